"""Blocks as a solver evaluates them: with a cache, and the deep one with its text and guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.cache import Cache
from ..model.flow import Block, Flow, Grid
from ..model.rope import Rotary, joined
from ..model.transformer import Attend, causal_tail
from .guidance import guided


class BlockRun:
    """A block with a cache, as a solver evaluates it. Slots count tokens, after any text prefix."""

    def __init__(self, flow: Flow, block: Block, rotary: Rotary, rows: int, prefix: int = 0):
        self.block, self.rotary, self.prefix, self.dtype = block, rotary, prefix, flow.compute_dtype
        head_dim = flow.config.head_dim
        heads = block.width // head_dim
        slots = len(rotary.cos)
        self.cache = Cache(len(block.attn_blocks), rows, heads, slots, head_dim, self.dtype, rotary.cos.device)

    def start(self, tokens: Tensor) -> Tensor:
        return self.block.start(tokens)

    def __call__(self, inputs: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """a, b of the slots from `start` on, given what is before each: inputs (rows, n, c) are the
        tokens of slots start - 1 .. start + n - 2. Their keys and values overwrite the cache."""
        hidden = self.block.proj_in(inputs.to(self.dtype))
        return self.block.affine(self.run(hidden, self.prefix + start))

    def run(self, hidden: Tensor, start: int) -> Tensor:
        stop = start + hidden.shape[1]
        tail = causal_tail(hidden.shape[1], stop, hidden.device)

        def attend(layer: int) -> Attend:
            return lambda q, k, v: tail(q, *self.cache.store(layer, start, k, v))

        return self.block.layers(hidden, self.rotary[start:stop], attend)


class DeepRun(BlockRun):
    """The deep block over one window: the text prefix, run once, and guidance.

    With guidance the cache has the batch's rows twice, conditional first.
    """

    def __init__(self, flow: Flow, grid: Grid, text: Tensor, uncond: Tensor | None, guidance: float):
        self.guidance = guidance if uncond is not None else 0.0
        rows = torch.cat((text, uncond.expand_as(text))) if self.guidance else text
        prefix, device = text.shape[1], text.device
        rotary = joined(flow.text_rotary(prefix, device), flow.rotary(grid, device))
        super().__init__(flow, flow.deep, rotary, len(rows), prefix)
        self.run(flow.deep.proj_txt(rows.to(self.dtype)), 0)

    def __call__(self, inputs: Tensor, start: int) -> tuple[Tensor, Tensor]:
        if not self.guidance:
            return super().__call__(inputs, start)
        a, b = super().__call__(inputs.repeat(2, 1, 1), start)
        (a_c, a_u), (b_c, b_u) = a.chunk(2), b.chunk(2)
        return guided(a_c, b_c, a_u, b_u, self.guidance)
