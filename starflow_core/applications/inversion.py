"""Pictures and clips to noise and back: the flow's exact inverse, and its likelihood."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..control import Control
from ..jobs import memory
from ..jobs.build import default_job
from ..jobs.context import Context
from ..jobs.noises import Noise, check_one_prompt, inversion_job, inverted, noise_of
from ..jobs.tasks import Generation, Job
from ..jobs.timeline import Caption, timed
from ..model.config import FlowConfig
from ..pipeline import Pipeline
from ..solve.inverting import Inverted
from ..solve.solvers import PRESETS, SolverSettings

Inversion = Noise  # its name in version 0.1


@torch.no_grad()
def encode_to_noise(
    pipeline: Pipeline, pixels: Tensor, prompt: str = "", fps: float | None = None, control: Control | None = None,
    **options,
) -> tuple[Noise, str]:  # fmt: skip
    """The noise of a clip (F, 3, H, W) in [-1, 1] (a picture if F = 1), and what was cut off the prompt.

    Options: `seed` adds the model's own noise to the latents first, drawn from it; `negative` and `guidance` as when
    sampling; `window` and `keep` for clips longer than the window; `context`, the frames that are given. Raises
    InputError for impossible sizes and frame counts.
    """
    return measure(pipeline, pixels, prompt, fps, control, **options)[1:]


@torch.no_grad()
def measure(
    pipeline: Pipeline, pixels: Tensor, prompt: str = "", fps: float | None = None, control: Control | None = None, *,
    seed: int | None = None, negative: str = "", guidance: float = 0.0, window: int | None = None,
    keep: int | None = None, context: Context | None = None,
) -> tuple[Inverted, Noise, str]:  # fmt: skip
    """As `encode_to_noise`, with the surprise of each token."""
    check_one_prompt(timed(prompt, pipeline.job())[1])
    config = pipeline.config
    job = clean_job(config, pixels, fps, guidance=guidance, window=window, keep=keep, context=context)
    if seed is not None:
        job = inversion_job(config, replace(job, seed=seed), clean=False)
    pipeline.require(memory.forecast_encode(config, job, pipeline.dtype), "encoding this")
    latents = pipeline.encode_clip(pixels, control)
    return measure_latents(pipeline, latents, job, prompt, negative, control)


@torch.no_grad()
def measure_latents(
    pipeline: Pipeline, latents: Tensor, job: Job, prompt: str, negative: str = "", control: Control | None = None,
    keep_text_encoder: bool = False,
) -> tuple[Inverted, Noise, str]:  # fmt: skip
    """As `measure`, for a clip's latents (1, C, T, h, w) in VAE space, inverted as `job` says."""
    text, uncond, cut = pipeline.encode_text([prompt], negative, job, keep_text_encoder)
    found = inverted(pipeline.flow, job, latents, text, uncond, control=control, placement=pipeline.placement)
    return found, noise_of(pipeline.config, job, found, prompt, negative), cut[0]


def clean_job(config: FlowConfig, pixels: Tensor, fps: float | None = None, **settings) -> Job:
    """The job that inverts a clip (F, 3, H, W), without the model's own noise, and without guidance unless given."""
    height, width = pixels.shape[-2:]
    rate = {} if fps is None else {"fps": fps}
    settings = {"guidance": 0.0, **rate, **settings}
    return inversion_job(config, default_job(config, height=height, width=width, frames=len(pixels), **settings), True)


def decode_from_noise(
    pipeline: Pipeline, noise: Noise, solver: SolverSettings = PRESETS["exact"], control: Control | None = None,
    prompt: Caption | None = None, keep_text_encoder: bool = False, **settings,
) -> Generation:  # fmt: skip
    """A generation that makes the clip again, or another one from the same noise with another `prompt` or other job
    `settings`; `Pipeline.frames` gives its pixels."""
    job = noise.job(pipeline.config, solver, **settings)
    caption = noise.prompt if prompt is None else prompt
    options = {"control": control, "noise": noise.noise, "keep_text_encoder": keep_text_encoder}
    return pipeline.start(caption, job, negative=noise.negative, **options)[0]
