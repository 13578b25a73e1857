"""Says what a clip shows from its pixels alone: one coloured shape that moves over a plain background.

The world is the one that `starflow_core.training.clips` describes; of what made the pixels nothing is known here.
Everything is measured against the background, on lightly smoothed frames: where the shape is, whether it is in one
piece, its colour by hue, its kind by the outline of its mean mask, its direction by the way of its centroid.

    python -m benchmarks.judge      prints how often drawn and then degraded clips are judged right
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from starflow_core.errors import InputError
from starflow_core.training.demo import clips

# Colours are RGB in [0, 1] and their distances Euclidean.
MIN_CONTRAST = 0.2  # a frame whose brightest difference from the background is less shows nothing
STRAY = 0.3  # share of that contrast from which a pixel counts as something that is drawn, however faint
MAX_BACKGROUND_ERROR = 0.3
MIN_CHROMA = 0.15  # less is a shade of grey and has no name
MAX_HUE_ERROR = 30.0  # degrees
EVEN = 0.25  # core pixels this near to their median have the shape's colour
WHOLE = 0.9  # the share of pixels in the largest component, and of frames, that makes one connected shape
AREAS = (0.02, 0.4)  # plausible areas of a shape, as a share of the frame
MIN_HOLE = 0.08  # unfilled share of the outline's area from which a disc is a ring
MIN_FIT = 0.8  # IoU with the best template below which an outline is no known kind
MIN_TRAVEL = 4.0  # pixels
MAX_SIDEWAYS = 0.5  # of the way in the main direction
MAX_COLOUR_DRIFT = 0.15
MAX_AREA_DRIFT = 0.25


class Expectation(Protocol):
    """What a clip should show; a `clips.Scene` is one. `background` None: any will do."""

    kind: str
    colour: str
    direction: str | None
    background: str | None


@dataclass(frozen=True)
class Sight:
    """What a clip of F frames shows. A name is None where nothing known is seen.

    Per frame: `path` (F, 2) the centroid (x, y) in pixels and `colours` (F, 3) the shape's RGB in [0, 1], both NaN
    where nothing is seen; `areas` (F,) as a share of the frame; `whole` (F,) whether one plausible shape is seen.
    The names are those of the clip as a whole; `consistent` is False where background, colour or area drift in it.
    """

    background: str | None
    colour: str | None
    kind: str | None
    direction: str | None
    connected: bool
    consistent: bool
    area: float
    path: np.ndarray
    colours: np.ndarray
    areas: np.ndarray
    whole: np.ndarray


def look(pixels: Tensor) -> Sight:
    """Judge one clip or still, (F, 3, H, W) in [-1, 1]. Pixels that are not finite count as mid-grey.

    Raises InputError for any other shape.
    """
    if pixels.ndim != 4 or pixels.shape[0] < 1 or pixels.shape[1] != 3 or min(pixels.shape[2:]) < 16:
        raise InputError(f"a clip to judge is (frames, 3, height, width) of 16 x 16 or more, not {tuple(pixels.shape)}")
    frames = _frames(pixels)
    ground = _ground(frames)
    mask, whole = _shape(np.linalg.norm(frames - ground[:, None, None], axis=-1))
    areas = mask.mean((1, 2))
    path = _centroids(mask)
    core = _core(mask)
    colours = np.array([_median(f[m]) for f, m in zip(frames, core, strict=True)])
    return Sight(
        background=_background(np.median(ground, axis=0)),
        colour=_colour(frames[core]),
        kind=_kind(_mean_mask(mask, path)),
        direction=_direction(path),
        connected=bool(whole.mean() >= WHOLE),
        consistent=_consistent(ground, colours, areas),
        area=float(np.median(areas)),
        path=path,
        colours=colours,
        areas=areas,
        whole=whole,
    )


def verdict(sight: Sight, expected: Expectation) -> dict[str, bool]:
    """Which of the expectations the clip meets: colour, direction, kind, connected, and background where one is given.

    An expected direction of None is met by a still, or by a clip in which nothing moves.
    """
    met = {
        "colour": sight.colour == expected.colour,
        "direction": sight.direction == expected.direction,
        "kind": sight.kind == expected.kind,
        "connected": sight.connected,
    }
    if expected.background is not None:
        met["background"] = sight.background == expected.background
    return met


def _frames(pixels: Tensor) -> np.ndarray:
    """(F, H, W, 3) in [0, 1], each pixel the mean of 3 x 3: that takes two thirds of white noise away."""
    values = np.nan_to_num(pixels.detach().float().cpu().numpy(), nan=0.0).clip(-1, 1).transpose(0, 2, 3, 1)
    padded = np.pad(values / 2 + 0.5, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    return (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 9


def _ground(frames: np.ndarray) -> np.ndarray:
    """The background colour of each frame (F, 3): the median of its outermost pixels."""
    sides = (frames[:, :2], frames[:, -2:], frames[:, 2:-2, :2], frames[:, 2:-2, -2:])
    return np.median(np.concatenate([s.reshape(len(frames), -1, 3) for s in sides], axis=1), axis=1)


def _shape(difference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From the difference to the background (F, H, W): the largest connected shape (F, H, W), and per frame whether
    it is all there is to see and of plausible area (F,).

    The outline lies at half the contrast, where blur leaves it; a fainter second shape shows only at a lower threshold.
    """
    contrast = np.quantile(difference, 1 - AREAS[0] / 2, axis=(1, 2))[:, None, None]
    visible = contrast > MIN_CONTRAST
    solid = visible & (difference > contrast / 2)
    drawn = visible & (difference > contrast * STRAY)
    shape, main = _largest(solid), _largest(drawn)
    whole = (_share(shape, solid) >= WHOLE) & (_share(main, drawn) >= WHOLE)
    area = shape.mean((1, 2))
    return shape, whole & (area >= AREAS[0]) & (area <= AREAS[1])


def _share(part: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return part.sum((1, 2)) / np.maximum(mask.sum((1, 2)), 1)


def _components(mask: np.ndarray) -> np.ndarray:
    """Label the 4-connected components of each frame's mask (F, H, W), 0 outside of them.

    A pixel's label is the position of a pixel of its own component, counted from 1 over the padded clip. All take the
    largest of their neighbours' labels, then the label at that position, until nothing changes.
    """
    inside = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
    labels = np.arange(1, inside.size + 1).reshape(inside.shape) * inside
    while True:
        spread = labels.copy()
        for axis in (1, 2):
            for step in (1, -1):
                np.maximum(spread, np.roll(labels, step, axis), out=spread)
        spread *= inside
        spread = np.append(0, spread)[spread]
        if np.array_equal(spread, labels):
            return labels[:, 1:-1, 1:-1]
        labels = spread


def _largest(mask: np.ndarray) -> np.ndarray:
    """The largest connected component of each frame's mask (F, H, W)."""
    largest = np.zeros_like(mask)
    for labels, out in zip(_components(mask), largest, strict=True):
        names, sizes = np.unique(labels[labels > 0], return_counts=True)
        if len(names):
            out[:] = labels == names[sizes.argmax()]
    return largest


def _centroids(mask: np.ndarray) -> np.ndarray:
    """Centroids (x, y) of masks (F, H, W) in pixels (F, 2), pixel centres at 0.5; NaN for an empty one."""
    total = mask.sum((1, 2)).astype(float)
    total[total == 0] = np.nan
    x = mask.sum(1) @ (np.arange(mask.shape[2]) + 0.5)
    y = mask.sum(2) @ (np.arange(mask.shape[1]) + 0.5)
    return np.stack([x, y], axis=-1) / total[:, None]


def _core(mask: np.ndarray) -> np.ndarray:
    """The pixels at least three from the outline, where blur has mixed in least of the background."""
    core = mask
    for _ in range(2):
        padded = np.pad(core, ((0, 0), (1, 1), (1, 1)))
        core = core & padded[:, :-2, 1:-1] & padded[:, 2:, 1:-1] & padded[:, 1:-1, :-2] & padded[:, 1:-1, 2:]
    return core


def _median(colours: np.ndarray) -> np.ndarray:
    return np.median(colours, axis=0) if len(colours) else np.full(3, np.nan)


def _background(colour: np.ndarray) -> str | None:
    errors = {name: np.linalg.norm(colour - rgb) for name, rgb in clips.BACKGROUNDS.items()}
    name = min(errors, key=errors.get)
    return name if errors[name] <= MAX_BACKGROUND_ERROR else None


def _colour(core: np.ndarray) -> str | None:
    """The name nearest in hue to the median of core pixels (N, 3), if most of them share it.

    Hue stands both dimming and a mixture with black, grey or white, which is what blur does to a thin shape.
    """
    if not len(core):
        return None
    middle = np.median(core, axis=0)
    even = np.linalg.norm(core - middle, axis=1) <= EVEN
    chroma = _chroma(middle)
    if abs(chroma) < MIN_CHROMA or even.mean() < 0.75:
        return None
    errors = {name: abs(np.angle(chroma / _chroma(rgb), deg=True)) for name, rgb in clips.COLOURS.items()}
    name = min(errors, key=errors.get)
    return name if errors[name] <= MAX_HUE_ERROR else None


def _chroma(rgb: tuple[float, float, float] | np.ndarray) -> complex:
    """The colour in the plane across the grey axis; its angle is the hue."""
    red, green, blue = rgb
    return complex(red - (green + blue) / 2, 3**0.5 / 2 * (green - blue))


def _mean_mask(mask: np.ndarray, path: np.ndarray) -> np.ndarray:
    """The pixels (H, W) that belong to the shape in most frames once its centroid is moved to the middle."""
    height, width = mask.shape[1:]
    seen = np.flatnonzero(~np.isnan(path[:, 0]))
    steps = np.rint(np.array([width, height]) / 2 - np.nan_to_num(path)).astype(int)
    moved = [np.roll(mask[i], (steps[i, 1], steps[i, 0]), axis=(0, 1)) for i in seen]
    return np.mean(moved, axis=0) > 0.5 if moved else np.zeros((height, width), bool)


def _kind(mask: np.ndarray) -> str | None:
    """The template that the outline of a mask (H, W) fits best; a disc with a hole is a ring, nothing else has one."""
    outline = _filled(mask)
    area = outline.sum()
    if not area:
        return None
    x0, y0 = _centroids(outline[None])[0]
    y, x = np.indices(mask.shape) + 0.5
    x, y = (x - x0) / area**0.5, (y - y0) / area**0.5
    fits = {name: _iou(outline, template) for name, template in _templates(x, y).items()}
    name = max(fits, key=fits.get)
    if fits[name] < MIN_FIT:
        return None
    if 1 - mask.sum() / area < MIN_HOLE:
        return name
    return "ring" if name == "circle" else None


def _filled(mask: np.ndarray) -> np.ndarray:
    """A mask (H, W) with its holes: all that cannot be reached from the border."""
    outside = _components(np.pad(~mask, 1, constant_values=True)[None])[0]
    return (outside != outside[0, 0])[1:-1, 1:-1]


def _templates(x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """The outlines of unit area about their centroid, y downwards; the triangle is upright, as wide as high, the
    cross has level arms."""
    below_top = y + 2**1.5 / 3
    reach = (8 * clips.ARM - 4 * clips.ARM**2) ** -0.5  # of a cross's arms
    inside = [(abs(x) <= a * reach) & (abs(y) <= b * reach) for a, b in ((1, clips.ARM), (clips.ARM, 1))]
    return {
        "cross": inside[0] | inside[1],
        "circle": np.hypot(x, y) <= np.pi**-0.5,
        "square": np.maximum(abs(x), abs(y)) <= 0.5,
        "triangle": (abs(x) <= below_top / 2) & (below_top <= 2**0.5),
    }


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


def _direction(path: np.ndarray) -> str | None:
    """Where the shape goes from the first to the last frames in which it is seen, level, upright or aslant."""
    seen = path[~np.isnan(path[:, 0])]
    if len(seen) < 2:
        return None
    ends = min(3, len(seen) // 2)
    way = np.median(seen[-ends:], axis=0) - np.median(seen[:ends], axis=0)
    along, across = max(abs(way)), min(abs(way))
    if along < MIN_TRAVEL:
        return None
    known = clips.DIAGONALS if across > MAX_SIDEWAYS * along else clips.DIRECTIONS
    return max(known, key=lambda name: way @ known[name])


def _consistent(ground: np.ndarray, colours: np.ndarray, areas: np.ndarray) -> bool:
    """Whether background (F, 3), colour (F, 3) and area (F,) are in the last quarter of the frames in which the shape
    is seen what they are in the first."""
    seen = np.flatnonzero(~np.isnan(colours[:, 0]))
    if not len(seen):
        return False
    quarter = max(1, len(seen) // 4)
    first, last = seen[:quarter], seen[-quarter:]
    drifts = [np.linalg.norm(np.median(x[last], axis=0) - np.median(x[first], axis=0)) for x in (ground, colours)]
    before, after = np.median(areas[first]), np.median(areas[last])
    return bool(max(drifts) <= MAX_COLOUR_DRIFT and abs(after - before) <= MAX_AREA_DRIFT * before)


def degrade(pixels: Tensor, blur: float, noise: float, shift: float, seed: int) -> Tensor:
    """What a small VAE does to a clip (F, 3, H, W) in [-1, 1]: Gaussian blur (sigma in pixels), colour noise (standard
    deviation) and a shift of up to `shift` in each channel, the last two in units of the [0, 1] range."""
    generator = torch.Generator().manual_seed(seed)
    if blur:
        reach = int(3 * blur + 1)
        kernel = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * blur**2))
        kernel /= kernel.sum()
        padded = torch.nn.functional.pad(pixels, (reach,) * 4, mode="replicate").flatten(0, 1)[:, None]
        rows = torch.nn.functional.conv2d(padded, kernel.view(1, 1, -1, 1))
        pixels = torch.nn.functional.conv2d(rows, kernel.view(1, 1, 1, -1)).view(pixels.shape)
    offset = (torch.rand(1, 3, 1, 1, generator=generator) * 2 - 1) * shift
    return (pixels + 2 * (offset + noise * torch.randn(pixels.shape, generator=generator))).clamp(-1, 1)


def calibrate(scenes: int, blur: float, noise: float = 0.06, shift: float = 0.05) -> dict[str, float]:
    """The share of random scenes of which each fact is judged right, at two sizes, half of them clips of 33 frames
    and half of them stills; what takes time to see is counted over the clips only."""
    rng = random.Random(0)
    right: dict[str, list[bool]] = {}
    for index in range(scenes):
        height, width = ((96, 96), (80, 128))[index % 2]
        moving = index % 4 < 2
        scene = clips.random_scene(rng, height, width, moving=moving, late=0)  # a late start may have come to its halt
        drawn = clips.render([scene], 33 if moving else 1, height, width)[0].transpose(0, 1)
        sight = look(degrade(drawn, blur, noise, shift, seed=index))
        for fact, met in (verdict(sight, scene) | {"consistent": sight.consistent}).items():
            if moving or fact not in ("direction", "consistent"):
                right.setdefault(fact, []).append(met)
    return {fact: sum(met) / len(met) for fact, met in right.items()}


def main() -> None:
    for blur in (0, 1, 1.5, 2, 2.5):
        shares = calibrate(400, blur)
        print(f"blur {blur:3}  " + "  ".join(f"{fact} {share:6.1%}" for fact, share in shares.items()), flush=True)


if __name__ == "__main__":
    main()
