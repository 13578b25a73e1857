"""Image and video VAEs: find, check and load one in any layout they are published in."""

from __future__ import annotations

import copy
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, NonFiniteError
from ..model.schema import check_fields, completed, number, read_object, shown
from ..model.vae.codec import VAE
from ..model.vae.layers import with_fast_layers
from .keys import check_tensors, count_numbers, module_shapes
from .tensorfiles import StoredTensor, TensorFile, save_tensors
from .vae_names import with_diffusers_names

METADATA_KEY = "starflow_vae_config"  # constructor arguments as JSON, in a safetensors file's metadata
EXPECTED_VAE = "expected a Wan 2.2 VAE (AutoencoderKLWan with residual shortcuts) or an AutoencoderKL"


@dataclass(frozen=True)
class WanOptions:
    """What the tensors of a Wan VAE don't tell of its configuration."""

    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = number(1e-6, 1e6, None)

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class KLOptions:
    """What the tensors of an AutoencoderKL don't tell of its configuration."""

    norm_num_groups: int | None = number(1, 4096, None)
    act_fn: str | None = None

    def __post_init__(self):
        check_fields(self)
        if self.act_fn not in (None, "silu", "swish"):
            raise CheckpointError(f"act_fn is {shown(self.act_fn)}, expected silu")


def load_vae(path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> VAE:
    """The VAE that `find_vae` finds, frozen; `dtype` is float32 unless given, whatever the file holds.

    Raises NonFiniteError for NaN or infinity in its weights.
    """
    return find_vae(path).load(dtype, device)


def save_vae(vae: VAE, path: str | Path, metadata: dict[str, str]) -> None:
    """Write a VAE in float32 as one file, by diffusers' names, with its configuration among the metadata. Raises
    InputError if it cannot be written, NonFiniteError for NaN or infinity; nothing is left behind then."""
    config = {name: value for name, value in vae.module.config.items() if not name.startswith("_")}
    tensors = {name: tensor.cpu() for name, tensor in vae.module.state_dict().items()}
    save_tensors(tensors, path, "fp32", metadata | {METADATA_KEY: json.dumps(config)})


@dataclass(frozen=True)
class VAEFile:
    """A VAE that was inspected, not loaded: the `weights` in their file, by diffusers' names, and the
    `outline`, which has shapes but no memory."""

    weights: TensorFile
    outline: VAE

    def load(self, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> VAE:
        """Read the weights, as float32 unless `dtype` is given."""
        # Weights outlive the caller's inference mode.
        with torch.inference_mode(False), torch.no_grad():
            module = copy.deepcopy(self.outline.module)
            _fill(module, self.weights, dtype or torch.float32, device)
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
    for missing, unexpected, wrongly shaped or quantised tensors.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise CheckpointError(f"no VAE at {path}; give a file or a diffusers folder")
    config = None
    if os.path.isdir(path):
        path, config = _open_diffusers_folder(path)
    file = TensorFile.open(path)
    if config is None and METADATA_KEY in file.metadata:
        config = read_object(file.metadata[METADATA_KEY], f"metadata {METADATA_KEY} of {path.name}")
    weights = replace(file, tensors=with_diffusers_names(file.tensors))
    module = _make_vae(weights, config)
    remedy = "Download the file again, in bf16, fp16 or fp32."
    check_tensors(weights.tensors, module_shapes(module), path.name, f"a {type(module).__name__}", remedy)
    return VAEFile(weights, VAE(module))


def _open_diffusers_folder(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The weights file and configuration of a diffusers folder, or of the `vae` in a pipeline's."""
    if not os.path.isfile(folder / "config.json"):
        folder = folder / "vae" if os.path.isdir(folder / "vae") else folder
    weights = folder / "diffusion_pytorch_model.safetensors"
    for file in (folder / "config.json", weights):
        if not os.path.isfile(file):
            raise CheckpointError(f"{folder} has no {file.name}; expected a VAE's folder as diffusers saves it")
    text = (folder / "config.json").read_text(encoding="utf-8", errors="replace")
    config = read_object(text, str(folder / "config.json"))
    name = config.get("_class_name")
    if name not in (None, "AutoencoderKL", "AutoencoderKLWan"):
        raise CheckpointError(f"{folder} contains a {shown(name)}; {EXPECTED_VAE}")
    return weights, config


def _make_vae(weights: TensorFile, config: dict[str, Any] | None) -> nn.Module:
    """The diffusers module for these weights, without memory of its own. Raises CheckpointError."""
    import diffusers

    file, tensors = weights.path.name, weights.tensors
    probe = tensors.get("encoder.down_blocks.0.resnets.0.conv1.weight")
    if probe is None or len(probe.shape) not in (4, 5):
        raise CheckpointError(f"{file} is {_describe_other(tensors)}; {EXPECTED_VAE}")
    video = len(probe.shape) == 5
    model = diffusers.AutoencoderKLWan if video else diffusers.AutoencoderKL
    try:
        derive, options = (_wan_config, WanOptions) if video else (_kl_config, KLOptions)
        config = completed(derive(tensors), config or {}, options, f"the configuration of {file}")
        with torch.device("meta"):
            module = model.from_config(config)
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{file} lacks the tensor {error.args[0]}; {EXPECTED_VAE}") from None
    except Exception as error:  # whatever its constructor says to numbers that make no model
        raise CheckpointError(f"{file}: no {model.__name__} has such a configuration: {error}") from None
    return with_fast_layers(module) if video else module


def _describe_other(tensors: dict[str, StoredTensor]) -> str:
    if {"encoder.downsamples.0.residual.2.weight", "encoder.down_blocks.0.conv1.weight"} & tensors.keys():
        latent = tensors.get("conv2.weight", tensors.get("post_quant_conv.weight"))
        return "a Wan 2.1 VAE" + (f" with {latent.shape[0]} latent channels" if latent is not None else "")
    return f"something else: {len(tensors)} tensors" + "".join(f", {name}" for name in list(tensors)[:3])


def _wan_config(tensors: dict[str, StoredTensor]) -> dict[str, Any]:
    base, in_channels = tensors["encoder.conv_in.weight"].shape[:2]
    blocks = range(count_numbers(tensors, r"encoder\.down_blocks\.(\d+)\."))
    multiples = [tensors[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] // base for i in blocks]
    temporal = [f"encoder.down_blocks.{i}.downsampler.time_conv.weight" in tensors for i in blocks[:-1]]
    decoder_width, channels = tensors["decoder.conv_in.weight"].shape[:2]
    patch = math.isqrt(in_channels // 3)
    return {
        "base_dim": base,
        "decoder_base_dim": decoder_width // multiples[-1],
        "z_dim": channels,
        "dim_mult": multiples,
        "num_res_blocks": count_numbers(tensors, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "temperal_downsample": temporal,
        "is_residual": True,
        "in_channels": in_channels,
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "patch_size": patch,
        "scale_factor_spatial": patch * 2 ** len(temporal),
        "scale_factor_temporal": 2 ** sum(temporal),
    }


def _kl_config(tensors: dict[str, StoredTensor]) -> dict[str, Any]:
    blocks = count_numbers(tensors, r"encoder\.down_blocks\.(\d+)\.")
    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "block_out_channels": [
            tensors[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(blocks)
        ],
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "layers_per_block": count_numbers(tensors, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in tensors,
    }


def _fill(module: nn.Module, weights: TensorFile, dtype: torch.dtype, device) -> None:
    """Give the module its weights."""
    state = {}
    for name in weights.tensors:
        state[name] = weights.tensor(name).to(device=device, dtype=dtype)
        if not torch.isfinite(state[name]).all():
            raise NonFiniteError(
                f"{weights.path.name}: {name} has NaN or infinity as {dtype}; download the file again, or use float32"
            )
    module.load_state_dict(state, assign=True)
