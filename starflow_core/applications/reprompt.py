"""Another prompt for a clip: its noise under the caption that it has, sampled under another one. Nothing is trained.

What the noise says stays (where things are, how they move), what the caption says changes. Where the two are tied, as a
colour is to its brightness, a candidate may lose its place, so that the likest of several is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..control import Control
from ..errors import InputError
from ..jobs import HOLDS, memory
from ..jobs.build import default_job
from ..jobs.context import Context
from ..jobs.noises import Noise, fresh_noise, inversion_job
from ..jobs.prompts import check_text
from ..jobs.tasks import Generation, Job
from ..pipeline import Pipeline
from ..solve.solvers import PRESETS, SolverSettings
from .inversion import decode_from_noise, measure_latents
from .likelihood import under_each

GUIDANCE = dict(zip(HOLDS, (0.0, 3.0), strict=True))  # by what is held
BLUR = 12  # the structure is seen through a blur of this share of the shorter side


@dataclass(frozen=True)
class Candidate:
    """One result: pixels (F, 3, H, W) in [-1, 1] and latents (1, C, T, h, w) in VAE space; the `noise` it was sampled
    from, and its `score`, the higher the better."""

    pixels: Tensor
    latents: Tensor
    noise: Noise
    score: float


@dataclass(frozen=True)
class Wish:
    """What is asked of a clip that shows `was`: that it show `prompt`.

    `hold` "clip" holds on to all of it, by its noise, `strength` 0 to 1; candidates are judged by the likeness of their
    outlines, those that `was` still fits better last. "first-frame" gives that frame and nothing else; candidates are
    judged by how much likelier `prompt` makes them than `was` does. Guidance None is what suits each: none for the
    clip, and 3.
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


@torch.no_grad()
def reprompt(
    pipeline: Pipeline, pixels: Tensor, wish: Wish, fps: float | None = None,
    solver: SolverSettings = PRESETS["balanced"], control: Control | None = None, tile: int | None = None,
) -> tuple[Candidate, list[float]]:  # fmt: skip
    """The best candidate for a clip (F, 3, H, W) in [-1, 1], and the scores of all; `tile` is the VAE's. Raises
    InputError for impossible sizes and frame counts, and for a picture whose first frame alone is to be held."""
    job = _job(pipeline, pixels, wish, fps, solver)
    latents = pipeline.encode_clip(pixels, control)
    make = _from_noise if wish.hold == "clip" else _from_first_frame
    best, scores = None, []
    for index in range(wish.candidates):
        candidate = make(pipeline, pixels, latents, wish, replace(job, seed=wish.seed + index), control, tile)
        scores.append(candidate.score)
        if best is None or candidate.score > best.score:
            best = candidate
    return best, scores


def structure_likeness(one: Tensor, other: Tensor) -> float:
    """How alike the outlines of two clips (F, 3, H, W) are, whatever their colours: the mean over frames of the
    correlation of their blurred edges, -1 to 1."""
    a, b = (_edges(clip).flatten(1) for clip in (one, other))
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    return float(torch.cosine_similarity(a, b, dim=1).mean())


def _job(
    pipeline: Pipeline, pixels: Tensor, wish: Wish, fps: float | None, solver: SolverSettings
) -> Job:  # fmt: skip
    height, width = pixels.shape[-2:]
    job = default_job(
        pipeline.config, height=height, width=width, frames=len(pixels), guidance=wish.guidance, seed=wish.seed,
        solver=solver, **({} if fps is None else {"fps": fps}),
    )  # fmt: skip
    if wish.hold == "first-frame" and job.frames == 1:
        raise InputError("a picture has no frames after its first; hold on to the clip")
    pipeline.require(memory.forecast_encode(pipeline.config, job, pipeline.dtype), "inverting this")
    return job


def _from_noise(
    pipeline: Pipeline, pixels: Tensor, latents: Tensor, wish: Wish, job: Job, control: Control | None,
    tile: int | None,
) -> Candidate:  # fmt: skip
    """The first candidate is that of the clean latents, unless their noise is to be blended; for the others the model's
    own noise is added, from a seed each."""
    job = inversion_job(pipeline.config, job, clean=job.seed == wish.seed and wish.strength == 1)
    _, noise, _ = measure_latents(pipeline, latents, job, wish.was, wish.negative, control, keep_text_encoder=True)
    if wish.strength < 1:
        noise = noise.vary((1 - wish.strength**2) ** 0.5, job.seed)
    generation = decode_from_noise(pipeline, noise, job.solver, control, wish.prompt, keep_text_encoder=True)
    made, latents = _made(pipeline, generation, tile)
    missed = wish.candidates > 1 and _gain(pipeline, latents, wish, job, control) < 0
    return Candidate(made, latents, noise, structure_likeness(pixels, made) - missed)


def _from_first_frame(
    pipeline: Pipeline, pixels: Tensor, latents: Tensor, wish: Wish, job: Job, control: Control | None,
    tile: int | None,
) -> Candidate:  # fmt: skip
    context = Context("first_frame", latents[:, :, :1])
    job = replace(job, context=context)
    options = {"negative": wish.negative, "control": control, "keep_text_encoder": True}
    generation, _ = pipeline.start(wish.prompt, job, **options)
    made, latents = _made(pipeline, generation, tile)
    noise = replace(fresh_noise(pipeline.config, job), prompt=wish.prompt, negative=wish.negative)
    return Candidate(made, latents, noise, _gain(pipeline, latents, wish, job, control))


def _gain(pipeline: Pipeline, latents: Tensor, wish: Wish, job: Job, control: Control | None) -> float:
    """How much likelier the new prompt makes latents than the caption that the clip had, in nats."""
    job = inversion_job(pipeline.config, replace(job, guidance=0.0), clean=True)
    texts, _, _ = pipeline.encode_text([wish.prompt, wish.was], "", job, keep_encoder=True)
    right, wrong = (float(found.log_likelihood) for found in under_each(pipeline, job, latents, texts, control=control))
    return right - wrong


def _made(pipeline: Pipeline, generation: Generation, tile: int | None) -> tuple[Tensor, Tensor]:
    """Pixels (F, 3, H, W) and latents."""
    latents = generation.run()
    return torch.cat(list(pipeline.decoded(latents, generation, tile)), 1)[0], latents.cpu()


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
