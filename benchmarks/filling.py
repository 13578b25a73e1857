"""How well parts of a clip are filled in, on the demo: `python -m benchmarks.filling [PART ..] [--clips N]`.

half      one half of all frames is masked: left, right, top or bottom
middle    a square in the middle, two thirds of each side
outside   outpainting: a border of a sixth of each side around what is known
missing   frames 9 to 20 of 33

Masked pixels are gone before anything is encoded. A clip counts as right if colour, direction, kind and one connected
shape are as the prompt says, judged by pixels; as near if the shape is within 8 pixels of where it was: in the median
frame of those that show a quarter of it or more, and of missing frames in all. Beside each stands what pasting the
known pixels over a fresh sample of the prompt gives. Settings were tuned on other scenes.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.adherence import prompt, scenes
from benchmarks.flow_features import FRAMES, NEAR, SEED, SIDE, drawn, said, way
from benchmarks.judge import look, verdict
from benchmarks.report import machine, write_json
from benchmarks.surprise import rate
from starflow_core.applications.fill import PARTICLES, composite, fill
from starflow_core.pipeline import Pipeline, load_pipeline

EDGE = SIDE // 6  # a latent cell of the demo
MISSING = slice(9, 21)  # three latent frames
FACTS = ("colour", "direction", "kind", "connected")
VISIBLE = 0.25  # the share of a shape that has to be seen to say where it is

Make = Callable[[Pipeline, Tensor, Tensor, str, int], Tensor]


def mask_of(part: str, rng: random.Random) -> Tensor:
    """True where it is to be filled, (F, H, W)."""
    mask, half = torch.zeros(FRAMES, SIDE, SIDE, dtype=torch.bool), SIDE // 2
    if part == "half":
        side = rng.choice(("left", "right", "top", "bottom"))
        part = mask if side in ("left", "right") else mask.transpose(1, 2)
        part[:, :, slice(0, half) if side in ("left", "top") else slice(half, SIDE)] = True
    elif part == "missing":
        mask[MISSING] = True
    else:
        mask[:, EDGE:-EDGE, EDGE:-EDGE] = True
        mask = ~mask if part == "outside" else mask
    return mask


def filled(pipeline: Pipeline, source: Tensor, mask: Tensor, caption: str, seed: int) -> Tensor:
    return fill(pipeline, source, mask.float(), caption, seed=seed).pixels


def pasted(pipeline: Pipeline, source: Tensor, mask: Tensor, caption: str, seed: int) -> Tensor:
    """Without the method: the known pixels over a fresh sample."""
    job = pipeline.job(height=SIDE, width=SIDE, frames=FRAMES, seed=seed)
    return composite(source, mask, pipeline.generate(caption, job).pixels[0])


def measure(pipeline: Pipeline, part: str, count: int, make: Make) -> list[dict]:
    rng, rows = random.Random(SEED), []
    for index, scene in enumerate(scenes(count, SEED)):
        source, mask = drawn([scene])[0], mask_of(part, rng)
        began = time.process_time()
        made = make(pipeline, torch.where(mask.unsqueeze(1), 0, source), mask, prompt(scene), 1000 * index)
        seconds = time.process_time() - began
        before, after = look(source), look(made)
        met, off = verdict(after, scene), way(before, after)
        judged = mask.flatten(1).all(1).numpy() if part == "missing" else seen(source, mask) >= VISIBLE
        far = None if not judged.any() else float((np.max if part == "missing" else np.median)(off[judged]))
        wrong = [fact for fact in FACTS if not met[fact]]
        rows.append({"clip": index, "wrong": wrong, "off": far, "seconds": seconds})
    return rows


def seen(source: Tensor, mask: Tensor) -> np.ndarray:
    """The share of the shape that isn't masked, in each frame."""
    shape = (source - source[:, :, :1, :1]).abs().sum(1) > 0.3
    return ((shape & ~mask).sum((1, 2)) / shape.sum((1, 2)).clamp(min=1)).numpy()


def summary(rows: list[dict]) -> tuple[dict, str]:
    right, off = [not row["wrong"] for row in rows], [row["off"] for row in rows if row["off"] is not None]
    near, seconds = [far < NEAR for far in off], float(np.mean([row["seconds"] for row in rows]))
    found = {"right": rate(right), "near": rate(near), "off": float(np.median(off)), "seconds": seconds}
    words = (
        f"right {said(right)}, near {said(near)}, {np.median(off):.1f} pixels off (median), {seconds:.1f} CPU seconds"
    )
    return {**found, "rows": rows}, words


PARTS = ("half", "middle", "outside", "missing")
WAYS: dict[str, Make] = {"filled": filled, "pasted": pasted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--clips", type=int, default=48, help="(default: 48)")
    parser.add_argument("--json", type=Path, help="parts of an earlier run that aren't run again stay in it")
    options = parser.parse_args()
    pipeline, results = load_pipeline(device="cpu"), {}
    if options.json and options.json.exists():
        results = json.loads(options.json.read_text())["results"]
    for part in options.parts or PARTS:
        results[part] = {}
        for way_, make in WAYS.items():
            results[part][way_], words = summary(measure(pipeline, part, options.clips, make))
            print(f"{part}, {way_}, {options.clips} clips: {words}", flush=True)
            if options.json:
                write_json(options.json, {**machine(), "seed": SEED, "particles": PARTICLES, "results": results})


if __name__ == "__main__":
    main()
