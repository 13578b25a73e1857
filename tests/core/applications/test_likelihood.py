"""Which caption fits, and the best of several candidates: on tiny models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from starflow_core.applications import likelihood
from starflow_core.applications.inversion import decode_from_noise, encode_to_noise, measure
from starflow_core.applications.likelihood import best_of, captions_at_once, choose_caption, judging_job
from starflow_core.bundled import FLOW_FILE, TEXT_FILE, VAE_FILE
from starflow_core.control import Control
from starflow_core.errors import Cancelled, InputError, OutOfMemoryForecast
from starflow_core.jobs import memory, noises
from starflow_core.jobs.noises import inverted
from starflow_core.jobs.timeline import Timeline
from starflow_core.model.flow import Flow
from starflow_core.pipeline import load_pipeline
from starflow_core.solve.solvers import PRESETS
from tests.core import models, tiny

CAPTIONS = ["a red circle", "a blue square moving left", "", "a ring on a grey background", "green"]


def load(folder, kind):
    tiny.write_model(folder, kind)
    return load_pipeline(*(folder / name for name in (FLOW_FILE, TEXT_FILE, VAE_FILE)), device="cpu")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return load(tmp_path_factory.mktemp("video"), "video")


@pytest.fixture(scope="module")
def image_pipeline(tmp_path_factory):
    return load(tmp_path_factory.mktemp("image"), "image")


def clip(frames=9):
    return models.randn(frames, 3, 32, 48, seed=3).clamp(-1, 1)


@pytest.mark.parametrize("options", [{}, {"window": 3, "keep": 1}], ids=["one window", "windows"])
@pytest.mark.parametrize("together", [1, 2, 8])
def test_a_choice_agrees_with_single_scores(pipeline, monkeypatch, together, options):
    batches, invert_deep = [], noises.invert_deep
    monkeypatch.setattr(
        noises, "invert_deep", lambda *a, **k: batches.append(len(a[2])) or invert_deep(*a, **k)
    )  # fmt: skip
    monkeypatch.setattr(likelihood, "TOGETHER", together)
    found = choose_caption(pipeline, clip(17), CAPTIONS, **options)
    assert batches == {1: [1] * 5, 2: [2, 2, 1], 8: [5]}[together]
    single = [measure(pipeline, clip(17), caption, **options)[0] for caption in CAPTIONS]
    scores = [float(each.log_likelihood) for each in single]
    assert found.log_likelihoods == pytest.approx(scores, rel=1e-4)
    assert found.winner == max(range(5), key=scores.__getitem__)
    assert found.distance == pytest.approx(sorted(scores)[-1] - sorted(scores)[-2], abs=1e-2)
    torch.testing.assert_close(found.surprise.nats, single[found.winner].surprise[0], atol=1e-3, rtol=1e-4)


def test_a_picture_by_an_image_model(image_pipeline):
    found = choose_caption(image_pipeline, clip(1), CAPTIONS)
    assert found.surprise.map.shape == (1, 32, 48)
    assert len(set(found.log_likelihoods)) == 5


def test_the_shallow_blocks_are_inverted_once(pipeline, monkeypatch):
    calls, encode = [], Flow.encode_shallow
    monkeypatch.setattr(Flow, "encode_shallow", lambda *a, **k: calls.append(1) or encode(*a, **k))
    monkeypatch.setattr(likelihood, "TOGETHER", 2)
    choose_caption(pipeline, clip(), CAPTIONS)
    assert len(calls) == 1


def test_as_many_captions_at_once_as_fit(pipeline, monkeypatch):
    job = likelihood.clean_job(pipeline.config, clip())
    needs = {n: replace(memory.forecast_encode(pipeline.config, replace(job, batch=n), pipeline.dtype), weights=0)
             for n in (1, 2, 4, 8)}  # fmt: skip
    text = pipeline.text.weight_bytes(pipeline.dtype)
    for most, need in needs.items():
        room = int(need.with_text(text).total / (1 - memory.RESERVE)) + 1
        monkeypatch.setattr(memory, "free", lambda device, room=room: room)
        assert needs[captions_at_once(pipeline, job, 100)].with_text(text).total <= need.with_text(text).total
        assert captions_at_once(pipeline, job, 100) >= most
        assert captions_at_once(pipeline, job, 1) == 1
    monkeypatch.setattr(memory, "free", lambda device: 1000)
    with pytest.raises(OutOfMemoryForecast, match="encoding this needs about"):
        captions_at_once(pipeline, job, 100)


@pytest.mark.parametrize(("captions", "message"), [
    ([], "nothing to choose"), (["one"], "one caption leaves nothing to choose; give two or more"),
    (["a", "b", "a"], "the caption 'a' is given twice"), (["a", "x" * 30000], "a prompt has 30000 characters"),
])  # fmt: skip
def test_captions_that_are_no_choice(captions, message):
    with pytest.raises(InputError, match=message):
        choose_caption(None, clip(), captions)  # before anything is used


TASKS = {"text": {}, "first_frame": {"image": clip(1)[0]}, "edit": {"clip": clip(5), "window": 6}}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("denoise", [True, False])
def test_candidates_are_as_likely_as_their_whole_results_beginnings(pipeline, task, denoise):
    """And batches change nothing."""
    job = pipeline.with_context(task, frames=17 if task != "edit" else 5, height=32, width=48, seed=5, guidance=1.5,
                                denoise=denoise, solver=PRESETS["exact"], **TASKS[task])  # fmt: skip
    found = best_of(pipeline, "a red circle", replace(job, batch=2), 3, negative="blue")
    assert found.judged == (5 if task == "first_frame" else 2)
    expected = {}
    for seed in (5, 6, 7):
        run, _ = pipeline.start("a red circle", replace(job, seed=seed), negative="blue", keep_text_encoder=True)
        with torch.no_grad():
            latents = run.run()
        whole = judging_job(pipeline.config, job, latents.shape[2])
        surprise = inverted(pipeline.flow, whole, latents, run.text).surprise
        expected[seed] = -float(surprise[:, : found.judged].sum())
    assert found.log_likelihoods == pytest.approx(expected, rel=1e-3)
    assert found.seed == max(expected, key=expected.get)


def test_no_more_is_sampled_than_is_looked_at(pipeline):
    """The judged frames and those that the denoiser needs after them, of 33."""
    job = pipeline.job(frames=33, height=32, width=48, denoise=True)
    sweeps = sum(s.deep_evaluations for s in best_of(pipeline, "a", job, 2, judged=1).statistics)
    whole = sum(s.deep_evaluations for s in best_of(pipeline, "a", job, 2, judged=9).statistics)
    assert sweeps < 0.8 * whole


def test_nothing_is_decoded(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.vae, "decode_frames", lambda *_, **__: pytest.fail("decoded"))
    best_of(pipeline, "a", pipeline.job(frames=5, height=32, width=48), 2)


def test_candidates_of_an_image_model(image_pipeline):
    job = image_pipeline.job(height=32, width=48, batch=3)
    found = best_of(image_pipeline, "a", job, 4)
    assert (found.judged, list(found.log_likelihoods)) == (1, [0, 1, 2, 3])


def test_one_candidate_is_no_choice():
    with pytest.raises(InputError, match="the best of 1; give at least 2 candidates"):
        best_of(None, "a", None, 1)


@pytest.mark.parametrize("act", [
    lambda pipeline, control: choose_caption(pipeline, clip(), CAPTIONS[:2], control=control),
    lambda pipeline, control: best_of(
        pipeline, "a", pipeline.job(frames=5, height=32, width=48), 2, control=control
    ),
])  # fmt: skip
def test_cancel(pipeline, act):
    seen = []
    act(pipeline, Control(seen.append))
    assert len(seen) > 6
    for moment in range(0, len(seen), 5):
        left = iter([False] * moment + [True])
        with pytest.raises(Cancelled):
            act(pipeline, Control(cancelled=lambda left=left: next(left)))


def test_candidates_of_a_timeline_are_judged_by_its_first_prompt(pipeline):
    line = Timeline(("a red circle", "a blue ring"), (0.0, 0.1))  # of one latent frame
    job = pipeline.job(frames=17, height=32, width=48)
    found = best_of(pipeline, line, job, 2)
    assert found.judged == 1
    assert found.log_likelihoods.keys() == {0, 1}


def test_a_noise_holds_one_prompt_and_is_sampled_under_several(pipeline):
    line = Timeline(("a red circle", "a blue ring"), (0.0, 0.5))
    clip = models.randn(17, 3, 32, 48).clamp(-1, 1)
    with pytest.raises(InputError, match="under one prompt only; give one that doesn't change"):
        encode_to_noise(pipeline, clip, line)
    noise, _ = encode_to_noise(pipeline, clip, "a red circle", seed=1)
    made = decode_from_noise(pipeline, noise, prompt=line)
    assert made.layout.starts == (0, 3)
    assert made.run().isfinite().all()
