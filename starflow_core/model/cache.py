"""The key/value cache of one block: allocated once, keys stored rotated, overwritten in place."""

from __future__ import annotations

import torch
from torch import Tensor


class Cache:
    """Keys and values (layers, rows, heads, slots, head_dim) in the compute type.

    Positions are absolute within a window, so a rotated key never changes. The caller knows which slots are valid; an
    unsettled one is simply overwritten.
    """

    def __init__(self, layers: int, rows: int, heads: int, slots: int, head_dim: int, dtype, device):
        shape = (layers, rows, heads, slots, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)

    @staticmethod
    def bytes(layers: int, rows: int, width: int, slots: int, itemsize: int) -> int:
        """Size of a cache whose heads together have `width` channels."""
        return 2 * layers * rows * width * slots * itemsize

    def store(self, layer: int, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new slots from `start` on; returns everything up to their end, as views."""
        stop = start + keys.shape[-2]
        self.keys[layer, ..., start:stop, :] = keys
        self.values[layer, ..., start:stop, :] = values
        return self.keys[layer, ..., :stop, :], self.values[layer, ..., :stop, :]
