"""The VAE on the host's sockets: core's nodes use it as their own."""

from __future__ import annotations

import pytest
import torch

from tests.core.models import randn

from . import pack

CORE = pack.core_nodes()
host = pack.module("nodes.host")


def core_node(name: str, *inputs):
    """What a node of core's gives."""
    node = CORE[name]()
    with torch.inference_mode():
        return (node.decode if "Decode" in name else node.encode)(*inputs)[0]


def tiles_of(monkeypatch, vae, name: str) -> list:
    """The tiles that a method of the core's VAE will be called with."""
    method, asked = getattr(vae.core, name), []

    def call(values, tile=None, *rest):
        asked.append(tile)
        return method(values, tile, *rest)

    monkeypatch.setattr(vae.core, name, call)
    return asked


@pytest.fixture(scope="module")
def samples(demo):
    return demo.sample(demo.empty(), seed=1)[0]


def test_core_decodes_the_same_pixels(demo, samples, clip):
    assert clip.shape == (9, 96, 96, 3)
    assert 0 <= clip.min() < 0.2 < 0.8 < clip.max() <= 1
    assert torch.equal(core_node("VAEDecode", demo.vae, samples), clip)
    tiled = core_node("VAEDecodeTiled", demo.vae, samples, 512, 64, 64, 8)
    torch.testing.assert_close(tiled, clip, atol=1e-5, rtol=0)


def test_core_encodes_what_the_sampler_takes(demo, core, clip):
    encoded = core_node("VAEEncode", demo.vae, clip)["samples"]
    assert encoded.shape == (1, 16, 3, 6, 6)
    wanted = core.vae.encode(clip.movedim(-1, 0)[None] * 2 - 1)
    torch.testing.assert_close(encoded, wanted, atol=1e-5, rtol=1e-5)
    assert (demo.decode({"samples": encoded}) - clip).square().mean() < 0.01


def test_cores_tiles_are_counted_in_cells(monkeypatch, demo):
    """Core gives cells to decode and pixels to encode; less than 4 cells are no tile."""
    decoded, encoded = (tiles_of(monkeypatch, demo.vae, name) for name in ("decode_frames", "encode"))
    latents, picture = torch.zeros(1, 16, 1, 2, 2), torch.zeros(1, 32, 32, 3)
    for pixels in (80, 64, 32):
        core_node("VAEDecodeTiled", demo.vae, {"samples": latents}, pixels, 16, 64, 8)
        core_node("VAEEncodeTiled", demo.vae, picture, pixels, 16, 64, 8)
    assert decoded == encoded == [5, 4, 4]
    with torch.inference_mode():
        demo.vae.decode_tiled(latents, tile_x=6, tile_y=5)
        demo.vae.decode_tiled(latents)
    assert decoded[3:] == [5, None]


def test_pictures_are_cropped_to_their_middle(demo):
    frames = torch.rand(3, 100, 300, 4, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        encoded = demo.vae.encode(frames)
        assert encoded.shape == (1, 16, 1, 6, 18)  # 3 frames are no whole latent frame more than 1
        assert torch.equal(encoded, demo.vae.encode(frames[:1, 2:98, 6:294, :3]))
        clips = demo.vae.encode(torch.rand(2, 6, 32, 48, 3))
        assert clips.shape == (2, 16, 2, 2, 3)
        with pytest.raises(Exception, match="an image of 300 x 10 is smaller than one latent cell of 16 x 16"):
            demo.vae.encode(frames[:, :10])


def test_results_are_put_where_the_host_wants_them(monkeypatch, demo, samples, clip):
    import comfy.model_management as management

    monkeypatch.setattr(management, "intermediate_device", lambda: torch.device("meta"))
    assert core_node("VAEDecode", demo.vae, samples).device.type == "meta"
    assert core_node("VAEEncode", demo.vae, clip)["samples"].device.type == "meta"


def test_memory_of_a_step_is_asked_for(demo, samples, clip, told):
    core_node("VAEDecode", demo.vae, samples)
    core_node("VAEEncode", demo.vae, clip[:, :64])
    steps = [demo.vae.core.step_bytes(*cells) for cells in ((6, 6), (4, 6))]
    assert told.loads == [(demo.vae.patcher, need, True) for need in steps]
    pair = {"samples": samples["samples"].expand(2, -1, -1, -1, -1)}
    core_node("VAEDecode", demo.vae, pair)
    assert told.loads[-1][1] == 2 * steps[0]


def test_what_core_asks_of_a_vae(demo, image_model):
    for vae, dims, temporal, spatial in ((demo.vae, 3, 4, 16), (image_model.vae, 2, None, 8)):
        assert vae.latent_dim == dims
        assert vae.latent_channels == vae.core.channels
        assert vae.temporal_compression_decode() == vae.temporal_compression_encode() == temporal
        assert vae.spacial_compression_decode() == vae.spacial_compression_encode() == spatial
        assert vae.downscale_ratio == vae.upscale_ratio == spatial
        assert vae.get_sd().keys() == vae.first_stage_model.state_dict().keys()
        vae.throw_exception_if_invalid()


def test_an_image_vae_takes_pictures(image_model):
    pictures = torch.rand(2, 36, 40, 3, generator=torch.Generator().manual_seed(0))
    encoded = core_node("VAEEncode", image_model.vae, pictures)
    assert encoded["samples"].shape == (2, 4, 4, 5)
    wanted = image_model.vae.core.encode(pictures[:, 2:34].movedim(-1, 1) * 2 - 1)
    torch.testing.assert_close(encoded["samples"], wanted, atol=1e-5, rtol=1e-5)
    decoded = image_model.vae.decode(encoded["samples"])
    assert decoded.shape == (2, 32, 40, 3)
    assert torch.equal(decoded, core_node("VAEDecode", image_model.vae, encoded))
    assert torch.equal(decoded, image_model.decode(encoded))


def test_another_models_latents_are_refused(demo, image_model, samples):
    """By both decode nodes, before the weights are loaded."""
    clip = "this latent is a clip of 16 channels, but this VAE decodes an image of 4 channels; load the VAE that goes"
    picture = "this latent is an image of 4 channels, but this VAE decodes a clip of 16 channels; load the VAE that"
    for latent, model, message in ((samples, image_model, clip), (image_model.empty(frames=1), demo, picture)):
        for decode in (model.decode, lambda latent, model=model: core_node("VAEDecode", model.vae, latent)):
            with pytest.raises(Exception, match=message):
                decode({"samples": latent["samples"]})
    with pytest.raises(Exception, match="a clip of 48 channels, but this VAE decodes a clip of 16 channels"):
        demo.decode({"samples": torch.zeros(1, 48, 1, 2, 2)})


def short(monkeypatch, vae, fits: int | None, before: int = 0) -> list:
    """No memory left for larger tiles than `fits`, after `before` latent frames; gives the tiles that are tried."""
    decode_frames, tried = vae.core.decode_frames, []

    def allocate(latents, tile=None):
        tried.append(tile)
        frames = decode_frames(latents, tile)
        if fits is None or tile is None or tile > fits:
            yield from (next(frames) for _ in range(before))
            raise host.OUT_OF_MEMORY("no memory left")
        yield from frames

    monkeypatch.setattr(vae.core, "decode_frames", allocate)
    return tried


def test_short_memory_decodes_in_tiles(monkeypatch, caplog, demo, samples, clip):
    import comfy.model_management as management

    released = []
    monkeypatch.setattr(management, "soft_empty_cache", lambda: released.append(True))
    tried = short(monkeypatch, demo.vae, 4)
    assert 0 < (demo.decode(samples) - clip).abs().mean() < 0.05
    assert tried == [None, 4]
    assert len(released) == 1
    assert "VAE: out of memory, decoding in tiles of 4 latent cells" in caplog.text


def test_tiles_are_halved_until_there_is_nothing_to_halve(monkeypatch, demo, told):
    tried = short(monkeypatch, demo.vae, None)
    with pytest.raises(host.OUT_OF_MEMORY):
        demo.decode({"samples": randn(1, 16, 1, 2, 20)})
    assert tried == [None, 10, 5, 4]
    with pytest.raises(host.OUT_OF_MEMORY):
        demo.decode({"samples": randn(1, 16, 1, 2, 20)}, tile_size=64)
    assert tried[4:] == [4]


def test_frames_that_are_out_are_not_made_twice(monkeypatch, demo, samples):
    tried = short(monkeypatch, demo.vae, 4, before=1)
    with pytest.raises(host.OUT_OF_MEMORY):
        demo.decode(samples)
    assert tried == [None]


def test_a_clip_that_cannot_fit_is_refused_and_a_picture_tiled(monkeypatch, demo, image_model, samples, told):
    """What a clip's tiles remember is as much as the whole needs; a picture's tiles are all there is."""
    pictures = tiles_of(monkeypatch, image_model.vae, "decode_frames")
    monkeypatch.setattr(host.memory, "free", lambda device: image_model.vae.core.step_bytes(9, 9))
    assert core_node("VAEDecode", image_model.vae, {"samples": torch.zeros(2, 4, 16, 16)}).shape == (2, 128, 128, 3)
    assert pictures == [8]
    told.loads.clear()
    with pytest.raises(Exception, match="decoding this needs about"):
        demo.decode(samples)
    assert len(told.loads) == 1  # no smaller tiles are tried
    with pytest.raises(Exception, match="encoding this needs about"):
        core_node("VAEEncode", demo.vae, torch.zeros(1, 96, 96, 3))
