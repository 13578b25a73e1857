"""Image and video VAEs of diffusers behind one class, loaded from any layout they are published in.

All tensors are VAE space: pixels (B, 3, F, H, W) in [-1, 1] and raw latents (B, C, T, h, w) of a
video VAE, (B, 3, H, W) and (B, C, h, w) of an image VAE. Mean, deviation and scale belong to the caller.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import LatentFormat
from .control import Control, Progress
from .errors import CheckpointError, InputError, NonFiniteError
from .tensorfiles import TensorFile

METADATA_KEY = "starflow_vae_config"  # constructor arguments as JSON, in a safetensors file's metadata
EXPECTED = "expected a Wan 2.2 VAE (AutoencoderKLWan with residual shortcuts) or an AutoencoderKL"
STEP_COPIES = {"video": 28, "image": 16}  # measured: activations of the widest layer that are held at once
LEAST_TILE = 4  # in latent cells, half of it shared with the next one

Stream = Callable[[Tensor], Tensor]  # takes the chunks (B, C, t, h, w) of one clip in order


class VAE:
    """A diffusers `AutoencoderKL` ("image") or `AutoencoderKLWan` ("video"), kept as `module`.

    `channels` are the latent's, `spatial` and `temporal` the pixels and frames per latent. Inputs
    are moved to the module's device and type chunk by chunk; results are float32 on its device.
    """

    def __init__(self, module: nn.Module):
        from diffusers import AutoencoderKLWan

        config = module.config
        self.module = module
        if isinstance(module, AutoencoderKLWan):
            self.kind = "video"
            self.channels = config.z_dim
            self.spatial = (config.patch_size or 1) * 2 ** (len(config.dim_mult) - 1)
            self.temporal = 2 ** sum(config.temperal_downsample)
        else:
            self.kind = "image"
            self.channels = config.latent_channels
            self.spatial = 2 ** (len(config.block_out_channels) - 1)
            self.temporal = 1

    def encode(self, pixels: Tensor, tile: int | None = None, control: Control | None = None) -> Tensor:
        """Latents of a picture or clip: the posterior's mean, where the reference draws a sample.

        A clip (B, 3, 4n + 1, H, W) goes through the causal encoder `temporal` frames at a time, so
        that activations don't grow with its length; `tile` (in latent cells) bounds them in space.
        `control` is told of every latent frame.
        Raises InputError for impossible sizes and frame counts, NonFiniteError for bad pixels.
        """
        clip = self._with_frames(pixels, 3, "pixels")
        self._check_size(*clip.shape[2:])
        stream = _Tiled(self._encoder, tile, self.spatial, 1)
        latents, start, control = [], 0, control or Control()
        total = (clip.shape[2] - 1) // self.temporal + 1
        while start < clip.shape[2]:
            control.report(Progress("encode", len(latents), total))
            stop = start + self.temporal if start else 1  # the first frame is a latent of its own
            chunk = clip[:, :, start:stop]
            _check_finite(chunk, start, "pixel frame", "check the picture or clip")
            latent = stream(self._to_module(chunk)).float()
            _check_finite(latent, len(latents), "encoded latent frame", "encode in float32")
            latents.append(latent)
            start = stop
        control.report(Progress("encode", total, total))
        return self._without_frames(torch.cat(latents, 2))

    def decode(self, latents: Tensor, tile: int | None = None, clamp: bool = True) -> Tensor:
        """Pixels of `latents`: exactly what `decode_frames` yields, in one tensor."""
        return self._without_frames(torch.cat(list(self.decode_frames(latents, tile, clamp)), 2))

    def decode_frames(
        self, latents: Tensor | Iterable[Tensor], tile: int | None = None, clamp: bool = True
    ) -> Iterator[Tensor]:
        """Yield the pixel frames (B, 3, f, H, W) of each latent frame as soon as it is decoded.

        `latents` is a whole tensor or pieces of it in order, of one or more latent frames each. In
        a clip f is 1 for the first latent frame and `temporal` for later ones; a picture is f = 1.
        Memory doesn't grow with length. `tile` bounds activations to tiles of that many latent
        cells a side, whose seams are blended. What the causal layers remember is kept for every
        tile, overlaps included, so that tiles of a clip below about 32 cells save little more.
        Without `clamp` values may leave [-1, 1], and gradients pass. Raises InputError for wrong
        shapes, NonFiniteError naming the latent frame.
        """
        stream = _Tiled(self._decoder, tile, 1, self.spatial)
        index, seen = 0, None
        for piece in [latents] if isinstance(latents, Tensor) else latents:
            piece = self._with_frames(piece, self.channels, "latents")
            batch_and_size = (piece.shape[0], *piece.shape[3:])
            if seen not in (None, batch_and_size):
                raise InputError(f"latents of (B, H, W) {batch_and_size} after {seen}: only the length may differ")
            seen = batch_and_size
            for frame in piece.split(1, 2):
                _check_finite(frame, index, "latent frame", "check the file they are from, or sample in float32")
                pixels = stream(self._to_module(frame)).float()
                if not torch.isfinite(pixels).all():
                    raise NonFiniteError(f"latent frame {index} decodes to NaN or infinity; decode in float32")
                yield pixels.clamp(-1, 1) if clamp else pixels
                index += 1

    def step_bytes(self, height: int, width: int, batch: int = 1, tile: int | None = None) -> int:
        """About what encoding or decoding one latent frame of height x width latent cells takes beside the
        weights, for a batch of clips or pictures. `tile` counts for pictures alone: tiles of a clip keep
        what their causal layers remember, which is most of it."""
        return self.step_values(height, width, batch, tile) * next(self.module.parameters()).element_size()

    def step_values(self, height: int, width: int, batch: int = 1, tile: int | None = None) -> int:
        """As `step_bytes`, in numbers of the module's type."""
        config = self.module.config
        if self.kind == "video":
            patch = config.patch_size or 1
            width_inside = max(config.base_dim, config.decoder_base_dim or config.base_dim)
        else:
            patch, width_inside, batch = 1, config.block_out_channels[0], 1  # one picture after the other
            height, width = (min(side, tile or side) for side in (height, width))
        values = batch * height * width * (self.spatial // patch) ** 2 * self.temporal * width_inside
        return STEP_COPIES[self.kind] * values

    def _encoder(self) -> Stream:
        """A fresh stream from pixel chunks to the latent's mean."""
        module = self.module
        if self.kind == "image":
            return _one_by_one(lambda pixels: module.encode(pixels[:, :, 0]).latent_dist.mean.unsqueeze(2))
        from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

        cache = _empty_cache(module.encoder)

        def encode(pixels: Tensor) -> Tensor:
            patches = patchify(pixels, module.config.patch_size or 1)
            moments = module.quant_conv(module.encoder(patches, feat_cache=cache, feat_idx=[0]))
            return moments.chunk(2, 1)[0]

        return encode

    def _decoder(self) -> Stream:
        """A fresh stream from single latent frames to pixel frames, not clamped."""
        module = self.module
        if self.kind == "image":
            return _one_by_one(lambda latent: module.decode(latent[:, :, 0]).sample.unsqueeze(2))
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        cache = _empty_cache(module.decoder)

        def decode(latent: Tensor) -> Tensor:
            first = cache[0] is None  # the first convolution fills its slot in every call
            hidden = module.post_quant_conv(latent)
            patches = module.decoder(hidden, feat_cache=cache, feat_idx=[0], first_chunk=first)
            return unpatchify(patches, module.config.patch_size or 1)

        return decode

    def _to_module(self, x: Tensor) -> Tensor:
        parameter = next(self.module.parameters())
        return x.to(parameter.device, parameter.dtype)

    def _with_frames(self, x: Tensor, channels: int, name: str) -> Tensor:
        """`x` as (B, C, T, H, W) once its shape and type are those of `name`."""
        axes, layout = (5, "(B, {}, T, H, W)") if self.kind == "video" else (4, "(B, {}, H, W)")
        if x.ndim != axes or x.shape[1] != channels or 0 in x.shape:
            raise InputError(f"{name} of shape {tuple(x.shape)}; this {self.kind} VAE takes {layout.format(channels)}")
        if not x.is_floating_point():
            raise InputError(f"{name} are {x.dtype}; expected floating point (pixels in [-1, 1])")
        return x if self.kind == "video" else x.unsqueeze(2)

    def _without_frames(self, x: Tensor) -> Tensor:
        return x if self.kind == "video" else x.squeeze(2)

    def _check_size(self, frames: int, height: int, width: int) -> None:
        LatentFormat(self.channels, self.spatial, self.temporal).latent_frames(frames)
        for name, value in (("height", height), ("width", width)):
            if value % self.spatial:
                low = value - value % self.spatial
                nearest = f"{low} and {low + self.spatial}" if low else str(self.spatial)
                raise InputError(f"{name} {value} is not a multiple of {self.spatial}; nearest: {nearest}")


class ChannelNorm(nn.Module):
    """diffusers' `WanRMS_norm` with the norm taken as a sum: `F.normalize` is slow on a CPU over an axis that
    is not the last one. It took a quarter of decoding and a third of the training."""

    def __init__(self, gamma: nn.Parameter):
        super().__init__()
        self.gamma = gamma

    def forward(self, x: Tensor) -> Tensor:
        squares = x.float().square().sum(1, keepdim=True)
        inverse = squares.clamp_min(1e-24).rsqrt() * len(self.gamma) ** 0.5
        return (x * inverse).to(x.dtype) * self.gamma.to(x.dtype)


def with_fast_norms(module: nn.Module) -> nn.Module:
    """The same module, every `WanRMS_norm` in it replaced by a `ChannelNorm` of the same weights."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, WanRMS_norm) and child.channel_first and not isinstance(child.bias, nn.Parameter):
                setattr(parent, name, ChannelNorm(child.gamma))
    return module


class _Tiled:
    """A stream that runs tile by tile: one fresh stream per tile, overlaps blended linearly.

    A cell is `enter` wide in the input and `leave` in the output. Without `tile`, or if one tile
    covers everything, it is the plain stream.
    """

    def __init__(self, start: Callable[[], Stream], tile: int | None, enter: int, leave: int):
        if tile is not None and tile < LEAST_TILE:
            raise InputError(f"tile {tile}: a tile has at least {LEAST_TILE} latent cells a side")
        self.streams = defaultdict(start)
        self.tile, self.enter, self.leave = tile, enter, leave
        self.overlap = max(LEAST_TILE // 2, (tile or 0) // 4)

    def __call__(self, x: Tensor) -> Tensor:
        height, width = (size // self.enter for size in x.shape[-2:])
        rows, columns = self._starts(height), self._starts(width)
        if len(rows) == len(columns) == 1:
            return self.streams[0, 0](x)
        total = weights = None
        for row in rows:
            for column in columns:
                source = self._area(row, column, self.enter)
                target = self._area(row, column, self.leave)
                part = self.streams[row, column](x[source]).float()
                if total is None:
                    weights = part.new_zeros(height * self.leave, width * self.leave)
                    total = part.new_zeros(*part.shape[:-2], *weights.shape)
                weight = self._ramp(row, height, part)[:, None] * self._ramp(column, width, part)
                total[target] += part * weight
                weights[target] += weight
        return total / weights

    def _starts(self, size: int) -> list[int]:
        """First cells of the evenly spread tiles along an axis of `size` cells."""
        if self.tile is None or size <= self.tile:
            return [0]
        steps = math.ceil((size - self.overlap) / (self.tile - self.overlap)) - 1
        return [round(i * (size - self.tile) / steps) for i in range(steps + 1)]

    def _area(self, row: int, column: int, scale: int) -> tuple:
        return (..., *(slice(start * scale, (start + self.tile) * scale) for start in (row, column)))

    def _ramp(self, start: int, size: int, like: Tensor) -> Tensor:
        """Weights along a tile: rising from a neighbour before it, falling towards one after it."""
        length = min(self.tile, size) * self.leave
        rise = (torch.arange(length, device=like.device, dtype=like.dtype) + 0.5) / (self.overlap * self.leave)
        ramp = torch.ones_like(rise)
        if start > 0:
            ramp = torch.minimum(ramp, rise)
        if start + self.tile < size:
            ramp = torch.minimum(ramp, rise.flip(0))
        return ramp


def load_vae(path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> VAE:
    """The VAE that `find_vae` finds, frozen; `dtype` is float32 unless given, whatever the file holds.

    Raises NonFiniteError for NaN or infinity in its weights.
    """
    return find_vae(path).load(dtype, device)


@dataclass(frozen=True)
class VAEFile:
    """A VAE that was looked at but not loaded: its tensors' file, their names there, the configuration if
    the file brings one, and the `outline`, which has shapes but no memory."""

    file: TensorFile
    names: list[str]
    config: dict[str, Any] | None
    outline: VAE

    def load(self, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> VAE:
        """Read the weights, as float32 unless `dtype` is given."""
        # Weights outlive the caller's inference mode.
        with torch.inference_mode(False), torch.no_grad():
            tensors = _rename({name: self.file.tensor(name) for name in self.names})
            module = _build(tensors, self.config, self.file.path.name)
            _fill(module, tensors, dtype or torch.float32, device, self.file.path.name)
        return VAE(module.requires_grad_(False).eval())

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Memory that the weights will take."""
        return dtype.itemsize * sum(parameter.numel() for parameter in self.outline.module.parameters())

    def step_bytes(self, height: int, width: int, batch: int, dtype: torch.dtype, tile: int | None = None) -> int:
        """As `VAE.step_bytes`."""
        return dtype.itemsize * self.outline.step_values(height, width, batch, tile)


def find_vae(path: str | Path) -> VAEFile:
    """A VAE in a file or folder; no weights are read.

    A folder is diffusers' (config.json and diffusion_pytorch_model.safetensors) or a pipeline's
    with such a `vae` in it. A file is safetensors, or a pickle that holds nothing but tensors, in
    the original Wan 2.2 names, the original latent diffusion names (also below
    `first_stage_model.`), or diffusers' own. A single file's configuration is read from its
    metadata (`METADATA_KEY`) or else from its shapes. Raises CheckpointError for anything else and
    for missing, unexpected or wrongly shaped tensors.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"no VAE at {path}; give a file or a diffusers folder")
    config = None
    if path.is_dir():
        path, config = _find_in_folder(path)
    file = TensorFile.open(path)
    if config is None and METADATA_KEY in file.metadata:
        config = _parse_config(file.metadata[METADATA_KEY], path.name)
    names = _names(file)
    shapes = _rename({name: torch.empty(file.shapes[name], device="meta") for name in names})
    module = _build(shapes, config, path.name)
    _check_names(module, shapes, path.name)
    return VAEFile(file, names, config, VAE(module))


def _find_in_folder(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The weights file and configuration of a diffusers folder, or of the `vae` in a pipeline's."""
    if not (folder / "config.json").is_file():
        folder = folder / "vae" if (folder / "vae").is_dir() else folder
    weights = folder / "diffusion_pytorch_model.safetensors"
    for file in (folder / "config.json", weights):
        if not file.is_file():
            raise CheckpointError(f"{folder} has no {file.name}; expected a VAE's folder as diffusers saves it")
    text = (folder / "config.json").read_text(encoding="utf-8", errors="replace")
    config = _parse_config(text, folder / "config.json")
    name = config.get("_class_name")
    if name not in (None, "AutoencoderKL", "AutoencoderKLWan"):
        raise CheckpointError(f"{folder} holds a {name}; {EXPECTED}")
    return weights, config


def _parse_config(text: str, where: str | Path) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"configuration in {where} is not JSON: {error}; get the file again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"configuration in {where} is no JSON object; get the file again")
    return config


def _names(file: TensorFile) -> list[str]:
    """The VAE's tensors in a file, once they are of a readable type."""
    names = [name for name in file.shapes if name.startswith(PREFIX)] or list(file.shapes)
    unknown = next((name for name in names if file.dtypes[name] is None), None)
    if unknown:
        raise CheckpointError(f"{file.path.name} is quantised ({unknown}); use a VAE in bf16, fp16 or fp32")
    return names


# Original names to those of diffusers: every rule is applied in turn.
WAN_RULES = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"coder\.conv1\.", "coder.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.(down|up)samples\.(\d+)\.\1samples\.\d+\.(resample|time_conv)\.", r".\1_blocks.\2.\1sampler.\3."),
    (r"\.(down|up)samples\.(\d+)\.\1samples\.(\d+)\.", r".\1_blocks.\2.resnets.\3."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)
LDM_RULES = (
    (r"\.(down|up)\.(\d+)\.block\.(\d+)\.", r".\1_blocks.\2.resnets.\3."),
    (r"\.(down|up)\.(\d+)\.\1sample\.", r".\1_blocks.\2.\1samplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
)
# What sd-vae-ft-ema's own folder still calls its attention.
OLD_DIFFUSERS_RULES = (
    (r"\.attentions\.0\.query\.", ".attentions.0.to_q."),
    (r"\.attentions\.0\.key\.", ".attentions.0.to_k."),
    (r"\.attentions\.0\.value\.", ".attentions.0.to_v."),
    (r"\.attentions\.0\.proj_attn\.", ".attentions.0.to_out.0."),
)
PREFIX = "first_stage_model."
TRAINING_ONLY = ("loss.", "model_ema.")


def _rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The VAE's tensors under the names and in the shapes that diffusers gives them."""
    if any(name.startswith(PREFIX) for name in tensors):
        tensors = {name[len(PREFIX) :]: t for name, t in tensors.items() if name.startswith(PREFIX)}
    tensors = {name: t for name, t in tensors.items() if not name.startswith(TRAINING_ONLY)}
    if any(name.startswith("encoder.downsamples.0.downsamples.") for name in tensors):
        return {_apply(WAN_RULES, name): t for name, t in tensors.items()}
    if any(name.startswith("encoder.down.0.block.") for name in tensors):
        return _rename_ldm(tensors)
    return {_apply(OLD_DIFFUSERS_RULES, name): t for name, t in tensors.items()}


def _rename_ldm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {_apply(LDM_RULES, name): t for name, t in tensors.items()}
    last = _count(renamed, r"decoder\.up_blocks\.(\d+)\.") - 1
    result = {}
    for name, tensor in renamed.items():
        # counted from the finest block there, from the coarsest in diffusers
        name = re.sub(r"(\.up_blocks\.)(\d+)", lambda match: f"{match[1]}{last - int(match[2])}", name)
        attention = ".attentions." in name and tensor.ndim == 4  # a 1 x 1 convolution there, linear in diffusers
        result[name] = tensor.flatten(1) if attention else tensor
    return result


def _apply(rules: Iterable[tuple[str, str]], name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _count(tensors: dict[str, Tensor], pattern: str) -> int:
    """How many different numbers the group of `pattern` takes in the names."""
    return len({match[1] for name in tensors if (match := re.match(pattern, name))})


def _build(tensors: dict[str, Tensor], config: dict[str, Any] | None, file: str) -> nn.Module:
    """The diffusers module for these tensors, without memory of its own. Raises CheckpointError."""
    import diffusers

    probe = tensors.get("encoder.down_blocks.0.resnets.0.conv1.weight")
    if probe is None or probe.ndim not in (4, 5):
        raise CheckpointError(f"{file} is {_describe(tensors)}; {EXPECTED}")
    video = probe.ndim == 5
    model = diffusers.AutoencoderKLWan if video else diffusers.AutoencoderKL
    try:
        config = config or (_wan_config if video else _kl_config)(tensors)
        with torch.device("meta"):
            module = model.from_config(config)
    except KeyError as error:
        raise CheckpointError(f"{file} lacks the tensor {error.args[0]}; {EXPECTED}") from None
    except Exception as error:  # whatever its constructor says to numbers that make no model
        raise CheckpointError(f"{file}: no {model.__name__} has such a configuration: {error}") from None
    return with_fast_norms(module) if video else module


def _describe(tensors: dict[str, Tensor]) -> str:
    if {"encoder.downsamples.0.residual.2.weight", "encoder.down_blocks.0.conv1.weight"} & tensors.keys():
        latent = tensors.get("conv2.weight", tensors.get("post_quant_conv.weight"))
        return "a Wan 2.1 VAE" + (f" with {latent.shape[0]} latent channels" if latent is not None else "")
    return f"something else: {len(tensors)} tensors" + "".join(f", {name}" for name in list(tensors)[:3])


def _wan_config(tensors: dict[str, Tensor]) -> dict[str, Any]:
    base, in_channels = tensors["encoder.conv_in.weight"].shape[:2]
    blocks = range(_count(tensors, r"encoder\.down_blocks\.(\d+)\."))
    multiples = [tensors[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] // base for i in blocks]
    temporal = [f"encoder.down_blocks.{i}.downsampler.time_conv.weight" in tensors for i in blocks[:-1]]
    decoder_width, channels = tensors["decoder.conv_in.weight"].shape[:2]
    patch = math.isqrt(in_channels // 3)
    return {
        "base_dim": base,
        "decoder_base_dim": decoder_width // multiples[-1],
        "z_dim": channels,
        "dim_mult": multiples,
        "num_res_blocks": _count(tensors, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "temperal_downsample": temporal,
        "is_residual": True,
        "in_channels": in_channels,
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "patch_size": patch,
        "scale_factor_spatial": patch * 2 ** len(temporal),
        "scale_factor_temporal": 2 ** sum(temporal),
    }


def _kl_config(tensors: dict[str, Tensor]) -> dict[str, Any]:
    blocks = _count(tensors, r"encoder\.down_blocks\.(\d+)\.")
    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "block_out_channels": [
            tensors[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(blocks)
        ],
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "layers_per_block": _count(tensors, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in tensors,
    }


def _check_names(module: nn.Module, tensors: dict[str, Tensor], file: str) -> None:
    """Raise CheckpointError unless names and shapes are the module's."""
    wanted = module.state_dict()
    problems = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [name for name in tensors if name not in wanted],
        "wrongly shaped": [
            f"{name} {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
            for name, value in wanted.items()
            if name in tensors and tensors[name].shape != value.shape
        ],
    }
    if any(problems.values()):
        parts = [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in problems.items() if names]
        raise CheckpointError(f"{file} doesn't fit a {type(module).__name__}: {'; '.join(parts)}; get the file again")


def _fill(module: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype, device, file: str) -> None:
    """Give the module its weights, taking each out of `tensors`."""
    weights = {}
    for name in module.state_dict():
        weights[name] = tensors.pop(name).to(device=device, dtype=dtype)
        if not torch.isfinite(weights[name]).all():
            raise NonFiniteError(f"{file}: {name} has NaN or infinity as {dtype}; get the file again or use float32")
    module.load_state_dict(weights, assign=True)


def _one_by_one(stream: Stream) -> Stream:
    """Pictures of a batch one after the other: a large batch takes no more memory than a small one."""
    return lambda batch: torch.cat([stream(one) for one in batch.split(1)])


def _empty_cache(coder: nn.Module) -> list[Tensor | None]:
    """One slot per causal convolution, as many as the coder can fill."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    return [None] * sum(isinstance(layer, WanCausalConv3d) for layer in coder.modules())


def _check_finite(frames: Tensor, first: int, name: str, remedy: str) -> None:
    """Raise NonFiniteError naming the first bad frame of (B, C, T, H, W), counted from `first`."""
    if torch.isfinite(frames).all():
        return
    bad = next(i for i in range(frames.shape[2]) if not torch.isfinite(frames[:, :, i]).all())
    raise NonFiniteError(f"{name} {first + bad} has NaN or infinity; {remedy}")
