"""The size of a job, and the way from latents to pictures."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import torch
from comfy_api.latest import io

from ..starflow_core.errors import InputError
from ..starflow_core.jobs.build import default_job
from ..starflow_core.jobs.tasks import layout
from ..starflow_core.model.config import ASPECTS, FlowConfig, parse_aspect
from . import host
from .types import CATEGORY, KEY, SEARCH, ModelType

MODEL_ASPECT = "model's own"
SIDE_STEP = 16  # whole tokens of every model; the 3B takes multiples of 8, too


class STARFlowEmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STARFlowEmptyLatent",
            display_name="STARFlow Empty Latent",
            category=CATEGORY,
            **SEARCH,
            description="Sets the size and length of the result. Shows the actual size and the number of tokens.",
            inputs=[
                ModelType.Input("model", tooltip="Determines the latent channels and the compression."),
                io.Combo.Input(
                    "aspect_ratio",
                    options=[MODEL_ASPECT, *ASPECTS],
                    default=MODEL_ASPECT,
                    tooltip="Width to height, at the area the model was trained for. Ignored if width and height are "
                    "both set.",
                ),
                io.Int.Input(
                    "width",
                    default=0,
                    min=0,
                    max=8192,
                    step=SIDE_STEP,
                    tooltip="In pixels; 0 follows from the height, if that is set, and the aspect ratio.",
                ),
                io.Int.Input(
                    "height",
                    default=0,
                    min=0,
                    max=8192,
                    step=SIDE_STEP,
                    tooltip="In pixels; 0 follows from the width, if that is set, and the aspect ratio.",
                ),
                io.Int.Input(
                    "frames",
                    default=0,
                    min=0,
                    max=100001,
                    tooltip="1 makes an image; clips have 4n + 1 frames. 0 uses the model's own length. Clips longer "
                    "than its window are sampled with a sliding window.",
                ),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=256, tooltip="How many to make at once; each one takes memory."
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="For Text Encode, the context node and the sampler."),
                io.Int.Output(display_name="width", tooltip="In pixels."),
                io.Int.Output(display_name="height", tooltip="In pixels."),
                io.Int.Output(display_name="frames", tooltip="Length in frames of video, not latent frames."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, aspect_ratio: str = MODEL_ASPECT) -> bool | str:
        options = (MODEL_ASPECT, *ASPECTS)
        return aspect_ratio in options or f"aspect_ratio is {aspect_ratio!r}; expected one of {', '.join(options)}"

    @classmethod
    def execute(cls, model, aspect_ratio: str, width: int, height: int, frames: int, batch_size: int) -> io.NodeOutput:
        config = host.flow_of(model).config
        aspect = config.defaults.aspect if aspect_ratio == MODEL_ASPECT else aspect_ratio
        size = _size(config, aspect, width, height)
        job = default_job(config, batch=batch_size, **size, **({"frames": frames} if frames else {}))
        plan = layout(config, job)
        shape = (plan.shape[0], plan.frames, *plan.shape[1:]) if config.kind == "video" else plan.shape
        samples = torch.zeros(batch_size, *shape, device=host.result_device())
        tokens = plan.frames * (job.height // config.cell) * (job.width // config.cell)
        host.show(f"{job.width} x {job.height}, {job.frames} frames, {tokens} tokens", cls.hidden.unique_id)
        return io.NodeOutput({"samples": samples}, job.width, job.height, job.frames)


class STARFlowVAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STARFlowVAEDecode",
            display_name="STARFlow VAE Decode",
            category=CATEGORY,
            **SEARCH,
            description="Decodes latents one latent frame at a time: in bounded memory, with progress, and you can "
            "cancel it partway. ComfyUI's VAE Decode gives the same pixels.",
            inputs=[
                io.Latent.Input("samples", tooltip="From the sampler."),
                io.Vae.Input("vae", tooltip="The VAE that goes with the model."),
                io.Int.Input(
                    "tile_size",
                    default=0,
                    min=0,
                    max=4096,
                    step=64,
                    tooltip="Side of a tile in pixels; smaller tiles take less memory and more time. 0 decodes whole "
                    "frames, and falls back to tiles only if memory runs out.",
                ),
                io.Boolean.Input(
                    "trim_overlap",
                    default=False,
                    tooltip="After STARFlow Extend: drops the frames at the start that the source already shows.",
                ),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="The frames; for a batch, clip after clip.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, samples, vae, tile_size: int, trim_overlap: bool) -> io.NodeOutput:
        latents = samples["samples"]
        skip = samples.get(KEY, {}).get("overlap", 0) if trim_overlap else 0
        bar = host.NodeProgress(cls.hidden.unique_id)
        frames = []
        for done, piece in enumerate(_stream(vae, latents, tile_size), 1):
            frames.append(piece)
            bar.update(done, latents.shape[2] if latents.ndim == 5 else 1, piece[0, -1])
        images = torch.cat(frames, 1)
        if skip >= images.shape[1]:
            raise InputError(f"all {images.shape[1]} frames overlap the source; ask for more frames, or keep fewer")
        return io.NodeOutput(host.mark_clips(images[:, skip:].flatten(0, 1), images.shape[1] - skip))


NODES = [STARFlowEmptyLatent, STARFlowVAEDecode]


def _size(config: FlowConfig, aspect: str, width: int, height: int) -> dict[str, int | str]:
    """A job's size: both sides, or one and the other in whole tokens by the ratio, or the ratio alone."""
    if not width and not height:
        return {"aspect": aspect}
    ratio = parse_aspect(aspect)
    return {"width": width or _tokens(config, height * ratio), "height": height or _tokens(config, width / ratio)}


def _tokens(config: FlowConfig, side: Fraction) -> int:
    return max(1, floor(side / config.cell + Fraction(1, 2))) * config.cell


def decoded(vae, latents, tile_size: int = 0):
    """Frames (B, F, H, W, 3) in 0..1 of the host's latents."""
    return torch.cat(list(_stream(vae, latents, tile_size)), 1)


def _stream(vae, latents, tile_size: int):
    """Frames (B, f, H, W, 3); a VAE from core's loader decodes in one piece."""
    from .vae import HostVAE

    if isinstance(vae, HostVAE):
        yield from vae.stream(latents, tile_size // vae.core.spatial or None)
    elif tile_size:
        cells = tile_size // vae.spacial_compression_decode()
        yield _with_frames(vae.decode_tiled(latents, tile_x=cells, tile_y=cells, overlap=cells // 4))
    else:
        yield _with_frames(vae.decode(latents))


def _with_frames(images):
    return images if images.ndim == 5 else images.unsqueeze(1)
