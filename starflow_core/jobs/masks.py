"""Masks of pixels: what is to be filled, which latent cells are known, and what stands in for the unknown meanwhile."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..model.config import FlowConfig


def checked_mask(mask: Tensor, pixels: Tensor) -> Tensor:
    """Which pixels are to be filled, (F, H, W) bool, of a mask (H, W), (1, H, W) or (F, H, W), 0 to 1, for a clip
    (F, 3, H, W): those above 0, since half of an unknown pixel isn't known. Raises InputError for another size or
    number of frames, and if it leaves nothing to fill."""
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
    if not mask.any():
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
            f"the mask leaves no cell of {config.cell} x {config.cell} pixels wholly known; fill less, or generate all"
        )
    return known


def stand_in(pixels: Tensor, mask: Tensor) -> Tensor:
    """A clip (F, 3, H, W) whose masked pixels (F, H, W) continue what is around them, so that encoding it says of the
    known ones what is there and nothing of what was masked: in each frame known pixels spread, one pixel at a time;
    frames of which nothing is known lie between the nearest others."""
    filled, known = torch.where(mask.unsqueeze(1), 0, pixels), (~mask).unsqueeze(1).to(pixels.dtype)
    whole = known.flatten(1).any(1)
    for _ in range(sum(pixels.shape[-2:])):
        if bool(known[whole].all()):
            break
        count = F.avg_pool2d(known, 3, 1, 1)
        spread = F.avg_pool2d(filled * known, 3, 1, 1) / count.clamp(min=1e-6)
        filled = torch.where(known > 0, filled, spread)
        known = (count > 0).to(known.dtype)
    there = whole.nonzero()[:, 0].tolist()
    for index in (~whole).nonzero()[:, 0].tolist():
        before, after = [i for i in there if i < index], [i for i in there if i > index]
        first, last = (before or after)[-1 if before else 0], (after or before)[0 if after else -1]
        share = (index - first) / (last - first) if last > first else 0.0
        filled[index] = torch.lerp(filled[first], filled[last], share)
    return filled


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
