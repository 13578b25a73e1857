"""Noise that is the same on every device: drawn on the CPU, per batch element, frame by frame."""

from __future__ import annotations

import torch
from torch import Tensor

VERSION = 1  # of the scheme below; kept in file metadata, so that a seed can be understood later
CONTEXT_STREAM = 0x9E3779B97F4A7C15  # moves a seed to its second stream, for noise on given frames


def draw(seed: int, batch: int, frames: int, shape: tuple[int, int, int]) -> Tensor:
    """N(0, 1) of shape (batch, frames, C, H, W), float32, on the CPU.

    Element i has a generator of its own, seeded seed + i, that draws latent frames in order: a
    longer clip keeps its first frames' noise, a larger batch keeps each element's.
    """
    return _draw([seed + index for index in range(batch)], frames, shape)


def draw_context(seed: int, batch: int, frames: int, shape: tuple[int, int, int]) -> Tensor:
    """Noise for given frames: as `draw`, from the second stream of each element's seed."""
    return _draw([(seed + index) ^ CONTEXT_STREAM for index in range(batch)], frames, shape)


def _draw(seeds: list[int], frames: int, shape: tuple[int, int, int]) -> Tensor:
    elements = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed % 2**64)
        elements.append(torch.stack([torch.randn(shape, generator=generator) for _ in range(frames)]))
    return torch.stack(elements)
