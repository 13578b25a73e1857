"""The pictures that the example of training learns from, as a clip's frames: `python -m tests.nodes.crosses`.

Mostly crosses, which the demo doesn't know, and some of what it knows, so that it goes on to tell them apart.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from starflow_core.media import write_video
from starflow_core.training.demo.clips import BACKGROUNDS, COLOURS, KINDS, MARGIN, Scene, random_scene, render

FILE = "starflow_crosses.mp4"
SIDE = 96
ARM = 0.31  # half the width of an arm, of half its length


def scenes() -> list[Scene]:
    """A cross of each colour on each background, and two of each kind that is known."""
    rng = random.Random(4)
    known = [replace(random_scene(rng, SIDE, SIDE, moving=False), kind=kind) for kind in (*KINDS, *KINDS)]
    crosses = [_cross(rng, colour, background) for colour in COLOURS for background in BACKGROUNDS]
    return rng.sample([*known, *crosses], len(known) + len(crosses))


def _cross(rng: random.Random, colour: str, background: str) -> Scene:
    radius = rng.uniform(22, 26)
    x, y = (rng.uniform(radius + MARGIN, SIDE - radius - MARGIN) for _ in range(2))
    return Scene("cross", colour, background, None, x, y, radius)


def captions() -> list[str]:
    return [_caption(scene) for scene in scenes()]


def _caption(scene: Scene) -> str:
    article = "an" if scene.colour == "orange" else "a"
    return f"{article} {scene.colour} {scene.kind} on a {scene.background} background"


def drawn(scene: Scene) -> Tensor:
    """(3, H, W) in [-1, 1], antialiased."""
    if scene.kind != "cross":
        return render([scene], 1, SIDE, SIDE)[0, :, 0]
    place = torch.arange(SIDE) + 0.5
    x, y = (place - scene.x).abs(), (place - scene.y).abs()[:, None]
    long, wide = scene.radius, ARM * scene.radius
    distance = torch.minimum(torch.maximum(x - long, y - wide), torch.maximum(x - wide, y - long))
    cover = (0.5 - distance).clamp(0, 1)
    ground, colour = (torch.tensor(c)[:, None, None] for c in (BACKGROUNDS[scene.background], COLOURS[scene.colour]))
    return torch.lerp(ground, colour, cover) * 2 - 1


def main() -> None:
    path = Path(__file__).parents[2] / "example_workflows" / "inputs" / FILE
    write_video(path, torch.stack([drawn(scene) for scene in scenes()]), 4, quality=95)
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
