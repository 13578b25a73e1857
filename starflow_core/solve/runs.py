"""Blocks as a solver evaluates them: a few slots at a time, with a key/value cache; the deep block with guidance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..model.cache import Cache
from ..model.flow import Block, Flow, Grid
from ..model.rope import Rotary, joined
from ..model.transformer import Attend, causal_tail
from .guidance import guided


class BlockRun:
    """A block over one sequence, on the device of its cache. Slots count tokens, after any text prefix."""

    def __init__(self, block: Block, rotary: Rotary, cache: Cache, dtype: torch.dtype, prefix: int = 0):
        self.block, self.rotary, self.cache, self.dtype, self.prefix = block, rotary, cache, dtype, prefix

    @property
    def device(self) -> torch.device:
        return self.rotary.cos.device

    def start(self, tokens: Tensor) -> Tensor:
        """The start token, (rows, 1, c) for tokens (rows, L, c)."""
        return self.block.start(tokens)

    def fill(self, text: Tensor) -> None:
        """Run the text prefix (rows, L, D), so that its keys and values are in the cache.

        May be called again with other text: what follows has to be run again, too.
        """
        text = text.to(self.device, self.dtype)
        nothing = text.new_empty(len(text), 0, self.block.sos_embed.shape[-1])
        self.block(nothing, self.rotary[: self.prefix], self._attend(0, self.prefix), text)

    def __call__(self, inputs: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """a, b of the slots from `start` on, given what is before each: inputs (rows, n, c) are the
        tokens of slots start - 1 .. start + n - 2. Their keys and values overwrite the cache."""
        first = self.prefix + start
        stop = first + inputs.shape[1]
        return self.block(inputs.to(self.dtype), self.rotary[first:stop], self._attend(first, stop))

    def _attend(self, start: int, stop: int) -> Callable[[int], Attend]:
        tail = causal_tail(stop - start, stop, self.device)
        return lambda layer: lambda q, k, v: tail(q, *self.cache.store(layer, start, k, v))


def block_run(
    flow: Flow, block: Block, rotary: Rotary, rows: int, prefix: int = 0, make_cache: Callable[..., Cache] = Cache
) -> BlockRun:
    """A run of one of the flow's blocks with an empty cache for `rows` sequences of all slots that `rotary` has."""
    head_dim = flow.config.head_dim
    shape = (len(block.attn_blocks), rows, block.width // head_dim, len(rotary.cos), head_dim)
    return BlockRun(
        block, rotary, make_cache(*shape, flow.compute_dtype, rotary.cos.device), flow.compute_dtype, prefix
    )


class DeepRun:
    """The deep block over one window: text prefix, then tokens, with guidance.

    The rows are the batch's, under guidance twice: conditional, then unconditional. `devices` names where they are:
    all in one run, or with two devices in a run each. `make_cache` is called as `Cache` is.
    """

    def __init__(
        self, flow: Flow, grid: Grid, text: Tensor, uncond: Tensor | None, guidance: float,
        devices: tuple[torch.device, ...] | None = None, make_cache: Callable[..., Cache] = Cache,
    ):  # fmt: skip
        self.guidance = guidance if uncond is not None else 0.0
        devices, prefix = devices or (text.device,), text.shape[1]
        copies = 2 if self.guidance else 1  # of the batch
        devices = devices[:copies]
        self.copies = copies // len(devices)  # in each run
        self.runs = []
        for device in devices:
            rotary = joined(flow.text_rotary(prefix, device), flow.rotary(grid, device))
            self.runs.append(block_run(flow, flow.deep, rotary, self.copies * len(text), prefix, make_cache))
        self.fill(text, uncond)

    def start(self, tokens: Tensor) -> Tensor:
        return self.runs[0].start(tokens)

    def fill(self, text: Tensor, uncond: Tensor | None) -> None:
        """Run the prompts (B, L, D) through the prefix; `uncond`, for guidance, may be one row. Repeatable."""
        rows = torch.cat((text, uncond.expand_as(text).to(text.device))) if self.guidance else text
        for run, part in zip(self.runs, rows.chunk(len(self.runs)), strict=True):
            run.fill(part)

    def __call__(self, inputs: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """a, b (B, n, c), guided, on the inputs' device; `inputs` and `start` as in `BlockRun`."""
        parts = [run(inputs.repeat(self.copies, 1, 1).to(run.device), start) for run in self.runs]
        a, b = (torch.cat([part.to(inputs.device) for part in both]) for both in zip(*parts, strict=True))
        if not self.guidance:
            return a, b
        (a_c, a_u), (b_c, b_u) = a.chunk(2), b.chunk(2)
        return guided(a_c, b_c, a_u, b_u, self.guidance)
