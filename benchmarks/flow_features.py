"""What only a flow can do, on the demo, judged by pixels: `python -m benchmarks.flow_features [PART ..] [--clips N]`.

Parts: round trips, variations, interpolation, and another prompt for the same noise by attribute. Each is set beside
what one gets without the flow. Shares come with their 95 % interval (Wilson). Settings were tuned on other scenes.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.adherence import prompt, scenes
from benchmarks.judge import Sight, look, verdict
from benchmarks.report import machine, write_json
from benchmarks.surprise import wilson
from starflow_core.applications.inversion import decode_from_noise, encode_to_noise
from starflow_core.applications.reprompt import Wish, reprompt
from starflow_core.pipeline import Pipeline, load_pipeline
from starflow_core.training.demo import clips

SIDE, FRAMES = 96, 33
NEAR, ROOM = 8.0, 16.0  # pixels
SEED = 4001  # of the reported scenes
VALUES = {"kind": clips.KINDS, "colour": clips.COLOURS, "background": clips.BACKGROUNDS, "direction": clips.DIRECTIONS}
REPROMPT = {  # the options of each attribute
    "kind": {"candidates": 4},
    "background": {"candidates": 4},
    "colour": {"candidates": 8},
    "direction": {"hold": "first-frame", "candidates": 4},
}
NO_CAPTION = ", first caption empty"
STRENGTHS = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0)


def drawn(wanted: list[clips.Scene]) -> Tensor:
    """Clips (B, F, 3, H, W)."""
    return clips.render(wanted, FRAMES, SIDE, SIDE).transpose(1, 2)


def changed(scene: clips.Scene, attribute: str, rng: random.Random) -> clips.Scene:
    others = [value for value in VALUES[attribute] if value != getattr(scene, attribute)]
    return replace(scene, **{attribute: rng.choice(others)})


def way(one: Sight, other: Sight) -> np.ndarray:
    """Pixels between two shapes in each frame; infinite where one isn't seen."""
    return np.nan_to_num(np.linalg.norm(one.path - other.path, axis=1), nan=np.inf)


def reprompted(
    pipeline: Pipeline, attribute: str, count: int, seed: int, was: bool = True, **options
) -> Iterator[dict]:
    """One attribute changed by the prompt, as `judged`. Without `was` the source's caption is left empty."""
    rng = random.Random(seed)
    for index, scene in enumerate(scenes(count, seed)):
        wanted, source = changed(scene, attribute, rng), drawn([scene])[0]
        wish = Wish(prompt(scene) if was else "", prompt(wanted), seed=1000 * index, **options)
        found = judged(reprompt(pipeline, source, wish).pixels, wanted, source, attribute)
        yield {**found, "room": room(scene, wanted.direction)}


def judged(made: Tensor, wanted: clips.Scene, source: Tensor, attribute: str) -> dict:
    """Whether a changed clip is right, and how far from the source: on its whole way, or for another direction in the
    first frame."""
    sight = look(made)
    met, off = verdict(sight, wanted), way(look(source[: len(made)]), sight)
    far = float(off[0] if attribute == "direction" else off.max())
    right = met[attribute] and met["connected"]
    return {"right": right, "off": far, "met": bool(right and far < NEAR)}


def room(scene: clips.Scene, direction: str) -> float:
    """Pixels that a scene's shape can move in a direction before its edge meets that of the frame."""
    place = {"left": scene.x, "up": scene.y, "right": SIDE - scene.x, "down": SIDE - scene.y}
    return place[direction] - scene.radius


TRAINED = {  # words for the trained edit, which learned only the first of them
    "colour": "make it {}", "kind": "make it a {}", "background": "make it on a {} background",
}  # fmt: skip


def without(pipeline: Pipeline, attribute: str, count: int, seed: int) -> Iterator[dict]:
    """The same change without inversion, as right and near: a fresh sample of the new prompt, and the trained edit (of
    the 17 frames that fit the window), or for another direction one clip by the trained first-frame task."""
    rng = random.Random(seed)
    for index, scene in enumerate(scenes(count, seed)):
        wanted, source = changed(scene, attribute, rng), drawn([scene])[0]
        fresh = pipeline.text_to_video(prompt(wanted), height=SIDE, width=SIDE, frames=FRAMES, seed=1000 * index)
        if attribute == "direction":
            trained = pipeline.image_to_video(prompt(wanted), source[0], frames=FRAMES, seed=1000 * index)
        else:
            words = TRAINED[attribute].format(getattr(wanted, attribute))
            trained = pipeline.edit(words, source[:17], seed=1000 * index)
        seen = {"fresh": fresh.pixels[0], "trained": trained.pixels[0]}
        yield {name: judged(made, wanted, source, attribute)["met"] for name, made in seen.items()}


def round_trips(pipeline: Pipeline, count: int, seed: int) -> Iterator[dict]:
    """A clip to noise and back, clean, and with guidance 1.5 both ways: pixels that its shape is off."""
    for scene in scenes(count, seed):
        source = drawn([scene])[0]
        for guidance in (0.0, 1.5):
            noise, _ = encode_to_noise(pipeline, source, prompt(scene), guidance=guidance)
            made = _made(pipeline, noise)
            yield {"guidance": guidance, "off": float(way(look(source), look(made)).max())}


def variations(pipeline: Pipeline, count: int, seed: int) -> Iterator[dict]:
    """Noise of a clip, varied: whether the prompt is still met, and how far the shape is off."""
    for index, scene in enumerate(scenes(count, seed)):
        source = drawn([scene])[0]
        noise, _ = encode_to_noise(pipeline, source, prompt(scene), seed=index)
        for strength in STRENGTHS:
            sight = look(_made(pipeline, noise.vary(strength, 500 + index)))
            off = way(look(source), sight)
            yield {"strength": strength, "met": all(verdict(sight, scene).values()), "off": float(np.median(off))}


def interpolations(pipeline: Pipeline, count: int, seed: int) -> Iterator[dict]:
    """Half-way between two clips of one caption, by noise and by latents: whether the caption is met."""
    for index, scene in enumerate(scenes(count, seed)):
        rng = random.Random(seed + index)
        other = next(
            s
            for s in (clips.random_scene(rng, SIDE, SIDE, late=0) for _ in range(10**4))
            if s.direction == scene.direction
        )
        other = replace(other, kind=scene.kind, colour=scene.colour, background=scene.background)
        sources = [drawn([s])[0] for s in (scene, other)]
        one, two = (
            encode_to_noise(pipeline, clip, prompt(scene), seed=10 * index + i)[0] for i, clip in enumerate(sources)
        )
        mixed = _made(pipeline, one.mix(two, 0.5))
        latents = [pipeline.encode_clip(clip) for clip in sources]
        run = decode_from_noise(pipeline, one, keep_text_encoder=True)
        without = torch.cat(list(pipeline.decoded((latents[0] + latents[1]) / 2, run)), 1)[0]
        yield {
            "met": all(verdict(look(mixed), scene).values()),
            "without": all(verdict(look(without), scene).values()),
        }


def _made(pipeline: Pipeline, noise) -> Tensor:
    run = decode_from_noise(pipeline, noise, keep_text_encoder=True)
    return torch.cat(list(pipeline.frames(run)), 1)[0]


def said(met: list[bool]) -> str:
    return "{:.1%} ({:.0%} to {:.0%})".format(sum(met) / len(met), *wilson(sum(met), len(met)))


def measure(pipeline: Pipeline, part: str, count: int) -> tuple[list[dict], list[str]]:
    """A part's rows, and what they come to, in words."""
    if part == "round trip":
        rows = list(round_trips(pipeline, count, SEED))
        words = [
            f"guidance {g:g}: {np.median([r['off'] for r in rows if r['guidance'] == g]):.2f} pixels off (median)"
            for g in (0.0, 1.5)
        ]
    elif part == "variations":
        rows = list(variations(pipeline, count, SEED))
        words = []
        for strength in STRENGTHS:
            own = [r for r in rows if r["strength"] == strength]
            far = np.median([r["off"] for r in own])
            words.append(f"strength {strength:g}: prompt met {said([r['met'] for r in own])}, {far:.1f} pixels off")
    elif part == "interpolation":
        rows = list(interpolations(pipeline, count, SEED))
        words = [f"valid by noise {said([r['met'] for r in rows])}, by latents {said([r['without'] for r in rows])}"]
    elif part == "without the flow":
        rows, words = [], []
        for attribute in REPROMPT:
            own = list(without(pipeline, attribute, count, SEED))
            rows += [{"attribute": attribute, **row} for row in own]
            fresh, trained = (said([row[name] for row in own]) for name in ("fresh", "trained"))
            words.append(f"{attribute}, right and near: fresh sample {fresh}, trained task {trained}")
    else:
        attribute = part.removesuffix(NO_CAPTION)
        rows = list(reprompted(pipeline, attribute, count, SEED, part == attribute, **REPROMPT[attribute]))
        words = [_reprompted(rows)]
        if part == "direction":
            words.append(f"with {ROOM:g} pixels of room to move: {_reprompted([r for r in rows if r['room'] >= ROOM])}")
    return rows, words


def _reprompted(rows: list[dict]) -> str:
    right, met = (said([row[name] for row in rows]) for name in ("right", "met"))
    return f"{len(rows)} clips, right {right}, right and near {met}"


PARTS = ("round trip", "variations", "interpolation", *REPROMPT, f"kind{NO_CAPTION}", "without the flow")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--json", type=Path, help="parts that are in it already stay")
    options = parser.parse_args()
    pipeline, results = load_pipeline(device="cpu"), {}
    if options.json and options.json.exists():
        results = json.loads(options.json.read_text(encoding="utf-8"))["results"]
    for part in options.parts or PARTS:
        began = time.process_time()
        rows, words = measure(pipeline, part, options.clips)
        seconds = (time.process_time() - began) / options.clips
        print(f"{part}: {options.clips} clips, {seconds:.1f} CPU seconds each", *words, sep="\n  ", flush=True)
        results[part] = {"seconds": seconds, "clips": options.clips, "seed": SEED, "words": words, "rows": rows}
        if options.json:
            write_json(options.json, {**machine(), "results": results})


if __name__ == "__main__":
    main()
