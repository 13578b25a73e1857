"""A small version of benchmarks/teaching.py: the demo learns crosses a little, and goes on knowing the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import adherence, teaching
from benchmarks.judge import look
from starflow_core.jobs.context import later_factors
from starflow_core.model.latent import to_flow_space
from starflow_core.pipeline import load_pipeline
from starflow_core.training.demo import clips

FRAMES = 9
SMALL = {"steps": 24, "batch": 6, "frames": FRAMES, "stride": 8, "blocks": "all", "warmup": 5}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """The demo, and the demo with what it learned of 12 clips."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teaching, "CLIPS", 12)
        patch.setattr(teaching, "rehearsed", lambda seed: tuple(map(adherence.prompt, KNOWN[:4])))
        lora = teaching.taught(teaching.SUBJECTS["cross"], tmp_path_factory.mktemp("teaching"), **SMALL)
    return [load_pipeline(device="cpu", loras=loras) for loras in ([], [str(lora)])]


CROSS = teaching.SUBJECTS["cross"]
KNOWN = teaching.scenes(replace(CROSS, kinds=clips.KINDS), 8, seed=7)


def nats(pipeline, scenes) -> float:
    """The mean loss of noisy clips under their captions."""
    config = pipeline.config
    job = pipeline.job(height=teaching.SIDE, width=teaching.SIDE, frames=FRAMES, batch=len(scenes))
    text, _, _ = pipeline.encode_text([adherence.prompt(s) for s in scenes], "", job)
    latents = pipeline.encode_pixels(clips.render(scenes, FRAMES, teaching.SIDE, teaching.SIDE))
    clean = to_flow_space(config.latent, latents, later_factors(config, "text", 0, latents.shape[2]))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return pipeline.flow.loss(clean + config.noise_std * noise, text).mean().item()


def test_new_clips_become_likelier_and_known_ones_stay(pipelines):
    new = teaching.scenes(CROSS, 8, seed=4)
    before, after = (nats(pipeline, new) for pipeline in pipelines)
    assert after < before - 0.25
    before, after = (nats(pipeline, KNOWN) for pipeline in pipelines)
    assert after < before + 0.12


def test_known_prompts_are_still_followed(pipelines):
    shares, shown = teaching.share_right(pipelines[1], KNOWN[:4], seed=3)
    assert shares["all"] >= 0.75
    assert shown.shape == (4, teaching.FRAMES, 3, teaching.SIDE, teaching.SIDE)


def test_what_is_drawn_is_what_is_judged():
    for name, subject in teaching.SUBJECTS.items():
        for scene in teaching.scenes(subject, 8, seed=2):
            sight = look(clips.render([scene], teaching.FRAMES, teaching.SIDE, teaching.SIDE)[0].transpose(0, 1))
            assert (sight.kind, sight.direction, sight.colour) == (scene.kind, scene.direction, scene.colour), name
