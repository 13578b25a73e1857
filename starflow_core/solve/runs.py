"""Blocks as a solver evaluates them: a few slots at a time, with a key/value cache; the deep block with guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from ..model.cache import Cache, CacheShape
from ..model.compiled import WIDEST, Evaluate, swept
from ..model.flow import Block, Flow, Grid
from ..model.rope import Rotary, joined
from .beside import carried
from .guidance import guided
from .solvers import PRESETS, Statistics, Window, absorb, solve_span, span_for
from .windows import Extent, Prompts

# Guidance of frames that are brought under another prompt, at most. Inverting with it would undo in part what sampling
# with it does. Tuned on scenes other than the reported ones of benchmarks/timelines.py.
INVERTING, BRINGING = 0.0, 1.0

T = TypeVar("T")


class BlockRun:
    """A block over one sequence, on the device of its cache. Slots count tokens, after any text prefix. Sweeps go
    through a compiled `graph` if one is given."""

    def __init__(
        self, block: Block, rotary: Rotary, cache: Cache, dtype: torch.dtype, graph: Evaluate | None = None
    ):  # fmt: skip
        self.block, self.rotary, self.cache, self.dtype, self.graph = block, rotary, cache, dtype, graph
        self.prefix = cache.shape.prefix

    @property
    def device(self) -> torch.device:
        return self.rotary.cos.device

    def fill(self, text: Tensor) -> None:
        """Run the text prefix (rows, L, D), so that its keys and values are in the cache.

        May be called again with other text: what follows has to be run again, too.
        """
        text = text.to(self.device, self.dtype)
        nothing = text.new_empty(len(text), 0, self.block.channels)
        self.block(nothing, self.rotary[: self.prefix], self.cache.at(0), text)

    def __call__(self, before: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """a, b (rows, n, c) of n slots from `start` on, given the tokens `before` each (as in `Block.forward`: n, or
        n - 1 where `start` is 0). Their keys and values overwrite the cache."""
        at, first = self.prefix + start, start == 0
        stop = at + before.shape[1] + first
        before = before.to(self.dtype)
        if self.graph is None or at < 2 or stop - at > WIDEST:
            return self.block(before, self.rotary[at:stop], self.cache.at(at), first=first)
        inputs = self.block.started(before) if first else before
        a, b, both = swept(self.graph, self.block, inputs, self.rotary[at:], self.cache.before(at))
        self.cache.put(at, both)
        return a, b

    def horizon(self, start: int) -> int:
        """As `Cache.horizon`, in tokens."""
        return self.cache.horizon(self.prefix + start) - self.prefix

    def agree(self, leading: int, known: int, residual: float) -> tuple[int, int, float]:
        return leading, known, residual


def block_run(
    flow: Flow, block: Block, rotary: Rotary, rows: int, prefix: int = 0, widest: int | None = None,
    make_cache: Callable[..., Cache] = Cache,
) -> BlockRun:  # fmt: skip
    """A run of one of the flow's blocks with an empty cache for `rows` sequences of all slots that `rotary` has, of
    which at most `widest` are evaluated at once."""
    head_dim, slots = flow.config.head_dim, len(rotary.cos)
    shape = CacheShape(len(block.attn_blocks), rows, block.heads, slots, head_dim, prefix, min(widest or slots, slots))
    cache = make_cache(shape, flow.compute_dtype, rotary.cos.device)
    graph = flow.evaluate if flow.compiled and not cache.settings.in_groups else None
    return BlockRun(block, rotary, cache, flow.compute_dtype, graph)


class DeepRun:
    """The deep block over one window: text prefix, then tokens, with guidance.

    The rows are the batch's, under guidance twice: conditional, then unconditional. `devices` names where they are:
    all in one run, or with two devices in a run each, which compute at the same time. A flow's team may have a half of
    them in each process. At most `widest` tokens are evaluated at once. `make_cache` is called as `Cache` is.
    """

    def __init__(
        self, flow: Flow, grid: Grid, text: Tensor, uncond: Tensor | None, guidance: float,
        devices: tuple[torch.device, ...] | None = None, widest: int | None = None,
        make_cache: Callable[..., Cache] = Cache,
    ):  # fmt: skip
        self.guidance, self.team, self.dtype = guidance if uncond is not None else 0.0, flow.team, flow.compute_dtype
        devices, prefix = devices or (text.device,), text.shape[1]
        copies = 2 if self.guidance else 1  # of the batch
        self.both = copies > 1
        devices = devices[:copies]
        self.copies = copies // (len(devices) * self.team.mesh.guidance)  # in each run
        self.runs = []
        for device in devices:
            rotary = joined(flow.text_rotary(prefix, device), flow.rotary(grid, device))
            block, rows = flow.deep_on(device), self.copies * len(text)
            self.runs.append(block_run(flow, block, rotary, rows, prefix, widest, make_cache))
        self.second = ThreadPoolExecutor(1, "guidance") if len(self.runs) > 1 else None
        self.fill(text, uncond)

    def horizon(self, start: int) -> int:
        return self.runs[0].horizon(start)

    def agree(self, leading: int, known: int, residual: float) -> tuple[int, int, float]:
        return self.team.agree(leading, known, residual)

    def take(self, rows: Tensor) -> None:
        """Go on with these elements (n,) of the batch, in this order; n is as it was. Only for caches that keep all in
        the compute type."""
        for run in self.runs:
            size = run.cache.shape.rows // self.copies
            run.cache.take(torch.cat([rows + copy * size for copy in range(self.copies)]))

    def fill(self, text: Tensor, uncond: Tensor | None) -> None:
        """Run the prompts (B, L, D) through the prefix; `uncond`, for guidance, may be one row. Repeatable."""
        rows = torch.cat((text, uncond.expand_as(text).to(text.device))) if self.both else text
        parts = rows.chunk(len(self.runs) * self.team.mesh.guidance)
        self._together(lambda run, index: run.fill(parts[index + self.team.half]))

    def __call__(self, before: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """a, b (B, n, c), guided, on the tokens' device; `before` and `start` as in `BlockRun`."""
        rows = before.repeat(self.copies, 1, 1)
        parts = self._together(lambda run, index: run(rows.to(run.device), start))
        a, b = (torch.cat([part.to(before.device) for part in both]) for both in zip(*parts, strict=True))
        if not self.both:
            return a, b
        (a_c, a_u), (b_c, b_u) = (both.chunk(2) for both in self.team.gather(a, b))
        return guided(a_c, b_c, a_u, b_u, self.guidance)

    def _together(self, act: Callable[[BlockRun, int], T]) -> list[T]:
        """What an act gives for each run and its index. Two act at the same time, the second in a thread of its own."""
        if self.second is None:
            return [act(self.runs[0], 0)]
        other = self.second.submit(carried(act), self.runs[1], 1)
        try:
            return [act(self.runs[0], 0), other.result()]
        finally:
            wait([other])  # nothing goes on computing when this one fails


class PromptedRun(DeepRun):
    """The deep block over the windows of a clip, one after the other, each under its prompt."""

    def __init__(
        self, flow: Flow, grid: Grid, prompts: Prompts, uncond: Tensor | None, guidance: float, *options
    ):  # fmt: skip
        super().__init__(flow, grid, prompts.first, uncond, guidance, *options)
        self.grid, self.prompts, self.uncond, self.prompt = grid, prompts, uncond, 0

    def enter(self, extent: Extent, there: Tensor, report: Callable[[float], None]) -> Tensor:
        """Begin a window whose first frames (B, n, N, c) are there; returns them as they are under its prompt. `report`
        is told the residual of each sweep that this takes."""
        if not (extent.changes and self.prompts.change):
            self._read(extent.prompt)
            return there
        kept, others = there[:, : extent.known], there[:, extent.known :]
        return torch.cat((self._brought(kept, extent, report), others), 1)

    def _brought(self, frames: Tensor, extent: Extent, report: Callable[[float], None]) -> Tensor:
        """Frames (B, n, N, c) that were made under the prompt before, made again under the extent's from the noise that
        they have under that one: what it says changes, the rest stays. Else a colour, say, would go on as it was."""
        size = self.grid.frame_tokens
        place = {"frame_tokens": size, "width": self.grid.width, "first": extent.first * size}
        tokens = frames.flatten(1, 2)
        self._read(extent.prompt - 1)
        was = Window(tokens, known=tokens.shape[1], **place)
        with self._weighted(INVERTING):
            absorb(self, was)
        self._read(extent.prompt)
        now = Window((tokens - was.b) / was.a, **place)
        with self._weighted(BRINGING):
            settings = PRESETS["exact"].spanned(span_for(now.z.device, self.copies * len(now.z))).resolvable(self.dtype)
            for _, residual in solve_span(self, now, settings, Statistics()):
                report(residual)
        return now.x.view_as(frames)

    @contextmanager
    def _weighted(self, most: float) -> Iterator[None]:
        """With guidance of at most that weight."""
        own, self.guidance = self.guidance, min(self.guidance, most)
        try:
            yield
        finally:
            self.guidance = own

    def _read(self, prompt: int) -> None:
        """Have the text of a prompt in the cache."""
        if prompt != self.prompt:
            self.fill(self.prompts.texts[prompt], self.uncond)
            self.prompt = prompt
