"""Drawn clips with captions: one coloured shape that moves over a plain background.

The grammar is small on purpose, so that every word of a caption can be checked in the pixels.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

COLOURS = {
    "red": (0.86, 0.12, 0.14),
    "orange": (0.96, 0.52, 0.08),
    "yellow": (0.95, 0.86, 0.16),
    "green": (0.14, 0.68, 0.24),
    "cyan": (0.16, 0.80, 0.86),
    "blue": (0.14, 0.30, 0.90),
    "purple": (0.52, 0.16, 0.78),
    "pink": (0.96, 0.48, 0.72),
}
BACKGROUNDS = {"black": (0.05, 0.05, 0.06), "grey": (0.42, 0.43, 0.45), "white": (0.93, 0.93, 0.92)}
KINDS = ("circle", "square", "triangle", "ring")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# What the demo isn't trained on, for others to teach it.
NEW_KINDS = ("cross",)
DIAGONALS = {"up and left": (-1, -1), "up and right": (1, -1), "down and left": (-1, 1), "down and right": (1, 1)}
MOTIONS = DIRECTIONS | DIAGONALS
ARM = 0.36  # half the width of a cross's arms, as a share of its radius
SIZES = {"1:1": (96, 96), "16:9": (80, 128), "9:16": (128, 80)}  # height and width of each aspect ratio
MARGIN = 3  # pixels that stay free between a shape and the border


@dataclass(frozen=True)
class Scene:
    """One clip's content. Lengths in pixels, speed in pixels a frame, `start` in frames."""

    kind: str
    colour: str
    background: str
    direction: str | None  # None: a still
    x: float
    y: float
    radius: float
    speed: float = 0.0
    start: int = 0

    def recoloured(self, colour: str) -> Scene:
        return replace(self, colour=colour)

    def later(self, frames: int) -> Scene:
        """The same motion, starting `frames` later."""
        return replace(self, start=self.start + frames)


def random_scene(rng: random.Random, height: int, width: int, moving: bool = True, late: float = 0.3) -> Scene:
    """A scene that fits height x width. A moving shape starts in the half that it will leave; with probability `late`
    the clip starts 1 to 69 frames into the motion."""
    radius = rng.uniform(15, 20)
    reach = radius + MARGIN
    x, y = rng.uniform(reach, width - reach), rng.uniform(reach, height - reach)
    scene = Scene(rng.choice(KINDS), rng.choice(list(COLOURS)), rng.choice(list(BACKGROUNDS)), None, x, y, radius)
    if not moving:
        return scene
    direction = rng.choice(list(DIRECTIONS))
    dx, dy = DIRECTIONS[direction]
    along = rng.uniform(0, 0.4)  # share of the free way that lies behind the shape
    if dx:
        x = reach + along * (width - 2 * reach)
        x = x if dx > 0 else width - x
    else:
        y = reach + along * (height - 2 * reach)
        y = y if dy > 0 else height - y
    start = rng.randrange(1, 70) if rng.random() < late else 0
    return replace(scene, direction=direction, x=x, y=y, speed=rng.uniform(0.9, 1.5), start=start)


def caption(scene: Scene, rng: random.Random) -> str:
    """A sentence that says what the scene shows, one time in three without its background."""
    article = "an" if scene.colour == "orange" else "a"
    motion = ""
    if scene.direction is not None:
        motion = rng.choice((" moving {}", " moves {}", " that moves {}")).format(scene.direction)
    place = rng.choice((" on a {} background", " over a {} background", "")).format(scene.background)
    return f"{article} {scene.colour} {scene.kind}{motion}{place}"


def edit_caption(colour: str, rng: random.Random) -> str:
    """The instruction that recolours a shape."""
    return rng.choice(("make it {}", "turn it {}", "recolour the shape {}")).format(colour)


def render(scenes: list[Scene], frames: int, height: int, width: int) -> Tensor:
    """Draw scenes of one size: (B, 3, frames, height, width) in [-1, 1], antialiased."""
    time = torch.arange(frames, dtype=torch.float32)
    middles = torch.stack([centres(s, time, height, width) for s in scenes])  # (B, F, 2)
    row = torch.arange(height).view(1, 1, -1, 1) + 0.5
    col = torch.arange(width).view(1, 1, 1, -1) + 0.5
    x = col - middles[..., 0, None, None]
    y = row - middles[..., 1, None, None]
    cover = torch.empty(len(scenes), frames, height, width)
    for i, scene in enumerate(scenes):
        cover[i] = (0.5 - _distance(scene.kind, x[i], y[i], scene.radius)).clamp(0, 1)
    colour = torch.tensor([COLOURS[s.colour] for s in scenes])[:, :, None, None, None]
    ground = torch.tensor([BACKGROUNDS[s.background] for s in scenes])[:, :, None, None, None]
    return torch.lerp(ground, colour, cover[:, None]) * 2 - 1


def centres(scene: Scene, time: Tensor, height: int, width: int) -> Tensor:
    """Centre (x, y) of the shape at each frame, (F, 2); it stops before the border."""
    dx, dy = MOTIONS.get(scene.direction, (0, 0))
    moved = scene.speed * (time + scene.start)
    reach = scene.radius + MARGIN
    x = (scene.x + dx * moved).clamp(reach, width - reach)
    y = (scene.y + dy * moved).clamp(reach, height - reach)
    return torch.stack([x, y], -1)


def _distance(kind: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Signed distance to the outline, negative inside. Kinds of one radius have similar areas, but for the cross."""
    if kind == "circle":
        return torch.hypot(x, y) - radius
    if kind == "ring":
        return (torch.hypot(x, y) - 0.75 * radius).abs() - 0.25 * radius
    if kind == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88 * radius
    if kind == "cross":
        bars = (torch.maximum(x.abs() - a * radius, y.abs() - b * radius) for a, b in ((1, ARM), (ARM, 1)))
        return torch.minimum(*bars)
    slope = 2 / 5**0.5  # an upright triangle: base and height both 2 radii
    sides = slope * (x.abs() - 0.5 * (y + radius))
    return torch.maximum(sides, y - radius)
