"""A map of numbers drawn over a clip, with its scale beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import InputError
from .pixels import from_bytes, to_bytes

# From what is usual to what stands out; dark and bright ends are told apart without colour, too.
COLOURS = ((40, 11, 84), (101, 21, 110), (159, 42, 99), (212, 72, 66), (245, 125, 21), (250, 193, 39), (252, 255, 164))
OPAQUE = 0.85  # of the map where it is highest; where it is lowest the clip shows through
SOFT = (45.0, 170.0)  # the greys of black and white
LUMA = (0.2126, 0.7152, 0.0722)  # BT.709
LEAST_SIDE = 320  # pixels of the enlarged picture, so that numbers can be read
PAPER, INK, FAINT = (24, 24, 28), (236, 236, 236), (150, 150, 158)
STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """The numbers that the ends of the colours stand for. Raises InputError unless they are finite, low before high."""

    low: float
    high: float

    def __post_init__(self):
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise InputError(f"a scale from {self.low} to {self.high}; give two finite numbers, the lower one first")

    @classmethod
    def of(cls, values: Tensor) -> Scale:
        """From the median, below which nothing stands out, to the largest; NaN doesn't count."""
        known = values[~values.isnan()]
        low, high = float(known.median()), float(known.max())
        return cls(low, max(high, low + 1e-3 * max(1.0, abs(low))))

    def share(self, values: np.ndarray) -> np.ndarray:
        """Where values are between the ends, 0 to 1; NaN is 0."""
        return np.nan_to_num((values - self.low) / (self.high - self.low)).clip(0, 1)

    def ticks(self, most: int = 6) -> list[float]:
        """Round numbers between the ends."""
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * s for s in STEPS if power * s >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(i * step, 10) for i in range(first, last + 1)]


def overlaid(pixels: Tensor, values: Tensor, unit: str, scale: Scale | None = None) -> Tensor:
    """A clip (F, 3, H, W) in [-1, 1] under a map (F, H, W), enlarged by a whole factor, with the scale on its right:
    (F, 3, H', W'), of even sides. Nothing covers the clip where the map is NaN. Raises InputError where they don't go
    together."""
    if pixels.ndim != 4 or pixels.shape[1] != 3 or values.shape != (len(pixels), *pixels.shape[2:]):
        raise InputError(f"a map of shape {tuple(values.shape)} over pixels of shape {tuple(pixels.shape)}")
    scale = scale or Scale.of(values)
    factor = max(1, math.ceil(LEAST_SIDE / min(pixels.shape[2:])))
    frames = _blended(to_bytes(pixels), values.float().cpu().numpy(), scale)
    frames = frames.repeat(factor, 1).repeat(factor, 2)
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, 0), (0, 0)), mode="edge")
    legend = _legend(frames.shape[1], unit, scale, frames.shape[2] % 2)
    legends = np.broadcast_to(legend, (len(frames), *legend.shape))
    return from_bytes(np.concatenate((frames, legends), 2))


def _blended(frames: np.ndarray, values: np.ndarray, scale: Scale) -> np.ndarray:
    """Bytes (F, H, W, 3) in soft greys, so that all colour is the map's, with the map on top."""
    grey = SOFT[0] + (frames @ np.array(LUMA))[..., None] / 255 * (SOFT[1] - SOFT[0])
    return _covered(grey, scale.share(values))


def _covered(ground: np.ndarray, share: np.ndarray) -> np.ndarray:
    """A ground (.., 3 or 1) under colours for a share (..), the denser the higher it is, as bytes."""
    cover = OPAQUE * share[..., None] ** 0.6  # so that what stands out a little can be seen, too
    return np.rint(ground + cover * (_coloured(share) - ground)).astype(np.uint8)


def _coloured(share: np.ndarray) -> np.ndarray:
    """(...,) in 0 .. 1 to colours (..., 3)."""
    places = np.linspace(0, 1, len(COLOURS))
    return np.stack([np.interp(share, places, channel) for channel in np.array(COLOURS).T], -1)


def _legend(height: int, unit: str, scale: Scale, odd: int) -> np.ndarray:
    """The scale as bytes (height, width, 3), with round numbers; one pixel wider if that is `odd`."""
    size = max(11, height // 24)
    font, margin, bar = ImageFont.load_default(size), size, int(1.2 * size)
    labels = [f"{tick:g}" for tick in scale.ticks()]
    wide = max(font.getlength(text) for text in [*labels, unit])
    width = int(2 * margin + bar + size // 2 + wide)
    picture = Image.new("RGB", (width + (width + odd) % 2, height), PAPER)
    draw, top, bottom = ImageDraw.Draw(picture), int(3 * size), height - int(1.5 * size)
    draw.text((margin, size), unit, FAINT, font)
    rows = np.linspace(1, 0, bottom - top)[:, None].repeat(bar, 1)
    ground = np.full((*rows.shape, 3), sum(SOFT) / 2)
    picture.paste(Image.fromarray(_covered(ground, rows)), (margin, top))
    for tick, label in zip(scale.ticks(), labels, strict=True):
        y = round(top + (1 - float(scale.share(np.array(tick)))) * (bottom - top - 1))
        draw.line((margin + bar, y, margin + bar + size // 4, y), INK)
        draw.text((margin + bar + size // 2, y), label, INK, font, anchor="lm")
    return np.asarray(picture)
