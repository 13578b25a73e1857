"""Noise as a thing to hold: from a clip, from a seed, varied and mixed."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

from comfy_api.latest import io
from torch import Tensor

from ..starflow_core.control import Control, Progress
from ..starflow_core.errors import InputError
from ..starflow_core.jobs import memory
from ..starflow_core.jobs.noises import Noise, fresh_noise, inversion_job, inverted, noise_of
from ..starflow_core.jobs.planner import MemoryPlan
from ..starflow_core.jobs.tasks import Job
from ..starflow_core.model.config import FlowConfig
from ..starflow_core.model.placement import Placement
from ..starflow_core.solve.inverting import Inverted
from ..starflow_core.solve.solvers import PRESETS
from . import host
from .conditioning import as_clip, at_rate_of, embeddings_for, job_of, prompt_of
from .options import Options, planned
from .types import CATEGORY, SEARCH, ContextType, ModelType, NoiseType, OptionsType

LARGEST_SEED = 0xFFFFFFFFFFFFFFFF


class STARFlowInvert(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STARFlowInvert",
            display_name="STARFlow Invert",
            category=CATEGORY,
            **SEARCH,
            description="Finds the noise that makes a picture or clip under a prompt, and how likely the model finds "
            "it. The sampler turns the noise back into the clip, or into another one.",
            inputs=[
                ModelType.Input("model", tooltip="The flow."),
                io.Conditioning.Input("positive", tooltip="What the clip shows; from STARFlow Text Encode."),
                io.Conditioning.Input("negative", tooltip="From STARFlow Text Encode; used only with guidance."),
                io.Latent.Input("latent", tooltip="The picture or clip, from VAE Encode with the model's VAE."),
                io.Float.Input(
                    "guidance",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Sampling has to use the same guidance to give the clip back. 0 is off.",
                ),
                io.Boolean.Input(
                    "add_noise",
                    default=True,
                    tooltip="On: adds the model's own noise first, so that the result is like fresh noise and can be "
                    "varied. Off: inverts the clean clip, which comes back exactly.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=LARGEST_SEED,
                    control_after_generate=False,
                    tooltip="Determines the noise that is added. A batch uses consecutive seeds.",
                ),
                io.Int.Input(
                    "window",
                    default=0,
                    min=0,
                    max=1024,
                    optional=True,
                    tooltip="Latent frames attended to at once in a long video; 0 uses the trained number.",
                ),
                io.Int.Input(
                    "keep",
                    default=0,
                    min=0,
                    max=1024,
                    optional=True,
                    tooltip="Latent frames kept when the window slides; 0 keeps about three quarters of the window.",
                ),
                ContextType.Input(
                    "context", optional=True, tooltip="Given frames; connect them to Text Encode as well."
                ),
                OptionsType.Input("options", optional=True, tooltip="From STARFlow Memory."),
            ],
            outputs=[
                NoiseType.Output(display_name="noise", tooltip="For the sampler and STARFlow Mix Noise."),
                io.Float.Output(
                    display_name="bits_per_dim",
                    tooltip="Of the clean clip without guidance: the lower, the likelier. The mean of a batch.",
                ),
                io.String.Output(display_name="report", tooltip="How it was inverted, and the likelihood."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, latent, guidance: float, add_noise: bool, seed: int, window: int = 0,
        keep: int = 0, context=None, options=None,
    ) -> io.NodeOutput:  # fmt: skip
        config, samples = host.flow_of(model).config, filled(latent["samples"])
        given = {"seed": seed, "guidance": guidance, "window": window or None, "keep": keep or None, "context": context}
        job = inversion_job(config, at_rate_of(positive, job_of(config, samples, **given)), not add_noise)
        text = embeddings_for(config, job, positive, "positive")
        uncond = embeddings_for(config, job, negative, "negative") if job.guidance else None
        plan, work = planned(model, job, options or Options(), memory.forecast_encode, "inverting this")
        bar, began = host.NodeProgress(cls.hidden.unique_id), time.monotonic()
        bar.say(_need(plan))
        host.load(model, work, "inverting this")
        jobs = _jobs(config, job)
        found = _inverted(model, jobs, samples, text, uncond, plan, bar)
        said = prompt_of(positive), prompt_of(negative)
        noise, likely = (noise_of(config, *each, *said) for each in ((jobs[0], found[0]), (jobs[-1], found[-1])))
        report = _report(noise, likely, job, plan, time.monotonic() - began)
        bar.say(report.splitlines()[0])
        return io.NodeOutput(noise, likely.bits_per_dim, report)


class STARFlowNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STARFlowNoise",
            display_name="STARFlow Noise",
            category=CATEGORY,
            **SEARCH,
            description="The noise that the sampler draws from a seed, as a thing to vary and mix.",
            inputs=[
                ModelType.Input("model", tooltip="Determines the noise's shape."),
                io.Latent.Input("latent", tooltip="Only its size and length matter, not its content."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=LARGEST_SEED,
                    control_after_generate=True,
                    tooltip="The same seed in the sampler gives the same result. A batch uses consecutive seeds.",
                ),
                ContextType.Input(
                    "context", optional=True, tooltip="Given frames; connect them to Text Encode as well."
                ),
            ],
            outputs=[NoiseType.Output(display_name="noise", tooltip="For the sampler and STARFlow Mix Noise.")],
        )

    @classmethod
    def execute(cls, model, latent, seed: int, context=None) -> io.NodeOutput:
        config = host.flow_of(model).config
        return io.NodeOutput(fresh_noise(config, job_of(config, latent["samples"], seed=seed, context=context)))


class STARFlowMixNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STARFlowMixNoise",
            display_name="STARFlow Mix Noise",
            category=CATEGORY,
            **SEARCH,
            description="Makes a variation of a noise, or with a second one, what lies between the two.",
            inputs=[
                NoiseType.Input("noise", tooltip="Its settings stay: guidance, window and given frames."),
                io.Float.Input(
                    "amount",
                    default=0.35,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How far from the first noise: 0 is the same, 1 is all fresh noise, or all the second one.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=LARGEST_SEED,
                    control_after_generate=True,
                    tooltip="Determines the fresh noise of a variation.",
                ),
                io.Int.Input(
                    "keep_frames",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="Latent frames at the start whose noise a variation leaves as it is.",
                ),
                NoiseType.Input(
                    "second_noise", optional=True, tooltip="Of the same size and length. Seed and keep frames don't "
                    "matter then.",
                ),
            ],
            outputs=[NoiseType.Output(display_name="noise", tooltip="For the sampler, or to mix again.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, noise, amount: float, seed: int, keep_frames: int, second_noise=None) -> io.NodeOutput:
        if second_noise is None:
            return io.NodeOutput(noise.vary(amount, seed, keep_frames))
        return io.NodeOutput(noise.mix(second_noise, amount))


NODES = [STARFlowInvert, STARFlowNoise, STARFlowMixNoise]


def job_from(noise: Noise, config: FlowConfig, samples: Tensor, denoise: bool, **settings) -> Job:
    """The job that makes latents of the size of the host's `samples` from a noise, whose own settings count where none
    are given. Raises InputError where the sizes differ."""
    wanted = job_of(config, samples)  # checks the channels, too
    _check_size(noise, config, samples, wanted)
    if noise.model != config.name:
        host.log.warning("the noise was made with %s, but this is %s; the result may be anything", noise.model,
                         config.name)  # fmt: skip
    given = {"solver": PRESETS["balanced"]} | {name: value for name, value in settings.items() if value is not None}
    job = noise.job(config, **given, denoise=denoise and not noise.clean)
    # Given frames are as clean as those that were inverted with them.
    return replace(job, context=job.context and replace(job.context, noisy=not noise.clean))


def _check_size(noise: Noise, config: FlowConfig, samples: Tensor, wanted: Job) -> None:
    frames, *shape = noise.noise.shape[1:]
    latents = as_clip(samples)
    if (shape[0], frames, *shape[1:]) == latents.shape[1:]:
        return
    if shape[0] != config.latent.channels:
        raise InputError(
            f"this noise has {shape[0]} channels, but {config.name} uses {config.latent.channels}; make it with the "
            "same model"
        )
    raise InputError(
        f"this noise is for {_size(noise.job(config))}, but the latent is of {_size(wanted)}; connect the latent that "
        "the noise was made from"
    )


def _size(job: Job) -> str:
    size = f"{job.width} x {job.height}"
    return f"{size}, {job.frames} frames" if job.frames > 1 else f"{size}, one frame"


def filled(samples: Tensor) -> Tensor:
    """Raise InputError for a latent of Empty Latent, of which there is nothing to invert."""
    if not samples.any():
        raise InputError("this latent is empty; connect VAE Encode, with the picture or clip that is to be inverted")
    return samples.float()


def _jobs(config: FlowConfig, job: Job) -> list[Job]:
    """The job, and where it has no likelihood that of the clean latents without guidance."""
    likely = inversion_job(config, replace(job, guidance=0.0), clean=True)
    return [job] if not (job.denoise or job.guidance) else [job, likely]


def _inverted(
    model, jobs: list[Job], samples: Tensor, text: Tensor, uncond: Tensor | None, plan: MemoryPlan,
    bar: host.NodeProgress,
) -> list[Inverted]:  # fmt: skip
    """What the same latents are as each of the jobs, one after the other."""
    flow = host.flow_of(model)
    latents = as_clip(samples)

    def progress(done: int, now: Progress) -> None:
        host.check_interrupted()
        if now.phase == "deep":
            bar.update(done * now.total + now.step, len(jobs) * now.total)

    return [
        inverted(
            flow, job, latents, text.to(flow.compute_dtype),
            uncond.to(flow.compute_dtype) if job.guidance else None, control=Control(partial(progress, done)),
            placement=Placement.on(model.load_device), means=plan.means,
        )
        for done, job in enumerate(jobs)
    ]  # fmt: skip


def _need(plan: MemoryPlan) -> str:
    return f"{plan.means}. Needs {memory.readable(plan.need.total)}"


def _report(noise: Noise, likely: Noise, job: Job, plan: MemoryPlan, seconds: float) -> str:
    return "\n".join(
        [
            f"{_size(job)}, inverted in {seconds:.1f} s",
            f"noise {'; '.join(noise.made)}: deviation {float(noise.noise.std()):.2f}, guidance {noise.guidance:g}",
            f"of the clean latents without guidance: {likely.bits_per_dim:.4f} bits per dimension, log-likelihood "
            f"{likely.log_likelihood:.1f} nats",
            f"memory: {_need(plan)}",
        ]
    )
