"""Writes the trained demo as the files that ship, and as the job defaults that suit it."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...bundled import FLOW_FILE, TEXT_FILE, VAE_FILE
from ...jobs.context import later_factors
from ...model.config import FlowConfig
from ...model.latent import to_flow_space
from ...weights.flow import save_flow
from ...weights.tensorfiles import save_tensors
from ...weights.text import T5_CONFIG_KEY
from ...weights.vae import METADATA_KEY
from . import clips, vae
from .bank import Bank
from .flow import TEXT_CONFIG, Model
from .tokenizer import build_tokenizer

LICENSE = {"license": "Apache-2.0", "made_by": "python -m starflow_core.training"}


def write(folder: Path, module, model: Model, banks: list[Bank]) -> None:
    """Flow, text encoder, tokenizer and VAE in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    model.flow.config = with_preview(model.flow.config, banks[0])
    save_flow(model.flow, folder / FLOW_FILE, "bf16", LICENSE)
    text = {n: t for n, t in model.text.state_dict().items() if n != "encoder.embed_tokens.weight"}
    rows = text["shared.weight"].shape[0]
    save_tensors(
        text, folder / TEXT_FILE, "bf16", LICENSE | {T5_CONFIG_KEY: json.dumps({"vocab_size": rows, **TEXT_CONFIG})}
    )
    shape = {**vae.CONFIG, "latents_mean": module.config.latents_mean, "latents_std": module.config.latents_std}
    save_tensors(module.state_dict(), folder / VAE_FILE, "bf16", LICENSE | {METADATA_KEY: json.dumps(shape)})
    build_tokenizer(folder)


def with_preview(config: FlowConfig, bank: Bank) -> FlowConfig:
    """The configuration with the factors that turn a latent into a rough colour, by least squares."""
    picks = random.Random(0).sample(range(len(bank.scenes)), min(64, len(bank.scenes)))
    latents = bank.clips[picks]
    frames = latents.shape[2]
    x = to_flow_space(config.latent, latents, later_factors(config, "text", 0, frames)).transpose(1, 2)
    height, width = latents.shape[-2] * config.latent.spatial, latents.shape[-1] * config.latent.spatial
    pixels = clips.render([bank.scenes[i] for i in picks], config.latent.frames(frames), height, width)
    colours = _mean_colours(pixels[:, :, :: config.latent.temporal], config.latent.spatial)
    rows = torch.cat((x.transpose(0, 1).flatten(1), torch.ones(1, x[:, 0].numel()))).T
    solution = torch.linalg.lstsq(rows, colours.transpose(0, 1).flatten(1).T).solution
    rgb, bias = solution[:-1].tolist(), solution[-1].tolist()
    return replace(config, latent=replace(config.latent, rgb=tuple(map(tuple, rgb)), rgb_bias=tuple(bias)))


def _mean_colours(pixels: Tensor, size: int) -> Tensor:
    """(B, 3, F, H, W) averaged over size x size pixels."""
    return torch.nn.functional.avg_pool3d(pixels, (1, size, size))
