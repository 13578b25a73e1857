"""What a likelihood can decide: which caption fits a clip, and which of several candidates to keep.

Both go by clean latents at guidance 0: with the model's own noise added, a likelihood would scatter by the draw.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..control import Control
from ..errors import InputError, OutOfMemoryForecast
from ..jobs import memory
from ..jobs.context import Context
from ..jobs.noises import inversion_job, inverted, under_each
from ..jobs.prompts import check_text
from ..jobs.surprise import Surprise
from ..jobs.tasks import PLAIN, Generation, Job, layout
from ..jobs.timeline import Caption, timed
from ..model.config import FlowConfig
from ..pipeline import Pipeline
from ..solve.solvers import Statistics
from .inversion import clean_job

JUDGED = 2  # latent frames of a candidate
TOGETHER = 8  # captions that the deep block reads at once, where memory allows it


@dataclass(frozen=True)
class Choice:
    """How likely one clip is under each caption, in nats, the surprise of its tokens under the likeliest, and what was
    cut off each caption."""

    captions: list[str]
    log_likelihoods: list[float]
    surprise: Surprise
    cut: list[str]

    @property
    def winner(self) -> int:
        return max(range(len(self.captions)), key=self.log_likelihoods.__getitem__)

    @property
    def distance(self) -> float:
        """From the winner to the second, in nats."""
        first, second = sorted(self.log_likelihoods, reverse=True)[:2]
        return first - second


def check_captions(captions: list[str]) -> None:
    """Raise InputError unless there are at least two captions to choose from, all of them different."""
    if len(captions) < 2:
        raise InputError("one caption leaves nothing to choose; give two or more")
    for caption in captions:
        check_text(caption)
    twice = next((c for i, c in enumerate(captions) if c in captions[:i]), None)
    if twice is not None:
        raise InputError(f"the caption {twice!r} is given twice; give different ones")


@torch.no_grad()
def choose_caption(
    pipeline: Pipeline, pixels: Tensor, captions: list[str], fps: float | None = None, control: Control | None = None,
    *, window: int | None = None, keep: int | None = None, context: Context | None = None,
) -> Choice:  # fmt: skip
    """Which caption fits a clip (F, 3, H, W) in [-1, 1] best. The shallow blocks read no text and are inverted once.

    `window`, `keep` and `context` as of `encode_to_noise`. Raises InputError for less than two captions, or equal ones.
    """
    check_captions(captions)
    job = clean_job(pipeline.config, pixels, fps, window=window, keep=keep, context=context)
    together = captions_at_once(pipeline, job, len(captions))
    texts, cut = _read(pipeline, captions, job, together)
    latents = pipeline.encode_clip(pixels, control)
    best, scores = None, []
    for found in under_each(
        pipeline.flow, job, latents, texts, together, control=control, placement=pipeline.placement
    ):
        scores.append(float(found.log_likelihood))
        if best is None or scores[-1] > -float(best.surprise.sum()):
            best = found
    surprise = Surprise(best.surprise[0].cpu(), pipeline.config, job.height, job.width, best.given)
    return Choice(captions, scores, surprise, cut)


def captions_at_once(pipeline: Pipeline, job: Job, count: int) -> int:
    """How many of so many captions fit beside each other. Raises OutOfMemoryForecast if not one does."""
    together = min(count, TOGETHER)
    while True:
        need = memory.forecast_encode(pipeline.config, replace(job, batch=together), pipeline.dtype)
        try:
            pipeline.require(need, "encoding this")
            return together
        except OutOfMemoryForecast:
            if together == 1:
                raise
            together //= 2


def _read(pipeline: Pipeline, captions: list[str], job: Job, together: int) -> tuple[Tensor, list[str]]:
    """Embeddings (P, L, D) of captions in main memory, and what was cut off each."""
    texts, cut = [], []
    for first in range(0, len(captions), together):
        part = captions[first : first + together]
        more = first + together < len(captions)
        text, _, rest = pipeline.encode_text(part, "", job, keep_encoder=more)
        texts.append(text.cpu())
        cut += rest
    return torch.cat(texts), cut


@dataclass(frozen=True)
class Best:
    """The seed of the most likely of some candidates, and how likely each is, in nats, by seed. `judged` counts the
    latent frames that were looked at; `statistics` is what the solvers did."""

    seed: int
    log_likelihoods: dict[int, float]
    judged: int
    statistics: list[Statistics]


@torch.no_grad()
def best_of(
    pipeline: Pipeline, caption: Caption, job: Job, count: int, *, negative: str = "", control: Control | None = None,
    judged: int | None = None,
) -> Best:  # fmt: skip
    """Which of the seeds job.seed, job.seed + 1, .. makes the likeliest of `count` results, looking at their first
    `judged` latent frames (None: as `frames_judged` says). Nothing is decoded: the winner is made from its seed.

    A candidate is denoised, so that its clean latents are there, and inverting them under its prompt gives their exact
    likelihood; given frames are its condition. As no frame depends on a later one, only the judged ones are sampled,
    `job.batch` candidates at a time, and those that the denoiser has to see after them. The text encoder stays. Raises
    InputError for less than two candidates, and as `Pipeline.start`.
    """
    check_count(count)
    (caption,), job = timed(caption, job)
    judged = min(judged or frames_judged(pipeline.config, job), layout(pipeline.config, job).frames)
    judging = judging_job(pipeline.config, job, judged)
    means = pipeline.plan.means if pipeline.plan else PLAIN
    pipeline.require(memory.forecast_encode(pipeline.config, judging, pipeline.dtype, means), "judging candidates")
    scores, statistics = {}, []
    for first in range(0, count, job.batch):
        some = {"seed": job.seed + first, "batch": min(job.batch, count - first)}
        captions = [caption] * some["batch"]
        run, _ = pipeline.start(
            captions, replace(job, **some), negative=negative, control=control, keep_text_encoder=True
        )  # fmt: skip
        found = inverted(
            pipeline.flow, replace(judging, **some), _beginning(run, judged), run.text, control=control,
            placement=pipeline.placement, means=run.means,
        )  # fmt: skip
        scores |= {some["seed"] + i: score for i, score in enumerate(found.log_likelihood.tolist())}
        statistics.append(run.statistics)
    return Best(max(scores, key=scores.__getitem__), scores, judged, statistics)


def frames_judged(config: FlowConfig, job: Job) -> int:
    """The latent frames by which candidates are told apart: the first ones, where most of what fails does so already
    (see benchmarks/surprise.py), or all, where the first is given."""
    plan = layout(config, job)
    frames = (*plan.starts, plan.frames)[1]  # of the first prompt
    return frames if job.context and job.context.shown else min(JUDGED, frames)


def _beginning(run: Generation, frames: int) -> Tensor:
    """The first latent frames (B, C, n, h, w) in VAE space of a generation, which goes no further than it must."""
    done, parts = 0, []
    for piece in run.stream():
        if piece.final:
            parts.append(piece.latents)
            done += piece.latents.shape[2]
        if done >= frames:
            break
    return torch.cat(parts, 2)[:, :, :frames]


def check_count(count: int) -> None:
    """Raise InputError unless there are at least two candidates."""
    if count < 2:
        raise InputError(f"the best of {count}; give at least 2 candidates, or leave it out")


def judging_job(config: FlowConfig, job: Job, frames: int) -> Job:
    """The job whose likelihood says how good a candidate's first latent frames are: clean ones, without guidance."""
    return inversion_job(
        config, replace(job, guidance=0.0, changes=(), frames=config.latent.frames(frames)), clean=True
    )
