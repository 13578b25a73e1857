"""Prompts that change: their text, where they begin, and what they make, over random flows."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from starflow_core.control import Control
from starflow_core.errors import Cancelled, InputError
from starflow_core.jobs import memory
from starflow_core.jobs.context import Context
from starflow_core.jobs.tasks import Generation, Job, Means, layout
from starflow_core.jobs.timeline import Timeline, timed
from starflow_core.jobs.unfinished import identity
from starflow_core.model.cache import CacheSettings
from starflow_core.solve.inverting import invert
from starflow_core.solve.runs import PromptedRun
from starflow_core.solve.sampling import Sampler, sample
from starflow_core.solve.solvers import AUTOREGRESSIVE, PRESETS
from starflow_core.solve.windows import Extent, Prompts
from tests.core import models
from tests.core.models import relative_error

SIZE = {"height": 32, "width": 48}  # 2 x 3 tokens
EXACT = PRESETS["exact"]


@pytest.fixture(scope="module")
def flow():
    return models.flow()


def job(frames=9, **settings):
    return Job(**SIZE, frames=(frames - 1) * 4 + 1, **{"changes": (1.0,), **settings})


def texts(flow, count=2, batch=1):
    return torch.stack([models.text(flow, batch, seed=20 + i) for i in range(count)])


def generation(flow, work, count=2, **options):
    text = texts(flow, count, work.batch)
    return Generation(flow, work, text, models.text(flow, seed=8) if work.guidance else None, **options)


# Text


@pytest.mark.parametrize(("text", "prompts", "times"), [
    ("0s: a red circle | 2s: a blue one", ("a red circle", "a blue one"), (0.0, 2.0)),
    ("a red circle|2.5s:a blue one | 10 s : up: a | 11s: b", ("a red circle", "a blue one", "up: a", "b"),
     (0.0, 2.5, 10.0, 11.0)),
    ("0s: a red circle", ("a red circle",), (0.0,)),
    ("a cat | a dog", ("a cat | a dog",), (0.0,)),
    ("time: 2s: now", ("time: 2s: now",), (0.0,)),
    ("a clock at 2s: late | early", ("a clock at 2s: late | early",), (0.0,)),
    ("", ("",), (0.0,)),
])  # fmt: skip
def test_texts_are_read_as_they_are_meant(text, prompts, times):
    timeline = Timeline.parse(text)
    assert (timeline.prompts, timeline.times) == (prompts, times)
    assert Timeline.parse(str(timeline)) == timeline


@pytest.mark.parametrize(("text", "message"), [
    ("0s: a | 2s: b | 1s: c", "at 1s follows one at 2s; times have to increase"),
    ("0s: a | 2s: b | 2.0s: c", "at 2s follows one at 2s"),
    ("1s: a | 2s: b", "begins at 1s; it has to begin at 0s"),
    ("0s: a | 2s:  | 3s: c", "at 2s is empty; say what to show"),
    ("| 2s: a", "at 0s is empty"),
    ("0s: a | b | 3s: c", "'b' has no time; begin it with one"),
    ("0s: " + "a" * 20001 + " | 1s: b", "20001 characters"),
])  # fmt: skip
def test_texts_that_make_no_sense_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        Timeline.parse(text)


def test_a_batch_changes_together():
    lines = [Timeline(("a", "b"), (0.0, 1.0)), Timeline(("c", "d"), (0.0, 1.0))]
    found, work = timed(lines, Job(**SIZE, frames=33))
    assert found == lines
    assert work.changes == (1.0,)
    with pytest.raises(InputError, match="at different times: 1s and never"):
        timed([lines[0], "a"], Job(**SIZE, frames=33))
    with pytest.raises(InputError, match="at different times: 1s and 2s"):
        timed(lines, Job(**SIZE, frames=33, changes=(2.0,)))


# Where they begin


@pytest.mark.parametrize(("fps", "times", "starts"), [
    (16, (1.0,), (0, 5)),  # frame 16 is in latent frame 4, but nearer to the first frame of the next
    (16, (0.01,), None),
    (16, (0.05,), (0, 1)),
    (16, (0.5, 0.75, 2.0), (0, 3, 4, 9)),
    (8, (2.0,), (0, 5)),
])  # fmt: skip
def test_times_are_rounded_to_latent_frames(flow, fps, times, starts):
    work = job(frames=12, fps=fps, changes=times)
    if starts is None:
        with pytest.raises(InputError, match="less than a latent frame after"):
            layout(flow.config, work)
        return
    assert layout(flow.config, work).starts == starts
    for time, start in zip(times, starts[1:], strict=True):
        others = [abs(flow.config.latent.first_frame(i) - time * fps) for i in range(12)]
        assert abs(flow.config.latent.first_frame(start) - time * fps) == min(others)


@pytest.mark.parametrize(("settings", "message"), [
    ({"changes": (1.0, 1.05)}, r"at 1.05s begins less than a latent frame after .* at least 0.25s"),
    ({"changes": (9.0,)}, r"at 9s begins after the clip's end: 33 frames at 16 a second end at 2.06s; make it longer"),
    ({"changes": (-1.0,)}, "give times above 0"),
    ({"changes": (float("nan"),)}, "give times above 0"),
    ({"frames": 1}, "one frame has one prompt"),
    ({"keep_at_change": 0}, "keep_at_change is 0; a window of 5 latent frames keeps 1 to 4"),
    ({"keep_at_change": 5}, "keep_at_change is 5"),
    ({"context": Context("edit", torch.zeros(1, 4, 2, 2, 3), hidden=2), "frames": 2}, "edit needs its given frames"),
    ({"context": Context("extend", torch.zeros(1, 4, 3, 2, 3)), "changes": (0.5,)}, "given; let it begin at 0.81s"),
    ({"changes": (2.0,)}, "begins after the clip's end"),  # its nearest latent frame does
])  # fmt: skip
def test_what_is_impossible_is_refused(flow, settings, message):
    with pytest.raises(InputError, match=message):
        layout(flow.config, job(**settings))


def test_a_model_without_a_denoiser_has_one_prompt():
    config = models.config(denoiser=None)
    with pytest.raises(InputError, match="no learned denoiser"):
        layout(config, job())
    assert layout(config, job(denoise=False)).starts == (0, 5)
    with pytest.raises(InputError, match="expected 1"):
        layout(models.config(kind="image"), job())


def test_prompts_have_to_fit_the_job(flow):
    with pytest.raises(InputError, match="3 prompts begin at 2 frames"):
        generation(flow, job(), count=3)
    with pytest.raises(InputError, match="the later ones go from 3 to 4"):
        Sampler(flow, models.randn(1, 5, 4, 2, 3), Prompts(texts(flow), (0, 2)), context=models.randn(1, 2, 4, 2, 3))


def test_windows_are_told_in_order(flow):
    prompts = Prompts(texts(flow, 3), (0, 4, 9), kept=2)
    assert list(prompts.extents(11, 5, 3)) == [
        Extent(0, 0, 4), Extent(2, 2, 7, 1, True), Extent(4, 3, 9, 1), Extent(7, 2, 11, 2, True),
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_each_frame_is_made_once_under_its_prompt(seed):
    """Of random timelines, whatever the window, and what is kept."""
    rng = random.Random(seed)
    frames, window = rng.randint(2, 30), rng.randint(2, 8)
    starts = (0, *sorted(rng.sample(range(1, frames), rng.randint(0, min(4, frames - 1)))))
    prompts = Prompts(torch.zeros(len(starts), 1, 2, 3), starts, rng.randint(1, window - 1))
    done = given = rng.randint(0, min(window, frames - 1, *(starts[1:2] or (99,))) - 1)
    for extent in prompts.extents(frames, window, rng.randint(1, window - 1), given):
        assert extent.first + extent.known == done
        assert extent.first >= 0
        assert extent.stop - extent.first <= window
        begin, before = starts[extent.prompt], starts[max(extent.prompt - 1, 0)]
        assert extent.first >= (before if extent.changes else begin)  # none of a prompt further back is read
        for frame in range(done, extent.stop):
            assert extent.prompt == sum(start <= frame for start in starts) - 1
        done = extent.stop
    assert done == frames


# What they make


@pytest.mark.parametrize("seed", range(12))
def test_one_prompt_is_the_plain_one(seed):
    flow, latents = models.random_case(seed)
    text = models.text(flow, len(latents))
    plain, one = (sample(flow, latents, each).latents for each in (text, Prompts(text.unsqueeze(0))))
    assert torch.equal(plain, one)


@pytest.mark.parametrize("solver", [AUTOREGRESSIVE, EXACT], ids=["autoregressive", "exact"])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_until_the_change_nothing_changes(flow, solver, guidance):
    work = job(guidance=guidance, solver=solver, denoise=False)
    changed = generation(flow, work).run()
    plain = generation(flow, replace(work, changes=()), count=1).run()
    start = layout(flow.config, work).starts[1]
    assert relative_error(changed[:, :, :start], plain[:, :, :start]) < 1e-10
    if solver is AUTOREGRESSIVE:
        assert torch.equal(changed[:, :, :start], plain[:, :, :start])
    assert (changed[:, :, start:] - plain[:, :, start:]).abs().amax((0, 1, 3, 4)).min() > 1e-3


def test_an_equal_prompt_only_begins_a_window(flow):
    """What is kept comes back from its noise as it was, and the rest is what a window that slides there gives."""
    text = texts(flow)[:1].expand(2, -1, -1, -1)
    noise = models.randn(1, 8, 4, 2, 3)
    prompts = Prompts(text, (0, 5), kept=2)
    changed = sample(flow, noise, prompts, settings=EXACT).latents
    plain = sample(flow, noise, text[0], window=5, keep=2, settings=EXACT).latents
    assert relative_error(changed, plain) < 1e-8


def test_kept_frames_may_stay_as_they_are(flow):
    """Then a change is a window that slides there, under another text."""
    old, new = texts(flow)
    noise = models.randn(1, 8, 4, 2, 3)
    prompts = Prompts(torch.stack((old, new)), (0, 5), kept=2, change=False)
    changed = sample(flow, noise, prompts, settings=AUTOREGRESSIVE).latents
    kept = changed[:, 3:5]
    after = sample(flow, noise[:, 3:], new, context=kept, settings=AUTOREGRESSIVE).latents
    torch.testing.assert_close(changed[:, 5:], after[:, 2:], atol=1e-4, rtol=1e-4)


def test_kept_frames_are_brought_under_the_new_prompt(flow):
    """By hand: their noise under the old text, sampled under the new one."""
    old, new = texts(flow)
    x = models.randn(1, 2, 4, 2, 3, seed=3)
    run = PromptedRun(flow, flow.grid(x), Prompts(torch.stack((old, new)), (0, 1)), None, 0.0)
    residuals = []
    brought = run.enter(Extent(0, 2, 2, 1, True), flow.tokens(x), residuals.append)
    assert residuals
    a, b = flow.deep_affine(flow.tokens(x).flatten(1, 2), old, flow.grid(x))
    noise = (flow.tokens(x).flatten(1, 2) - b) / a
    a, b = flow.deep_affine(brought.flatten(1, 2), new, flow.grid(x))
    torch.testing.assert_close(a * noise + b, brought.flatten(1, 2), atol=1e-4, rtol=1e-4)
    assert relative_error(brought, flow.tokens(x)) > 1e-3


@pytest.mark.parametrize("kept", [1, 3])
@pytest.mark.parametrize("context", [None, Context("first_frame", models.randn(1, 4, 1, 2, 3)),
                                     Context("extend", models.randn(1, 4, 2, 2, 3))])  # fmt: skip
def test_a_stream_is_the_run(flow, kept, context):
    work = job(frames=12, guidance=1.5, changes=(1.0, 2.0), keep_at_change=kept, context=context, solver=EXACT)
    whole = generation(flow, work, count=3).run()
    pieces = [piece for piece in generation(flow, work, count=3).stream() if piece.final]
    assert [piece.first for piece in pieces] == sorted(piece.first for piece in pieces)
    torch.testing.assert_close(torch.cat([piece.latents for piece in pieces], 2), whole, atol=1e-4, rtol=1e-4)


def test_what_is_before_a_change_is_final_at_the_change(flow):
    """The denoiser waits for no frame of another prompt."""
    work, done = job(solver=AUTOREGRESSIVE), 0
    for piece in generation(flow, work).stream():
        done = max(done, piece.first + piece.latents.shape[2]) if piece.final else done
        if not piece.final and piece.first == 5:
            assert done == 5
    assert done == 9


def test_batches_are_their_elements(flow):
    work = job(batch=3, guidance=1.5, seed=40, solver=EXACT)
    text, uncond = texts(flow, 2, 3), models.text(flow, seed=8)
    together = Generation(flow, work, text, uncond).run()
    for i in range(3):
        alone = Generation(flow, replace(work, batch=1, seed=40 + i), text[:, i : i + 1], uncond).run()
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", [CacheSettings(), CacheSettings(True), CacheSettings(True, True)],
                         ids=["full", "int8", "offloaded"])  # fmt: skip
@pytest.mark.parametrize("solver", [PRESETS["balanced"], AUTOREGRESSIVE], ids=["jacobi", "autoregressive"])
def test_a_clip_goes_on_from_each_window_to_the_same_bits(flow, cache, solver):
    work = job(frames=11, guidance=1.5, changes=(1.0, 2.0), solver=solver, window=4, keep=2, keep_at_change=2)
    kept, means = [], Means(cache=cache)
    whole = [*generation(flow, work, 3, means=means, on_window=kept.append).stream()]
    assert [state.tokens.shape[1] for state in kept] == [4, 5, 7, 9, 11]
    for state in kept:
        again = [*generation(flow, work, 3, means=means, settled=state).stream()]
        assert all(torch.equal(one.latents, other.latents) for one, other in zip(again, whole, strict=True))


def test_unfinished_clips_know_their_timeline(flow):
    def known(text, **settings):
        lines, work = timed(Timeline.parse(text), replace(job(changes=()), **settings))
        return identity(flow, work, Means(), lines, "")

    one = known("0s: a | 1s: b")
    assert one == known("a|1.0s:b")
    for other in (known("0s: a | 1.5s: b"), known("0s: a | 1s: c"), known("a"), known("a|1s:b", keep_at_change=2)):
        assert one != other


def test_it_can_be_cancelled_at_the_change(flow, monkeypatch):
    """While kept frames are brought under the new prompt."""
    inside, brought = [], PromptedRun._brought

    def watched(self, frames, extent, report):
        inside.append(True)
        found = brought(self, frames, extent, report)
        inside.clear()
        return found

    def cancelled():
        return bool(inside)

    monkeypatch.setattr(PromptedRun, "_brought", watched)
    with pytest.raises(Cancelled):
        generation(flow, job(), control=Control(cancelled=cancelled)).run()
    assert inside  # it never came back


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_the_inverse_knows_changes(flow, guidance):
    """Sampling what was inverted gives it back, with kept frames that change under way."""
    latents, uncond = models.randn(2, 8, 4, 2, 3, seed=4) * 0.5, models.text(flow, seed=8)
    prompts = Prompts(texts(flow, 2, 2), (0, 3), kept=2)
    found = invert(flow, latents, prompts, uncond, guidance=guidance, keep=3)
    again = sample(flow, found.noise, prompts, uncond, guidance=guidance, keep=3, settings=EXACT).latents
    assert relative_error(again, latents) < 1e-6


def test_more_prompts_need_more_memory(flow):
    one, two = (memory.forecast(flow.config, job(changes=each), torch.float32) for each in ((), (1.0,)))
    prefix, dim = flow.config.prompt.tokens, flow.config.text_dim
    assert two.total - one.total == 4 * prefix * dim
