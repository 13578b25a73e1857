"""Jobs: layouts, contexts, streaming, batches, and what is refused."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from starflow_core.control import Control
from starflow_core.errors import CheckpointError, InputError, NonFiniteError
from starflow_core.jobs.context import Context, extend, later_factors
from starflow_core.jobs.tasks import PLAIN, Generation, Job, Means, Piece, layout
from starflow_core.jobs.unfinished import Unfinished, identity
from starflow_core.model.cache import CacheSettings
from starflow_core.model.latent import to_flow_space, to_vae_space
from starflow_core.solve import noise
from starflow_core.solve.denoising import denoise
from starflow_core.solve.runs import DeepRun
from starflow_core.solve.solvers import AUTOREGRESSIVE, PRESETS
from starflow_core.weights.tensorfiles import save_tensors
from tests.core import models
from tests.core.models import relative_error

EXACT = PRESETS["exact"]
SIZE = {"height": 32, "width": 48}  # 2 x 3 tokens


def latents(frames, batch=1, seed=5):
    return models.randn(batch, 4, frames, 2, 3, seed=seed)


CONTEXTS = {
    "text": (None, 3),
    "first_frame": (Context("first_frame", latents(1)), 3),
    "extend": (Context("extend", latents(2)), 4),
    "edit": (Context("edit", latents(2), hidden=2), 2),
    "last_frame": (Context("last_frame", latents(1), hidden=1), 3),
    "first_and_last": (Context("last_frame", latents(2), hidden=1), 3),
}


def job(context=None, frames=3, **settings):
    return Job(**SIZE, frames=(frames - 1) * 4 + 1, context=context, **settings)


def generation(flow, work, batch=1, **options):
    uncond = models.text(flow, seed=8) if work.guidance else None
    return Generation(flow, work, models.text(flow, batch), uncond, **options)


@pytest.fixture(scope="module")
def flow():
    return models.flow()


@pytest.mark.parametrize(("settings", "message"), [
    ({"fps": "16"}, "^fps is '16'; expected a number$"),
    ({"seed": 1.5}, "^seed is 1.5; expected a whole number$"),
    ({"frames": 5.0}, "^frames is 5.0; expected a whole number$"),
    ({"batch": True}, "^batch is True; expected a whole number$"),
    ({"guidance": "3"}, "^guidance is '3'; expected a number$"),
    ({"window": 2.5}, "^window is 2.5; expected a whole number$"),
    ({"denoise": "no"}, "^denoise is 'no'; expected True or False$"),
    ({"seed": None}, "^seed is None; expected a whole number$"),
])  # fmt: skip
def test_settings_of_another_type_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Job(**SIZE, **settings)


def test_settings_of_any_number_type_are_taken():
    assert Job(**SIZE, fps=Fraction(30000, 1001), guidance=1, seed=np.int64(3), window=None).fps == Fraction(
        30000, 1001
    )


@pytest.mark.parametrize("task", CONTEXTS)
@pytest.mark.parametrize("denoise", [True, False])
def test_result_and_given_frames(flow, task, denoise):
    context, frames = CONTEXTS[task]
    out = generation(flow, job(context, frames, guidance=1.0, denoise=denoise)).run()
    assert out.shape == (1, 4, frames, 2, 3)
    if context:
        given = context.latents[:, :, context.hidden :]
        torch.testing.assert_close(out[:, :, : context.shown], given, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("task", CONTEXTS)
@pytest.mark.parametrize("denoise", [True, False])
def test_streaming_equals_at_once(flow, task, denoise):
    context, frames = CONTEXTS[task]
    work = job(context, frames, guidance=1.0, denoise=denoise)
    whole = generation(flow, work).run()
    pieces = list(generation(flow, work).stream())
    final = [p for p in pieces if p.final]
    torch.testing.assert_close(torch.cat([p.latents for p in final], 2), whole, atol=1e-5, rtol=1e-5)
    counted = 0
    for piece in final:
        assert piece.first == counted
        counted += piece.latents.shape[2]
    provisional = [p.first for p in pieces if not p.final]
    assert bool(provisional) == denoise
    assert provisional == sorted(provisional)


def test_long_streaming_equals_at_once(flow):
    work = job(None, 11, guidance=1.0)
    whole = generation(flow, work).run()
    final = [p.latents for p in generation(flow, work).stream() if p.final]
    assert whole.shape[2] == 11
    torch.testing.assert_close(torch.cat(final, 2), whole, atol=1e-5, rtol=1e-5)


def test_frames_come_before_the_end(flow):
    """A frame is shown while later ones are still unsampled."""
    seen = []
    work = job(None, 5, solver=replace(EXACT, first_span=3, span=3))
    run = generation(flow, work)
    for piece in run.stream():
        seen.append((piece.first, piece.final, run.statistics.deep_sweeps))
    assert seen[0][2] < seen[-1][2]
    finals = [(first, sweeps) for first, final, sweeps in seen if final]
    assert finals[0][1] < finals[-1][1]


@pytest.mark.parametrize("task", CONTEXTS)
@pytest.mark.parametrize("method", ["jacobi", "autoregressive"])
def test_drafts_approach_the_frame_that_is_being_solved(flow, task, method):
    """And change nothing: neither the result nor what is counted."""
    context, frames = CONTEXTS[task]
    work = job(context, frames, batch=2, denoise=False, solver=replace(EXACT, first_span=2, span=2, method=method))
    drafts = []

    def watch(progress):
        if progress.phase == "deep" and (draft := run.draft()):
            assert not draft.final
            assert draft.first == progress.settled // 6 - run.layout.hidden
            drafts.append((draft.first, progress.settled % 6, draft.latents))

    run, alone = generation(flow, work, 2, control=Control(watch)), generation(flow, work, 2)
    made = torch.cat([piece.latents for piece in run.stream()], 2)
    assert torch.equal(made, torch.cat([piece.latents for piece in alone.stream()], 2))
    assert run.statistics.shallow_evaluations == alone.statistics.shallow_evaluations
    assert run.draft() is None
    shown = context.shown if context else 0
    assert {first for first, _, _ in drafts} >= set(range(max(shown, 1), frames))
    for frame in range(max(shown, 1), frames):
        wanted = made[:, :, frame : frame + 1]
        errors = {settled: relative_error(latents, wanted) for first, settled, latents in drafts if first == frame}
        assert errors[max(errors)] < 0.6 * errors[min(errors)]


@pytest.mark.parametrize("task", CONTEXTS)
def test_a_batch_element_is_the_element_alone(flow, task):
    context, frames = CONTEXTS[task]
    text = models.text(flow, 3)
    uncond = models.text(flow, seed=8)
    work = job(context, frames, guidance=1.0, batch=3, seed=40, solver=EXACT)
    together = Generation(flow, work, text, uncond).run()
    for i in range(3):
        alone = Generation(flow, replace(work, batch=1, seed=40 + i), text[i : i + 1], uncond).run()
        assert (together[i : i + 1] - alone).norm() < 1e-5 * alone.norm()


def test_a_batch_of_contexts(flow):
    context = Context("first_frame", latents(1, batch=2))
    out = generation(flow, job(context, 3, batch=2), batch=2).run()
    torch.testing.assert_close(out[:, :, :1], context.latents, atol=1e-5, rtol=1e-5)


def test_seeds_repeat_and_differ(flow):
    first, again, other = (generation(flow, job(seed=s)).run() for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_a_longer_clip_begins_alike(flow):
    """Within one window the noise and so the frames are those of the shorter clip."""
    short, long = (generation(flow, job(None, n, denoise=False, solver=EXACT)).run() for n in (3, 5))
    torch.testing.assert_close(long[:, :, :3], short, atol=1e-4, rtol=1e-4)


def test_score_denoising_without_a_denoiser():
    flow = models.flow(denoiser=None)
    work = job(None, 3)
    whole = generation(flow, work).run()
    streamed = torch.cat([p.latents for p in generation(flow, work).stream() if p.final], 2)
    # The gradient of a random flow is steep: it enlarges the rounding of the frames' own solve.
    torch.testing.assert_close(streamed, whole, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(generation(flow, replace(work, denoise=False)).run(), whole)


def test_image_model():
    flow = models.flow(kind="image")
    out = Generation(flow, Job(24, 40, batch=2), models.text(flow, 2)).run()
    assert out.shape == (2, 4, 1, 3, 5)


def test_noise_scheme():
    """Recorded: a seed must mean the same for ever."""
    drawn = noise.draw(7, 2, 2, (2, 1, 2))
    torch.testing.assert_close(drawn[0].flatten(), torch.tensor(RECORDED), atol=1e-6, rtol=0)
    assert torch.equal(noise.draw(8, 1, 3, (2, 1, 2))[0, :2], drawn[1])
    assert not torch.allclose(noise.draw_context(7, 1, 2, (2, 1, 2)), drawn[:1])
    assert torch.isfinite(noise.draw(2**64 - 1, 2, 1, (1, 1, 1))).all()


def test_noise_of_given_frames_is_the_second_stream():
    """Recorded, as above: of the model's deviation, and in its own place of every seed."""
    drawn = noise.draw_context(7, 1, 1, (2, 1, 2)).flatten()
    torch.testing.assert_close(drawn, torch.tensor([1.624834, 0.7259, 1.051991, 1.097]), atol=1e-6, rtol=0)
    flow, context = models.flow(), Context("extend", latents(2))
    run = generation(flow, job(context, 4, seed=7))
    added = run.sampler.context - run.given
    torch.testing.assert_close(added, 0.3 * noise.draw_context(7, 1, 2, (4, 2, 3)), atol=1e-5, rtol=1e-5)


def test_denoising_keeps_to_the_jobs_window():
    flow = models.flow()
    work = job(None, 5, window=3, keep=2)
    sampled = Generation(flow, replace(work, denoise=False), models.text(flow)).run()
    x = to_flow_space(flow.config.latent, sampled, later_factors(flow.config, "text", 0, 5))
    found = to_flow_space(flow.config.latent, generation(flow, work).run(), later_factors(flow.config, "text", 0, 5))
    torch.testing.assert_close(found, denoise(flow, x, models.text(flow), window=3), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, denoise(flow, x, models.text(flow)), atol=1e-3)


RECORDED = [-0.146795, 0.786141, 0.946822, -1.114344, 1.69079, -0.894828, -0.355625, 1.232386]


def test_spaces_invert():
    config = models.config()
    factors = later_factors(config, "text", 0, 3)
    x = latents(3)
    torch.testing.assert_close(to_vae_space(config.latent, to_flow_space(config.latent, x, factors), factors), x)
    expected = (x[0, 1, 2, 0, 1] - 0.1) / 1.3 * 0.6
    torch.testing.assert_close(to_flow_space(config.latent, x, factors)[0, 2, 1, 0, 1], expected)


@pytest.mark.parametrize(("task", "hidden", "expected"), [
    ("text", 0, [1, 0.6, 0.6, 0.6]), ("first_frame", 0, [1, 0.6, 0.6, 0.6]), ("extend", 0, [0.6] * 4),
    ("edit", 2, [1, 0.6, 1, 0.6]), ("last_frame", 1, [1, 1, 0.6, 0.6]),
])  # fmt: skip
def test_later_factors(task, hidden, expected):
    torch.testing.assert_close(later_factors(models.config(), task, hidden, 4), torch.tensor(expected))


def test_extend_takes_the_end_of_the_clip():
    latent = models.config().latent
    seen = []

    def encode(pixels):
        seen.append(pixels)
        count = (pixels.shape[2] - 1) // 4 + 1
        return torch.arange(count).view(1, 1, -1, 1, 1).float()

    clip = torch.arange(19.0).view(1, 1, -1, 1, 1).expand(1, 3, -1, 2, 2)
    context = extend(encode, clip, latent, keep=3)
    assert seen[0][0, 0, :, 0, 0].tolist() == list(range(2, 19))
    assert context.latents.flatten().tolist() == [2, 3, 4]
    assert context.overlap(latent) == 9
    with pytest.raises(InputError, match="at least 5 frames"):
        extend(encode, clip[:, :, :4], latent, keep=3)


@pytest.mark.parametrize(("settings", "message"), [
    ({"height": 33}, "height 33 .* 32 and 48"),
    ({"width": 8}, "width 8 .* smallest is 16"),
    ({"frames": 10}, "10 frames.* 9 and 13"),
    ({"frames": 0}, "0 frames.* 1 and 5"),
    ({"batch": 0}, "batch is 0"),
    ({"guidance": -1.0}, "guidance is -1"),
    ({"frames": 41, "keep": 5}, "keep is 5; a window of 5 .* 1 to 4"),
    ({"context": Context("first_frame", latents(1)), "frames": 1}, "context alone gives 1"),
    ({"context": Context("extend", latents(6)), "frames": 41}, "6 latent frames, the window 5"),
    ({"context": Context("edit", latents(2), hidden=2), "frames": 17}, "within 5 .* longest result is 9 frames"),
    ({"context": Context("edit", latents(5), hidden=5), "frames": 5}, "source may have at most 5 frames"),
    ({"context": Context("first_frame", latents(1)), "width": 64}, "context's latents are"),
    ({"context": Context("first_frame", latents(1, batch=2)), "batch": 3}, "context of 2 for a batch of 3"),
])  # fmt: skip
def test_impossible_jobs_name_the_remedy(settings, message):
    with pytest.raises(InputError, match=message):
        layout(models.config(), Job(**{**SIZE, "frames": 9, **settings}))


def test_an_image_model_makes_no_clips():
    with pytest.raises(InputError, match="expected 1"):
        layout(models.config(kind="image"), Job(16, 16, frames=5))


def test_prompts_must_match_the_batch(flow):
    with pytest.raises(InputError, match="2 prompts for a batch of 3"):
        Generation(flow, job(batch=3), models.text(flow, 2))


def test_nan_in_a_context_is_named(flow):
    bad = latents(1)
    bad[0, 0, 0, 1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"token 5"):
        generation(flow, job(Context("first_frame", bad), 3)).run()


# Going on


LONG = {"window": 3, "keep": 1}
INT8, AWAY = CacheSettings(True), CacheSettings(True, True)


@pytest.mark.parametrize("cache", [CacheSettings(), INT8, AWAY], ids=["full", "int8", "offloaded"])
@pytest.mark.parametrize("kind", ["text", "first_frame", "extend"])
@pytest.mark.parametrize("solver", [PRESETS["balanced"], AUTOREGRESSIVE], ids=["jacobi", "autoregressive"])
def test_a_clip_goes_on_from_each_window_to_the_same_bits(flow, kind, cache, solver):
    work = job(CONTEXTS[kind][0], frames=8, guidance=1.5, solver=solver, **LONG)
    kept, means = [], Means(cache=cache)
    whole = [*generation(flow, work, means=means, on_window=kept.append).stream()]
    assert [state.tokens.shape[1] + len_given(work) for state in kept] == [3, 5, 7, 8]
    for state in kept:
        run = generation(flow, work, means=means, settled=state)
        again = [*run.stream()]
        assert [(p.first, p.final) for p in again] == [(p.first, p.final) for p in whole]
        assert all(torch.equal(one.latents, other.latents) for one, other in zip(again, whole, strict=True))
    assert run.statistics.deep_sweeps == run.statistics.shallow_sweeps == 0  # nothing was left to sample


def len_given(work) -> int:
    return work.context.frames if work.context else 0


def test_a_resumed_clip_keeps_only_its_new_windows(flow):
    kept, later = [], []
    work = job(frames=6, **LONG)
    list(generation(flow, work, on_window=kept.append).stream())
    list(generation(flow, work, settled=kept[0], on_window=later.append).stream())
    assert [state.tokens.shape[1] for state in (*kept, *later)] == [3, 5, 6, 5, 6]


def running_out(monkeypatch, times, error=None):
    """Memory runs out in the deep block's next evaluations but a few, so many times."""
    left, evaluate = list(times), DeepRun.__call__

    def evaluated(self, before, start):
        if left:
            left[0] -= 1
            if left[0] == 0:
                left.pop(0)
                raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return evaluate(self, before, start)

    monkeypatch.setattr(DeepRun, "__call__", evaluated)


@pytest.mark.parametrize("streamed", [True, False])
def test_where_memory_runs_out_a_smaller_cache_goes_on(flow, monkeypatch, streamed):
    work = job(CONTEXTS["first_frame"][0], frames=7, guidance=1.5, solver=EXACT, **LONG)
    expected = generation(flow, work).run()
    said, fallbacks = [], [Means(cache=INT8), Means(cache=AWAY)]
    running_out(monkeypatch, (20, 20))
    run = generation(flow, work, fallbacks=fallbacks, control=Control(warn=said.append))
    pieces = run.stream() if streamed else [Piece(0, run.run(), True)]
    found = torch.cat([piece.latents for piece in pieces if piece.final], 2)
    assert run.means == Means(cache=AWAY)
    assert relative_error(found, expected) < 1e-3
    assert len(said) == 2
    begins = r"memory ran out after \d of 7 latent frames; going on with weights in full; keys and values in 8 bit"
    assert all(re.match(begins, words) for words in said)
    assert run.statistics.deep_sweeps > 40  # those before, too


def test_what_is_sampled_is_not_sampled_again(flow, monkeypatch):
    work = job(frames=7, solver=AUTOREGRESSIVE)
    running_out(monkeypatch, (31,))  # within the sixth frame of 6 tokens each
    said = []
    run = generation(flow, work, fallbacks=[Means(cache=INT8)], control=Control(warn=said.append))
    list(run.stream())
    assert run.statistics.deep_evaluations == 7 * 6
    assert said[0].startswith("memory ran out after 5 of 7 latent frames")


@pytest.mark.parametrize(("fallbacks", "error"), [
    ((), torch.OutOfMemoryError("CUDA out of memory")),
    ((Means(cache=INT8),), RuntimeError("another")),
])  # fmt: skip
def test_what_cannot_go_on_fails_as_it_did(flow, monkeypatch, fallbacks, error):
    running_out(monkeypatch, (3,), error)
    run = generation(flow, job(), fallbacks=fallbacks)
    with pytest.raises(RuntimeError, match=str(error)):
        list(run.stream())


def test_frames_of_another_job_are_refused(flow, tmp_path):
    def known(work, means=PLAIN, captions=("a",), of=flow):
        return identity(of, work, means, list(captions), "")

    work = job(CONTEXTS["first_frame"][0], frames=6, **LONG)
    file = Unfinished(str(tmp_path / "clip.mp4"), known(work))
    assert file.load() is None
    kept = []
    list(generation(flow, work, on_window=kept.append).stream())
    file.save(kept[0])
    assert os.listdir(tmp_path) == ["clip.mp4.unfinished.safetensors"]
    again = file.load()
    assert all(map(torch.equal, vars(again).values(), vars(kept[0]).values()))
    others = {
        "seed": known(replace(work, seed=1)),
        "cache": known(work, Means(cache=INT8)),
        "prompt": known(work, captions=["b"]),
        "given frames": known(replace(work, context=Context("first_frame", latents(1, seed=9)))),
        "guidance, solver": known(replace(work, guidance=2.0, solver=EXACT)),
        "weights": known(work, of=models.flow(seed=9)),
    }
    for names, other in others.items():
        with pytest.raises(InputError, match=rf"is of another job: {names} differ\. Give the same options"):
            replace(file, identity=other).load()
    save_tensors({"noise": torch.zeros(1)}, file.path, "fp32", {})
    with pytest.raises(CheckpointError, match="isn't an unfinished clip"):
        file.load()
