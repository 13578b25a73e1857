"""The key/value cache of one block.

Keys are stored rotated: positions are absolute within a window, so a rotated key never changes. What a solver works on
and what has settled lately is in the compute type; with `CacheSettings` settled slots are kept in 8 bit, or elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .attention import attend, merge
from .transformer import Attend

GROUP = 256  # slots that leave the compute type together
PIECE = 4096  # slots that are expanded or brought in at once
SCALE = torch.bfloat16  # of an 8-bit row: float32's range, and rounding it costs nothing, since the row follows it


@dataclass(frozen=True)
class CacheSettings:
    """How settled slots are kept: in 8 bit if `quantised`, in main memory if `offloaded`."""

    quantised: bool = False
    offloaded: bool = False

    @property
    def in_groups(self) -> bool:
        return self.quantised or self.offloaded


RESIDENT = CacheSettings()  # all in the compute type, on the block's device


@dataclass(frozen=True)
class CacheShape:
    """`slots` of `rows` sequences, the first `prefix` of them text. At most `widest` slots are evaluated at once."""

    layers: int
    rows: int
    heads: int
    slots: int
    head_dim: int
    prefix: int
    widest: int

    def room(self, settings: CacheSettings) -> int:
        """Slots that are kept in the compute type."""
        return min(self.slots, max(self.widest + GROUP, self.prefix)) if settings.in_groups else self.slots

    def bytes(self, settings: CacheSettings, itemsize: int) -> tuple[int, int]:
        """What a cache takes on its device and in main memory, with a compute type of `itemsize` bytes."""
        row = 2 * self.rows * self.heads  # keys and values of a slot and layer
        here = row * self.layers * self.room(settings) * self.head_dim * itemsize
        if not settings.in_groups:
            return here, 0
        value = self.head_dim + SCALE.itemsize if settings.quantised else self.head_dim * itemsize
        settled = row * self.layers * self.slots * value
        here += row * min(PIECE, self.slots) * self.head_dim * itemsize
        return (here, settled) if settings.offloaded else (here + settled, 0)

    def moving(self, settings: CacheSettings) -> int:
        """What attention takes on the device besides: a piece in 8 bit that has come from main memory."""
        piece = 2 * self.rows * self.heads * min(PIECE, self.slots)
        return piece * (self.head_dim + SCALE.itemsize) if settings.quantised and settings.offloaded else 0


class Cache:
    """Keys and values of a block whose slots settle from left to right.

    Slots after the prefix form groups of GROUP. With settings that keep settled slots in another form, an evaluation
    sees all groups before its first slot's group in that form, and the rest in the compute type: so what a slot sees
    depends on its place alone, not on how many slots a solver takes at once, and a group is quantised once, not in
    every sweep, when its rounding would move.
    """

    def __init__(self, shape: CacheShape, dtype: torch.dtype, device: torch.device, settings: CacheSettings = RESIDENT):
        self.shape, self.settings, self.settled = shape, settings, 0  # slots that left the compute type
        size = (shape.rows, shape.heads)
        factory = {"dtype": dtype, "device": device}
        self.recent = torch.empty(2, shape.layers, *size, shape.room(settings), shape.head_dim, **factory)
        if settings.in_groups:
            self.store = Store(shape, dtype, device, settings)

    def at(self, start: int) -> Callable[[int], Attend]:
        """Attention by layer for an evaluation of slots from `start` on, whose keys and values overwrite what was
        there. All slots before have settled; to go back, begin at the first of a group."""
        boundary = self._boundary(start)
        if boundary < self.settled:
            assert start == boundary, f"slot {start} lies within a group that has settled"
        elif boundary > self.settled:
            self._settle(boundary, start)
        self.settled = boundary
        return lambda layer: partial(self._attend, layer, start)

    def before(self, start: int) -> Tensor:
        """Keys and values (2, layers, rows, heads, start, head_dim) of all slots before `start`, where all are in the
        compute type."""
        assert not self.settings.in_groups, "settled slots are elsewhere"
        return self.recent[..., :start, :]

    def put(self, start: int, both: Tensor) -> None:
        """The same of slots from `start` on, which overwrite what was there."""
        self.recent[..., start : start + both.shape[-2], :] = both

    def take(self, rows: Tensor) -> None:
        """Go on with these rows (rows,), which may repeat."""
        assert not self.settings.in_groups, "settled slots are elsewhere"
        for layer in self.recent.unbind(1):  # one at a time, which takes the least beside the cache
            layer.copy_(layer[:, rows.to(layer.device)])

    def horizon(self, start: int) -> int:
        """Slots from this one on have to be evaluated again once the slots between `start` and it have settled."""
        return self._boundary(start) + GROUP if self.settings.in_groups else self.shape.slots

    def _boundary(self, start: int) -> int:
        """The first slot of the group of `start`."""
        after = start - self.shape.prefix
        if not self.settings.in_groups or after < 0:
            return 0
        return start - after % GROUP

    def _settle(self, boundary: int, start: int) -> None:
        """Move slots up to `boundary` to the store, and what has settled after it to the front."""
        leaving, kept = boundary - self.settled, start - boundary
        for layer in range(self.shape.layers):
            recent = self.recent[:, layer]
            self.store.put(layer, self.settled, recent[..., :leaving, :])
            recent[..., :kept, :] = recent[..., leaving : leaving + kept, :].clone()

    def _attend(self, layer: int, start: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        offset = start - self.settled
        recent_keys, recent_values = self.recent[:, layer]
        now = slice(offset, offset + keys.shape[2])
        recent_keys[:, :, now], recent_values[:, :, now] = keys, values

        def parts() -> Iterator[tuple[Tensor, Tensor]]:
            if self.settled:
                yield from (attend(queries, *piece) for piece in self.store.pieces(layer, self.settled))
            if offset:
                yield attend(queries, recent_keys[:, :, :offset], recent_values[:, :, :offset])
            yield attend(queries, keys, values, causal=True)

        return merge(parts())


class Store:
    """Settled keys and values, in 8 bit or in main memory, given back a piece at a time through one buffer."""

    def __init__(self, shape: CacheShape, dtype: torch.dtype, device: torch.device, settings: CacheSettings):
        size = (2, shape.layers, shape.rows, shape.heads, shape.slots)
        home = torch.device("cpu") if settings.offloaded else device
        pinned = settings.offloaded and device.type == "cuda"
        kind = torch.int8 if settings.quantised else dtype
        self.data = torch.empty(*size, shape.head_dim, dtype=kind, device=home, pin_memory=pinned)
        self.scales = torch.empty(*size, 1, dtype=SCALE, device=home, pin_memory=pinned) if settings.quantised else None
        piece = (2, shape.rows, shape.heads, min(PIECE, shape.slots), shape.head_dim)
        self.buffer = torch.empty(piece, dtype=dtype, device=device)

    def put(self, layer: int, start: int, both: Tensor) -> None:
        """Keys and values (2, rows, heads, n, head_dim) of a layer's slots from `start` on."""
        now = slice(start, start + both.shape[-2])
        if self.scales is not None:
            both, scales = quantised(both)
            self.scales[:, layer, ..., now, :] = scales
        self.data[:, layer, ..., now, :] = both

    def pieces(self, layer: int, stop: int) -> Iterator[Tensor]:
        """Keys and values (2, rows, heads, n, head_dim) of a layer's slots before `stop`, in the compute type. Each
        piece is gone when the next is asked for."""
        for start in range(0, stop, PIECE):
            now = slice(start, min(start + PIECE, stop))
            piece = self.buffer[..., : now.stop - now.start, :]
            data = self.data[:, layer, ..., now, :]
            if self.scales is None:
                piece.copy_(data, non_blocking=True)
            else:
                data, scales = (
                    x.to(piece.device, non_blocking=True) for x in (data, self.scales[:, layer, ..., now, :])
                )
                torch.mul(data, scales.to(piece.dtype), out=piece)
            yield piece


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (.., n, d) in 8 bit with one scale for each row of d: values (.., n, d) and scales (.., n, 1)."""
    x = x.float()
    scales = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30).to(SCALE)
    return (x / scales.float()).round().clamp(-127, 127).to(torch.int8), scales
