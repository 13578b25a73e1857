"""Given frames: a first frame, a clip to go on from, a clip to edit, a last frame."""

from __future__ import annotations

import torch
from comfy_api.latest import io
from torch import Tensor

from ..starflow_core.errors import InputError
from ..starflow_core.jobs import context as contexts
from ..starflow_core.media import FITS, fit
from ..starflow_core.model.latent import LatentFormat
from . import host
from .types import CATEGORY, SEARCH, ContextType, ModelType

LATENT_TIP = "Sets the size that pictures are brought to."
FIT_TIP = (
    "For pictures of another shape. crop: covers the whole size, and the edges are lost. pad: shows all of the "
    "picture, with black bars. stretch: fills the size and changes the proportions."
)
VAE_TIP = "The VAE that goes with the model."
CONTEXT_TIP = "Connect it to both Text Encode and the sampler."


class STARFlowFirstFrame(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STARFlowFirstFrame",
            display_name="STARFlow First Frame",
            category=CATEGORY,
            **SEARCH,
            description="Image to video: the clip begins with this image. A batch of images makes a batch of clips.",
            inputs=[
                io.Image.Input("image", tooltip="One image, or one for each clip in the batch."),
                io.Vae.Input("vae", tooltip=VAE_TIP),
                io.Latent.Input("latent", tooltip=LATENT_TIP),
                io.Combo.Input("fit", options=list(FITS), default=FITS[0], optional=True, tooltip=FIT_TIP),
            ],
            outputs=[ContextType.Output(display_name="context", tooltip=CONTEXT_TIP)],
        )

    @classmethod
    def validate_inputs(cls, fit: str = FITS[0]) -> bool | str:
        return _known_fit(fit)

    @classmethod
    def execute(cls, image, vae, latent, fit: str = FITS[0]) -> io.NodeOutput:
        return io.NodeOutput(contexts.first_frame(_encoder(vae), _pictures(image, vae, latent, fit)))


class STARFlowFirstLastFrame(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STARFlowFirstLastFrame",
            display_name="STARFlow First and Last Frame",
            category=CATEGORY,
            **SEARCH,
            description="Makes a clip that ends with one image, and can begin with another.",
            inputs=[
                io.Image.Input("last_image", tooltip="The image that the clip ends with."),
                io.Vae.Input("vae", tooltip=VAE_TIP),
                io.Latent.Input("latent", tooltip=LATENT_TIP),
                io.Image.Input(
                    "first_image",
                    optional=True,
                    tooltip="The image that the clip begins with. Without it, the model chooses the beginning.",
                ),
                io.Combo.Input("fit", options=list(FITS), default=FITS[0], optional=True, tooltip=FIT_TIP),
            ],
            outputs=[ContextType.Output(display_name="context", tooltip=CONTEXT_TIP)],
        )

    @classmethod
    def validate_inputs(cls, fit: str = FITS[0]) -> bool | str:
        return _known_fit(fit)

    @classmethod
    def execute(cls, last_image, vae, latent, first_image=None, fit: str = FITS[0]) -> io.NodeOutput:
        last = _pictures(last_image, vae, latent, fit)
        first = None if first_image is None else _pictures(first_image, vae, latent, fit)
        return io.NodeOutput(contexts.last_frame(_encoder(vae), last, first))


class STARFlowExtend(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STARFlowExtend",
            display_name="STARFlow Extend",
            category=CATEGORY,
            **SEARCH,
            description="Continues a clip. The result begins with the end of the source; STARFlow VAE Decode can trim "
            "that off, so that the two can be joined.",
            inputs=[
                ModelType.Input("model", tooltip="Determines how much of the source it can see."),
                io.Image.Input("images", tooltip="The frames of one clip."),
                io.Vae.Input("vae", tooltip=VAE_TIP),
                io.Latent.Input("latent", tooltip=LATENT_TIP + " Its length includes the given frames."),
                io.Int.Input(
                    "keep",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="Latent frames of the source that the model sees; 0 uses what its window keeps. More "
                    "make motion and look steadier, but leave less room for new frames.",
                ),
                io.Combo.Input("fit", options=list(FITS), default=FITS[0], optional=True, tooltip=FIT_TIP),
            ],
            outputs=[ContextType.Output(display_name="context", tooltip=CONTEXT_TIP)],
        )

    @classmethod
    def validate_inputs(cls, fit: str = FITS[0]) -> bool | str:
        return _known_fit(fit)

    @classmethod
    def execute(cls, model, images, vae, latent, keep: int, fit: str = FITS[0]) -> io.NodeOutput:
        config = host.flow_of(model).config
        kept = keep or config.sliding_window(1)[1]
        made = _format(vae)
        config.check_vae(made.channels, made.spatial, made.temporal)
        clip = _clip(images, vae, latent, fit)
        return io.NodeOutput(contexts.extend(_encoder(vae), clip, _format(vae), kept))


class STARFlowVideoEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STARFlowVideoEdit",
            display_name="STARFlow Video Edit",
            category=CATEGORY,
            **SEARCH,
            description="Video to video: changes the source as the prompt says, and keeps its length.",
            inputs=[
                io.Image.Input("images", tooltip="The frames of one clip."),
                io.Vae.Input("vae", tooltip=VAE_TIP),
                io.Latent.Input("latent", tooltip=LATENT_TIP + " Source frames beyond its length are dropped."),
                io.Combo.Input("fit", options=list(FITS), default=FITS[0], optional=True, tooltip=FIT_TIP),
            ],
            outputs=[
                ContextType.Output(display_name="context", tooltip=CONTEXT_TIP),
                io.Latent.Output(
                    display_name="latent", tooltip="As long as the source; for Text Encode and the sampler."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, fit: str = FITS[0]) -> bool | str:
        return _known_fit(fit)

    @classmethod
    def execute(cls, images, vae, latent, fit: str = FITS[0]) -> io.NodeOutput:
        samples = _samples(vae, latent)
        longest = _format(vae).frames(samples.shape[2])
        context = contexts.edit(_encoder(vae), _clip(images[:longest], vae, latent, fit), _format(vae))
        return io.NodeOutput(context, {"samples": samples[:, :, : context.hidden]})


NODES = [STARFlowFirstFrame, STARFlowFirstLastFrame, STARFlowExtend, STARFlowVideoEdit]


def _format(vae) -> LatentFormat:
    """What a VAE makes of frames: ours or core's."""
    temporal = vae.temporal_compression_decode()
    if temporal is None:
        raise InputError("given frames need a video model and its VAE; this VAE encodes single images")
    return LatentFormat(vae.latent_channels, vae.spacial_compression_decode(), temporal)


def _known_fit(fit: str) -> bool | str:
    return fit in FITS or f"fit is {fit!r}; expected one of {', '.join(FITS)}"


def _samples(vae, latent) -> Tensor:
    """A clip's latents, which the VAE has to be able to make."""
    samples = latent["samples"]
    if samples.ndim != 5:
        raise InputError("this latent is an image; given frames need a clip (STARFlow Empty Latent with a video model)")
    channels = _format(vae).channels
    if samples.shape[1] != channels:
        raise InputError(
            f"this VAE makes latents of {channels} channels, but the latent has {samples.shape[1]}; load the VAE that "
            "goes with the model"
        )
    return samples


def _pictures(images: Tensor, vae, latent, how: str) -> Tensor:
    """The host's images as (B, 3, H, W) in [-1, 1], of the clip's size."""
    height, width = (side * _format(vae).spatial for side in _samples(vae, latent).shape[-2:])
    return fit(images[..., :3].movedim(-1, 1) * 2 - 1, height, width, how)


def _clip(images: Tensor, vae, latent, how: str) -> Tensor:
    """The host's frames as one clip (1, 3, F, H, W) in [-1, 1]."""
    return _pictures(images, vae, latent, how).movedim(1, 0).unsqueeze(0)


def _encoder(vae) -> contexts.Encode:
    """Clips one by one: a VAE of core's takes one at a time."""

    def encode(pixels: Tensor) -> Tensor:
        images = (pixels / 2 + 0.5).movedim(1, -1)
        return torch.cat([vae.encode(clip).float().cpu() for clip in images])

    return encode
