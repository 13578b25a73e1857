"""Jobs from a model's defaults, a size and given frames."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from ..errors import InputError
from ..media import fit
from ..model.config import FlowConfig
from ..model.latent import LatentFormat
from . import context as contexts
from .tasks import Job


def default_job(config: FlowConfig, **settings) -> Job:
    """A job with the model's defaults; give `height` and `width`, or `aspect` and `size`."""
    defaults = config.defaults
    size = _taken(settings, "height", "width", "aspect", "size")
    unknown = settings.keys() - {field.name for field in fields(Job)}
    if unknown:
        raise InputError(f"unknown setting {', '.join(sorted(unknown))} of a job")
    context = settings.get("context")
    if context is not None and not any(size.values()):
        size |= {name: n * config.latent.spatial for name, n in zip(size, context.latents.shape[-2:], strict=False)}
    height, width = chosen_size(config, **size)
    chosen = {"frames": defaults.frames, "fps": defaults.fps or 16, "guidance": defaults.guidance} | settings
    return Job(height, width, **chosen)


def chosen_size(
    config: FlowConfig, given: Tensor | None = None, *, height: int | None = None, width: int | None = None,
    aspect: str | None = None, size: int | None = None,
) -> tuple[int, int]:  # fmt: skip
    """The requested height and width; otherwise the trained ratio nearest to the `given` pixels (.., H, W), or the
    model's own size. Raises InputError for sides mixed with a ratio, or a size that doesn't fit the model."""
    if (height is None) != (width is None):
        raise InputError("height and width go together; give both, or aspect and size")
    if height is not None and (aspect or size):
        raise InputError("give either height and width, or aspect and size")
    if height is None:
        if aspect is None and given is not None:
            aspect = config.nearest_aspect(*given.shape[-2:])
        height, width = config.size(aspect, size)
    config.check_size(height, width)
    return height, width


def job_with_context(
    config: FlowConfig, encode: contexts.Encode, task: str, *, image: Tensor | None = None, last: Tensor | None = None,
    clip: Tensor | None = None, keep_latents: int | None = None, **settings,
) -> Job:  # fmt: skip
    """A job with given frames, fitted to its size (covered, centre-cropped) and encoded.

    Without a size or ratio, the trained ratio nearest to the given frames is used. `keep_latents` limits how many
    latent frames of a clip to extend are given. With `shapes_only` as `encode`, a job can be checked and its memory
    forecast before anything is loaded.
    """
    wanted = {"text": (), "first_frame": (image,), "last_frame": (last,), "extend": (clip,), "edit": (clip,)}
    if task not in wanted:
        raise InputError(f"task is {task!r}; expected one of {', '.join(wanted)}")
    if any(pixels is None for pixels in wanted[task]):
        name = {"first_frame": "image", "last_frame": "last"}.get(task, "clip")
        raise InputError(f"{task} needs {name}; give its pixels")
    pixels = {"image": image, "last": last, "clip": clip}
    given = next((_checked(name, pixels[name]) for name in pixels if pixels[name] is not None), None)
    size = _taken(settings, "height", "width", "aspect", "size")
    settings["height"], settings["width"] = place = chosen_size(config, given, **size)
    job, latent = default_job(config, **settings), config.latent
    if task == "text":
        return job
    if task == "first_frame":
        context = contexts.first_frame(encode, _batched(fit(image, *place), 4))
    elif task == "last_frame":
        first = None if image is None else _batched(fit(image, *place), 4)
        context = contexts.last_frame(encode, _batched(fit(last, *place), 4), first)
    else:
        pixels = _batched(fit(clip, *place), 5).transpose(1, 2)
        if task == "edit":
            context = contexts.edit(encode, pixels, latent)
            settings.setdefault("frames", latent.frames(context.hidden))
        else:
            if keep_latents is None:
                _, keep_latents = config.sliding_window(latent.latent_frames(job.frames), job.window, job.keep)
            context = contexts.extend(encode, pixels, latent, keep_latents)
    return default_job(config, **settings, context=context)


def shapes_only(latent: LatentFormat) -> contexts.Encode:
    """An encoder whose latents have the right shape but no values."""

    def encode(pixels: Tensor) -> Tensor:
        batch, _, frames, height, width = pixels.shape
        cells = (height // latent.spatial, width // latent.spatial)
        return torch.empty(batch, latent.channels, latent.latent_frames(frames), *cells, device="meta")

    return encode


def _taken(settings: dict, *names: str) -> dict:
    """Take these settings out of the others; those that aren't given are None."""
    return {name: settings.pop(name, None) for name in names}


def _checked(name: str, pixels: Tensor) -> Tensor:
    """Raise InputError unless these are pixels of a picture, or of a clip."""
    dims = (4, 5) if name == "clip" else (3, 4)
    if pixels.ndim not in dims or pixels.shape[-3] != 3:
        wanted = "(F, 3, H, W)" if name == "clip" else "(3, H, W), or (B, 3, H, W)"
        raise InputError(f"{name} has the shape {tuple(pixels.shape)}; expected {wanted}")
    return pixels


def _batched(pixels: Tensor, dims: int) -> Tensor:
    return pixels if pixels.ndim == dims else pixels.unsqueeze(0)
