"""Streams of a VAE in tiles, for less memory."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import InputError

LEAST_TILE = 4  # in latent cells, half of it shared with the next one

Stream = Callable[[Tensor], Tensor]  # takes the chunks (B, C, t, h, w) of one clip in order


class TiledStream:
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
