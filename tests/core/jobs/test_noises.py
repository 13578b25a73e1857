"""Noise from seeds and clips: what it carries, files of both schemas, blends, and that jobs make the clip again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from starflow_core.errors import CheckpointError, InputError
from starflow_core.jobs.context import Context
from starflow_core.jobs.noises import KEY, Noise, fresh_noise, inversion_job, inverted, noise_of
from starflow_core.jobs.tasks import Generation, Job
from starflow_core.solve.solvers import PRESETS
from tests.core import models
from tests.core.models import relative_error

EXACT = PRESETS["exact"]


def latents(frames, batch=1, seed=5):
    return models.randn(batch, 4, frames, 2, 3, seed=seed)


@pytest.fixture(scope="module")
def flow():
    return models.flow()


CONTEXTS = {
    "text": None,
    "first frame": Context("first_frame", latents(1)),
    "edit": Context("edit", latents(2, seed=6), hidden=2),
    "first and last": Context("last_frame", latents(2, seed=6), hidden=1),
}


def round_trip(flow, job, clip):
    text, uncond = models.text(flow, job.batch), models.text(flow, seed=3)
    noise = noise_of(flow.config, job, inverted(flow, job, clip, text, uncond), "a")
    again = noise.job(flow.config, EXACT)
    return noise, Generation(flow, replace(again, denoise=False), text, uncond, noise=noise.noise).run()


@pytest.mark.parametrize("clean", [True, False], ids=["clean", "noisy"])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_a_clip_comes_back(flow, context, guidance, clean):
    frames = 7 if context is None or not context.hidden else 3  # beyond the window of 5, where it may be
    clip = latents(frames, batch=2, seed=8)
    if context:
        clip[:, :, : context.shown] = context.latents[:, :, context.hidden :]
    job = Job(32, 48, frames=frames * 4 - 3, batch=2, seed=3, guidance=guidance, context=context)
    noise, again = round_trip(flow, inversion_job(flow.config, job, clean), clip)
    if clean:
        assert relative_error(again, clip) < 1e-6
    else:  # with the model's own noise in it, but for the given frames
        shown = context.shown if context else 0
        scale = flow.config.noise_std * flow.config.latent.std[0]
        rest = (again - clip)[:, :, shown:].std() / scale
        assert 0.7 < rest < 1.9  # later frames have a factor of 0.6
        assert torch.allclose(again[:, :, :shown], clip[:, :, :shown], atol=1e-5)
    assert (noise.log_likelihood is None) == (not clean or guidance > 0)
    assert noise.clean == clean


def test_bits_count_the_new_frames_alone(flow):
    clip = latents(3)
    job = inversion_job(flow.config, Job(32, 48, frames=9, context=Context("first_frame", clip[:, :, :1])), True)
    found = inverted(flow, job, clip, models.text(flow))
    assert found.dimensions == 2 * 4 * 6
    noise = noise_of(flow.config, job, found, "")
    assert noise.bits_per_dim == pytest.approx(-noise.log_likelihood / (48 * 0.6931472), rel=1e-5)


def test_fresh_noise_is_the_seeds(flow):
    job = Job(32, 48, frames=9, seed=4, guidance=1.0, context=CONTEXTS["first frame"])
    noise, text, uncond = fresh_noise(flow.config, job), models.text(flow), models.text(flow, seed=3)
    expected = Generation(flow, job, text, uncond).run()
    again = noise.job(flow.config, job.solver)
    assert again == job
    assert torch.equal(Generation(flow, again, text, uncond, noise=noise.noise).run(), expected)


@pytest.mark.parametrize("context", [None, Context("edit", latents(2), hidden=2, noisy=False)])
def test_files(tmp_path, context):
    noise = Noise(models.randn(1, 2, 4, 2, 3), "a", 12.0, "m", -1.5, 0.25, "b", 1.5, 7, 5, 2, context, ("x", "y"))
    noise.save(tmp_path / "n.safetensors")
    found = Noise.load(tmp_path / "n.safetensors")
    for name in vars(noise):
        if name not in ("noise", "context"):
            assert getattr(found, name) == getattr(noise, name)
    assert torch.equal(found.noise, noise.noise)
    if context:
        assert torch.equal(found.context.latents, context.latents)
        assert replace(found.context, latents=None) == replace(context, latents=None)


def test_files_of_the_first_schema(tmp_path):
    values = {"schema": 1, "prompt": "a", "fps": 8.0, "model": "m", "log_likelihood": -2.0, "bits_per_dim": 0.5}
    save_file({"noise": torch.ones(1, 1, 4, 2, 2)}, tmp_path / "n.safetensors", {KEY: json.dumps(values)})
    found = Noise.load(tmp_path / "n.safetensors")
    assert found.clean
    assert (found.prompt, found.guidance, found.context, found.bits_per_dim) == ("a", 0.0, None, 0.5)
    for changed, message in ({"schema": 3}, "newer version"), ({"colour": 1}, "isn't a noise file"):
        save_file({"noise": torch.ones(1, 1, 4, 2, 2)}, tmp_path / "n.safetensors", {KEY: json.dumps(values | changed)})
        with pytest.raises(CheckpointError, match=message):
            Noise.load(tmp_path / "n.safetensors")


@pytest.fixture
def two():
    return [Noise(models.randn(2, 4, 16, 32, 32, seed=seed), "a", 16.0, "m", seed=seed) for seed in (1, 2)]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 0.5, 0.9, 1.0])
def test_blends_are_as_likely_as_what_they_are_made_of(two, share):
    for made in (two[0].vary(share, 9), two[0].mix(two[1], share)):
        assert made.noise.std() == pytest.approx(1, abs=0.01)
        assert made.log_likelihood is None
        assert len(made.made) == 1
    varied = two[0].vary(share, 9).noise
    assert torch.corrcoef(torch.stack((varied.flatten(), two[0].noise.flatten())))[0, 1] == pytest.approx(
        (1 - share**2) ** 0.5, abs=0.01
    )


def test_the_ends_of_a_mixture(two):
    a, b = two
    torch.testing.assert_close(a.mix(b, 0).noise, a.noise)
    torch.testing.assert_close(a.mix(b, 1).noise, b.noise)
    torch.testing.assert_close(a.mix(a, 0.5).noise, a.noise)
    assert torch.equal(a.vary(0, 3).noise, a.noise)
    kept = a.vary(1, 3, keep=2).noise
    assert torch.equal(kept[:, :2], a.noise[:, :2])
    assert torch.equal(kept[:, 2:], a.vary(1, 3).noise[:, 2:])


def test_what_cannot_be_blended(two):
    a, b = two
    clean = replace(a, seed=None)
    refusals = [
        (lambda: clean.vary(0.5, 1), "can't be blended with fresh noise"),
        (lambda: a.mix(clean, 0.5), "one noise is that of clean latents, the other isn't"),
        (lambda: a.mix(replace(b, noise=b.noise[:, :1]), 0.5), "of one size and length"),
        (lambda: a.vary(0.5, 1, keep=5), "keep is 5 latent frames; this noise has 4"),
        (lambda: a.vary(1.5, 1), "from 0 to 1"),
        (lambda: a.mix(b, float("nan")), "from 0 to 1"),
    ]
    for act, message in refusals:
        with pytest.raises(InputError, match=message):
            act()


def test_the_added_noise_is_the_seeds(flow):
    clip, text = latents(3), models.text(flow)
    found = [inverted(flow, Job(32, 48, frames=9, seed=seed), clip, text).noise for seed in (1, 1, 2)]
    assert torch.equal(found[0], found[1])
    assert not torch.isclose(found[0], found[2]).all()


def test_latents_of_another_size_are_refused(flow):
    job = Job(32, 48, frames=9)
    with pytest.raises(InputError, match=r"latents of shape \(1, 4, 2, 2, 3\), the job's are \(1, 4, 3, 2, 3\)"):
        inverted(flow, job, latents(2), models.text(flow))
