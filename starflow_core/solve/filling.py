"""Sampling around what is known: sequential Monte Carlo in the deep block's order, with known tokens forced.

A token sees only what comes before it, but what is known may come after. So several particles are sampled side by side.
Known tokens take the place of sampled ones, and how likely each particle finds them is its weight: after each run of
them, particles that can't explain them die out and the others branch. The shallow blocks tie the cells of a frame
together, so that the deep tokens of known cells are known only up to what is beside them: they are forced as they would
be beside the last frame, and once a frame is sampled, its known cells are put back and it is inverted exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..control import Control, Progress
from ..errors import InputError
from ..model.flow import Flow, require_finite
from ..model.placement import Placement
from . import noise as draws
from .inverting import invert_shallow
from .runs import DeepRun
from .sampling import Sampler
from .solvers import ABSORBED, PRESETS, SolverSettings

OPENING = 8  # times as many particles in a first frame with a seam: it decides where things are, and is short
PARTICLE_STREAM = 0xBF58476D1CE4E5B9  # between the seeds of one particle and the next
CHOICE_STREAM = 0xD1B54A32D192ED03  # moves a seed to the stream that decides which particles live on


@dataclass(frozen=True)
class Completed:
    """Latents (1, T, C, H, W) in flow space, the known ones as they were given, and for each frame the least effective
    number of particles in it: near 1 where few of them could explain what is known."""

    latents: Tensor
    effective: list[float]


def opening(particles: int, known: Tensor) -> int:
    """How many particles the first frame takes, by where cells (T, h, w) are known."""
    return particles * OPENING if particles > 1 and known[0].any() and not known[0].all() else particles


@torch.no_grad()
def fill_in(
    flow: Flow, latents: Tensor, known: Tensor, text: Tensor, uncond: Tensor | None = None, **options
) -> Completed:
    """Sample what isn't `known` (T, h, w), by tokens, of latents (1, T, C, H, W) in flow space, the model's noise
    included, under text (1, L, D). Options as of `Particles`. Raises NonFiniteError as `Sampler` does."""
    return Particles(flow, latents, known, text, uncond, **options).run()


@dataclass
class Particles:
    """The state of one such job.

    The first particle's noise is that of the seed, so that without anything known it is what `Sampler` makes; the
    others' seeds are far from it and from those of other seeds. No more than `window` frames are in the deep block at
    once, as in `Sampler`.
    """

    flow: Flow
    given: Tensor
    known: Tensor
    text: Tensor
    uncond: Tensor | None = None
    guidance: float = 0.0
    particles: int = 8
    seed: int = 0
    window: int | None = None
    keep: int | None = None
    settings: SolverSettings = PRESETS["balanced"]
    control: Control = field(default_factory=Control)
    placement: Placement | None = None

    def __post_init__(self):
        flow, given = self.flow, self.given.float()
        if self.particles < 1:
            raise InputError(f"particles is {self.particles}; the minimum is 1")
        if self.guidance and self.uncond is None:
            raise InputError("guidance needs the unconditional text; give it, or guidance 0")
        self.grid, self.placement = flow.grid(given), self.placement or Placement.on(self.text.device)
        expected = (self.grid.frames, self.grid.height, self.grid.width)
        if self.known.shape != expected:
            raise InputError(f"known cells of shape {tuple(self.known.shape)}, the tokens are {expected}")
        self.window, self.keep = flow.config.sliding_window(self.grid.frames, self.window, self.keep)
        self.window = min(self.window, self.grid.frames)
        self.cells, self.forced = flow.tokens(given)[0].to(self.placement.shallow), self.known.flatten(1).cpu()
        self.rows = opening(self.particles, self.known)
        frames, shape = self.grid.frames, tuple(given.shape[2:])
        seeds = [self.seed + i * PARTICLE_STREAM for i in range(self.rows)]
        self.noise = torch.cat([draws.draw(seed, 1, frames, shape) for seed in seeds[: self.particles]])
        further = [draws.draw(seed, 1, 1, shape) for seed in seeds[self.particles :]]
        self.first_noise = torch.cat((self.noise[:, :1], *further))  # of all rows, which later frames haven't
        self.sampler = Sampler(flow, self.first_noise[:1], self.text, settings=self.settings, control=self.control)
        self.choice = torch.Generator().manual_seed((self.seed ^ CHOICE_STREAM) % 2**64)
        self.weights, self.counted = torch.zeros(self.rows), torch.zeros(self.rows)
        self.tokens = self.cells.new_zeros(self.rows, 0, *self.cells.shape[1:])  # of the frames that are done
        self.deep = torch.zeros_like(self.tokens, device=self.placement.deep[0])  # the same before the shallow blocks
        self.first, self.effective = 0, []  # the first frame of the window

    def run(self) -> Completed:
        """All frames, then the particle that explains the known ones best."""
        if self.rows > self.particles:
            self._begin(1)
            self._frame(0)
            if self.grid.frames > 1:
                self._choose(self.particles)
        if self.tokens.shape[1] < self.grid.frames:
            self._begin(self.window)
        for index in range(self.tokens.shape[1], self.grid.frames):
            self._slide(index)
            self._frame(index)
        best = int(self.weights.argmax())
        return Completed(self.flow.latents(self.tokens[best : best + 1], self.grid), self.effective)

    # The window

    def _begin(self, frames: int) -> None:
        """A deep block of so many frames for the particles that there are."""
        self.evaluate, text = None, self.text.expand(self.rows, -1, -1)  # the last one's cache is freed
        self.evaluate = DeepRun(
            self.flow, self.grid.with_frames(frames), text, self.uncond, self.guidance, self.placement.deep,
            max(ABSORBED, self.grid.frame_tokens),
        )  # fmt: skip
        self._absorb()

    def _slide(self, index: int) -> None:
        if index - self.first == self.window:
            self.first = index - self.keep
            self._absorb()

    def _absorb(self) -> None:
        """Keys and values of the window's frames that are done."""
        done = self.deep[:, self.first :].flatten(1, 2)
        for start in range(0, done.shape[1], ABSORBED):
            stop = min(start + ABSORBED, done.shape[1])
            self.evaluate(done[:, max(start - 1, 0) : stop - 1], start)

    # A frame

    def _frame(self, index: int) -> None:
        """Sample a frame, put back what is known, and weigh the particles by it."""
        block, forced = self.flow.deep, self.forced[index]
        self.counted.zero_()
        self.effective.append(float(self.rows))
        x = self._composite(index, self._guess(index))
        if not forced.all():
            u = self._inverted(x, index)[0]
            x = self._composite(index, self._sampled(index, block.ordered(u).to(self.deep)))
        u, nats = self._inverted(x, index)
        frame = self._before(index, block.ordered(u).to(self.deep))
        nats = nats + block.ordered(self._surprise(frame, self._slot(index)).unsqueeze(-1)).squeeze(-1).to(nats)
        self.tokens = torch.cat((self.tokens, x.unsqueeze(1)), 1)
        self.deep = torch.cat((self.deep, frame[:, -self.grid.frame_tokens :].unsqueeze(1)), 1)
        if forced.any():
            self.weights -= nats[:, forced].sum(-1).cpu() + self.counted
            few = self._few()
            if few and index + 1 < self.grid.frames and self.rows == self.particles:
                self._choose(self.rows)

    def _guess(self, index: int) -> Tensor:
        """What an unknown cell may be, so that the known ones can be inverted beside it: what it was, or their mean."""
        if index:
            return self.tokens[:, index - 1]
        forced = self.forced[index]
        mean = self.cells[index][forced].mean(0) if forced.any() else torch.zeros_like(self.cells[index, 0])
        return mean.expand(self.rows, *self.cells.shape[1:])

    def _composite(self, index: int, x: Tensor) -> Tensor:
        return torch.where(self.forced[index].to(x.device).unsqueeze(-1), self.cells[index], x)

    def _inverted(self, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """The deep block's tokens of frames (rows, N, c), and the nats of the shallow blocks (rows, N)."""
        halfway = invert_shallow(self.flow, self.flow.latents(x.unsqueeze(1), self.grid))
        require_finite(halfway.tokens, "the shallow blocks", self.grid, index)
        return halfway.tokens[:, 0], halfway.nats[:, 0]

    def _sampled(self, index: int, u: Tensor) -> Tensor:
        """A frame's cells (rows, N, c), from its deep tokens `u` in the block's order, of which the known ones are
        right."""
        frame, block = self._before(index, u), self.flow.deep
        start, lead = self._slot(index), frame.shape[1] - self.grid.frame_tokens
        forced = block.ordered(self.forced[index].unsqueeze(-1)).squeeze(-1)
        z = self.flow.tokens(self.noise[:, index : index + 1] if index else self.first_noise)[:, 0]
        z, done = block.ordered(z).to(frame), 0
        for token in (~forced).nonzero()[:, 0].tolist():
            a, b = self.evaluate(frame[:, max(lead + done - 1, 0) : lead + token], start + done)
            if token > done:
                among = frame[:, lead + done : lead + token]
                lived = self._weigh(_nats(among, a[:, :-1], b[:, :-1]).sum(-1).cpu())
                if lived is not None:
                    frame, a, b = (part[lived.to(part.device)] for part in (frame, a, b))
            frame[:, lead + token] = a[:, -1] * z[:, token] + b[:, -1]
            done = token + 1
            self._report(index, done)
        sampled = block.ordered(frame[:, lead:]).unsqueeze(1)
        require_finite(sampled, "the deep block", self.grid, index)
        return self.flow.tokens(self._shallow(sampled, index))[:, 0]

    def _shallow(self, tokens: Tensor, index: int) -> Tensor:
        """Latents of a frame's deep tokens (rows, 1, N, c): one frame through the sampler's shallow blocks."""
        return self.sampler.through_shallow(tokens.to(self.placement.shallow), index)

    def _before(self, index: int, u: Tensor) -> Tensor:
        """A frame's deep tokens behind the one before them, if the window has one."""
        last = self.deep[:, index - 1, -1:] if index > self.first else u[:, :0]
        return torch.cat((last, u), 1)

    def _slot(self, index: int) -> int:
        return (index - self.first) * self.grid.frame_tokens

    def _surprise(self, frame: Tensor, start: int) -> Tensor:
        """Nats (rows, N) of a frame's deep tokens, behind those before them; their keys and values stay."""
        a, b = self.evaluate(frame[:, :-1], start)
        return _nats(frame[:, -self.grid.frame_tokens :], a, b)

    def _report(self, index: int, done: int) -> None:
        size = self.grid.frame_tokens
        settled, total = index * size + done, self.grid.frames * size
        self.control.report(Progress("deep", settled, total, settled, total))

    # Who lives on

    def _weigh(self, nats: Tensor) -> Tensor | None:
        """Count known tokens of so many nats within a frame; which particles live on, if that is decided now. What is
        counted here isn't again when the frame is done."""
        self.weights -= nats
        self.counted -= nats
        return self._choose(self.rows) if self._few() else None

    def _few(self) -> bool:
        """Whether the effective number of particles has halved, so that they are to branch and end; it is noted."""
        effective = float(1 / self.weights.softmax(0).square().sum())
        self.effective[-1] = min(self.effective[-1], effective)
        return effective < self.rows / 2

    def _choose(self, count: int) -> Tensor:
        """Systematic resampling to so many particles, which weigh the same from here on."""
        ends = self.weights.softmax(0).cumsum(0)
        pointers = (torch.rand(1, generator=self.choice) + torch.arange(count)) / count
        lived = torch.searchsorted(ends, pointers.clamp(max=float(ends[-1]) * (1 - 1e-6)))
        if count == self.rows:
            self.evaluate.take(lived)
        self.tokens, self.deep = (part[lived.to(part.device)] for part in (self.tokens, self.deep))
        self.counted, self.weights, self.rows = self.counted[lived], torch.zeros(count), count
        return lived


def _nats(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Minus the log density (.., n) of tokens (.., n, c) with scale a and shift b."""
    z = (x - b) / a
    return (0.5 * (z.square() + math.log(2 * math.pi)) + a.log()).sum(-1)
