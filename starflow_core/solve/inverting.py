"""From latents in flow space to the noise that makes them: the exact inverse of `sampling`, window by window."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..control import Control, Progress
from ..errors import InputError
from ..model.cache import RESIDENT, Cache, CacheSettings
from ..model.flow import Flow, Grid, require_finite
from ..model.placement import Placement
from .runs import PromptedRun
from .solvers import ABSORBED, Window, absorb
from .windows import Prompts


@dataclass(frozen=True)
class Inverted:
    """The noise (B, T, C, H, W) of some latents, and each token's surprise (B, T, N) in nats, row-major: minus its log
    density given what comes before it. Given frames have a surprise of 0, and no noise that matters."""

    noise: Tensor
    surprise: Tensor
    given: int = 0

    @property
    def dimensions(self) -> int:
        """Latent elements of a clip that the likelihood is of."""
        return self.noise[0, self.given :].numel()

    @property
    def log_likelihood(self) -> Tensor:
        """log p(new frames | given ones, text) in nats: (B,)."""
        return -self.surprise.flatten(1).sum(1)


@dataclass(frozen=True)
class Halfway:
    """Latents that have passed the shallow blocks, which read no text: the deep block's input, tokens (B, T, N, c), and
    log |dx/dz| of each (B, T, N) so far, row-major."""

    tokens: Tensor
    nats: Tensor
    grid: Grid
    home: torch.device

    def repeated(self, rows: int) -> Halfway:
        """One clip, as often as there are texts."""
        return replace(self, **{name: getattr(self, name).expand(rows, *[-1] * dims)
                                for name, dims in (("tokens", 3), ("nats", 2))})  # fmt: skip


@torch.no_grad()
def invert(
    flow: Flow, latents: Tensor, text: Tensor | Prompts, uncond: Tensor | None = None, *,
    control: Control | None = None, placement: Placement | None = None, **options,
) -> Inverted:  # fmt: skip
    """The noise from which `Sampler` makes latents (B, T, C, H, W), with the same text, guidance, windows and number of
    given frames; options as in `invert_deep`. A likelihood under guidance is that of the guided model, which isn't
    normalised over texts.

    Raises NonFiniteError that names the block and the token where NaN or infinity began.
    """
    placement = placement or Placement.on(Prompts.of(text).texts.device)
    halfway = invert_shallow(flow, latents.to(placement.shallow), control)
    found = invert_deep(flow, halfway, text, uncond, control=control, placement=placement, **options)
    return replace(found, noise=found.noise.to(latents.device), surprise=found.surprise.to(latents.device))


@torch.no_grad()
def invert_shallow(flow: Flow, latents: Tensor, control: Control | None = None) -> Halfway:
    """The first half of `invert`: once for all texts. Raises as it does."""
    tokens, logdets = flow.encode_shallow(latents, control)
    nats = -sum(each.sum(-1) for each in logdets) if logdets else torch.zeros_like(tokens[..., 0])
    return Halfway(tokens, nats, flow.grid(latents), latents.device)


@torch.no_grad()
def invert_deep(
    flow: Flow, halfway: Halfway, text: Tensor | Prompts, uncond: Tensor | None = None, *, guidance: float = 0.0,
    given: int = 0, window: int | None = None, keep: int | None = None, control: Control | None = None,
    placement: Placement | None = None, cache: CacheSettings = RESIDENT,
) -> Inverted:  # fmt: skip
    """The second half: under text (B, L, D), or several prompts. Raises InputError for guidance without the
    unconditional text, and as `invert`."""
    control, placement = control or Control(), placement or Placement.on(Prompts.of(text).texts.device)
    if guidance and uncond is None:
        raise InputError("guidance needs the unconditional text; give it, or guidance 0")
    grid, block = halfway.grid, flow.deep
    width, keep = flow.config.sliding_window(grid.frames, window, keep)
    width = min(width, grid.frames)
    x = block.ordered(halfway.tokens).to(placement.deep[0])
    prompts = Prompts.of(text)
    run = PromptedRun(
        flow, grid.with_frames(width), prompts, uncond, guidance, placement.deep, ABSORBED,
        partial(Cache, settings=cache),
    )  # fmt: skip
    parts = []
    for extent in prompts.extents(grid.frames, width, keep, given):
        first, known = extent.first, extent.first + extent.known
        there = Progress("deep", known * grid.frame_tokens, x.shape[1] * grid.frame_tokens)
        report = lambda residual, there=there: control.report(there)  # noqa: E731
        tokens = torch.cat((run.enter(extent, x[:, first:known], report), x[:, known : extent.stop]), 1)
        parts.append(_window(run, tokens, grid.width, extent.known, first, x.shape[1], control))
    blank = x.new_zeros(x[:, :given].shape), x.new_ones(x[:, :given].shape)
    z, scale = (block.ordered(torch.cat(each, 1)) for each in zip(blank, *parts, strict=True))
    require_finite(z, f"block {block.index}", grid)
    nats = (0.5 * (z.square() + math.log(2 * math.pi)) + scale.log()).sum(-1)
    surprise = nats.to(halfway.home) + halfway.nats
    surprise[:, :given] = 0
    return Inverted(flow.latents(z.to(halfway.home), grid), surprise, given)


def _window(
    run: PromptedRun, x: Tensor, width: int, known: int, first: int, frames: int, control: Control
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Noise and scale (B, n, N, c) of the frames after the first `known` of a window's tokens x (B, W, N, c), which
    begins at frame `first` of so many."""
    size = x.shape[2]
    window = Window(x.flatten(1, 2), size, width, known=x.shape[1] * size, first=first * size)
    absorb(run, window, lambda done: control.report(Progress("deep", first * size + done, frames * size)))
    z = (window.x - window.b) / window.a
    return tuple(part.view_as(x)[:, known:] for part in (z, window.a))
