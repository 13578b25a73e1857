"""The trained demo as the files that ship."""

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
from ...weights.text import EMBEDDING_ALIAS, T5_CONFIG_KEY
from ...weights.vae import METADATA_KEY
from . import clips
from .bank import Bank
from .flow import TEXT_CONFIG, FlowWithText
from .tokenizer import build_tokenizer
from .vae import CONFIG

LICENSE = {"license": "Apache-2.0", "made_by": "python -m starflow_core.training"}


def write_bundle(folder: Path, vae, model: FlowWithText, banks: list[Bank]) -> None:
    """Flow, text encoder, tokenizer and VAE in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    model.flow.config = with_preview(model.flow.config, banks[0])
    save_flow(model.flow, folder / FLOW_FILE, "bf16", LICENSE)
    text = {name: tensor for name, tensor in model.text.state_dict().items() if name != EMBEDDING_ALIAS}
    shape = {"vocab_size": len(text["shared.weight"]), **TEXT_CONFIG}
    save_tensors(text, folder / TEXT_FILE, "bf16", LICENSE | {T5_CONFIG_KEY: json.dumps(shape)})
    shape = {**CONFIG, "latents_mean": vae.config.latents_mean, "latents_std": vae.config.latents_std}
    save_tensors(vae.state_dict(), folder / VAE_FILE, "bf16", LICENSE | {METADATA_KEY: json.dumps(shape)})
    build_tokenizer(folder)


def with_preview(config: FlowConfig, bank: Bank) -> FlowConfig:
    """The configuration with the factors that turn a latent into a rough colour, by least squares."""
    latent = config.latent
    picks = random.Random(0).sample(range(len(bank.scenes)), min(64, len(bank.scenes)))
    latents = bank.clips[picks]
    frames, height, width = latents.shape[2:]
    x = to_flow_space(latent, latents, later_factors(config, "text", 0, frames)).transpose(1, 2)
    scenes, size = [bank.scenes[i] for i in picks], (height * latent.spatial, width * latent.spatial)
    pixels = clips.render(scenes, latent.frames(frames), *size)
    colours = _mean_colours(pixels[:, :, :: latent.temporal], latent.spatial)
    rows = torch.cat((x.transpose(0, 1).flatten(1), torch.ones(1, x[:, 0].numel()))).T
    # In float64, rounding in the solver doesn't reach the file: the same banks give the same factors.
    solution = torch.linalg.lstsq(rows.double(), colours.transpose(0, 1).flatten(1).T.double()).solution.float()
    rgb, bias = solution[:-1].tolist(), solution[-1].tolist()
    return replace(config, latent=replace(latent, rgb=tuple(map(tuple, rgb)), rgb_bias=tuple(bias)))


def _mean_colours(pixels: Tensor, size: int) -> Tensor:
    """(B, 3, F, H, W) averaged over size x size pixels."""
    return torch.nn.functional.avg_pool3d(pixels, (1, size, size))
