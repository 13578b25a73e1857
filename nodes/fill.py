"""Filling in: parts of a picture or clip, what is around it, missing frames."""

from __future__ import annotations

import time
from functools import partial

from comfy_api.latest import io
from torch import Tensor

from ..starflow_core.applications.fill import (
    PARTICLES,
    check_prompt,
    composite,
    fewer,
    fill_latents,
    filling_job,
    fitting,
    forecast_fill,
    told,
)  # fmt: skip
from ..starflow_core.control import Control
from ..starflow_core.errors import InputError
from ..starflow_core.jobs.masks import checked_mask, joined, parted, stand_in
from ..starflow_core.jobs.tasks import Job
from ..starflow_core.media import FITS, fit
from ..starflow_core.model.placement import Placement
from . import host
from .conditioning import as_clip, at_rate_of, embeddings_for, job_of, prompt_of
from .latent import decoded
from .options import Options, planned
from .sampling import OWN_GUIDANCE, check_guidance
from .types import CATEGORY, SEARCH, ModelType, OptionsType, SolverType


class STARFlowFillIn(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STARFlowFillIn",
            display_name="STARFlow Fill In",
            category=CATEGORY,
            **SEARCH,
            description="Fills what a mask marks in a picture or clip, around it, or in missing frames. What isn't "
            "marked stays as it is.",
            inputs=[
                ModelType.Input("model", tooltip="The flow."),
                io.Conditioning.Input(
                    "positive", tooltip="From STARFlow Text Encode; it describes all of the result, known parts, too."
                ),
                io.Conditioning.Input("negative", tooltip="From STARFlow Text Encode; used only with guidance."),
                io.Image.Input("images", tooltip="The picture, or the frames of one clip."),
                io.Mask.Input(
                    "mask", tooltip="White is filled. One for all frames, or one for each; of the size of the images."
                ),
                io.Vae.Input("vae", tooltip="The VAE that goes with the model."),
                io.Latent.Input("latent", tooltip="Sets the size that images and mask are brought to, and the length."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Determines the noise, which is the same on every machine.",
                ),
                io.Float.Input(
                    "guidance",
                    default=OWN_GUIDANCE,
                    min=OWN_GUIDANCE,
                    max=100.0,
                    step=0.1,
                    tooltip="How strongly the prompt counts. 0 is off and corresponds to a CFG of 1 elsewhere; -1 "
                    "uses the model's own value.",
                ),
                io.Int.Input(
                    "particles",
                    default=PARTICLES,
                    min=1,
                    max=1024,
                    tooltip="Samples that go side by side; those that fit what is known live on. More fit better, and "
                    "take more time and memory.",
                ),
                SolverType.Input("settings", optional=True, tooltip="For the shallow blocks. Without it: balanced."),
                OptionsType.Input("options", optional=True, tooltip="From STARFlow Memory."),
                io.Combo.Input(
                    "fit",
                    options=list(FITS),
                    default=FITS[0],
                    optional=True,
                    tooltip="For images of another shape than the latent's: crop, pad or stretch them.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images", tooltip="The result; what wasn't marked is the same to the bit."
                ),
                io.Latent.Output(display_name="latent", tooltip="What was sampled, known cells as they were encoded."),
                io.String.Output(display_name="report", tooltip="How well the known parts could be met, by frame."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, fit: str = FITS[0]) -> bool | str:
        return fit in FITS or f"fit is {fit!r}; expected one of {', '.join(FITS)}"

    @classmethod
    def execute(
        cls, model, positive, negative, images, mask, vae, latent, seed: int, guidance: float, particles: int,
        settings=None, options=None, fit: str = FITS[0],
    ) -> io.NodeOutput:  # fmt: skip
        check_guidance(guidance)
        config, samples = host.flow_of(model).config, latent["samples"]
        wanted = job_of(config, samples)
        pixels, marked = _fitted(images, mask, wanted, fit)
        given = {"seed": seed, "solver": settings, "guidance": guidance if guidance >= 0 else None}
        marked, known, job = filling_job(config, pixels, marked, particles, **given)
        job, text, uncond = _prompts(config, job, positive, negative)
        asked, (particles, (plan, work)) = particles, fitting(None, _plans(model, job, options, known), particles)
        if warning := fewer(particles, asked):
            host.log.warning("STARFlow: %s", warning)
        bar, began = host.NodeProgress(cls.hidden.unique_id), time.monotonic()
        bar.say(str(plan))
        latents = _encoded(vae, stand_in(pixels, marked))
        host.load(model, work, "filling this")
        flow = host.flow_of(model)
        filled = partial(
            fill_latents, flow, job, latents, known, text.to(flow.compute_dtype),
            None if uncond is None else uncond.to(flow.compute_dtype), particles, control=Control(bar.follow),
            placement=Placement.on(model.load_device),
        )  # fmt: skip
        made, effective = host.compute(model, filled)
        made = made.to(host.result_device())
        result = {"samples": made if samples.ndim == 5 else made.squeeze(2)}
        frames = decoded(vae, result["samples"])[0].movedim(-1, 1).cpu().float()
        known_images = (pixels + 1) / 2 if pixels.shape[-2:] != images.shape[1:3] else _plain(images)[: len(pixels)]
        whole = composite(known_images, marked, frames).movedim(1, -1)
        report = _report(
            job, particles, told(effective, particles, known), time.monotonic() - began, str(plan), warning
        )
        bar.say(report.splitlines()[0])
        return io.NodeOutput(host.mark_clips(whole, len(whole)), result, report)


NODES = [STARFlowFillIn]


def _plain(images: Tensor) -> Tensor:
    """The host's images (F, H, W, 3) in 0..1 as (F, 3, H, W)."""
    return images[..., :3].cpu().float().movedim(-1, 1)


def _fitted(images: Tensor, mask: Tensor, job: Job, how: str) -> tuple[Tensor, Tensor]:
    """Pixels (F, 3, H, W) in [-1, 1] and the mask (F, H, W), of the job's size and length. Raises InputError where they
    don't go together."""
    if job.batch != 1:
        raise InputError(f"the latent is a batch of {job.batch}; fill one picture or clip at a time")
    if len(images) < job.frames or (len(images) > 1 and job.frames == 1):
        need = "one picture" if job.frames == 1 else "at least as many images"
        raise InputError(f"{len(images)} images, but the latent has {job.frames} frames; give {need}")
    pixels = _plain(images) * 2 - 1
    marked = checked_mask(mask.cpu().float(), pixels)[: job.frames]
    return parted(fit(joined(pixels[: job.frames], marked), job.height, job.width, how))


def _prompts(config, job: Job, positive: list, negative: list) -> tuple[Job, Tensor, Tensor | None]:
    """The job at the prompt's frame rate, and the embeddings."""
    job = at_rate_of(positive, job)
    text = embeddings_for(config, job, positive, "positive")
    check_prompt(prompt_of(positive))
    return job, text, embeddings_for(config, job, negative, "negative") if job.guidance else None


def _plans(model, job: Job, options: Options | None, known: Tensor):
    """`planned`, by the number of particles."""

    def plan(particles: int):
        forecast = partial(forecast_fill, particles=particles, known=known)
        return planned(model, job, options or Options(), forecast, "filling this")

    return plan


def _encoded(vae, pixels: Tensor) -> Tensor:
    """Latents (1, C, T, h, w) of a clip."""
    return as_clip(vae.encode((pixels / 2 + 0.5).movedim(1, -1)).float().cpu())


def _report(job: Job, particles: int, fitted: str, seconds: float, memory: str, warning: str) -> str:
    """What was done; a first line for the node itself."""
    length = f"{job.frames} frames" if job.frames > 1 else "one picture"
    return "\n".join([
        f"{job.width} x {job.height}, {length} filled in {seconds:.1f} s",
        f"particles {particles}, guidance {job.guidance:g}, seed {job.seed}",
        fitted,
        f"memory: {memory}",
        *filter(None, [warning]),
    ])  # fmt: skip
