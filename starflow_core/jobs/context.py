"""Given frames: what they are, where they go in the deep sequence, and which of them the result shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..model.config import FlowConfig
from ..model.latent import LatentFormat

Encode = Callable[[Tensor], Tensor]  # pixels (B, 3, F, H, W) in [-1, 1] -> VAE latents (B, C, T, h, w)


@dataclass(frozen=True)
class Context:
    """Clean latents of given frames (B, C, T, h, w) in VAE space, and the task they stand for.

    The deep sequence begins with them. The first `hidden` of them are not part of the result: the source of an edit, or
    a last frame. The model's own noise is added to them, as in training, if `noisy`.
    """

    task: str
    latents: Tensor
    hidden: int = 0
    noisy: bool = True

    @property
    def frames(self) -> int:
        return self.latents.shape[2]

    @property
    def shown(self) -> int:
        """How many given latent frames the result begins with."""
        return self.frames - self.hidden

    def overlap(self, latent: LatentFormat) -> int:
        """Pixel frames at the result's start that show the source's end (extend only)."""
        return latent.frames(self.frames) if self.task == "extend" else 0


def first_frame(encode: Encode, image: Tensor) -> Context:
    """Image to video: image (B, 3, H, W) in [-1, 1], already of the clip's size."""
    return Context("first_frame", encode(image.unsqueeze(2)))


def last_frame(encode: Encode, last: Tensor, first: Tensor | None = None) -> Context:
    """A clip that ends with image `last` and, if given, begins with `first`, (B, 3, H, W) each."""
    latents = encode(last.unsqueeze(2))
    if first is not None:
        if len(first) not in (1, len(last)):
            raise InputError(f"{len(first)} first images for {len(last)} last ones; give one, or one each")
        latents = torch.cat((latents, encode(first.unsqueeze(2)).expand_as(latents)), 2)
    return Context("last_frame", latents, hidden=1)


def extend(encode: Encode, clip: Tensor, latent: LatentFormat, keep: int) -> Context:
    """Continuation of a clip (B, 3, F, H, W): its last `keep` latent frames, fewer if it is short.

    Frames at the start that don't fill a latent frame are dropped. A clip of one latent frame can't be extended, since
    it has no later frame to continue from.
    """
    if keep < 1:
        raise InputError(f"keep is {keep} latent frames of the source; the minimum is 1")
    clip = whole_latents(clip, latent, from_end=True)
    latents = encode(clip)
    if latents.shape[2] < 2:
        raise InputError(
            f"extend needs a clip of at least {latent.frames(2)} frames; for a single picture use it as first frame"
        )
    return Context("extend", latents[:, :, -min(keep, latents.shape[2] - 1) :])


def edit(encode: Encode, clip: Tensor, latent: LatentFormat) -> Context:
    """Video to video: the source clip (B, 3, F, H, W), as a clip of its own."""
    latents = encode(whole_latents(clip, latent))
    return Context("edit", latents, hidden=latents.shape[2])


def whole_latents(clip: Tensor, latent: LatentFormat, from_end: bool = False) -> Tensor:
    """The clip without the frames that don't fill a latent frame."""
    count = (clip.shape[2] - 1) // latent.temporal * latent.temporal + 1
    return clip[:, :, clip.shape[2] - count :] if from_end else clip[:, :, :count]


def starts(task: str, hidden: int) -> tuple[int, ...]:
    """Frames of the deep sequence that start a clip and so have no later-frame factor."""
    return {"extend": (), "edit": (0, hidden), "last_frame": (0, 1)}.get(task, (0,))


def later_factors(config: FlowConfig, task: str, hidden: int, frames: int) -> Tensor:
    """Factor of each frame of the deep sequence: (frames,)."""
    factors = torch.full((frames,), config.latent.later_factor)
    factors[[i for i in starts(task, hidden) if i < frames]] = 1.0
    return factors
