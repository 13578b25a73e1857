"""How likely a model finds an image or a clip, and what in it surprises it."""

from __future__ import annotations

import torch
from comfy_api.latest import io
from torch import Tensor

from ..starflow_core.control import Control
from ..starflow_core.errors import InputError
from ..starflow_core.jobs import memory
from ..starflow_core.jobs.noises import inversion_job, inverted
from ..starflow_core.jobs.surprise import UNIT, Surprise
from ..starflow_core.jobs.tasks import Job
from ..starflow_core.media import fit
from ..starflow_core.media.overlay import overlaid
from ..starflow_core.model.placement import Placement
from ..starflow_core.solve.inverting import Inverted
from . import host
from .conditioning import as_clip, at_rate_of, embeddings_for, job_of
from .options import Options, planned
from .types import CATEGORY, SEARCH, ContextType, ModelType


class STARFlowLikelihood(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STARFlowLikelihood",
            display_name="STARFlow Likelihood",
            category=CATEGORY,
            **SEARCH,
            description="How likely the model finds an image or a clip under a prompt, exactly, and where in it "
            "something surprises it.",
            inputs=[
                ModelType.Input("model", tooltip="The flow."),
                io.Conditioning.Input("positive", tooltip="From STARFlow Text Encode; an empty prompt is allowed."),
                io.Latent.Input("latent", tooltip="From the sampler or a VAE Encode. No noise is added to it."),
                io.Float.Input(
                    "threshold",
                    default=10.0,
                    min=-1e6,
                    max=1e6,
                    step=0.5,
                    tooltip="Nats per token from which a token counts as surprising, for the mask.",
                ),
                io.Image.Input(
                    "images", optional=True, tooltip="The decoded frames, for the overlay. Without them it is on grey."
                ),
                ContextType.Input(
                    "context", optional=True, tooltip="Given frames are a condition and don't count themselves."
                ),
            ],
            outputs=[
                io.Float.Output(display_name="log_likelihood", tooltip="In nats; of a batch the mean."),
                io.Float.Output(display_name="bits_per_dim", tooltip="Lower is likelier; it can be negative."),
                io.Mask.Output(display_name="surprise", tooltip="Where the surprise is above the threshold, by frame."),
                io.Image.Output(display_name="overlay", tooltip="The surprise over the images, with its scale."),
                io.String.Output(display_name="report", tooltip="The figures of each clip and frame."),
                io.Latent.Output(display_name="best", tooltip="Of a batch the likeliest."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, positive, latent, threshold: float, images=None, context=None) -> io.NodeOutput:
        config, samples = host.flow_of(model).config, latent["samples"]
        job = at_rate_of(positive, job_of(config, samples, context=context, guidance=0.0))
        text = embeddings_for(config, job, positive, "positive")
        pixels = _pixels(images, job)
        found = _inverted(model, inversion_job(config, job, clean=True), samples, text, cls.hidden.unique_id)
        clips = [Surprise(nats.cpu(), config, job.height, job.width, found.given) for nats in found.surprise]
        likelihood, bits = (sum(getattr(c, n) for c in clips) / len(clips) for n in ("log_likelihood", "bits_per_dim"))
        report = "\n".join(line for index, clip in enumerate(clips) for line in _lines(clip, index, len(clips)))
        host.show(f"log-likelihood {likelihood:.2f} nats, {bits:.4f} bits per dimension", cls.hidden.unique_id)
        overlay = overlaid(pixels, torch.cat([clip.map for clip in clips]), UNIT)
        mask = torch.cat([clip.mask(threshold) for clip in clips])
        best = max(range(len(clips)), key=lambda index: clips[index].log_likelihood)
        kept = {**latent, "samples": samples[best : best + 1]}
        return io.NodeOutput(likelihood, bits, mask, ((overlay + 1) / 2).movedim(1, -1), report, kept)


NODES = [STARFlowLikelihood]


def _inverted(model, job: Job, samples: Tensor, text: Tensor, node_id: str | None) -> Inverted:
    """As the core's, of the host's latents, fitted to what the host has free."""
    flow, bar = host.flow_of(model), host.NodeProgress(node_id)

    def progress(done) -> None:
        host.check_interrupted()
        bar.update(done.step, done.total)

    plan, work = planned(model, job, Options(), memory.forecast_encode, "this job")
    host.load(model, work, "this job")
    return inverted(
        flow, job, as_clip(samples), text.to(model.load_device, flow.compute_dtype), control=Control(progress),
        placement=Placement.on(model.load_device), means=plan.means,
    )  # fmt: skip


def _pixels(images: Tensor | None, job: Job) -> Tensor:
    """The host's images (F, H, W, 3) in 0..1 as the core's, in the job's size; mid-grey without any."""
    count = job.batch * job.frames
    if images is None:
        return torch.zeros(count, 3, job.height, job.width)
    if len(images) != count:
        raise InputError(f"{len(images)} images, but the latent has {count} frames; connect the frames decoded from it")
    return fit(images[..., :3].cpu().float().movedim(-1, 1) * 2 - 1, job.height, job.width)


def _lines(clip: Surprise, index: int, clips: int) -> list[str]:
    """A line for the clip, and for a video one for each latent frame."""
    name = f"clip {index + 1}: " if clips > 1 else ""
    lines = [f"{name}log-likelihood {clip.log_likelihood:.2f} nats, {clip.bits_per_dim:.4f} bits per dimension"]
    curve = clip.curve()
    if len(clip.nats) > 1:
        lines += [f"frames {p['first']} to {p['last']}: {p['nats']:.2f} nats, {p['largest']:.2f} at most in a token"
                  for p in curve]  # fmt: skip
    return lines
