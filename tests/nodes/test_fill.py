"""The Fill In node: known pixels come back, bad masks are refused, images go through an image model."""

from __future__ import annotations

import pytest
import torch

from . import pack
from .steps import PROMPT, SMALL, PlainVAE, run

fill, errors = pack.module("nodes.fill"), pack.module("starflow_core.errors")
HALF = torch.zeros(1, 32, 48)
HALF[:, :, 16:] = 1


def filled(demo, images, mask, latent=None, **inputs):
    latent = latent or demo.empty(**SMALL)
    positive, negative, _ = demo.encode(latent, PROMPT)
    given = {"vae": demo.vae, "seed": 3, "particles": 2, "guidance": 1.0, **inputs}
    return run("STARFlowFillIn", model=demo.model, positive=positive, negative=negative, images=images, mask=mask,
               latent=latent, **given)  # fmt: skip


@pytest.fixture(scope="module")
def images():
    return torch.rand(9, 32, 48, 3, generator=torch.Generator().manual_seed(1))


def test_known_pixels_come_back_to_the_bit(demo, images):
    made, latent, report = filled(demo, images, HALF)
    assert torch.equal(made[:, :, :16], images[:, :, :16])
    assert not torch.equal(made[:, :, 16:], images[:, :, 16:])
    assert latent["samples"].shape == (1, 16, 3, 2, 3)
    assert torch.allclose(demo.decode(latent)[:, :, 16:], made[:, :, 16:])
    assert report.splitlines()[0].startswith("48 x 32, 9 frames filled in ")
    assert report.splitlines()[1] == "particles 2, guidance 1, seed 3"
    assert report.splitlines()[2].count(",") == 2
    assert " of 16, " in report.splitlines()[2]


def test_what_is_masked_and_what_is_beyond_the_latent_does_not_matter(demo, images):
    other = torch.cat((images, images))
    other[:, :, 16:] = 0.5
    one, two = (filled(demo, each, HALF)[0] for each in (images, other))
    assert torch.equal(one, two)
    assert not torch.equal(filled(demo, images, HALF, seed=4)[0], one)


def test_a_mask_for_each_frame_gives_missing_frames(demo, images):
    mask = torch.zeros(9, 32, 48)
    mask[3:6] = 1
    made = filled(demo, images, mask)[0]
    assert torch.equal(made[:3], images[:3])
    assert torch.equal(made[6:], images[6:])


def test_images_of_another_size_are_fitted_with_their_mask(demo, images):
    large = images.repeat_interleave(2, 1).repeat_interleave(2, 2)
    mask = torch.zeros(1, 64, 96)
    mask[:, :, 66:] = 1
    made = filled(demo, large, mask)[0]
    assert made.shape == images.shape
    expected = torch.nn.functional.interpolate(large.movedim(-1, 1), (32, 48), mode="bilinear", antialias=True)
    assert torch.allclose(made[:, :, :32], expected.movedim(1, -1)[:, :, :32], atol=1e-5)
    assert not torch.allclose(made[:, :, 33:], expected.movedim(1, -1)[:, :, 33:], atol=0.1)


def test_core_vae_and_guidance_of_the_model(demo, images):
    made, latent, _ = filled(demo, images, HALF, vae=PlainVAE(demo.vae), guidance=-1.0)
    assert torch.equal(made[:, :, :16], images[:, :, :16])
    assert torch.isfinite(latent["samples"]).all()


def test_a_picture(demo, images):
    latent = demo.empty(**SMALL, frames=1)
    made, filled_in, report = filled(demo, images[:1], HALF, latent)
    assert made.shape == (1, 32, 48, 3)
    assert filled_in["samples"].shape == latent["samples"].shape
    assert "one picture" in report


@pytest.mark.parametrize(("count", "mask", "inputs", "message"), [
    (9, torch.ones(1, 32, 40), {}, "the mask is of 40 x 32, the frames are 48 x 32"),
    (9, torch.ones(4, 32, 48), {}, "the mask has 4 frames, the clip 9"),
    (9, torch.zeros(1, 32, 48), {}, "the mask is empty"),
    (9, torch.ones(1, 32, 48), {}, "no cell of 16 x 16 pixels wholly known"),
    (5, HALF, {}, "5 images, but the latent has 9 frames; give at least as many images"),
    (9, HALF, {"guidance": -2.0}, "guidance is -2"),
])  # fmt: skip
def test_what_is_wrong_is_named(demo, images, count, mask, inputs, message):
    with pytest.raises(Exception, match=message):
        filled(demo, images[:count], mask, **inputs)


def test_as_many_particles_as_fit(demo, images, monkeypatch, caplog):
    tried, planned = [], fill.planned

    def scarce(model, job, options, forecast, what):
        tried.append(forecast.keywords["particles"])
        if tried[-1] > 2:
            raise errors.OutOfMemoryForecast("too much")
        return planned(model, job, options, forecast, what)

    monkeypatch.setattr(fill, "planned", scarce)
    report = filled(demo, images, HALF, particles=6)[2].splitlines()
    assert tried == [6, 3, 1]
    warning = "6 particles don't fit in memory, so 1 goes side by side"
    assert (report[1], report[-1]) == ("particles 1, guidance 1, seed 3", warning)
    assert f"STARFlow: {warning}" in caplog.messages


def test_an_empty_prompt_is_refused(demo, images):
    latent = demo.empty(**SMALL)
    positive, negative, _ = demo.encode(latent, " ")
    with pytest.raises(Exception, match="the prompt is empty; say what all of the result shows"):
        run("STARFlowFillIn", model=demo.model, positive=positive, negative=negative, images=images, mask=HALF,
            latent=latent, vae=demo.vae, seed=3, particles=2, guidance=1.0)  # fmt: skip


def test_one_clip_at_a_time(demo, images):
    with pytest.raises(Exception, match="the latent is a batch of 2; fill one picture or clip at a time"):
        filled(demo, images, HALF, demo.empty(**SMALL, batch_size=2))
