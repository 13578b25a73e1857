"""Files with the weights of one tiny flow, each a real one, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from starflow_core.model.config import Denoiser, FlowConfig, PromptFormat
from starflow_core.model.latent import LatentFormat
from starflow_core.weights.flow import expected_shapes

CONFIG = FlowConfig(
    name="tiny",
    kind="video",
    latent=LatentFormat(3, 16, 4, later_factor=0.6),
    prompt=PromptFormat(tokens=4, fps=True),
    layers=(1, 1, 2),
    width=20,
    deep_width=40,
    text_dim=6,
    rope_length=5,
    noise_std=0.5,
    head_dim=20,
    window=3,
    denoiser=Denoiser(width=20, layers=2, window=2),
)
METADATA = {"starflow_config": json.dumps(CONFIG.to_dict())}


def random_weights(config: FlowConfig = CONFIG, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in expected_shapes(config).items()}


def write_safetensors(path: Path, weights=None, metadata=METADATA) -> Path:
    save_file(random_weights() if weights is None else weights, path, metadata)
    return path


def write_pickle(path: Path, content=None) -> Path:
    torch.save(random_weights() if content is None else content, path)
    return path


def write_shards(folder: Path) -> Path:
    """Two shards and their index."""
    weights = random_weights()
    names = list(weights)
    weight_map = {}
    for number, part in enumerate((names[:20], names[20:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, METADATA)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index
