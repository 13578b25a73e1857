"""Filling in, on the demo by the pixel judge, and with random models; `benchmarks/filling.py` has more cases."""

from __future__ import annotations

import pytest
import torch

from benchmarks import filling
from benchmarks.adherence import prompt, scenes
from benchmarks.flow_features import drawn
from starflow_core.applications.fill import fill, fill_latents, filling_job, forecast_fill
from starflow_core.control import Control
from starflow_core.errors import Cancelled, InputError, OutOfMemoryForecast
from starflow_core.jobs import memory
from starflow_core.jobs.build import default_job
from starflow_core.jobs.masks import known_cells
from starflow_core.pipeline import load_pipeline
from tests.core import models, tiny

SCENE = scenes(2, 3)[1]


@pytest.fixture(scope="module")
def demo():
    return load_pipeline(device="cpu")


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    folder = tiny.write_model(tmp_path_factory.mktemp("image"), "image")
    return load_pipeline(folder / tiny.FLOW_FILE, folder / tiny.TEXT_FILE, folder / tiny.VAE_FILE, device="cpu")


@pytest.fixture(scope="module")
def half(demo):
    source = drawn([SCENE])[0]
    mask = torch.zeros(1, 96, 96)
    mask[:, :, 48:] = 1
    return source, mask, fill(demo, source, mask, prompt(SCENE), particles=4, seed=1)


def test_half_a_clip_is_filled_and_the_other_half_stays(half):
    source, _, found = half
    assert torch.equal(found.pixels[..., :48], source[..., :48])
    assert found.pixels.shape == source.shape
    assert found.latents.shape == (1, 16, 9, 6, 6)
    off = filling.way(filling.look(source), filling.look(found.pixels))
    assert filling.verdict(filling.look(found.pixels), SCENE)["colour"]
    assert sorted(off)[len(off) // 2] < filling.NEAR
    assert min(found.effective) >= 1


def test_what_is_masked_does_not_matter(demo, half):
    source, mask, found = half
    grey = source.clone()
    grey[..., 48:] = 0.3
    again = fill(demo, grey, mask, prompt(SCENE), particles=4, seed=1)
    assert torch.equal(again.pixels, found.pixels)


def test_missing_frames(demo):
    source = drawn([SCENE])[0][:21]
    mask = torch.zeros(21, 96, 96)
    mask[9:13] = 1
    found = fill(demo, source, mask, prompt(SCENE), particles=4)
    known = torch.cat((found.pixels[:9], found.pixels[13:]))
    assert torch.equal(known, torch.cat((source[:9], source[13:])))
    assert filling.way(filling.look(source), filling.look(found.pixels)).max() < filling.NEAR


def test_a_picture_of_an_image_model_is_denoised_by_its_score(image):
    pixels = models.randn(1, 3, 32, 40).clamp(-1, 1)
    mask = torch.zeros(32, 40)
    mask[:, 16:] = 1
    one = fill(image, pixels, mask, "a boat", particles=2)
    assert torch.equal(one.pixels[..., :16], pixels[..., :16])
    assert one.latents.shape == (1, image.config.latent.channels, 1, 4, 5)
    assert torch.isfinite(one.latents).all()
    assert not torch.equal(fill(image, pixels, mask, "a boat", particles=2, seed=3).latents, one.latents)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_known_cells_of_the_latents_stay_as_clean_as_they_were(kind):
    flow = models.flow(1, kind=kind)
    config, frames = flow.config, 5 if kind == "video" else 1
    cell = config.latent.spatial
    job = default_job(config, height=3 * cell, width=3 * cell, frames=frames, guidance=0.5)
    latents = models.randn(1, 4, config.latent.latent_frames(frames), 3, 3)
    known = models.randn(latents.shape[2], 3, 3, seed=4) > 0
    found, _ = fill_latents(flow, job, latents, known, models.text(flow), models.text(flow, seed=3), particles=2)
    kept = found[0].movedim(0, -1)[known]
    assert torch.allclose(kept, latents[0].movedim(0, -1)[known], atol=1e-5)
    assert not torch.allclose(found, latents, atol=0.1)


def test_cancelled(demo):
    mask = torch.zeros(1, 96, 96)
    mask[:, :48] = 1
    left = iter(range(40))
    with pytest.raises(Cancelled):
        fill(demo, drawn([SCENE])[0][:5], mask, "a circle", control=Control(cancelled=lambda: next(left, None) is None))


@pytest.mark.parametrize(("pixels", "mask", "options", "message"), [
    ((5, 96, 96), (1, 96, 80), {}, "the mask is of 80 x 96"),
    ((5, 96, 96), (4, 96, 96), {}, "the mask has 4 frames, the clip 5"),
    ((6, 96, 96), (1, 96, 96), {}, "nearest are 5 and 9"),
    ((5, 90, 96), (1, 90, 96), {}, "90"),
    ((5, 96, 96), (1, 96, 96), {}, "no cell of 16 x 16 pixels wholly known"),
    ((5, 96, 96), (1, 96, 96), {"particles": 0}, "particles is 0; the minimum is 1"),
    ((5, 96, 96), (1, 96, 96), {"guidance": -1.0}, "guidance is -1"),
])  # fmt: skip
def test_what_is_wrong_is_named_before_any_work(demo, monkeypatch, pixels, mask, options, message):
    monkeypatch.setattr(type(demo), "encode_clip", None)
    monkeypatch.setattr(type(demo), "encode_text", None)
    with pytest.raises(InputError, match=message):
        fill(demo, torch.zeros(pixels[0], 3, *pixels[1:]), torch.ones(mask), "a circle", **options)


def test_particles_take_memory_and_too_many_are_refused_before_any_work(demo, monkeypatch):
    pixels, mask = torch.zeros(33, 3, 96, 96), torch.zeros(1, 96, 96)
    mask[:, 40:] = 1
    _, known, job = filling_job(demo.config, pixels, mask)
    few, many = (forecast_fill(demo.config, job, torch.float32, particles=n, known=known).total for n in (2, 16))
    assert many > 6 * few - memory.forecast(demo.config, job, torch.float32).weights * 6
    frames = torch.ones_like(known)
    frames[3] = False  # no seam in the first frame
    few, many = (forecast_fill(demo.config, job, torch.float32, particles=n, known=frames).cache for n in (2, 16))
    assert many == 8 * few
    assert known_cells(demo.config, mask.expand(33, -1, -1) > 0).equal(known)
    monkeypatch.setattr(type(demo), "encode_clip", None)
    with pytest.raises(OutOfMemoryForecast, match=r"filling this .* Fewer particles than 1000000 need less, too\.$"):
        fill(demo, pixels, mask, "a circle", particles=10**6)


@pytest.mark.parametrize("fits", [8, 4, 3, 1, 0])
def test_as_many_particles_as_fit_go_side_by_side(demo, monkeypatch, fits):
    pixels, mask = torch.zeros(5, 3, 96, 96), torch.zeros(1, 96, 96)
    mask[:, 40:] = 1
    _, known, job = filling_job(demo.config, pixels, mask)
    least = demo._beside(
        forecast_fill(demo.config, job, demo.dtype, particles=max(fits, 1), known=known), torch.device("cpu")
    ).total
    monkeypatch.setattr(memory, "RESERVE", 0)
    monkeypatch.setattr(memory, "free", lambda device: least if fits else least - 1)
    if not fits:
        with pytest.raises(OutOfMemoryForecast, match=r"or a 16-bit type\.$"):
            fill(demo, pixels, mask, "a circle")
        return
    found = fill(demo, pixels, mask, "a circle")
    assert found.particles == {8: 8, 4: 4, 3: 2, 1: 1}[fits]
    if fits < 8:
        with pytest.raises(OutOfMemoryForecast, match="Fewer particles than 8"):
            fill(demo, pixels, mask, "a circle", particles=8)


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt_is_refused_before_any_work(demo, prompt):
    with pytest.raises(InputError, match="the prompt is empty; say what all of the result shows"):
        fill(demo, torch.zeros(5, 3, 96, 96), torch.zeros(5, 96, 96), prompt)
