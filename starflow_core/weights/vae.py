"""Image and video VAEs of diffusers behind one class, loaded from any layout they are published in.

All tensors are VAE space: pixels (B, 3, F, H, W) in [-1, 1] and raw latents (B, C, T, h, w) of a
video VAE, (B, 3, H, W) and (B, C, h, w) of an image VAE. Mean, deviation and scale belong to the caller.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, NonFiniteError
from ..model.vae.codec import VAE
from ..model.vae.norms import with_fast_norms
from .tensorfiles import TensorFile
from .vae_names import PREFIX, _count, _rename

METADATA_KEY = "starflow_vae_config"  # constructor arguments as JSON, in a safetensors file's metadata
EXPECTED = "expected a Wan 2.2 VAE (AutoencoderKLWan with residual shortcuts) or an AutoencoderKL"


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
