"""Small random flows for tests: weights that make a and b depend on the past, but gently."""

from __future__ import annotations

import random

import torch

from starflow_core.model.config import ROUNDINGS, Denoiser, FlowConfig, PromptFormat
from starflow_core.model.flow import Flow
from starflow_core.model.latent import LatentFormat


def config(kind="video", layers=(1, 1, 2), channels=4, patch_size=1, **overrides) -> FlowConfig:
    video = kind == "video"
    settings = {
        "kind": kind,
        "latent": LatentFormat(channels, 16 if video else 8, 4 if video else 1, (0.1,), (1.3,), 0.6 if video else 1.0),
        "prompt": PromptFormat(5, fps=video, noise_level=video, aspect=video),
        "layers": layers,
        "width": 48,
        "deep_width": 72,
        "text_dim": 12,
        "rope_length": 5,
        "noise_std": 0.3,
        "head_dim": 24,
        "patch_size": patch_size,
        "rounding": "exact",
        "window": 5 if video else 0,
        "denoiser": Denoiser(48, 2, 3) if video else None,
        "tasks": ("text", "first_frame", "extend", "edit", "last_frame") if video else ("text",),
    }
    return FlowConfig(**{**settings, **overrides})


def flow(seed=0, **options) -> Flow:
    model = Flow(config(**options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = 0.5 if parameter.ndim < 2 or "sos" in name else 0.8 * parameter.shape[-1] ** -0.5
        offset = 1.0 if name.endswith("norm.weight") and "final" not in name else 0.0
        parameter.data = offset + scale * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(model: Flow, batch=1, seed=1):
    return randn(batch, model.config.prompt.tokens, model.config.text_dim, seed=seed)


def random_case(seed: int):
    """A flow of random shape with latents (B, T, C, H, W) that suit it."""
    rng = random.Random(seed)
    kind = rng.choice(("image", "video"))
    patch = rng.choice((1, 1, 2))
    layers = tuple(rng.randint(1, 2) for _ in range(rng.randint(2, 4)))
    options = {"channels": rng.randint(1, 5), "seq_order": rng.choice(("L2R", "R2L"))}
    options["rounding"] = rng.choice(ROUNDINGS)
    model = flow(seed, kind=kind, layers=layers, patch_size=patch, **options)
    batch, frames = rng.randint(1, 3), rng.randint(1, 4) if kind == "video" else 1
    height, width = patch * rng.randint(1, 5), patch * rng.randint(1, 5)
    shape = (batch, frames, model.config.latent.channels, height, width)
    return model, randn(*shape, seed=seed)


def relative_error(actual, exact) -> float:
    return float((actual - exact).square().sum() / exact.square().sum())
