"""The pictures that the example of training learns from, as a clip's frames: `python -m tests.nodes.crosses`.

Mostly crosses, which the demo doesn't know, and some of what it knows, so that it goes on to tell them apart.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from starflow_core.media import write_video
from starflow_core.training.demo.clips import BACKGROUNDS, COLOURS, KINDS, MARGIN, Scene, random_scene, render

FILE = "starflow_crosses.mp4"
SIDE = 96


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


def main() -> None:
    path = Path(__file__).parents[2] / "example_workflows" / "inputs" / FILE
    write_video(path, render(scenes(), 1, SIDE, SIDE)[:, :, 0], 4, quality=95)
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
