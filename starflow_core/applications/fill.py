"""Filling in: parts of a picture or clip, what is around it, or frames that are missing. Nothing is trained.

See `solve.filling` for how. No frame is sure before the last is done, since what is known of it may decide between
particles, so that filling doesn't stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..control import Control
from ..errors import InputError, OutOfMemoryForecast
from ..jobs import memory
from ..jobs.build import default_job
from ..jobs.masks import checked_mask, known_cells, stand_in
from ..jobs.noises import flowing
from ..jobs.prompts import check_text
from ..jobs.tasks import PLAIN, Generation, Job, Means, layout
from ..model.cache import RESIDENT
from ..model.config import FlowConfig
from ..model.flow import Flow
from ..model.latent import to_vae_space
from ..model.placement import Placement
from ..pipeline import Pipeline
from ..solve.filling import fill_in, opening
from ..solve.solvers import PRESETS, SolverSettings

PARTICLES = 8


@dataclass(frozen=True)
class Filled:
    """Pixels (F, 3, H, W) in [-1, 1], of which the known ones are the source's, bit for bit; latents (1, C, T, h, w) in
    VAE space as they were sampled and denoised, known cells as they were encoded; and for each latent frame the least
    effective number of particles: near 1 where few could explain what is known. `cut` is what was too long of the
    prompt, `particles` how many there were."""

    pixels: Tensor
    latents: Tensor
    effective: list[float]
    cut: str
    particles: int


@torch.no_grad()
def fill(
    pipeline: Pipeline, pixels: Tensor, mask: Tensor, prompt: str, *, negative: str = "", particles: int | None = None,
    guidance: float | None = None, seed: int = 0, fps: float | None = None, window: int | None = None,
    keep: int | None = None, solver: SolverSettings = PRESETS["balanced"], control: Control | None = None,
    tile: int | None = None,
) -> Filled:  # fmt: skip
    """Fill what is masked of a clip (F, 3, H, W) in [-1, 1] (a picture if F = 1), as the prompt says, which has to
    describe all of the result.

    `mask` (H, W), (1, H, W) or (F, H, W), 1 where it is to be filled, 0 where it stays. A latent cell, which stands for
    a square of pixels in several frames, is known only if all of them are. Without `particles`, there are 8, or as many
    as fit in memory. Raises InputError for a mask that doesn't
    fit, or leaves nothing to fill or nothing to go by, and as `Pipeline.start`.
    """
    config = pipeline.config
    check_prompt(prompt)
    check_text(negative)
    mask, known, job = filling_job(
        config, pixels, mask, particles, fps=fps, guidance=guidance, seed=seed, window=window, keep=keep, solver=solver
    )  # fmt: skip

    def require(count: int) -> None:
        pipeline.require(forecast_fill(config, job, pipeline.dtype, particles=count, known=known), "filling this")

    particles, _ = fitting(particles, require)
    latents = pipeline.encode_clip(stand_in(pixels, mask), control)
    text, uncond, cut = pipeline.encode_text([prompt], negative, job)
    options = {"control": control, "placement": pipeline.placement}
    made, effective = fill_latents(pipeline.flow, job, latents, known, text, uncond, particles, **options)
    run = Generation(pipeline.flow, job, text, uncond, control, placement=pipeline.placement)
    frames = torch.cat(list(pipeline.decoded(made, run, tile)), 1)[0]
    return Filled(composite(pixels, mask, frames), made.cpu(), effective, cut[0], particles)


def filling_job(
    config: FlowConfig, pixels: Tensor, mask: Tensor, particles: int | None = None, **settings
) -> tuple[Tensor, Tensor, Job]:
    """The mask (F, H, W) of pixels to fill, the known cells (T, h, w), and the job that makes the like of the clip.
    Settings of None are the model's own. Raises InputError as `fill`, before any work."""
    if particles is not None and particles < 1:
        raise InputError(f"particles is {particles}; the minimum is 1")
    height, width = pixels.shape[-2:]
    given = {name: value for name, value in settings.items() if value is not None}
    job = default_job(config, height=height, width=width, frames=len(pixels), **given)
    layout(config, job)
    mask = checked_mask(mask, pixels)
    return mask, known_cells(config, mask), job


def check_prompt(prompt: str) -> None:
    """Raise InputError for a prompt that says nothing, or that no model could read."""
    check_text(prompt)
    if not prompt.strip():
        raise InputError("the prompt is empty; say what all of the result shows")


def fitting(particles: int | None, attempt: Callable[[int], Any], most: int = PARTICLES) -> tuple[int, Any]:
    """How many particles there are to be, and what `attempt` returned for so many; it raises OutOfMemoryForecast where
    they don't fit. Those that are given have to; without, it is `most`, halved until they fit."""
    count = most if particles is None else particles
    while True:
        try:
            return count, attempt(count)
        except OutOfMemoryForecast as error:
            if count > 1 and particles is not None:
                raise OutOfMemoryForecast(f"{error} Fewer particles than {count} need less, too.") from None
            if count == 1:
                raise
        count //= 2


def fewer(particles: int, wanted: int) -> str:
    """A warning where not as many particles fit as were wanted."""
    if particles == wanted:
        return ""
    return f"{wanted} particles don't fit in memory, so {particles} {'go' if particles > 1 else 'goes'} side by side"


def told(effective: list[float], particles: int, known: Tensor) -> str:
    """`Filled.effective` in words, of how many where a first frame takes more."""
    first, numbers = opening(particles, known), [f"{n:.1f}" for n in effective]
    if first > particles:
        numbers[0] += f" of {first}"
    return f"effective particles by latent frame: {', '.join(numbers)}"


def composite(pixels: Tensor, mask: Tensor, made: Tensor) -> Tensor:
    """What was made where the mask (F, H, W) is set, the pixels themselves elsewhere, (F, 3, H, W)."""
    return torch.where(mask.unsqueeze(1), made.to(pixels), pixels)


def forecast_fill(
    config: FlowConfig, job: Job, dtype: torch.dtype, means: Means = PLAIN, *, particles: int, known: Tensor
) -> memory.Forecast:
    """What it takes: all particles side by side, more of them in the first frame, then one clip denoised."""
    means = replace(means, cache=RESIDENT)  # particles change places in it, so that all of it has to be there
    first = replace(job, batch=opening(particles, known), frames=1)
    needs = [memory.forecast_encode(config, each, dtype, means) for each in (replace(job, batch=particles), first)]
    needs.append(memory.forecast(config, job, dtype, means))
    return max(needs, key=lambda need: need.total)


@torch.no_grad()
def fill_latents(
    flow: Flow, job: Job, latents: Tensor, known: Tensor, text: Tensor, uncond: Tensor | None = None,
    particles: int = PARTICLES, *, control: Control | None = None, placement: Placement | None = None,
) -> tuple[Tensor, list[float]]:  # fmt: skip
    """Fill the cells of a clip's latents (1, C, T, h, w) in VAE space that aren't `known` (T, h, w); with embeddings
    (1, L, D) of the prompts. Returns the latents, denoised if the job says so, and `Filled.effective`."""
    control, placement = control or Control(), placement or Placement.on(text.device)
    config, plan = flow.config, layout(flow.config, job)
    home = latents.to(placement.shallow)
    clean = flowing(config, replace(job, denoise=False), home)
    found = fill_in(
        flow, flowing(config, job, home), known, text, uncond, guidance=job.guidance, particles=particles,
        seed=job.seed, window=plan.window, keep=plan.keep, settings=job.solver, control=control, placement=placement,
    )  # fmt: skip
    run = Generation(flow, job, text, uncond, control, placement=placement)
    made, patch = run.denoised(found.latents), config.patch_size
    cells = known.repeat_interleave(patch, -2).repeat_interleave(patch, -1).to(made.device).unsqueeze(1)
    return to_vae_space(config.latent, torch.where(cells, clean, made), plan.factors), found.effective
