"""Plain block Jacobi as the reference inverts its flow: what the solver benchmark compares with.

It evaluates the blocks through the same caches as the solvers of `starflow_core`, so that only the
iterations differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from starflow_core.model.flow import Flow, Grid
from starflow_core.solve.runs import DeepRun, block_run
from starflow_core.solve.solvers import Evaluate, Statistics

GROWTH = 4  # of the deep block's chunks after a video's first frame


@dataclass(frozen=True)
class Baseline:
    """Chunks of `chunk` tokens are iterated until their relative squared change is below `threshold`, or
    `max_sweeps` times."""

    chunk: int
    threshold: float = 1e-3
    max_sweeps: int = 32


def sample_baseline(
    flow: Flow, noise: Tensor, text: Tensor, uncond: Tensor | None, guidance: float, settings: Baseline
) -> tuple[Tensor, Statistics]:
    """Latents in flow space from noise, both (B, T, C, H, W); text and uncond are (B, L, D)."""
    grid, deep, statistics = flow.grid(noise), flow.deep, Statistics()
    frame_tokens = grid.frame_tokens if flow.config.kind == "video" else None
    z = deep.ordered(flow.tokens(noise))
    run = DeepRun(flow, grid, text, uncond, guidance)
    x, sweeps, evaluations = iterate_chunks(run, z.flatten(1, 2), settings, frame_tokens)
    statistics.deep_sweeps, statistics.deep_evaluations = sweeps, evaluations
    tokens = deep.ordered(x.unflatten(1, z.shape[1:3]))
    latents, statistics.shallow_sweeps, statistics.shallow_evaluations = invert_shallow(flow, tokens, grid, settings)
    return latents, statistics


def invert_shallow(flow: Flow, tokens: Tensor, grid: Grid, settings: Baseline) -> tuple[Tensor, int, int]:
    """Latents (B, T, C, H, W) of tokens (B, T, N, c) as the deep block leaves them, in row-major order; the sweeps, and
    the tokens evaluated in all frames."""
    rotary, sweeps, evaluations = flow.frame_rotary(grid, tokens.device), 0, 0
    for block in reversed(flow.shallow):
        z = block.ordered(tokens).flatten(0, 1)
        x, more, each = iterate_chunks(block_run(flow, block, rotary, len(z)), z, settings)
        sweeps, evaluations = sweeps + more, evaluations + each * len(z)
        tokens = block.ordered(x.unflatten(0, tokens.shape[:2]))
    return flow.latents(tokens, grid), sweeps, evaluations


def iterate_chunks(
    evaluate: Evaluate, z: Tensor, settings: Baseline, frame_tokens: int | None = None, growth: int = GROWTH
) -> tuple[Tensor, int, int]:
    """Invert a block for z (rows, L, c): its tokens, the sweeps, and the tokens evaluated in each row.

    With `frame_tokens`, what comes after a video's first frame has chunks `growth` times as large. They start from the
    tokens one frame earlier as far as these are known, which also take the place of the known token on the left in the
    first sweep.
    """
    x = z.clone()
    start = sweeps = evaluations = 0
    while start < z.shape[1]:
        size = settings.chunk * (growth if frame_tokens and start >= frame_tokens else 1)
        stop = min(start + size, z.shape[1])
        left = x[:, max(start - 1, 0) : start]  # nothing is before the first
        guess = torch.cat((left, x[:, start:stop]), 1)
        if frame_tokens and start > frame_tokens:
            earlier = x[:, start - 1 - frame_tokens : min(start, stop - frame_tokens)]
            guess[:, : earlier.shape[1]] = earlier
        inputs, old = guess[:, :-1], guess[:, left.shape[1] :]
        for _ in range(settings.max_sweeps):
            a, b = evaluate(inputs, start)
            new = a * z[:, start:stop] + b
            change = (new - old).square().mean() / new.square().mean()
            inputs, old = torch.cat((left, new[:, :-1]), 1), new
            sweeps, evaluations = sweeps + 1, evaluations + stop - start
            if change < settings.threshold:
                break
        x[:, start:stop] = old
        start = stop
    return x, sweeps, evaluations
