"""Pixels as the models see them, and as files hold them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

FITS = ("crop", "pad", "stretch")


@dataclass(frozen=True)
class Clip:
    """Frames (F, 3, H, W), float32 in [-1, 1], and their rate; `fps` is 0 where the source has none."""

    pixels: Tensor
    fps: Fraction


def stacked(frames: Iterable[Tensor], size: tuple[int, int] | None) -> Tensor:
    """Frames (3, H, W) as one clip; with a size each is fitted as it comes, so that a long clip is never held large."""
    return torch.stack([frame if size is None else fit(frame, *size) for frame in frames])


def fit(pixels: Tensor, height: int, width: int, how: str = "crop") -> Tensor:
    """Bring (..., 3, H, W) to height x width (bilinear, antialiased), centred.

    "crop" covers the size and cuts the edges off, "pad" shows the whole picture with black bars, "stretch" gives the
    proportions up.
    """
    if how not in FITS:
        raise InputError(f"fit is {how!r}; expected one of {', '.join(FITS)}")
    size = _scaled(pixels.shape[-2:], (height, width), how)
    if size != pixels.shape[-2:]:
        frames = pixels.reshape(-1, *pixels.shape[-3:])
        frames = F.interpolate(frames, size, mode="bilinear", antialias=True, align_corners=False)
        pixels = frames.reshape(*pixels.shape[:-2], *size)
    if how == "pad":
        top, left = (height - size[0]) // 2, (width - size[1]) // 2
        return F.pad(pixels, (left, width - size[1] - left, top, height - size[0] - top), value=-1.0)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return pixels[..., top : top + height, left : left + width]


def _scaled(old: tuple[int, int], new: tuple[int, int], how: str) -> tuple[int, int]:
    """Height and width that a picture is scaled to, before it is cropped or padded."""
    if how == "stretch":
        return new
    ratios = [there / here for here, there in zip(old, new, strict=True)]
    scale = max(ratios) if how == "crop" else min(ratios)
    bound = max if how == "crop" else min
    return tuple(bound(there, max(1, round(here * scale))) for here, there in zip(old, new, strict=True))


def from_bytes(array: np.ndarray) -> Tensor:
    """(..., H, W, 3) uint8 to (..., 3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(array)).movedim(-1, -3)  # a copy: decoders give views that torch cannot take
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


def to_bytes(pixels: Tensor) -> np.ndarray:
    """(..., 3, H, W) in [-1, 1], or clipped to it, to (..., H, W, 3) uint8."""
    levels = pixels.add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
    return levels.movedim(-3, -1).contiguous().cpu().numpy()
