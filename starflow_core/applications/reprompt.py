"""Another prompt for a clip: its noise under the caption that it has, sampled under another one. Nothing is trained.

What the noise says stays (where things are, how they move), what the caption says changes. Where the two are tied, as a
colour is to its brightness, a result may lose its place, so that the likest of several is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..control import Control
from ..errors import InputError
from ..jobs import HOLDS, memory
from ..jobs.build import default_job
from ..jobs.context import Context
from ..jobs.noises import Noise, fresh_noise, inversion_job, inverted, noise_of, under_each
from ..jobs.prompts import check_text
from ..jobs.tasks import PLAIN, Generation, Job, Means
from ..model.flow import Flow
from ..model.placement import Placement
from ..pipeline import Pipeline
from ..solve.solvers import PRESETS, SolverSettings

BEGINNINGS = 4  # first frames that are tried for each candidate
NEAREST = 2  # of them that are gone on from
BEGIN, GO_ON = (0.3, 0.5, 0.7), (0.3, 0.4, 0.5)  # how far their noise, and the later frames', is varied, in turn
GUIDANCE = dict(zip(HOLDS, (0.0, 3.0), strict=True))  # by what is held
BLUR = 12  # the structure is seen through a blur of this share of the shorter side


@dataclass(frozen=True)
class Wish:
    """What is asked of a clip that shows `was`: that it show `prompt`.

    `hold` "clip" holds on to all of it, by its noise, `strength` 0 to 1; candidates are judged by the likeness of their
    outlines, those that `was` still fits better last. "first-frame" gives that frame and nothing else; candidates are
    judged by how much likelier `prompt` makes them than `was` does. Guidance None is what suits each: none for the
    clip, and 3. Without the whole clip held, strength doesn't matter.
    """

    was: str
    prompt: str
    negative: str = ""
    hold: str = "clip"
    strength: float = 1.0
    guidance: float | None = None
    candidates: int = 1
    seed: int = 0

    def __post_init__(self):
        for text in (self.was, self.prompt, self.negative):
            check_text(text)
        if not self.prompt.strip():
            raise InputError("the prompt is empty; say what the clip shall show")
        if self.hold not in HOLDS:
            raise InputError(f"hold is {self.hold!r}; choose one of {', '.join(HOLDS)}")
        if not 0 <= self.strength <= 1:
            raise InputError(f"the strength of holding on is {self.strength:g}; give a number from 0 to 1")
        if self.candidates < 1:
            raise InputError(f"candidates is {self.candidates}; the minimum is 1")
        if self.guidance is None:
            object.__setattr__(self, "guidance", GUIDANCE[self.hold])


@dataclass(frozen=True)
class Candidate:
    """One result: latents (1, C, T, h, w) in VAE space, and the `noise` they were sampled from."""

    latents: Tensor
    noise: Noise


@dataclass(frozen=True)
class Edited:
    """The best candidate with its pixels (F, 3, H, W) in [-1, 1], the scores of all, the higher the better, and what
    was cut off the two captions."""

    best: Candidate
    pixels: Tensor
    scores: list[float]
    cut: list[str]

    @property
    def kept(self) -> int:
        """Which candidate is the best."""
        return self.scores.index(max(self.scores))


@torch.no_grad()
def reprompt(
    pipeline: Pipeline, pixels: Tensor, wish: Wish, fps: float | None = None,
    solver: SolverSettings = PRESETS["balanced"], control: Control | None = None, tile: int | None = None,
) -> Edited:  # fmt: skip
    """What a clip (F, 3, H, W) in [-1, 1] becomes; `tile` is the VAE's. Raises InputError for impossible sizes and
    frame counts, and for a picture whose first frame alone is to be held."""
    control = control or Control()
    height, width = pixels.shape[-2:]
    settings = {"guidance": wish.guidance, "seed": wish.seed, "solver": solver, **({} if fps is None else {"fps": fps})}
    job = default_job(pipeline.config, height=height, width=width, frames=len(pixels), **settings)
    check_hold(wish, job)
    pipeline.require(memory.forecast_encode(pipeline.config, job, pipeline.dtype), "inverting this")
    plan = pipeline.plan_for(job)
    latents = pipeline.encode_clip(pixels, control)
    job = wished_job(wish, job, latents)
    texts, uncond, cut = pipeline.encode_text([wish.was, wish.prompt], wish.negative, job)
    work = Reprompting(
        pipeline.flow, wish, job, pixels, latents, texts, uncond,
        lambda made: pipeline.decode_clip(made, control, tile), control=control,
        placement=pipeline.placement, means=plan.means, fallbacks=plan.fallbacks,
    )  # fmt: skip
    return Edited(*work.best(), cut)


def check_hold(wish: Wish, job: Job) -> None:
    """Raise InputError for a picture whose first frame alone is to be held."""
    if wish.hold != "clip" and job.frames == 1:
        raise InputError("a picture has no frames after its first; hold on to all of it (without --hold, or a context)")


def wished_job(wish: Wish, job: Job, latents: Tensor) -> Job:
    """The job that makes the result from a clip's latents (1, C, T, h, w)."""
    return job if wish.hold == "clip" else replace(job, context=Context("first_frame", latents[:, :, :1]))


class Reprompting:
    """Makes the candidates for a clip: its `pixels` (F, 3, H, W) in [-1, 1] and `latents` (1, C, T, h, w) in VAE space.

    `job` is as `wished_job` says, `texts` (2, L, D) are of what the clip shows and of what it shall show, and `decode`
    makes pixels like the clip's of latents like the clip's.
    """

    def __init__(
        self, flow: Flow, wish: Wish, job: Job, pixels: Tensor, latents: Tensor, texts: Tensor, uncond: Tensor | None,
        decode: Callable[[Tensor], Tensor], *, control: Control | None = None, placement: Placement | None = None,
        means: Means = PLAIN, fallbacks: Iterable[Means] = (),
    ):  # fmt: skip
        self.flow, self.wish, self.job, self.pixels, self.latents = flow, wish, job, pixels, latents
        self.was, self.wanted, self.uncond, self.decode = texts[:1], texts[1:], uncond, decode
        self.control, self.placement = control, placement or Placement.on(texts.device)
        self.means, self.fallbacks = means, list(fallbacks)

    @torch.no_grad()
    def best(self, scored: Callable[[int], None] = lambda index: None) -> tuple[Candidate, Tensor, list[float]]:
        """The best candidate, its pixels, and the scores of all. `scored` is called with the index of each."""
        best, shown, scores = None, None, []
        for candidate in self._candidates():
            pixels = self.decode(candidate.latents)
            scores.append(self._score(candidate.latents, pixels))
            if best is None or scores[-1] > max(scores[:-1]):
                best, shown = candidate, pixels
            scored(len(scores) - 1)
        return best, shown, scores

    def _candidates(self) -> Iterator[Candidate]:
        if self.wish.hold == "clip":
            found = self._noises()
        else:
            texts = {"prompt": self.wish.prompt, "negative": self.wish.negative}
            jobs = (replace(self.job, seed=self.wish.seed + index) for index in range(self.wish.candidates))
            found = (replace(fresh_noise(self.flow.config, job), **texts) for job in jobs)
        for noise in found:
            yield Candidate(self._sampled(noise.noise, replace(self.job, seed=noise.seed or 0), noise.clean), noise)

    def _noises(self) -> Iterator[Noise]:
        """The clip's own noise, that of clean latents, unless it is to be blended. For further candidates that of noisy
        ones, which begins as what comes nearest to the source, and goes on varied."""
        wish, varied = self.wish, (1 - self.wish.strength**2) ** 0.5
        if not varied:
            yield self._inverted(clean=True)
        rest = wish.candidates - (not varied)
        if not rest:
            return
        noise = self._inverted(clean=False)
        noise = noise.vary(varied, wish.seed) if varied else noise
        if wish.candidates == 1:
            yield noise
            return
        beginnings = self._beginnings(noise)
        beginnings = beginnings[: NEAREST if self.job.frames > 1 else rest]
        for index in range(rest):
            how_far = GO_ON[index % len(GO_ON)] if index else 0.0
            gone_on = noise.vary(how_far, wish.seed + index, keep=1)
            yield gone_on.beginning_as(beginnings[index % len(beginnings)])

    def _beginnings(self, noise: Noise) -> list[Noise]:
        """A noise and variations of it, those first whose first frames are likest to the source's."""
        tried = [noise, *(noise.vary(BEGIN[index % len(BEGIN)], self.wish.seed + index)
                          for index in range(1, BEGINNINGS * self.wish.candidates))]  # fmt: skip
        first = torch.cat([each.noise[:, :1] for each in tried])
        job, likeness = replace(self.job, frames=1, seed=noise.seed), []
        for some in first.split(noise.noise.shape[1]):  # as many as a clip has, so that they take no more memory
            made = self._sampled(some, replace(job, batch=len(some)), clean=False)
            likeness += [structure_likeness(self.pixels[:1], self.decode(each)) for each in made.split(1)]
        return [tried[index] for index in sorted(range(len(tried)), key=likeness.__getitem__, reverse=True)]

    def _inverted(self, clean: bool) -> Noise:
        job = inversion_job(self.flow.config, self.job, clean)
        found = inverted(
            self.flow, job, self.latents, self.was, self.uncond, control=self.control, placement=self.placement,
            means=self.means,
        )  # fmt: skip
        return noise_of(self.flow.config, job, found, self.wish.was, self.wish.negative)

    def _sampled(self, noise: Tensor, job: Job, clean: bool) -> Tensor:
        """Latents in VAE space of a noise under the new prompt."""
        job = replace(job, denoise=not clean)
        run = Generation(
            self.flow, job, self.wanted, self.uncond, self.control, noise, self.placement, self.means, self.fallbacks
        )  # fmt: skip
        return run.run().cpu()

    def _score(self, latents: Tensor, pixels: Tensor) -> float:
        gain = self._gain(latents) if self.wish.candidates > 1 else 0.0
        return gain if self.wish.hold != "clip" else structure_likeness(self.pixels, pixels) - (gain < 0)

    def _gain(self, latents: Tensor) -> float:
        """How much likelier the new prompt makes clean latents than what the clip shows, in nats."""
        job = inversion_job(self.flow.config, replace(self.job, guidance=0.0), clean=True)
        right, wrong = (
            float(found.log_likelihood)
            for found in under_each(
                self.flow, job, latents, torch.cat((self.wanted, self.was)), control=self.control,
                placement=self.placement, means=self.means,
            )
        )  # fmt: skip
        return right - wrong


def structure_likeness(one: Tensor, other: Tensor) -> float:
    """How alike the outlines of two clips (F, 3, H, W) are, whatever their colours: the mean over frames of the
    correlation of their blurred edges, -1 to 1."""
    a, b = (_edges(clip).flatten(1) for clip in (one, other))
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    return float(torch.cosine_similarity(a, b, dim=1).mean())


def _edges(clip: Tensor) -> Tensor:
    """Where a clip (F, 3, H, W) has edges, blurred: (F, 1, H, W)."""
    clip = clip.float()
    across = F.pad((clip[..., 1:] - clip[..., :-1]).abs().sum(1, keepdim=True), (1, 0))
    down = F.pad((clip[..., 1:, :] - clip[..., :-1, :]).abs().sum(1, keepdim=True), (0, 0, 1, 0))
    size = max(3, min(clip.shape[-2:]) // BLUR) | 1
    edges = across + down
    for _ in range(2):
        edges = F.avg_pool2d(edges, size, 1, size // 2, count_include_pad=False)
    return edges
