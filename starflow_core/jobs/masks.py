"""Masks of pixels: what is to be filled, which latent cells are known, and what stands in for the unknown meanwhile."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..model.config import FlowConfig


def checked_mask(mask: Tensor, pixels: Tensor, may_be_empty: bool = False) -> Tensor:
    """Which pixels are to be filled, (F, H, W) bool, of a mask (H, W), (1, H, W) or (F, H, W), 0 to 1, for a clip
    (F, 3, H, W): those above 0, since half of an unknown pixel isn't known. Raises InputError for another size or
    number of frames, and if it leaves nothing to fill, unless that may be."""
    mask = mask.unsqueeze(0) if mask.ndim == 2 else mask
    frames, height, width = len(pixels), *pixels.shape[-2:]
    if mask.ndim != 3 or mask.shape[1:] != (height, width):
        found = " x ".join(map(str, reversed(mask.shape[1:])))
        raise InputError(f"the mask is of {found}, the frames are {width} x {height}; give a mask of that size")
    if len(mask) not in (1, frames):
        raise InputError(f"the mask has {len(mask)} frames, the clip {frames}; give one mask, or one for each frame")
    if not torch.isfinite(mask).all():
        raise InputError("the mask has values that are no numbers; give 0 for what stays, 1 for what is to be filled")
    mask = (mask > 0).expand(frames, -1, -1)
    if not (may_be_empty or mask.any()):
        raise InputError("the mask is empty, so nothing is to be filled; mark it in white")
    return mask


def known_cells(config: FlowConfig, mask: Tensor) -> Tensor:
    """Which tokens (T, h, w) have all of their pixels outside a mask (F, H, W). Raises InputError where none has."""
    clear = (~mask).float().unsqueeze(1)
    clear = -F.max_pool2d(-clear, config.cell).squeeze(1)  # the least of a cell's pixels
    later = clear[1:].view(-1, config.latent.temporal, *clear.shape[1:]).amin(1) if len(clear) > 1 else clear[1:]
    known = torch.cat((clear[:1], later)) > 0
    if not known.any():
        raise InputError(
            f"no cell of {config.cell} x {config.cell} pixels wholly known is left to go by; fill less, or generate all"
        )
    return known


def stand_in(pixels: Tensor, mask: Tensor) -> Tensor:
    """A clip (F, 3, H, W) whose masked pixels (F, H, W) continue what is around them, so that encoding it says of the
    known ones what is there and nothing of what was masked: in each frame they are what the known ones nearby are on
    average; frames of which nothing is known lie between the nearest others."""
    filled, whole = torch.where(mask.unsqueeze(1), 0, pixels), (~mask).flatten(1).any(1)
    filled[whole] = _spread(filled[whole], (~mask[whole]).unsqueeze(1))
    there = whole.nonzero()[:, 0].tolist()
    for index in (~whole).nonzero()[:, 0].tolist():
        before, after = [i for i in there if i < index], [i for i in there if i > index]
        first, last = (before or after)[-1 if before else 0], (after or before)[0 if after else -1]
        share = (index - first) / (last - first) if last > first else 0.0
        filled[index] = torch.lerp(filled[first], filled[last], share)
    return filled


def _spread(values: Tensor, known: Tensor) -> Tensor:
    """Values (F, C, H, W) where they are `known` (F, 1, H, W), and where they aren't those of a picture of half the
    size, made of the known ones and filled in the same way. Where they aren't known they are 0."""
    if known.all():
        return values
    share = F.avg_pool2d(known.to(values.dtype), 2, ceil_mode=True)
    halves = F.avg_pool2d(values, 2, ceil_mode=True) / share.clamp(min=0.25)
    around = F.interpolate(_spread(halves, share > 0), values.shape[-2:], mode="bilinear", align_corners=False)
    return torch.where(known, values, around)


def joined(pixels: Tensor, mask: Tensor) -> Tensor:
    """A clip (F, 4, H, W) with its mask (F, H, W), 0 or 1, as a fourth channel, which is fitted as the pixels are."""
    return torch.cat((pixels, mask.unsqueeze(1) * 2.0 - 1), 1)


def parted(both: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels and mask of what was `joined`; what is masked by any part is masked."""
    return both[:, :3], (both[:, 3] > -1 + 1e-3).float()


def outpainted(pixels: Tensor, left: int, top: int, right: int, bottom: int) -> tuple[Tensor, Tensor]:
    """A clip (F, 3, H, W) with so many pixels added on each side, and the mask (F, H, W) of those. Raises InputError
    for a margin below 0, or wider than the picture."""
    margins = {"left": left, "top": top, "right": right, "bottom": bottom}
    for (side, margin), most in zip(margins.items(), 2 * pixels.shape[:-3:-1], strict=True):
        if not 0 <= margin <= most:
            raise InputError(f"the margin on the {side} is {margin} pixels; give 0 to {most}, the side of the picture")
    around = (left, right, top, bottom)
    mask = torch.zeros(len(pixels), *pixels.shape[-2:])
    return F.pad(pixels, around), F.pad(mask, around, value=1.0)
