"""From noise to latents in flow space: windows of the deep block, then the shallow blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from threading import Event

import torch
from torch import Tensor

from ..control import Control, Progress
from ..errors import Cancelled, InputError, NonFiniteError
from ..model.cache import RESIDENT, Cache, CacheSettings
from ..model.flow import Block, Flow, require_finite
from ..model.placement import Placement
from .beside import ahead
from .runs import DeepRun, PromptedRun, block_run
from .solvers import (
    PRESETS,
    Evaluate,
    SolverSettings,
    Statistics,
    Window,
    absorb,
    raise_non_finite,
    solve_frames,
    solve_span,
    solve_tokens,
    span_for,
)
from .windows import Prompts

DRAFT = SolverSettings(shallow_tolerance=0.03, max_sweeps=8)  # whatever the method: drafts are to cost little


@dataclass(frozen=True)
class Sample:
    """Latents (B, T, C, H, W) in flow space, and what the solvers did."""

    latents: Tensor
    statistics: Statistics


@dataclass(frozen=True)
class Settled:
    """Frames that are sampled already, after any given ones: `tokens` (B, n, N, c) as the deep block leaves them, in
    row-major order, and `latents` (B, m, C, H, W) in flow space of the first m of them. All on the CPU."""

    tokens: Tensor
    latents: Tensor


class Sampler:
    """One sampling job.

    noise (B, T, C, H, W), text and uncond (B, L, D); several prompts come as `Prompts`; uncond may be None or one row,
    and is not used with guidance 0. `context` holds the first latent frames, noise included; they come back as they
    are and their place in `noise` is ignored. At most `window` frames are in the deep block at once;
    when it is full, it slides on, keeping the last `keep` of them. `cache` says how settled keys and values are kept.
    Without a `placement` everything computes where the text is. Frames that are `settled` aren't sampled again; the
    others are the same to the bit if the settled ones end with a window (see `ends_window`).
    """

    def __init__(
        self,
        flow: Flow,
        noise: Tensor,
        text: Tensor | Prompts,
        uncond: Tensor | None = None,
        *,
        guidance: float = 0.0,
        context: Tensor | None = None,
        window: int | None = None,
        keep: int | None = None,
        settings: SolverSettings = PRESETS["balanced"],
        control: Control | None = None,
        placement: Placement | None = None,
        cache: CacheSettings = RESIDENT,
        settled: Settled | None = None,
    ):
        self.flow, self.noise, self.uncond, self.guidance = flow, noise, uncond, guidance
        self.prompts = Prompts.of(text)
        self.context, self.control = context, control or Control()
        self.placement, self.cache = placement or Placement.on(self.prompts.texts.device), cache
        rows = len(noise) * (2 if guidance else 1) // (len(self.placement.deep) * flow.team.mesh.guidance)
        span = span_for(self.placement.deep[0], max(rows, 1))
        self.settings = settings.spanned(span).resolvable(flow.compute_dtype)
        self.grid = flow.grid(noise)
        self.frames = noise.shape[1]
        self.given = 0 if context is None else context.shape[1]
        window, self.keep = flow.config.sliding_window(self.frames, window, keep)
        self.window = min(window, self.frames)
        self.extents = tuple(self.prompts.extents(self.frames, self.window, self.keep, self.given))
        self.statistics = Statistics()
        self._openings: dict[int, tuple[Tensor, Tensor]] = {}  # of the shallow blocks, by their index
        self._stop = Event()  # that the deep block is to stop, in whichever thread it computes
        self._solving: tuple[int, Tensor] | None = None  # the first frame that isn't settled, and its tokens so far
        self._tokens = _each(settled.tokens) if settled else []
        self._latents = _each(settled.latents) if settled else []
        self._check()

    def _check(self) -> None:
        self.flow.team.mesh.check(self.flow.config, self.guidance)
        if self.given > self.window:
            raise InputError(f"a context of {self.given} latent frames is longer than the window of {self.window}")
        if any(not self.given < start < self.frames for start in self.prompts.starts[1:]):
            raise InputError(
                f"prompts begin at the latent frames {self.prompts.starts}; the later ones go from {self.given + 1} to "
                f"{self.frames - 1}"
            )
        if len(self.prompts.starts) > 1 and self.prompts.kept >= self.window:
            raise InputError(
                f"{self.prompts.kept} latent frames kept at a change fill the window of {self.window}; keep fewer"
            )
        if self.given >= self.frames:
            raise InputError(f"a context of {self.given} latent frames leaves nothing to sample in {self.frames}")
        if self.frames > 1 and self.flow.config.kind == "image":
            raise InputError("an image model samples one frame")
        if self.guidance and self.uncond is None:
            raise InputError("guidance needs the unconditional text; give it, or guidance 0")
        home = self.flow.deep.sos_embed.device
        without = [device for device in self.placement.deep if device not in (home, *self.flow.copies)]
        if self.guidance and len(without) == 1:  # where a host brings weights to both, they are on neither
            raise InputError(
                f"the deep block's weights are on {home} alone, so guidance can't be split over "
                f"{' and '.join(map(str, self.placement.deep))}; load it onto both, or give one device"
            )
        if not torch.isfinite(self.noise).all():
            raise NonFiniteError("NaN or infinity in the given noise")

    @property
    def settled(self) -> Settled:
        """What is sampled so far."""
        tokens, latents = self.flow.tokens(self.noise[:, :0]).cpu(), self.noise[:, :0].float().cpu()
        return Settled(torch.cat([tokens, *self._tokens], 1), torch.cat([latents, *self._latents], 1))

    @property
    def finished(self) -> Settled:
        """Of what is sampled so far the frames that have latents: the deep block may be ahead of them."""
        settled = self.settled
        return Settled(settled.tokens[:, : settled.latents.shape[1]], settled.latents)

    @property
    def done(self) -> int:
        """How many frames have latents, given ones included."""
        return self.given + len(self._latents)

    def ends_window(self, frames: int) -> bool:
        """Whether a window of the deep block ends after so many frames."""
        return any(extent.stop == frames for extent in self.extents)

    def sample(self) -> Sample:
        """All frames at once: shallow blocks take them as one batch."""
        for _ in self._solved():
            pass
        tokens = torch.cat(self._tokens[len(self._latents) :], 1).to(self.placement.shallow)
        done = [latents.to(self.placement.shallow) for latents in self._latents]
        latents = torch.cat([*self._context(), *done, self.through_shallow(tokens, self.given + len(done))], 1)
        return Sample(latents, self.statistics)

    def follow(self) -> None:
        """Compute along with the leader of the flow's team, which alone has what comes after the deep block."""
        for _ in self._solved():
            pass

    def stream(self, first: int = 0) -> Iterator[Tensor]:
        """Latents (B, n, C, H, W) from frame `first` on, given frames first, each frame as soon as it is settled."""
        if first < self.given:
            yield from (context[:, first:] for context in self._context())
        done = max(first - self.given, 0)
        yield from (latents.to(self.placement.shallow) for latents in self._latents[done:])
        for index in self._solved_ahead():
            tokens = self._tokens[index].to(self.placement.shallow)
            latents = self.through_shallow(tokens, self.given + index)
            self._latents.append(latents.cpu())
            yield latents

    def draft(self) -> tuple[int, Tensor] | None:
        """The frame that is being solved: its index and rough latents (B, 1, C, H, W), noise where tokens haven't
        settled yet. Call it from `control.progress`; None between frames. It counts in no statistics."""
        if self._solving is None:
            return None
        frame, tokens = self._solving
        tokens = self.flow.deep.ordered(tokens.to(self.placement.shallow))
        rotary = self.flow.frame_rotary(self.grid, tokens.device)
        for block in reversed(self.flow.shallow):
            z = block.ordered(tokens)[:, 0]
            affine = partial(self.flow.shallow_affine, block, rotary=rotary)
            x = solve_frames(affine, z, self._open(block, z), DRAFT, Statistics(), lambda done, residual: None)
            tokens = block.ordered(x.unsqueeze(1))
        return frame, self.flow.latents(tokens, self.grid)

    def _context(self) -> list[Tensor]:
        return [] if self.context is None else [self.context.float().to(self.placement.shallow)]

    # The boundary of the deep block: what goes in moves to its device and into its order, what comes out moves back.

    def _known(self) -> Tensor:
        """The context as the deep block takes it, (B, given, N, c)."""
        block, home, team = self.flow.deep, self.placement.deep[0], self.flow.team
        if self.context is None:
            return self.flow.tokens(self.noise[:, :0]).to(home)
        known = block.ordered(self.flow.encode_shallow(*self._context())[0]).cpu() if team.leads else None
        return team.tell(known).to(home)

    def _solved(self) -> Iterator[int]:
        """Which of the sampled frames have tokens, but no latents yet: those that are settled, then the others as they
        are solved."""
        block, home = self.flow.deep, self.placement.deep[0]
        yield from range(len(self._latents), len(self._tokens))
        z = block.ordered(self.flow.tokens(self.noise)).to(home)
        done = self.given + len(self._tokens)
        if done == self.frames:
            return
        known = torch.cat((self._known(), block.ordered(self.settled.tokens).to(home)), 1)
        for tokens in self._deep(z, known):
            self._tokens.append(block.ordered(tokens).cpu())
            yield len(self._tokens) - 1

    def _solved_ahead(self) -> Iterator[int]:
        """As `_solved`; where the shallow blocks have a device of their own, the deep block goes on meanwhile."""
        if self.placement.shallow in self.placement.deep:
            return self._solved()
        self._stop = Event()
        return ahead(self._solved(), self._stop)

    def _deep(self, z: Tensor, known: Tensor) -> Iterator[Tensor]:
        """The frames (B, 1, N, c) after the `known` ones, window by window, from noise z (B, T, N, c)."""
        run = PromptedRun(
            self.flow, self.grid.with_frames(self.window), self.prompts, self.uncond, self.guidance,
            self.placement.deep, self.settings.widest, partial(Cache, settings=self.cache),
        )  # fmt: skip
        done = _each(known)
        for extent in self.extents:
            if extent.stop <= len(done):
                continue
            if done:
                report = partial(self._report, len(done) * self.grid.frame_tokens)
                known = run.enter(extent, torch.cat(done[extent.first :], 1), report)
            window = torch.cat((known, z[:, extent.first + known.shape[1] : extent.stop]), 1)
            for tokens in self._window(run, window, known.shape[1], extent.first):
                yield tokens
                done.append(tokens)

    def _window(self, run: DeepRun, z: Tensor, known: int, first: int) -> Iterator[Tensor]:
        """Solve the frames after the first `known` of z (B, W, N, c), which are tokens, not noise."""
        size = self.grid.frame_tokens
        window = Window(z.flatten(1, 2), size, self.grid.width, known * size, first * size)
        absorb(run, window)
        for settled, residual in self._solver(run, window):
            self._solving = _unsettled(window, settled, first)
            self._report(first * size + settled, residual)
            while known < settled // size:
                yield window.x[:, None, known * size : (known + 1) * size].clone()
                known += 1

    def _report(self, settled: int, residual: float) -> None:
        """How many of the clip's tokens are settled."""
        if self._stop.is_set():
            raise Cancelled("cancelled")
        tokens = settled, self.frames * self.grid.frame_tokens
        self.control.report(Progress("deep", *tokens, *tokens, residual))

    def _solver(self, run: Evaluate, window: Window) -> Iterator[tuple[int, float]]:
        if self.settings.method == "jacobi":
            yield from solve_span(run, window, self.settings, self.statistics)
            return
        for settled in solve_tokens(run, window):
            token = window.x[:, settled - 1 : settled]
            if not torch.isfinite(token).all():
                raise_non_finite(window, token, settled - 1)
            self.statistics.deep_sweeps += 1
            self.statistics.deep_evaluations += 1
            yield settled, 0.0

    def through_shallow(self, tokens: Tensor, first: int) -> Tensor:
        """Invert the shallow blocks of frames (B, n, N, c) from frame `first` on; latents (B, n, C, H, W)."""
        frames = tokens.shape[1]
        for block in reversed(self.flow.shallow):
            z = block.ordered(tokens).flatten(0, 1)
            x = self._shallow_block(block, z)
            tokens = block.ordered(x.unflatten(0, (-1, frames)))
            require_finite(tokens, f"block {block.index}", self.grid, first)
        return self.flow.latents(tokens, self.grid)

    def _opening(self, block: Block, z: Tensor) -> tuple[Tensor, Tensor]:
        """As `_open`, once for each block."""
        if block.index not in self._openings:
            self._openings[block.index] = self._open(block, z)
            self.statistics.shallow_sweeps += 1
            self.statistics.shallow_evaluations += 1
        return self._openings[block.index]

    def _open(self, block: Block, z: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift (1, 1, c) of a frame's first token, which reads no other: they are the weights' own."""
        nothing, rotary = z[:1, :0].to(self.flow.compute_dtype), self.flow.frame_rotary(self.grid, z.device)
        return block(nothing, rotary[:1], first=True)

    def _shallow_block(self, block: Block, z: Tensor) -> Tensor:
        """Invert one block of frames (rows, N, c), rows in any order."""
        flow = self.flow
        rotary = flow.frame_rotary(self.grid, z.device)
        rows, size, total = len(z), z.shape[1], len(flow.shallow)

        def report(settled: int, residual: float = 0.0) -> None:
            step = total - 1 - block.index  # blocks that are done: the last comes first
            self.control.report(Progress("shallow", step, total, settled, rows * size, residual))

        if self.settings.method == "jacobi":
            return solve_frames(
                lambda tokens: flow.shallow_affine(block, tokens, rotary), z, self._opening(block, z), self.settings,
                self.statistics, lambda done, residual: report(done * size, residual),
            )  # fmt: skip
        window = Window(z, size, self.grid.width)
        for settled in solve_tokens(block_run(flow, block, rotary, rows), window):
            self.statistics.shallow_sweeps += 1
            self.statistics.shallow_evaluations += rows
            report(settled * rows)
        return window.x


def _each(frames: Tensor) -> list[Tensor]:
    """Frames (B, n, ..), there may be none, as n of (B, 1, ..)."""
    return [frame.unsqueeze(1) for frame in frames.unbind(1)]


def _unsettled(window: Window, settled: int, first: int) -> tuple[int, Tensor] | None:
    """The first frame that isn't settled and its tokens (B, 1, N, c), of a window that begins at frame `first`."""
    if settled == window.length:
        return None
    frame = settled // window.frame_tokens
    start = frame * window.frame_tokens
    return first + frame, window.x[:, None, start : start + window.frame_tokens]


def sample(flow: Flow, noise: Tensor, text: Tensor, uncond: Tensor | None = None, **options) -> Sample:
    """Sample latents from noise; options as in `Sampler`."""
    return Sampler(flow, noise, text, uncond, **options).sample()
