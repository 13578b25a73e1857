"""From latents in flow space to the noise that makes them: the exact inverse of `sampling`, window by window."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..control import Control, Progress
from ..errors import InputError
from ..model.cache import RESIDENT, Cache, CacheSettings
from ..model.flow import Flow, require_finite
from ..model.placement import Placement
from .runs import DeepRun
from .solvers import ABSORBED, Window, absorb


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


@torch.no_grad()
def invert(
    flow: Flow, latents: Tensor, text: Tensor, uncond: Tensor | None = None, *, guidance: float = 0.0, given: int = 0,
    window: int | None = None, keep: int | None = None, control: Control | None = None,
    placement: Placement | None = None, cache: CacheSettings = RESIDENT,
) -> Inverted:  # fmt: skip
    """The noise from which `Sampler` makes latents (B, T, C, H, W), with the same text, guidance, windows and number of
    given frames. A likelihood under guidance is that of the guided model, which isn't normalised over texts.

    Raises NonFiniteError that names the block and the token where NaN or infinity began.
    """
    control, placement = control or Control(), placement or Placement.on(text.device)
    if guidance and uncond is None:
        raise InputError("guidance needs the unconditional text; give it, or guidance 0")
    grid, block = flow.grid(latents), flow.deep
    width, keep = flow.config.sliding_window(grid.frames, window, keep)
    width = min(width, grid.frames)
    tokens, logdets = flow.encode_shallow(latents.to(placement.shallow), control)
    x = block.ordered(tokens).to(placement.deep[0])
    run = DeepRun(
        flow, grid.with_frames(width), text, uncond, guidance, placement.deep, ABSORBED, partial(Cache, settings=cache)
    )  # fmt: skip
    parts, first, known = [], 0, given
    while True:
        stop = min(first + width, grid.frames)
        parts.append(_window(run, x[:, first:stop], grid.width, known, first, x.shape[1], control))
        if stop == grid.frames:
            break
        first, known = stop - keep, keep
    blank = x.new_zeros(x[:, :given].shape), x.new_ones(x[:, :given].shape)
    z, scale = (block.ordered(torch.cat(each, 1)) for each in zip(blank, *parts, strict=True))
    require_finite(z, f"block {block.index}", grid)
    nats = 0.5 * (z.square() + math.log(2 * math.pi)) + scale.log() - sum(d.to(z.device) for d in logdets)
    surprise = nats.sum(-1)
    surprise[:, :given] = 0
    return Inverted(flow.latents(z.to(latents.device), grid), surprise.to(latents.device), given)


def _window(
    run: DeepRun, x: Tensor, width: int, known: int, first: int, frames: int, control: Control
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Noise and scale (B, n, N, c) of the frames after the first `known` of a window's tokens x (B, W, N, c), which
    begins at frame `first` of so many."""
    size = x.shape[2]
    window = Window(x.flatten(1, 2), size, width, known=x.shape[1] * size, first=first * size)
    absorb(run, window, lambda done: control.report(Progress("deep", first * size + done, frames * size)))
    z = (window.x - window.b) / window.a
    return tuple(part.view_as(x)[:, known:] for part in (z, window.a))
