"""The VAEs: recorded tensors, every layout they come in, streaming, tiles, and bad input."""

from __future__ import annotations

import copy
import gc
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from starflow_core.errors import CheckpointError, InputError, NonFiniteError
from starflow_core.model.latent import WAN22_VAE
from starflow_core.model.vae.codec import VAE
from starflow_core.model.vae.layers import ChannelNorm, with_fast_layers
from starflow_core.model.vae.tiles import TiledStream
from starflow_core.weights.vae import METADATA_KEY, _kl_config, _wan_config, find_vae, load_vae

from .. import golden

GOLDEN_FILE = golden.FOLDER / "wan22_vae_weights.safetensors"
TOLERANCE = {"atol": 2e-4, "rtol": 0}


@pytest.fixture(scope="module")
def video() -> VAE:
    return load_vae(GOLDEN_FILE)


@pytest.fixture(scope="module")
def recorded() -> dict:
    return golden.load("wan22_vae")[0]


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    return torch.randn(2, 48, 3, 2, 3, generator=torch.Generator().manual_seed(1)) / 2


def tiny_image_module(**overrides):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return AutoencoderKL(**{**blocks, "block_out_channels": [32, 64], "layers_per_block": 1, **overrides}).eval()


@pytest.fixture(scope="module")
def image_module():
    return tiny_image_module()


@pytest.fixture(scope="module")
def image_folder(image_module, tmp_path_factory):
    folder = tmp_path_factory.mktemp("image")
    image_module.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def video_folder(video, tmp_path_factory):
    folder = tmp_path_factory.mktemp("video")
    video.module.save_pretrained(folder / "vae")
    return folder


def ldm_names(tensors: dict, levels: int) -> dict:
    """Diffusers' names and linear attention to those of the original latent diffusion code."""
    replacements = (
        ("conv_norm_out", "norm_out"),
        ("mid_block.resnets.0", "mid.block_1"),
        ("mid_block.resnets.1", "mid.block_2"),
        ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
        ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
        ("mid_block.attentions.0.to_", "mid.attn_1."),
        ("conv_shortcut", "nin_shortcut"),
        ("resnets", "block"),
        ("downsamplers.0", "downsample"),
        ("upsamplers.0", "upsample"),
        ("down_blocks", "down"),
    )
    result = {}
    for name, tensor in tensors.items():
        linear = ".attentions." in name and tensor.ndim == 2
        for theirs, original in replacements:
            name = name.replace(theirs, original)
        name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
        result[name] = tensor[:, :, None, None].contiguous() if linear else tensor
    return result


# --- the recorded Wan 2.2 VAE ------------------------------------------------------------------


def test_statistics_are_the_recorded_ones(recorded):
    torch.testing.assert_close(torch.tensor(WAN22_VAE.mean), recorded["mean"])
    torch.testing.assert_close(torch.tensor(WAN22_VAE.std), recorded["std"])


@pytest.mark.parametrize(("frames", "name"), [(9, "latent_mean"), (1, "image_latent_mean")])
def test_encode_matches_recorded(video, recorded, frames, name):
    mean, std = (recorded[k].view(1, -1, 1, 1, 1) for k in ("mean", "std"))
    latents = video.encode(recorded["pixels"][:, :, :frames])
    torch.testing.assert_close((latents - mean) / std, recorded[name], **TOLERANCE)


@pytest.mark.parametrize(("frames", "name"), [(3, "decoded"), (1, "decoded_first_frame")])
def test_decode_matches_recorded(video, recorded, frames, name):
    mean, std = (recorded[k].view(1, -1, 1, 1, 1) for k in ("mean", "std"))
    latents = (recorded["latent"] * std + mean)[:, :, :frames]
    torch.testing.assert_close(video.decode(latents, clamp=False), recorded[name], **TOLERANCE)
    torch.testing.assert_close(video.decode(latents), recorded[name].clamp(-1, 1), **TOLERANCE)


def test_describes_itself(video):
    assert (video.kind, video.channels, video.spatial, video.temporal) == ("video", 48, 16, 4)


def test_is_frozen(video):
    assert not video.module.training
    assert not any(p.requires_grad for p in video.module.parameters())


# --- layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["pipeline", "folder", "single", "pth", "wrapped pth", "metadata"])
def test_video_layouts_agree(video, video_folder, latents, tmp_path, layout):
    weights = video_folder / "vae" / "diffusion_pytorch_model.safetensors"
    if layout == "pth":
        torch.save(load_file(GOLDEN_FILE), tmp_path / "vae.pth")
    elif layout == "wrapped pth":
        torch.save({"state_dict": load_file(GOLDEN_FILE), "step": 1}, tmp_path / "vae.pth")
    elif layout == "metadata":
        config = json.dumps({k: v for k, v in video.module.config.items() if not k.startswith("_")})
        save_file(load_file(weights), tmp_path / "vae.safetensors", metadata={METADATA_KEY: config})
    path = {
        "pipeline": video_folder,
        "folder": video_folder / "vae",
        "single": weights,
        "metadata": tmp_path / "vae.safetensors",
    }.get(layout, tmp_path / "vae.pth")
    assert torch.equal(load_vae(path).decode(latents), video.decode(latents))


@pytest.mark.parametrize("layout", ["folder", "single", "old attention names", "ldm", "ldm in a checkpoint"])
def test_image_layouts_agree(image_module, image_folder, tmp_path, layout):
    tensors = dict(image_module.state_dict())
    path = tmp_path / "vae.safetensors"
    if layout == "folder":
        path = image_folder
    elif layout == "single":
        path = image_folder / "diffusion_pytorch_model.safetensors"
    elif layout == "old attention names":
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        pattern = re.compile("|".join(map(re.escape, old)))
        save_file({pattern.sub(lambda match: old[match[0]], name): t for name, t in tensors.items()}, path)
    elif layout == "ldm":
        save_file({**ldm_names(tensors, 2), "loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}, path)
    else:
        inside = {f"first_stage_model.{name}": t for name, t in ldm_names(tensors, 2).items()}
        save_file({**inside, "model.diffusion_model.out.2.bias": torch.zeros(4)}, path)
    loaded = load_vae(path)
    assert (loaded.kind, loaded.channels, loaded.spatial, loaded.temporal) == ("image", 4, 2, 1)
    assert loaded.module.state_dict().keys() == tensors.keys()
    assert all(torch.equal(loaded.module.state_dict()[name], tensor) for name, tensor in tensors.items())


def test_image_without_quantisation_layers(tmp_path):
    module = tiny_image_module(use_quant_conv=False, use_post_quant_conv=False, latent_channels=16)
    save_file(ldm_names(module.state_dict(), 2), tmp_path / "ae.safetensors")
    assert load_vae(tmp_path / "ae.safetensors").channels == 16


def test_metadata_overrides_shapes(tmp_path):
    module = tiny_image_module(block_out_channels=[8, 16], norm_num_groups=4)
    config = {k: v for k, v in module.config.items() if not k.startswith("_")}
    path = tmp_path / "vae.safetensors"
    save_file(module.state_dict(), path)
    with pytest.raises(CheckpointError, match="AutoencoderKL"):
        load_vae(path)  # the number of groups can't be told from shapes
    save_file(module.state_dict(), path, metadata={METADATA_KEY: json.dumps(config)})
    pixels = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(load_vae(path).encode(pixels), module.encode(pixels).latent_dist.mean)


def test_released_configurations_follow_from_shapes():
    from diffusers import AutoencoderKL, AutoencoderKLWan

    wan = {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "scale_factor_temporal": 4,
    }
    stable_diffusion = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
    }
    with torch.device("meta"):
        assert _wan_config(AutoencoderKLWan(**wan).state_dict()) == wan
        assert _kl_config(AutoencoderKL(**stable_diffusion).state_dict()) == stable_diffusion


def test_types(video, latents):
    assert {p.dtype for p in video.module.parameters()} == {torch.float32}  # the file holds float16
    half = load_vae(GOLDEN_FILE, dtype=torch.bfloat16)
    assert {p.dtype for p in half.module.parameters()} == {torch.bfloat16}
    pixels = half.decode(latents)
    assert pixels.dtype == torch.float32
    assert (pixels - video.decode(latents)).abs().mean() < 0.05


def test_one_find_serves_several_loads(latents):
    found = find_vae(GOLDEN_FILE)
    first, second = found.load(), found.load(torch.bfloat16)
    first.module.decoder.conv_out.weight.zero_()
    assert second.decode(latents).abs().mean() > 0.01
    assert {p.dtype for p in second.module.parameters()} == {torch.bfloat16}
    assert all(parameter.is_meta for parameter in found.outline.module.parameters())


def test_weights_outlive_the_file(tmp_path, video, latents):
    path = tmp_path / "vae.safetensors"
    path.write_bytes(GOLDEN_FILE.read_bytes())
    loaded = load_vae(path)
    path.write_bytes(b"")
    assert torch.equal(loaded.decode(latents), video.decode(latents))


# --- streaming ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[3], [1, 1, 1], [1, 2], [2, 1]])
@pytest.mark.parametrize("tile", [None, 4])
def test_pieces_equal_the_whole(video, lengths, tile):
    latents = torch.randn(1, 48, 3, 2, 5, generator=torch.Generator().manual_seed(2))
    frames = list(video.decode_frames(iter(latents.split(lengths, 2)), tile))
    assert [f.shape[2] for f in frames] == [1, 4, 4]
    assert torch.equal(torch.cat(frames, 2), video.decode(latents, tile))


def test_stream_equals_diffusers(video, latents):
    torch.testing.assert_close(video.decode(latents), video.module.decode(latents).sample)
    pixels = video.decode(latents)
    torch.testing.assert_close(video.encode(pixels), video.module.encode(pixels).latent_dist.mean)


def test_frames_come_before_later_latents_are_asked_for(video, latents):
    asked = []

    def source():
        for i, piece in enumerate(latents.split(1, 2)):
            asked.append(i)
            yield piece

    frames = video.decode_frames(source())
    next(frames)
    assert asked == [0]
    next(frames)
    assert asked == [0, 1]


def test_early_frames_do_not_depend_on_later_latents(video, latents):
    changed = torch.cat([latents[:, :, :2], -latents[:, :, 2:]], 2)
    before, after = video.decode(latents), video.decode(changed)
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    assert not torch.allclose(before[:, :, 5:], after[:, :, 5:])


def test_first_latent_is_the_first_frame_alone(video, recorded):
    clip = recorded["pixels"]
    torch.testing.assert_close(video.encode(clip)[:, :, :1], video.encode(clip[:, :, :1]))


def test_batch_elements_are_independent(video, latents):
    torch.testing.assert_close(video.decode(latents)[1:], video.decode(latents[1:]), atol=1e-5, rtol=0)


def test_what_is_kept_does_not_grow(video):
    def kept() -> int:
        gc.collect()
        return sum(o.nbytes for o in gc.get_objects() if type(o) is torch.Tensor)

    frames = video.decode_frames(torch.randn(1, 48, 1, 1, 1) for _ in range(7))
    sizes = {i: kept() for i, _ in enumerate(frames) if i in (3, 6)}
    assert sizes[3] == sizes[6]


def test_gradients_pass_without_clamp(video, latents):
    given = (latents * 20).requires_grad_()
    pixels = video.decode(given, clamp=False)
    assert pixels.abs().max() > 1
    pixels.sum().backward()
    assert given.grad.abs().amax((0, 1, 3, 4)).min() > 0


# --- tiles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [3, 7])
def test_one_tile_that_covers_everything_is_no_tile(image_module, tile):
    vae = VAE(image_module)
    latents = torch.randn(1, 4, 3, 3)
    with torch.no_grad():
        assert torch.equal(vae.decode(latents, max(tile, 4)), vae.decode(latents))


@pytest.mark.parametrize("size", [(4, 5), (6, 4), (9, 13), (30, 53)])
@pytest.mark.parametrize("tile", [4, 5, 8])
@pytest.mark.parametrize(("enter", "leave"), [(1, 4), (4, 1)])
def test_tiles_of_a_local_map_have_no_seams(size, tile, enter, leave):
    def local(x):
        if enter > leave:
            return torch.nn.functional.avg_pool3d(x, (1, enter, enter))
        return x.repeat_interleave(leave, -1).repeat_interleave(leave, -2)

    x = torch.randn(1, 2, 3, size[0] * enter, size[1] * enter)
    torch.testing.assert_close(TiledStream(lambda: local, tile, enter, leave)(x), local(x))


def test_overlaps_are_blended_linearly():
    tiles = iter([0.0, 1.0])

    def start():
        value = next(tiles)
        return lambda x: torch.full_like(x, value)

    row = TiledStream(start, 8, 1, 1)(torch.zeros(1, 1, 1, 8, 14))[0, 0, 0, 0]
    torch.testing.assert_close(row, torch.tensor([0.0] * 6 + [0.25, 0.75] + [1.0] * 6))


def test_tiles_approach_the_whole(video):
    """The weights are random, so a tile's border reaches far; a trained decoder does far better."""
    latents = torch.randn(1, 48, 1, 4, 16, generator=torch.Generator().manual_seed(3)) / 2
    whole = video.decode(latents, clamp=False)
    errors = [
        ((video.decode(latents, tile, clamp=False) - whole).square().mean() / whole.square().mean()).item()
        for tile in (4, 8, 14)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.05


def test_tiled_encode_approaches_the_whole(video):
    pixels = torch.randn(1, 3, 1, 64, 256, generator=torch.Generator().manual_seed(4)).clamp(-1, 1)
    whole = video.encode(pixels)
    errors = [((video.encode(pixels, tile) - whole).square().mean() / whole.square().mean()).item() for tile in (4, 14)]
    assert errors[0] > errors[1]
    assert errors[1] < 0.05


# --- pictures ----------------------------------------------------------------------------------


def test_image_is_that_of_diffusers(image_module, image_folder):
    vae = load_vae(image_folder)
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        latents = image_module.encode(pixels).latent_dist.mean
        expected = image_module.decode(latents).sample
    torch.testing.assert_close(vae.encode(pixels), latents)
    torch.testing.assert_close(vae.decode(latents), expected.clamp(-1, 1))
    (frame,) = vae.decode_frames(latents, clamp=False)
    assert frame.shape == (2, 3, 1, 16, 24)
    torch.testing.assert_close(frame[:, :, 0], expected)


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 4, 32, 32), "4 frames.*nearest are 1 and 5"),
        ((1, 3, 1, 40, 32), "height 40.*16.*nearest: 32 and 48"),
        ((1, 3, 1, 32, 7), "width 7.*nearest: 16"),
        ((1, 4, 1, 32, 32), r"\(1, 4, 1, 32, 32\).*\(B, 3, T, H, W\)"),
        ((3, 32, 32), r"\(B, 3, T, H, W\)"),
        ((1, 3, 0, 32, 32), r"\(1, 3, 0, 32, 32\)"),
    ],
)
def test_impossible_pixels(video, shape, message):
    with pytest.raises(InputError, match=message):
        video.encode(torch.zeros(shape))


def test_integer_pixels(video):
    with pytest.raises(InputError, match=r"uint8.*\[-1, 1\]"):
        video.encode(torch.zeros(1, 3, 1, 16, 16, dtype=torch.uint8))


def test_impossible_latents(video, latents):
    with pytest.raises(InputError, match=r"\(B, 48, T, H, W\)"):
        video.decode(torch.zeros(1, 16, 1, 2, 2))
    with pytest.raises(InputError, match="only the length may differ"):
        list(video.decode_frames([latents, latents[..., :2]]))
    with pytest.raises(InputError, match="at least 4"):
        video.decode(latents, tile=1)


def test_image_shape(image_folder):
    with pytest.raises(InputError, match=r"this image VAE takes \(B, 3, H, W\)"):
        load_vae(image_folder).encode(torch.zeros(1, 3, 1, 16, 16))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_input_names_the_frame(video, latents, recorded, value):
    bad = latents.clone()
    bad[1, 3, 2, 0, 0] = value
    frames = video.decode_frames(bad)
    next(frames)
    next(frames)
    with pytest.raises(NonFiniteError, match="latent frame 2 has NaN or infinity"):
        next(frames)
    pixels = recorded["pixels"].clone()
    pixels[0, 1, 6, 3, 3] = value
    with pytest.raises(NonFiniteError, match="pixel frame 6 has NaN or infinity"):
        video.encode(pixels)


def test_overflow_in_the_decoder_is_named(latents):
    vae = load_vae(GOLDEN_FILE)
    vae.module.decoder.conv_out.weight.fill_(3e38)
    with pytest.raises(NonFiniteError, match="latent frame 0 decodes to NaN"):
        vae.decode(latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axes", [2, 3])
def test_fast_norms_are_the_librarys(dtype, axes):
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    draw = torch.Generator().manual_seed(axes)
    norm = WanRMS_norm(8, images=axes == 2).to(dtype)
    torch.nn.init.normal_(norm.gamma, generator=draw)
    x = torch.randn(2, 8, *range(3, 3 + axes), generator=draw).to(dtype)
    x[:, :, 0] = 0
    expected = norm(x)
    fast = with_fast_layers(torch.nn.Sequential(norm))[0]
    assert isinstance(fast, ChannelNorm)
    assert fast(x).dtype == dtype
    torch.testing.assert_close(fast(x), expected, rtol=8 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(("dtype", "taken"), [(torch.float32, True), (torch.bfloat16, False)])
def test_fast_convolutions_are_the_librarys(monkeypatch, dtype, taken):
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    calls, convolve = [], torch.mkldnn_convolution
    monkeypatch.setattr(torch, "mkldnn_convolution", lambda *given: calls.append(given) or convolve(*given))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)  # of the weights
    for settings in ({"kernel_size": 3, "padding": 1}, {"kernel_size": (3, 1, 1), "stride": (2, 1, 1)}):
        slow = WanCausalConv3d(4, 6, **settings).to(dtype)
        fast = with_fast_layers(copy.deepcopy(slow))
        x = torch.randn(1, 4, 5, 6, 7, generator=draw).to(dtype)
        expected, found = slow(x), fast(x)
        sizes = copy.deepcopy(slow)  # what is summed: rounding is relative to its size, in whatever order
        for weight in sizes.parameters():
            weight.data.abs_()
        assert ((found - expected).abs() <= 8 * torch.finfo(dtype).eps * sizes(x.abs())).all()
        torch.testing.assert_close(
            *(
                torch.autograd.grad(y.float().square().sum(), layer.weight)[0]
                for y, layer in ((found, fast), (expected, slow))
            )
        )
    assert bool(calls) == taken


def test_a_file_is_looked_at_without_reading_weights(video):
    found = find_vae(GOLDEN_FILE)
    assert all(parameter.is_meta for parameter in found.outline.module.parameters())
    for name in ("kind", "channels", "spatial", "temporal"):
        assert getattr(found.outline, name) == getattr(video, name)
    parameters = sum(p.numel() for p in video.module.parameters())
    assert found.weight_bytes(torch.bfloat16) == 2 * parameters
    assert found.step_bytes(4, 6, 3, torch.float32) == video.step_bytes(4, 6, 3) == 3 * video.step_bytes(4, 6)
    assert found.step_bytes(4, 60, 1, torch.float32, tile=6) == video.step_bytes(4, 60)


def test_pictures_of_a_batch_take_the_memory_of_one(image_folder, image_module):
    found, vae = find_vae(image_folder), VAE(image_module)
    assert found.step_bytes(8, 8, 32, torch.float32) == vae.step_bytes(8, 8)
    assert found.step_bytes(8, 8, 1, torch.float32, tile=4) == vae.step_bytes(8, 8, tile=4) == vae.step_bytes(4, 4)
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = vae.encode(pixels)
    assert torch.equal(latents[1:2], vae.encode(pixels[1:2]))
    assert torch.equal(vae.decode(latents)[2:], vae.decode(latents[2:]))


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="no VAE at"):
        load_vae(tmp_path / "none.safetensors")


def test_incomplete_folders(tmp_path, video_folder):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_vae(tmp_path)
    config = (video_folder / "vae" / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"has no diffusion_pytorch_model\.safetensors"):
        load_vae(tmp_path)
    weights = (video_folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    (tmp_path / "config.json").write_text(config.replace("AutoencoderKLWan", "AutoencoderTiny"))
    with pytest.raises(CheckpointError, match="'AutoencoderTiny'; expected"):
        load_vae(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="JSON"):
            load_vae(tmp_path)


@pytest.mark.parametrize("name", ["vae.safetensors", "vae.pth"])
@pytest.mark.parametrize("damage", ["empty", "stub", "truncated", "text"])
def test_damaged_files(tmp_path, name, damage):
    path = tmp_path / name
    if name.endswith("pth"):
        torch.save(load_file(GOLDEN_FILE), path)
    else:
        path.write_bytes(GOLDEN_FILE.read_bytes())
    content = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "stub": content[:3], "truncated": content[: len(content) // 2], "text": b"<html>404</html>"}[
            damage
        ]
    )
    with pytest.raises(CheckpointError, match=re.escape(name)):
        load_vae(path)


class Exploit:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(1), "more": Exploit(tmp_path / "ran")}, tmp_path / "vae.pth")
    with pytest.raises(CheckpointError, match="none of its code ran"):
        load_vae(tmp_path / "vae.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [torch.zeros(2), [torch.zeros(2)], {"epoch": 3}])
def test_a_pickle_without_a_vae(tmp_path, content):
    torch.save(content, tmp_path / "vae.pth")
    with pytest.raises(CheckpointError, match="not a state_dict of tensors"):
        load_vae(tmp_path / "vae.pth")


def test_another_architecture(tmp_path):
    save_file({"model.layers.0.q.weight": torch.zeros(2, 2)}, tmp_path / "llm.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors, model\.layers\.0\.q\.weight; expected a Wan 2\.2"):
        load_vae(tmp_path / "llm.safetensors")


def test_wan_21(tmp_path):
    from diffusers import AutoencoderKLWan

    AutoencoderKLWan(base_dim=4, z_dim=16, num_res_blocks=1).save_pretrained(tmp_path)
    original = {"encoder.downsamples.0.residual.2.weight": torch.zeros(1), "conv2.weight": torch.zeros(16, 16, 1, 1, 1)}
    save_file(original, tmp_path / "original.safetensors")
    for path in (tmp_path, tmp_path / "original.safetensors"):
        with pytest.raises(CheckpointError, match=r"Wan 2\.1 VAE with 16 latent channels; expected a Wan 2\.2"):
            load_vae(path)


def test_wrong_keys_and_shapes_are_named(tmp_path):
    tensors = load_file(GOLDEN_FILE)
    del tensors["encoder.head.2.bias"]
    tensors["extra.weight"] = torch.zeros(1)
    tensors["decoder.head.0.gamma"] = torch.zeros(9, 1, 1, 1)
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_vae(tmp_path / "vae.safetensors")
    assert "1 missing (encoder.conv_out.bias)" in str(caught.value)
    assert "1 unexpected (extra.weight)" in str(caught.value)
    assert "decoder.norm_out.gamma (9, 1, 1, 1) instead of (8, 1, 1, 1)" in str(caught.value)


def test_a_tensor_that_gives_the_configuration_is_missing(tmp_path):
    tensors = load_file(GOLDEN_FILE)
    del tensors["decoder.conv1.weight"]
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks the tensor decoder\.conv_in\.weight"):
        load_vae(tmp_path / "vae.safetensors")


def test_quantised_weights_are_named(tmp_path):
    tensors = load_file(GOLDEN_FILE)
    tensors["encoder.conv1.weight"] = tensors["encoder.conv1.weight"].to(torch.int8)
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=r"1 quantised .*\(encoder\.conv_in\.weight torch\.int8\)"):
        find_vae(tmp_path / "vae.safetensors")


def test_bad_metadata(tmp_path):
    for text, message in (
        ("{", "isn't JSON"),
        ("[" * 100_000, "isn't JSON"),
        ("7", "isn't a JSON object"),
        ('{"base_dim": "wide"}', "contradicts the tensors: base_dim is 'wide', not 8"),
        ('{"latents_std": [0]}', r"latents_std is \(0,\), expected"),
        ('{"dim_mult": [1, 2, 4, 1e300]}', "contradicts the tensors: dim_mult"),
    ):
        save_file(load_file(GOLDEN_FILE), tmp_path / "vae.safetensors", metadata={METADATA_KEY: text})
        with pytest.raises(CheckpointError, match=message):
            load_vae(tmp_path / "vae.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_non_finite_weights(tmp_path, value):
    tensors = load_file(GOLDEN_FILE)
    tensors["encoder.conv1.bias"][3] = value
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(NonFiniteError, match=r"encoder\.conv_in\.bias"):
        load_vae(tmp_path / "vae.safetensors")


def test_overflow_of_the_asked_type(tmp_path, image_module):
    tensors = {name: t.clone() for name, t in image_module.state_dict().items()}
    tensors["quant_conv.bias"][0] = 1e6
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(NonFiniteError, match=r"quant_conv\.bias.*float16.*float32"):
        load_vae(tmp_path / "vae.safetensors", dtype=torch.float16)
