"""From a prompt to conditioning, and the check that it fits the job it is used for."""

from __future__ import annotations

from dataclasses import replace

import torch
from comfy_api.latest import io
from torch import Tensor

from ..starflow_core.errors import InputError
from ..starflow_core.jobs.build import default_job
from ..starflow_core.jobs.prompts import MadeFor, wrapped
from ..starflow_core.jobs.tasks import MAX_FPS, Job, layout
from ..starflow_core.jobs.timeline import Timeline
from ..starflow_core.model.config import FlowConfig
from . import host
from .types import CATEGORY, KEY, LATER, PROMPT, SEARCH, ContextType, ModelType, TextEncoderType


class STARFlowTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STARFlowTextEncode",
            display_name="STARFlow Text Encode",
            category=CATEGORY,
            **SEARCH,
            description="Wraps a prompt in the words the model was trained with (frame rate, aspect ratio, task) and "
            "encodes it.",
            inputs=[
                ModelType.Input("model", tooltip="Determines how prompts are wrapped and how long they may be."),
                TextEncoderType.Input("text_encoder", tooltip="The encoder that goes with the model."),
                io.Latent.Input("latent", tooltip="Gives the aspect ratio, and whether it is an image or a clip."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    tooltip="What to show; for an edit, what to change. Several prompts, each from a second on: "
                    "0s: a red circle moving right | 2s: a red circle moving up",
                ),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    default="",
                    tooltip="Used only with guidance. Empty, as in training, is nearly always best.",
                ),
                io.Float.Input(
                    "frame_rate",
                    default=0.0,
                    min=0.0,
                    max=120.0,
                    step=1.0,
                    tooltip="Frames per second that the prompt asks for; 0 uses the model's own. Ignored for images.",
                ),
                ContextType.Input(
                    "context", optional=True, tooltip="The given frames, if any; they determine the task."
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The prompt."),
                io.Conditioning.Output(display_name="negative", tooltip="The negative prompt."),
                io.String.Output(
                    display_name="report", tooltip="The text as the model reads it, and what was cut off, if anything."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, text_encoder, latent, prompt: str, negative_prompt: str, frame_rate: float, context=None
    ) -> io.NodeOutput:
        config = host.flow_of(model).config
        config.check_text_encoder(text_encoder.encoder.dim)
        _check_rate(frame_rate)
        timeline = Timeline.parse(prompt)
        given = {"context": context, "changes": timeline.changes} | ({"fps": frame_rate} if frame_rate else {})
        job = job_of(config, latent["samples"], **given)
        # Only these are laid out: window and denoising are the sampler's to know.
        starts = layout(config, replace(job, denoise=False)).starts if job.changes else (0,)
        texts = wrapped(config, list(timeline.prompts), job) + wrapped(config, [negative_prompt], job, "text")
        host.load(text_encoder.patcher, 0, "reading the prompt", whole=True)
        encoded = text_encoder.encoder.encode(texts, config.prompt.tokens)
        made_for = MadeFor.of(config, job)
        rows = encoded.embeddings.float().to(host.result_device())
        cut = _cut(config, *encoded.cut)
        report = "\n".join([*cut, *_told(config, texts[:-1], starts)])
        host.show(report, cls.hidden.unique_id)
        for line in cut:
            host.log.warning("%s", line)
        later = {LATER: tuple(zip(timeline.changes, rows[1:-1].split(1), strict=True))} if timeline.changes else {}
        positive = [[rows[:1], {KEY: made_for, PROMPT: prompt, **later}]]
        negative = [[rows[-1:], {KEY: made_for, PROMPT: negative_prompt}]]
        return io.NodeOutput(positive, negative, report)


NODES = [STARFlowTextEncode]


def job_of(config: FlowConfig, samples: Tensor, **settings) -> Job:
    """The job that fills latents of the host: (B, C, h, w) of an image, (B, C, T, h, w) of a clip.

    Raises InputError where they are not this model's.
    """
    latent = config.latent
    frames = samples.shape[2] if samples.ndim == 5 else 1
    if samples.shape[1] != latent.channels:
        raise InputError(
            f"this latent has {samples.shape[1]} channels, but {config.name} uses {latent.channels}; "
            "make it with STARFlow Empty Latent, connected to the same model"
        )
    height, width = (side * latent.spatial for side in samples.shape[-2:])
    config.check_size(height, width)
    given = {"height": height, "width": width, "frames": latent.frames(frames), "batch": len(samples)}
    return default_job(config, **{**given, **settings})


def as_clip(samples: Tensor) -> Tensor:
    """The host's latents of images (B, C, h, w) or clips as (B, C, T, h, w)."""
    return samples if samples.ndim == 5 else samples.unsqueeze(2)


def changing_as(conditioning: list, job: Job) -> Job:
    """The job whose prompt changes when that of a conditioning does."""
    later = conditioning[0][1].get(LATER, ()) if conditioning else ()
    return replace(job, changes=tuple(time for time, _ in later))


def at_rate_of(conditioning: list, job: Job) -> Job:
    """The job at the frame rate that a prompt asks for."""
    made_for = conditioning[0][1].get(KEY) if conditioning else None
    return replace(job, fps=made_for.fps) if made_for and made_for.fps else job


def prompt_of(conditioning: list) -> str:
    """The prompt that a conditioning was made from."""
    return conditioning[0][1].get(PROMPT, "")


def embeddings_for(config: FlowConfig, job: Job, conditioning: list, name: str) -> Tensor:
    """The embeddings (1, L, D) of a conditioning with one prompt. Raises InputError unless they were made for this
    model and job."""
    texts = texts_for(config, job, conditioning, name)
    if len(texts) > 1:
        raise InputError(
            f"{name} has prompts that change, which only the sampler's positive input reads; give one prompt"
        )
    return texts[0]


def texts_for(config: FlowConfig, job: Job, conditioning: list, name: str) -> Tensor:
    """As `embeddings_for`, of one prompt or several that follow each other: (S, 1, L, D)."""
    if len(conditioning) != 1:
        raise InputError(
            f"{name} combines {len(conditioning)} conditionings, but a flow reads only one prompt; connect one "
            "STARFlow Text Encode"
        )
    rows, options = conditioning[0]
    made_for, wanted = options.get(KEY), MadeFor.of(config, job)
    if made_for is None:
        raise InputError(f"{name} wasn't made for STARFlow; make it with STARFlow Text Encode")
    if made_for != wanted:
        raise InputError(
            f"{name} was made for {made_for}, but this is {wanted}; give STARFlow Text Encode the same model, latent "
            "and context as the sampler"
        )
    return torch.stack([rows, *(later for _, later in options.get(LATER, ()))])


def _check_rate(frame_rate: float) -> None:
    if frame_rate and not 0 < frame_rate <= MAX_FPS:
        raise InputError(
            f"frame_rate is {frame_rate:g}; give frames per second, at most {MAX_FPS}, or 0 for the model's own"
        )


def _cut(config: FlowConfig, *rests: str) -> list[str]:
    """A line for each text that was too long, the negative prompt's last."""
    limit = f"{config.name} reads only {config.prompt.tokens} tokens; left out"
    names = [""] if len(rests) == 2 else [f" of prompt {number}" for number in range(1, len(rests))]
    cut = zip([*names, " of the negative prompt"], rests, strict=True)
    return [f"{limit}{of}: {rest}" for of, rest in cut if rest]


def _told(config: FlowConfig, texts: list[str], starts: tuple[int, ...]) -> list[str]:
    """The texts as the model reads them; of several with the frame that each begins with, counted from 1."""
    if len(texts) == 1:
        return [texts[0].strip()]
    frames = (config.latent.first_frame(start) + 1 for start in starts)
    return [f"From frame {frame} on:\n{text.strip()}" for frame, text in zip(frames, texts, strict=True)]
