"""Empty latents, and VAE Decode."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from . import pack
from .steps import SMALL, PlainVAE, run


def sizes(demo, **inputs) -> tuple:
    """Shape of the latent, then width, height and frames."""
    latent, *numbers = run("STARFlowEmptyLatent", model=demo.model, **inputs)
    return tuple(latent["samples"].shape), *numbers


def test_empty_latents_have_the_models_own_numbers_or_those_given(demo):
    assert sizes(demo) == ((1, 16, 9, 6, 6), 96, 96, 33)
    assert sizes(demo, frames=1) == ((1, 16, 1, 6, 6), 96, 96, 1)
    assert sizes(demo, aspect_ratio="16:9", frames=5, batch_size=2) == ((2, 16, 2, 5, 8), 128, 80, 5)
    assert sizes(demo, aspect_ratio="9:16", frames=5) == ((1, 16, 2, 8, 5), 80, 128, 5)
    assert sizes(demo, aspect_ratio="16:9", width=48, height=32, frames=9) == ((1, 16, 3, 2, 3), 48, 32, 9)


def test_one_side_alone_gives_the_other_by_the_ratio(demo):
    for ratio, given, size in (
        ("16:9", {"width": 128}, (128, 80)),  # 72, in whole tokens of 16
        ("16:9", {"height": 80}, (144, 80)),
        ("9:16", {"width": 80}, (80, 144)),
        ("21:9", {"width": 16}, (16, 16)),  # at least one token
        ("model's own", {"width": 64}, (64, 64)),
        ("model's own", {"height": 64}, (64, 64)),
    ):
        assert sizes(demo, aspect_ratio=ratio, frames=1, **given)[1:3] == size
    with pytest.raises(Exception, match="width 100 is not a multiple of 16"):
        sizes(demo, width=100)


def test_empty_latents_are_zero_and_on_the_hosts_device(monkeypatch, demo):
    import comfy.model_management as management

    assert not demo.empty()["samples"].any()
    monkeypatch.setattr(management, "intermediate_device", lambda: torch.device("meta"))
    assert demo.empty()["samples"].device.type == "meta"


def test_the_size_is_shown(demo, told):
    demo.empty(**SMALL)
    assert told.texts == ["48 x 32, 9 frames, 18 tokens"]
    assert told.nodes == {pack.NODE_ID}


@pytest.fixture(scope="module")
def samples(demo):
    return demo.sample(demo.empty(**SMALL, batch_size=2), seed=3)[0]


def test_frames_are_what_the_core_decodes(demo, core, samples):
    pixels = core.vae.decode(samples["samples"])
    wanted = (pixels.movedim(1, -1).flatten(0, 1) + 1) / 2
    torch.testing.assert_close(demo.decode(samples), wanted, atol=1e-5, rtol=0)


def test_decoding_is_shown(demo, samples, told):
    images = demo.decode({"samples": samples["samples"][:1]})
    assert told.steps == [(1, 3), (2, 3), (3, 3)]
    assert told.nodes == {pack.NODE_ID}
    for (_, shown, _), frame in zip(told.previews, images[[0, 4, 8]], strict=True):
        assert np.abs(np.asarray(shown, np.int16) - 255 * frame.numpy()).max() <= 1


@pytest.mark.parametrize(("tile_size", "cells"), [(0, None), (64, 4), (128, 8)])
def test_tile_size_is_in_pixels(monkeypatch, demo, samples, tile_size, cells):
    decode_frames, asked = demo.vae.core.decode_frames, []
    monkeypatch.setattr(
        demo.vae.core, "decode_frames", lambda latents, tile=None: asked.append(tile) or decode_frames(latents, tile)
    )
    demo.decode(samples, tile_size=tile_size)
    assert asked == [cells]


def test_tiles_give_nearly_the_same(demo):
    samples = demo.sample(demo.empty(width=192, height=192, frames=1))[0]
    assert 0 < (demo.decode(samples) - demo.decode(samples, tile_size=128)).abs().mean() < 0.02


def test_the_overlap_of_an_extended_clip_is_trimmed(demo, clip):
    latent = demo.empty(**SMALL)
    (context,) = run("STARFlowExtend", model=demo.model, images=clip, vae=demo.vae, latent=latent, keep=2)
    samples = demo.sample(latent, context=context)[0]
    whole = demo.decode(samples)
    assert len(whole) == 9
    assert torch.equal(demo.decode(samples, trim_overlap=True), whole[5:])
    with pytest.raises(Exception, match="all 5 frames overlap the source; ask for more frames, or keep fewer"):
        demo.decode({**samples, "samples": samples["samples"][:, :, :2]}, trim_overlap=True)


def test_nothing_else_is_trimmed(demo, clip):
    latent = demo.empty(**SMALL, frames=5)
    (context,) = run("STARFlowFirstFrame", image=clip[:1], vae=demo.vae, latent=latent)
    for samples in (demo.sample(latent, context=context)[0], latent):
        assert len(demo.decode(samples, trim_overlap=True)) == 5


def test_cores_vae_decodes_in_one_piece(demo, samples, told):
    plain = PlainVAE(demo.vae)
    images = run("STARFlowVAEDecode", samples=samples, vae=plain)[0]
    assert torch.equal(images, demo.decode(samples))
    tiled = run("STARFlowVAEDecode", samples=samples, vae=plain, tile_size=256)[0]
    assert tiled.shape == images.shape
    assert plain.tiles == [(16, 16, 4)]


def test_cores_vae_decodes_images(image_model):
    samples = image_model.sample(image_model.empty(frames=1, batch_size=2))[0]
    images = run("STARFlowVAEDecode", samples=samples, vae=PlainVAE(image_model.vae))[0]
    assert images.shape == (2, 32, 32, 3)
    assert torch.equal(images, image_model.decode(samples))
    assert pack.module("nodes.host").clip_frames(images) == 1
