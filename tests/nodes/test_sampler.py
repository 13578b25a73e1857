"""The sampler and its settings: what comes out is what the core makes of the same numbers."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from starflow_core import AUTOREGRESSIVE, PRESETS
from tests.core.models import relative_error

from . import pack
from .steps import SMALL, run

sampling = pack.module("nodes.sampling")
CHANGES = [
    {"guidance": 0.0}, {"guidance": 2.5}, {"seed": 7}, {"denoise": False}, {"window": 2}, {"window": 3, "keep": 1},
]  # fmt: skip


@pytest.fixture(scope="module")
def latent(demo):
    """4 latent frames of 6 tokens."""
    return demo.empty(**SMALL, frames=13)


@pytest.fixture(scope="module")
def plain(demo, latent):
    return demo.sample(latent)[0]["samples"]


@pytest.fixture(scope="module")
def conditioned(demo, latent):
    return demo.encode(latent)[:2]


def test_without_inputs_it_is_the_models_own_job(plain, made):
    assert relative_error(plain, made(frames=13)) < 1e-4


@pytest.mark.parametrize("inputs", CHANGES, ids=str)
def test_inputs_reach_the_core(demo, made, latent, plain, inputs):
    wanted = made(frames=13, **inputs)
    assert relative_error(demo.sample(latent, **inputs)[0]["samples"], wanted) < 1e-4
    assert relative_error(plain, wanted) > 1e-3


@pytest.mark.parametrize("guidance", [-0.5, float("nan"), float("inf"), float("-inf")])
def test_no_other_guidance_below_0_or_none_at_all(demo, conditioned, latent, guidance):
    with pytest.raises(Exception, match=rf"guidance is {guidance:g}; 0 is off, -1 uses the model's own value"):
        demo.sampler(*conditioned, latent, guidance=guidance)


def test_a_batch_takes_the_seeds_that_follow(demo, made):
    pair = demo.sample(demo.empty(**SMALL, frames=5, batch_size=2), seed=5)[0]["samples"]
    assert relative_error(pair, made(frames=5, batch=2, seed=5)) < 1e-4
    second = demo.sample(demo.empty(**SMALL, frames=5), seed=6)[0]["samples"]
    assert relative_error(pair[1:], second) < 1e-3


def test_a_seed_repeats(demo, latent, plain):
    assert torch.equal(demo.sample(latent)[0]["samples"], plain)


def test_the_negative_prompt_counts_with_guidance_only(demo, made, latent, plain):
    wanted = made(frames=13, negative="a blue ring")
    assert relative_error(demo.sample(latent, negative_prompt="a blue ring")[0]["samples"], wanted) < 1e-4
    assert relative_error(plain, wanted) > 1e-3


def test_without_guidance_the_negative_is_not_read(demo, conditioned):
    latent, nothing = demo.empty(**SMALL, frames=5), [["nothing", {}]]
    with pytest.raises(Exception, match="negative wasn't made for STARFlow"):
        demo.sampler(conditioned[0], nothing, latent)
    assert demo.sampler(conditioned[0], nothing, latent, guidance=0.0)[0]["samples"].isfinite().all()


def test_settings_are_the_presets_and_the_numbers():
    for name, preset in {**PRESETS, "autoregressive": AUTOREGRESSIVE}.items():
        assert asdict(run("STARFlowJacobiSettings", preset=name)[0]) == asdict(preset)
    numbers = {"image_span": 3, "first_span": 4, "span": 5, "tolerance": 0.1, "shallow_tolerance": 0.2, "max_sweeps": 6}
    (settings,) = run("STARFlowJacobiSettings", preset="fast", **numbers)
    assert asdict(settings) == {**numbers, "method": "jacobi"}


def test_settings_reach_the_solver(demo, made, latent, plain):
    (settings,) = run("STARFlowJacobiSettings", preset="fast", span=3, max_sweeps=2)
    wanted = made(frames=13, solver=PRESETS["fast"].with_numbers(span=3, max_sweeps=2))
    assert relative_error(demo.sample(latent, settings=settings)[0]["samples"], wanted) < 1e-4
    assert relative_error(plain, wanted) > 1e-3


def test_report_counts_what_the_solver_did(monkeypatch, demo, conditioned, latent):
    generation, runs = sampling.Generation, []
    monkeypatch.setattr(
        sampling, "Generation", lambda *given, **more: runs.append(generation(*given, **more)) or runs[-1]
    )
    _, report, picture = demo.sampler(*conditioned, latent, guidance=2.5, seed=3)
    done = runs[0].statistics
    first, deep, shallow, _ = report.splitlines()
    assert re.fullmatch(r"method jacobi, guidance 2\.5, seed 3, \d+\.\d s", first)
    per_token = done.deep_evaluations / 24
    assert deep == (
        f"deep block: {done.deep_sweeps} sweeps, {done.deep_evaluations} token evaluations, {per_token:.1f} per token"
    )
    assert shallow == f"shallow blocks: {done.shallow_sweeps} sweeps, {done.shallow_evaluations} token evaluations"
    assert torch.equal(picture, sampling.convergence(done, runs[0].job, demo.flow.config))


def test_report_of_token_by_token(demo, latent):
    (settings,) = run("STARFlowJacobiSettings", preset="autoregressive")
    _, report, _ = demo.sample(latent, settings=settings)
    assert report.startswith("method autoregressive, guidance 1,")
    assert "deep block: 24 sweeps, 24 token evaluations\n" in report


def test_the_run_is_shown(monkeypatch, demo, latent, plain, told):
    """After a draft of the first, each frame as it was sampled, then those that are denoised; the bar ends at the last
    token."""
    monkeypatch.setattr(sampling, "PICTURE_EVERY", 1e6)  # nothing in between
    raw = demo.sample(latent, denoise=False)[0]["samples"]
    told.steps.clear(), told.previews.clear(), told.texts.clear()
    report = demo.sample(latent)[1]
    picture = pack.module("nodes.preview").Preview(demo.flow.config).picture
    values = [value for value, _ in told.steps]
    assert values == sorted(values)
    assert told.steps[-1] == (24, 24)
    assert told.nodes == {pack.NODE_ID}
    shown = [np.asarray(image, np.int16) for _, image, _ in told.previews]
    expected = [(255 * picture(frame).clamp(0, 1)).numpy() for frame in (raw[:, :, 0], raw[:, :, 1], plain[:, :, -1])]
    for image, wanted in zip((shown[1], shown[2], shown[-1]), expected, strict=True):
        assert np.abs(image - wanted).max() <= 1
    assert len(shown) > 5
    assert {(kind, side) for kind, _, side in told.previews} == {("JPEG", 48)}  # its real size
    sweeps = re.search(r"deep block: (\d+) sweeps", report)[1]
    assert re.fullmatch(rf"48 x 32, 13 frames in \d+\.\d s, {sweeps} sweeps", told.texts[-1])


class Clock:
    """In the place of `time`: `now` is what a test sets it to."""

    def __init__(self, monkeypatch, now: float):
        self.now = now
        monkeypatch.setattr(sampling, "time", SimpleNamespace(monotonic=lambda: self.now))


def watched(core, **job):
    """A watch of a run that hasn't begun."""
    watch = sampling.Watch(pack.NODE_ID, sampling.Preview(core.config))
    plan = SimpleNamespace(total=4, hidden=1)
    watch.generation = SimpleNamespace(job=core.job(**job), layout=plan, draft=lambda: None)
    return watch


def test_how_far_it_is_is_said_now_and_then(monkeypatch, core, told):
    """With the size, and in a clip the frame that is being made; hidden frames aren't counted."""
    clock = Clock(monkeypatch, 100.0)
    watch = watched(core, height=32, width=48, frames=9, batch=2)
    for now, settled, phase in (
        (110.0, 6, "deep"), (110.3, 7, "deep"), (111.0, 9, "shallow"), (111.0, 8, "deep"), (112.0, 16, "deep"),
    ):  # fmt: skip
        clock.now = now
        watch.progress(sampling.Progress(phase, 0, 0, settled, 16, 0.25 / settled))
    clock.now = 113.0
    watch.finished()
    assert told.texts == [
        "48 x 32, batch of 2, frame 1 of 9: 6 of 16 tokens, residual 4.2e-02, about 17 s left",
        "48 x 32, batch of 2, frame 5 of 9: 8 of 16 tokens, residual 3.1e-02, about 11 s left",
        "48 x 32, batch of 2, frame 9 of 9: 16 of 16 tokens, residual 1.6e-02, about 0 s left",
        "48 x 32, batch of 2, 9 frames in 13.0 s, 4 sweeps",
    ]


def test_of_an_image_no_frame_is_said(monkeypatch, core, told):
    clock = Clock(monkeypatch, 100.0)
    watch = watched(core, height=32, width=48, frames=1)
    clock.now = 101.0
    watch.progress(sampling.Progress("deep", 0, 0, 2, 8, 0.5))
    watch.finished()
    assert told.texts == ["48 x 32: 2 of 8 tokens, residual 5.0e-01, about 3 s left", "48 x 32, in 1.0 s, 1 sweeps"]


def test_between_new_frames_the_preview_plays_those_that_are_there(monkeypatch, core, told):
    """One every quarter of a second, and at the end a draft of the next; then the same again."""
    clock, pictures = Clock(monkeypatch, 100.0), []
    watch = watched(core, height=32, width=48, frames=13)
    monkeypatch.setattr(watch.preview, "picture", lambda latents: pictures.append(float(latents.mean())))

    def draft():
        clock.now += 0.125  # it takes a while
        return sampling.Piece(2, torch.full((1, 16, 1, 2, 3), 9.0), False)

    watch.generation.draft = draft
    watch.show(sampling.Piece(0, torch.ones(1, 16, 1, 2, 3), False))
    watch.show(sampling.Piece(1, torch.full((1, 16, 1, 2, 3), 2.0), False))
    watch.show(sampling.Piece(0, torch.full((1, 16, 1, 2, 3), 3.0), True))  # the first one, denoised
    assert pictures == [1.0, 2.0, 3.0]
    pictures.clear()
    shown = {}
    for _ in range(25):
        clock.now += 0.125
        watch.progress(sampling.Progress("deep", 0, 0, 2, 8, 0.5))
        if pictures:
            shown[clock.now - 100] = pictures.pop()
    assert list(shown.values())[:5] == [3.0, 2.0, 9.0, 3.0, 2.0]
    first, second, drawn, again = list(shown)[:4]
    assert (first, second) == (0.25, 0.5)
    assert again - drawn == 1.125  # ten times as long as it took, from when it began
    assert not pictures


def test_an_image_is_seen_as_it_settles(monkeypatch, demo, told):
    monkeypatch.setattr(sampling, "PICTURE_EVERY", 0.0)
    Clock(monkeypatch, 1.0)  # nothing takes time
    latent = demo.empty(frames=1, batch_size=2)
    result = demo.sample(latent, denoise=False, seed=1)[0]["samples"]
    last = pack.module("nodes.preview").Preview(demo.flow.config).picture(result[:, :, 0])
    wanted = (last * 255).clamp(0, 255).numpy()
    distances = [np.abs(np.asarray(image, np.float32) - wanted).mean() for _, image, _ in told.previews]
    assert len(distances) > 5
    assert distances[-1] < 1
    assert distances[-2] < distances[0] / 2


def test_results_wait_where_the_host_wants_them(monkeypatch, demo, conditioned, latent):
    import comfy.model_management as management

    monkeypatch.setattr(management, "intermediate_device", lambda: torch.device("meta"))
    assert demo.sampler(*conditioned, latent)[0]["samples"].device.type == "meta"


def test_conditioning_of_another_job_is_refused(demo, conditioned, latent, clip):
    others = {
        "a clip at 16 fps of 48 x 48": demo.empty(width=48, height=48),
        "a clip at 16 fps of 32 x 32": demo.empty(width=32, height=32),
        "an image of 48 x 32": demo.empty(**SMALL, frames=1),
    }
    made_for = "was made for STARFlow demo: text, a clip at 16 fps of 48 x 32, but this is STARFlow demo: text,"
    for name, other in others.items():
        with pytest.raises(Exception, match=f"{made_for} {name};"):
            demo.sampler(*conditioned, other)
    (context,) = run("STARFlowFirstFrame", image=clip[:1], vae=demo.vae, latent=latent)
    with pytest.raises(Exception, match=r"this is STARFlow demo: first frame, .*the same model, latent and context"):
        demo.sampler(*conditioned, latent, context=context)
    shorter = demo.empty(**SMALL, frames=5)
    assert demo.sampler(*conditioned, shorter)[0]["samples"].shape[2] == 2  # the words around a prompt are the same


def test_conditioning_of_another_model_is_refused(demo, conditioned, latent):
    """Of the same shapes: only the name tells them apart."""
    flow = demo.flow
    config, flow.config = flow.config, replace(flow.config, name="another")
    try:
        with pytest.raises(Exception, match=r"was made for STARFlow demo: .*but this is another: .*the same model"):
            demo.sampler(*conditioned, latent)
    finally:
        flow.config = config


def test_the_sampler_takes_over_the_prompts_rate(monkeypatch, demo, conditioned, latent):
    positive, negative, _ = demo.encode(latent, frame_rate=24.0)
    jobs, original = [], sampling.Generation
    monkeypatch.setattr(sampling, "Generation", lambda flow, job, *args, **options: jobs.append(job) or original(
        flow, job, *args, **options
    ))  # fmt: skip
    demo.sampler(positive, negative, latent)
    assert jobs[0].fps == 24
    with pytest.raises(Exception, match=r"negative was made for .* at 16 fps .*but this is .* at 24 fps"):
        demo.sampler(positive, conditioned[1], latent, guidance=1.0)


def test_conditioning_that_is_none_of_ours_is_refused(demo, conditioned, latent):
    positive, negative = conditioned
    with pytest.raises(Exception, match="positive wasn't made for STARFlow; make it with STARFlow Text Encode"):
        demo.sampler([[positive[0][0], {}]], negative, latent)
    with pytest.raises(Exception, match="negative wasn't made for STARFlow"):
        demo.sampler(positive, [[negative[0][0], {}]], latent)
    with pytest.raises(Exception, match="positive combines 2 conditionings, but a flow reads only one prompt"):
        demo.sampler(positive * 2, negative, latent)


def test_a_task_without_training_is_warned_of(monkeypatch, caplog, demo, latent, clip):
    (context,) = run("STARFlowFirstFrame", image=clip[:1], vae=demo.vae, latent=latent)
    demo.sample(latent, context=context)
    assert not caplog.records
    flow = demo.flow
    monkeypatch.setattr(flow, "config", replace(flow.config, tasks=("text",)))
    demo.sample(latent, context=context)
    assert "wasn't trained for first_frame" in caplog.text


def test_an_image_model_makes_latents_of_images(image_model):
    """It has no denoiser of its own: a score step, whose gradient inference mode must not forbid."""
    latent = image_model.empty(frames=1, batch_size=2)
    assert latent["samples"].shape == (2, 4, 4, 4)
    samples = image_model.sample(latent)[0]["samples"]
    assert samples.shape == (2, 4, 4, 4)
    raw = image_model.sample(latent, denoise=False)[0]["samples"]
    assert 1e-4 < relative_error(samples, raw) < 1
    assert image_model.decode({"samples": samples}).shape == (2, 32, 32, 3)


def test_score_denoising_works_where_the_host_moves_weights(monkeypatch, demo, latent):
    """A gradient step needs weights that aren't inference tensors, also after a move to a card."""
    import comfy.model_management as management

    def move(models, **_):
        for weight in models[0].model.parameters():
            weight.data = weight.data.clone()

    monkeypatch.setattr(management, "load_models_gpu", move)
    flow = demo.flow
    monkeypatch.setattr(flow, "config", replace(flow.config, denoiser=None))
    assert demo.sample(latent)[0]["samples"].isfinite().all()
