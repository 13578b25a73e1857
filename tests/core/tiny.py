"""A whole tiny model on disk, in the layout of the bundled demo: random weights, a second to make."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from starflow_core.bundled import FLOW_FILE, TEXT_FILE, VAE_FILE
from starflow_core.model.config import Defaults, FlowConfig, PromptFormat
from starflow_core.training.demo.tokenizer import build_tokenizer
from starflow_core.weights.flow import save_flow
from starflow_core.weights.text import EMBEDDING_ALIAS, T5_CONFIG_KEY
from starflow_core.weights.vae import METADATA_KEY
from tests.core import models

CHANNELS = 4
TEXT_DIM = 12
T5 = {
    "d_model": TEXT_DIM, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "relative_attention_num_buckets": 8,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
WAN = {
    "base_dim": 4, "z_dim": CHANNELS, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "is_residual": True,
    "temperal_downsample": [False, True, True], "patch_size": 2, "in_channels": 12, "out_channels": 12,
    "scale_factor_spatial": 16, "latents_mean": [0.0] * CHANNELS, "latents_std": [1.0] * CHANNELS,
}  # fmt: skip
KL = {
    "latent_channels": CHANNELS, "block_out_channels": [4, 4, 4, 4], "norm_num_groups": 2, "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip


def write_model(folder: Path, kind: str = "video", **overrides) -> Path:
    """Flow, text encoder with tokenizer, and VAE under the bundled files' names; gives the folder.

    Defaults: clips of 9 frames of 32 x 32, window 5. `overrides` are fields of the configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_flow(folder / FLOW_FILE, kind, **overrides)
    write_text_encoder(folder / TEXT_FILE)
    write_vae(folder / VAE_FILE, kind)
    return folder


def write_flow(path: Path, kind: str = "video", **overrides) -> FlowConfig:
    """A flow in float32; gives its configuration."""
    video = kind == "video"
    settings = {
        "name": f"tiny {kind}",
        "prompt": PromptFormat(48, fps=video, noise_level=video, aspect=video),
        "text_dim": TEXT_DIM,
        "defaults": Defaults(1.0, 32, frames=9 if video else 1, fps=16 if video else 0),
    }
    flow = models.flow(kind=kind, **{**settings, **overrides})
    save_flow(flow, path, "fp32", {"license": "none"})
    return flow.config


def write_text_encoder(path: Path) -> None:
    """A T5 encoder as a single file with the demo's tokenizer beside it."""
    from transformers import T5Config, T5EncoderModel

    config = {"vocab_size": build_tokenizer(path.parent).get_vocab_size(), **T5}
    torch.manual_seed(0)
    weights = T5EncoderModel(T5Config(**config)).state_dict()
    weights.pop(EMBEDDING_ALIAS, None)
    save_file(weights, path, {T5_CONFIG_KEY: json.dumps(config)})


def write_vae(path: Path, kind: str = "video") -> None:
    """A VAE as a single file with its configuration: Wan 2.2's compression, or an image VAE's."""
    from diffusers import AutoencoderKL, AutoencoderKLWan

    model, config = (AutoencoderKLWan, WAN) if kind == "video" else (AutoencoderKL, KL)
    torch.manual_seed(0)
    weights = {name: tensor.contiguous() for name, tensor in model(**config).state_dict().items()}
    save_file(weights, path, {METADATA_KEY: json.dumps(config)})
