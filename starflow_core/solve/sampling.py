"""From noise to latents in flow space: windows of the deep block, then the shallow blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..control import Control, Progress
from ..errors import InputError, NonFiniteError
from ..model.flow import Flow, require_finite
from .runs import BlockRun, DeepRun
from .solvers import (
    PRESETS,
    Sequence,
    SolverSettings,
    Statistics,
    absorb,
    raise_non_finite,
    solve_frames,
    solve_span,
    solve_tokens,
)


@dataclass(frozen=True)
class Sample:
    """Latents (B, T, C, H, W) in flow space, and what the solvers did."""

    latents: Tensor
    statistics: Statistics


class Sampler:
    """One sampling job.

    noise (B, T, C, H, W), text and uncond (B, L, D); uncond may be None or one row, and is not used
    with guidance 0. `context` holds the first latent frames, noise included; they come back as they
    are and their place in `noise` is ignored. At most `window` frames are in the deep block at once;
    when it is full, the last `keep` of them stay and it goes on.
    """

    def __init__(
        self,
        flow: Flow,
        noise: Tensor,
        text: Tensor,
        uncond: Tensor | None = None,
        *,
        guidance: float = 0.0,
        context: Tensor | None = None,
        window: int | None = None,
        keep: int | None = None,
        settings: SolverSettings = PRESETS["balanced"],
        control: Control | None = None,
    ):
        self.flow, self.noise, self.text, self.uncond, self.guidance = flow, noise, text, uncond, guidance
        self.context, self.settings, self.control = context, settings, control or Control()
        self.grid = flow.grid(noise)
        self.frames = noise.shape[1]
        window, self.keep = flow.config.sliding_window(self.frames, window, keep)
        self.window = min(window, self.frames)
        self.statistics = Statistics()
        self._check()

    def _check(self) -> None:
        given = 0 if self.context is None else self.context.shape[1]
        if given > self.window:
            raise InputError(f"a context of {given} latent frames is longer than the window of {self.window}")
        if given >= self.frames:
            raise InputError(f"a context of {given} latent frames leaves nothing to sample in {self.frames}")
        if self.frames > 1 and self.flow.config.kind == "image":
            raise InputError("an image model samples one frame")
        if self.guidance and self.uncond is None:
            raise InputError("guidance needs the unconditional text; give it, or guidance 0")
        if not torch.isfinite(self.noise).all():
            raise NonFiniteError("NaN or infinity in the given noise")

    def sample(self) -> Sample:
        """All frames at once: shallow blocks take them as one batch."""
        deep = [tokens for _, tokens in self._deep()]
        return Sample(self._finish(torch.cat(deep, 1)), self.statistics)

    def stream(self) -> Iterator[Tensor]:
        """Latents (B, n, C, H, W), given frames first, each frame as soon as it is settled."""
        given = 0 if self.context is None else self.context.shape[1]
        for first, tokens in self._deep():
            if first >= given:
                yield self._shallow(tokens, first)
            elif first + tokens.shape[1] >= given:
                yield self.context.float()

    def _finish(self, tokens: Tensor) -> Tensor:
        given = 0 if self.context is None else self.context.shape[1]
        sampled = self._shallow(tokens[:, given:], given)
        return torch.cat((self.context.float(), sampled), 1) if given else sampled

    def _deep(self) -> Iterator[tuple[int, Tensor]]:
        """The deep block's frames, tokens (B, n, N, c) in row-major order, with the first's index."""
        flow, block = self.flow, self.flow.deep
        z = block.ordered(flow.tokens(self.noise))
        run = DeepRun(flow, self.grid.with_frames(self.window), self.text, self.uncond, self.guidance)
        known = z[:, :0]
        if self.context is not None:
            known = block.ordered(flow.encode_shallow(self.context)[0])
            for i in range(known.shape[1]):
                yield i, block.ordered(known[:, i : i + 1])
        first = 0  # absolute index of the window's first frame
        while first + known.shape[1] < self.frames:
            stop = min(first + self.window, self.frames)
            window = torch.cat((known, z[:, first + known.shape[1] : stop]), 1)
            for frame, tokens in self._window(run, window, known.shape[1], first):
                yield frame, block.ordered(tokens)
            known = self.solved[:, -self.keep :]
            first = stop - known.shape[1]

    def _window(self, run: DeepRun, z: Tensor, known: int, first: int) -> Iterator[tuple[int, Tensor]]:
        """Solve the frames after the first `known` of z (B, W, N, c); known ones are tokens."""
        per_frame = self.grid.frame_tokens
        sequence = Sequence(z.flatten(1, 2), per_frame, self.grid.width, known * per_frame, first * per_frame)
        absorb(run, sequence)
        done = known
        for settled, residual in self._solver(run, sequence):
            tokens = first * per_frame + settled, self.frames * per_frame
            self.control.report(Progress("deep", *tokens, *tokens, residual))
            while done < settled // per_frame:
                done += 1
                yield first + done - 1, sequence.x[:, None, (done - 1) * per_frame : done * per_frame].clone()
        self.solved = sequence.x.unflatten(1, (-1, per_frame))

    def _solver(self, run: BlockRun, sequence: Sequence) -> Iterator[tuple[int, float]]:
        if self.settings.method == "jacobi":
            yield from solve_span(run, sequence, self.settings, self.statistics)
            return
        for settled in solve_tokens(run, sequence):
            token = sequence.x[:, settled - 1 : settled]
            if not torch.isfinite(token).all():
                raise_non_finite(sequence, token, settled - 1)
            self.statistics.deep_sweeps += 1
            self.statistics.deep_evaluations += 1
            yield settled, 0.0

    def _shallow(self, tokens: Tensor, first: int) -> Tensor:
        """Invert the shallow blocks of frames (B, n, N, c) from frame `first` on; latents (B, n, C, H, W)."""
        frames = tokens.shape[1]
        for block in reversed(self.flow.shallow):
            z = block.ordered(tokens).flatten(0, 1)
            x = self._shallow_block(block, z)
            tokens = block.ordered(x.unflatten(0, (-1, frames)))
            require_finite(tokens, f"block {block.index}", self.grid, first)
        return self.flow.latents(tokens, self.grid)

    def _shallow_block(self, block, z: Tensor) -> Tensor:
        """Invert one block of frames (rows, N, c), rows in any order."""
        rotary = self.flow.frame_rotary(self.grid, z.device)
        rows, per_frame, total = len(z), z.shape[1], len(self.flow.shallow)

        def report(settled: int, residual: float = 0.0) -> None:
            step = total - 1 - block.index  # blocks that are done: the last comes first
            self.control.report(Progress("shallow", step, total, settled, rows * per_frame, residual))

        if self.settings.method == "jacobi":
            return solve_frames(
                lambda tokens: self.flow.shallow_affine(block, tokens, rotary), z, self.settings, self.statistics,
                lambda done, residual: report(done * per_frame, residual),
            )  # fmt: skip
        sequence = Sequence(z, self.grid.frame_tokens, self.grid.width)
        run = BlockRun(self.flow, block, rotary, rows)
        for settled in solve_tokens(run, sequence):
            self.statistics.shallow_sweeps += 1
            self.statistics.shallow_evaluations += rows
            report(settled * rows)
        return sequence.x


def sample(flow: Flow, noise: Tensor, text: Tensor, uncond: Tensor | None = None, **options) -> Sample:
    """Sample latents from noise; options as in `Sampler`."""
    return Sampler(flow, noise, text, uncond, **options).sample()
