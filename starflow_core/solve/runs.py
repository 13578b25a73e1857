"""Blocks as a solver evaluates them: a few slots at a time, with a key/value cache; the deep block with guidance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..model.cache import Cache, CacheShape
from ..model.flow import Block, Flow, Grid
from ..model.rope import Rotary, joined
from .guidance import guided


class BlockRun:
    """A block over one sequence, on the device of its cache. Slots count tokens, after any text prefix."""

    def __init__(self, block: Block, rotary: Rotary, cache: Cache, dtype: torch.dtype):
        self.block, self.rotary, self.cache, self.dtype = block, rotary, cache, dtype
        self.prefix = cache.shape.prefix

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
        self.block(nothing, self.rotary[: self.prefix], self.cache.at(0), text)

    def __call__(self, inputs: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """a, b of the slots from `start` on, given what is before each: inputs (rows, n, c) are the
        tokens of slots start - 1 .. start + n - 2. Their keys and values overwrite the cache."""
        first = self.prefix + start
        stop = first + inputs.shape[1]
        return self.block(inputs.to(self.dtype), self.rotary[first:stop], self.cache.at(first))

    def horizon(self, start: int) -> int:
        """As `Cache.horizon`, in tokens."""
        return self.cache.horizon(self.prefix + start) - self.prefix


def block_run(
    flow: Flow, block: Block, rotary: Rotary, rows: int, prefix: int = 0, widest: int | None = None,
    make_cache: Callable[..., Cache] = Cache,
) -> BlockRun:  # fmt: skip
    """A run of one of the flow's blocks with an empty cache for `rows` sequences of all slots that `rotary` has, of
    which at most `widest` are evaluated at once."""
    head_dim, slots = flow.config.head_dim, len(rotary.cos)
    layers, heads = len(block.attn_blocks), block.width // head_dim
    shape = CacheShape(layers, rows, heads, slots, head_dim, prefix, min(widest or slots, slots))
    return BlockRun(block, rotary, make_cache(shape, flow.compute_dtype, rotary.cos.device), flow.compute_dtype)


class DeepRun:
    """The deep block over one window: text prefix, then tokens, with guidance.

    The rows are the batch's, under guidance twice: conditional, then unconditional. `devices` names where they are:
    all in one run, or with two devices in a run each. At most `widest` tokens are evaluated at once. `make_cache` is
    called as `Cache` is.
    """

    def __init__(
        self, flow: Flow, grid: Grid, text: Tensor, uncond: Tensor | None, guidance: float,
        devices: tuple[torch.device, ...] | None = None, widest: int | None = None,
        make_cache: Callable[..., Cache] = Cache,
    ):  # fmt: skip
        self.guidance = guidance if uncond is not None else 0.0
        devices, prefix = devices or (text.device,), text.shape[1]
        copies = 2 if self.guidance else 1  # of the batch
        devices = devices[:copies]
        self.copies = copies // len(devices)  # in each run
        self.runs = []
        for device in devices:
            rotary = joined(flow.text_rotary(prefix, device), flow.rotary(grid, device))
            self.runs.append(block_run(flow, flow.deep, rotary, self.copies * len(text), prefix, widest, make_cache))
        self.fill(text, uncond)

    def start(self, tokens: Tensor) -> Tensor:
        return self.runs[0].start(tokens)

    def horizon(self, start: int) -> int:
        return self.runs[0].horizon(start)

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
