"""Rotary positions: row, column and time of a token as rotation angles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TIME_CHANNELS = 8  # angles per head that carry time, or a text token's index


@dataclass(frozen=True)
class Rotary:
    """Cosine and sine of each slot's angles, both (slots, head_dim / 2), float32."""

    cos: Tensor
    sin: Tensor

    def __getitem__(self, slots: slice) -> Rotary:
        return Rotary(self.cos[slots], self.sin[slots])

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate adjacent pairs of channels of x (..., slots, head_dim), in float32."""
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((even * self.cos - odd * self.sin, odd * self.cos + even * self.sin), -1)
        return turned.flatten(-2).to(x.dtype)


def token_rotary(
    frames: int, height: int, width: int, *, length: float, head_dim: int, rounding: str, device
) -> Rotary:
    """Angles of a grid of tokens, frame by frame in row-major order.

    `length` is the reference length that the grid is scaled to, `rounding` one of `config.ROUNDINGS`. Shallow blocks
    pass frames=1, since they treat each frame on its own.
    """
    scale = length / (height * width) ** 0.5
    time, row, col = torch.meshgrid(
        torch.arange(frames, dtype=torch.float32),
        torch.arange(height, dtype=torch.float32) * scale,
        torch.arange(width, dtype=torch.float32) * scale,
        indexing="ij",
    )
    return _rotary(row.flatten(), col.flatten(), time.flatten(), head_dim, rounding, device)


def text_rotary(tokens: int, *, length: float, head_dim: int, rounding: str, device) -> Rotary:
    """Angles of the text prefix, which has no place in the picture but is spread over `length` steps of time."""
    time = torch.arange(tokens, dtype=torch.float32) * (length / tokens)
    nowhere = torch.zeros(tokens)
    return _rotary(nowhere, nowhere, time, head_dim, rounding, device)


def joined(first: Rotary, second: Rotary) -> Rotary:
    return Rotary(torch.cat((first.cos, second.cos)), torch.cat((first.sin, second.sin)))


def _rotary(row: Tensor, col: Tensor, time: Tensor, head_dim: int, rounding: str, device) -> Rotary:
    space = head_dim // 2 - TIME_CHANNELS
    space_rates = 10000.0 ** (-2 * torch.arange(space // 2, dtype=torch.float32) / space)
    time_rates = 10000.0 ** (-torch.arange(TIME_CHANNELS, dtype=torch.float32) / TIME_CHANNELS)
    positions = [row, col, time]
    if rounding == "positions":
        positions = [p.bfloat16().float() for p in positions]
    rates = (space_rates, space_rates, time_rates)
    angles = torch.cat([torch.outer(p, r) for p, r in zip(positions, rates, strict=True)], -1)
    if rounding != "exact":
        angles = angles.bfloat16().float()
    return Rotary(angles.cos().to(device), angles.sin().to(device))
