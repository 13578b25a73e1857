"""Does the demo model do what its prompts say? Judged by pixels: `python -m benchmarks.adherence`.

Every task is judged on clips that it made from known prompts, and once more against the prompts of
other clips: what a model that ignored its prompts would reach.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.judge import Sight, look, verdict
from benchmarks.report import write_json
from starflow_core.pipeline import Pipeline, load_pipeline
from starflow_core.training.demo import clips
from starflow_core.weights.tensorfiles import DTYPES

SIDE, FRAMES, EDIT_FRAMES = 96, 33, 17
NEAR = 8.0  # pixels between where the last frame was given and where the clip ends
GOALS = {
    "text": {"colour": 0.97, "direction": 0.95, "connected": 0.95, "kind": 0.80},
    "first frame": {"colour": 0.90, "kind": 0.90},
    "edit": {"colour": 0.70, "direction": 0.70},
    "extend": {"colour": 0.70, "kind": 0.70, "direction": 0.70},
    "last frame": {"colour": 0.70, "kind": 0.70, "arrives": 0.70},
}


def scenes(count: int, seed: int, moving: bool = True) -> list[clips.Scene]:
    """Scenes that go through colours, kinds and directions evenly; no motion has halted at the start."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        scene = clips.random_scene(rng, SIDE, SIDE, moving, late=0)
        direction = list(clips.DIRECTIONS)[i % 4] if moving else None
        while moving and scene.direction != direction:
            scene = clips.random_scene(rng, SIDE, SIDE, moving, late=0)
        kind, colour = clips.KINDS[i // 4 % 4], list(clips.COLOURS)[(i + i // 8) % 8]
        made.append(replace(scene, kind=kind, colour=colour))
    return made


def prompt(scene: clips.Scene) -> str:
    """One fixed wording, with the background if there is one."""
    motion = f" moving {scene.direction}" if scene.direction else ""
    article = "an" if scene.colour == "orange" else "a"
    place = f" on a {scene.background} background" if scene.background else ""
    return f"{article} {scene.colour} {scene.kind}{motion}{place}"


Batch = tuple[list[clips.Scene], Tensor]  # what is expected of each clip, and the clips (B, F, 3, H, W)


def text(pipeline: Pipeline, wanted: list[clips.Scene], seed: int, **options) -> Batch:
    return wanted, _run(pipeline, wanted, seed, frames=FRAMES, **options)


def any_background(pipeline: Pipeline, wanted: list[clips.Scene], seed: int, **options) -> Batch:
    """The prompt leaves the background open: the model has to choose one of three."""
    return wanted, _run(pipeline, [replace(s, background=None) for s in wanted], seed, frames=FRAMES, **options)


def stills(pipeline: Pipeline, wanted: list[clips.Scene], seed: int, **options) -> Batch:
    wanted = [replace(s, direction=None) for s in wanted]
    return wanted, _run(pipeline, wanted, seed, frames=1, **options)


def long(pipeline: Pipeline, wanted: list[clips.Scene], seed: int, **options) -> Batch:
    """The last quarter of a clip four times as long; by then the shape has halted at the border."""
    made = _run(pipeline, wanted, seed, frames=4 * (FRAMES - 1) + 1, **options)
    return [replace(s, direction=None) for s in wanted], made[:, -(FRAMES - 1) :]


def first_frame(pipeline: Pipeline, wanted: list[clips.Scene], seed: int, **options) -> Batch:
    images = clips.render(wanted, 1, SIDE, SIDE)[:, :, 0]
    job = pipeline.with_context("first_frame", image=images, frames=FRAMES, batch=len(wanted), seed=seed, **options)
    return wanted, _generate(pipeline, [prompt(s) for s in wanted], job)


def extend(pipeline: Pipeline, wanted: list[clips.Scene], seed: int, **options) -> Batch:
    """Only what was added is judged: a source of 17 frames, slow enough to go on moving."""
    wanted = [replace(s, speed=0.9) for s in wanted]
    source = clips.render(wanted, EDIT_FRAMES, SIDE, SIDE).transpose(1, 2)
    job = pipeline.with_context(
        "extend", clip=source, keep_latents=4, frames=FRAMES, batch=len(wanted), seed=seed, **options
    )
    made = _generate(pipeline, [prompt(s) for s in wanted], job)
    return wanted, made[:, job.context.overlap(pipeline.config.latent) :]


def edit(pipeline: Pipeline, wanted: list[clips.Scene], seed: int, **options) -> Batch:
    """Recolouring: the source has another colour than the one asked for."""
    rng = random.Random(seed)
    sources = [s.recoloured(rng.choice([c for c in clips.COLOURS if c != s.colour])) for s in wanted]
    clip = clips.render(sources, EDIT_FRAMES, SIDE, SIDE).transpose(1, 2)
    job = pipeline.with_context("edit", clip=clip, batch=len(wanted), seed=seed, **options)
    return wanted, _generate(pipeline, [f"make it {s.colour}" for s in wanted], job)


def last_frame(pipeline: Pipeline, wanted: list[clips.Scene], seed: int, **options) -> Batch:
    lasts = clips.render(wanted, FRAMES, SIDE, SIDE)[:, :, -1]
    job = pipeline.with_context("last_frame", last=lasts, frames=FRAMES, batch=len(wanted), seed=seed, **options)
    return wanted, _generate(pipeline, [prompt(s) for s in wanted], job)


TASKS: dict[str, Callable[..., Batch]] = {
    "text": text,
    "any background": any_background,
    "stills": stills,
    "first frame": first_frame,
    "extend": extend,
    "edit": edit,
    "last frame": last_frame,
    "long": long,
}


def _run(pipeline: Pipeline, wanted: list[clips.Scene], seed: int, **options) -> Tensor:
    job = pipeline.job(height=SIDE, width=SIDE, batch=len(wanted), seed=seed, **options)
    return _generate(pipeline, [prompt(s) for s in wanted], job)


def _generate(pipeline: Pipeline, captions: list[str], job) -> Tensor:
    return pipeline.generate(captions, job, keep_text_encoder=True).pixels


def judged(task: str, sight: Sight, scene: clips.Scene) -> dict[str, bool]:
    met = verdict(sight, scene)
    if task in ("edit", "any background"):
        del met["background"]  # the prompt doesn't say it
    if task == "long":
        del met["direction"]
    if task == "last frame":
        end = clips.render([scene], FRAMES, SIDE, SIDE)[0, :, -1:].transpose(0, 1)
        met["arrives"] = bool(np.linalg.norm(look(end).path[-1] - sight.path[-1]) < NEAR)
    return met


def measure(pipeline: Pipeline, task: str, count: int, seeds: int, batch: int = 8, **options) -> dict:
    """Shares of clips that meet each expectation, and the same against other clips' prompts."""
    wanted = scenes(count, seed=17)
    sights, expected = [], []
    for seed in range(seeds):
        for i in range(0, count, batch):
            part, pixels = TASKS[task](pipeline, wanted[i : i + batch], 1000 * seed + i, **options)
            sights += [look(clip) for clip in pixels]
            expected += part
    order = list(range(len(expected)))
    random.Random(0).shuffle(order)
    return {
        "clips": len(sights),
        "met": _shares([judged(task, s, e) for s, e in zip(sights, expected, strict=True)]),
        "shuffled": _shares([judged(task, s, expected[j]) for s, j in zip(sights, order, strict=True)]),
    }


def _shares(verdicts: list[dict[str, bool]]) -> dict[str, float]:
    return {name: float(np.mean([v[name] for v in verdicts])) for name in verdicts[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--int8", action="store_true", help="weights of flow and text encoder in 8 bit")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="type that all parts compute in")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pipeline, results = load_pipeline(quantise=options.int8, dtype=DTYPES[options.dtype]), {}
    settings = {} if options.guidance is None else {"guidance": options.guidance}
    for task in options.tasks:
        began = time.monotonic()
        results[task] = measure(pipeline, task, options.prompts, options.seeds, **settings)
        results[task]["seconds"] = round(time.monotonic() - began, 1)
        print(f"\n{task}: {results[task]['clips']} clips, {results[task]['seconds']} s", flush=True)
        for name, share in results[task]["met"].items():
            goal = GOALS.get(task, {}).get(name)
            target = f"   goal {goal:.0%}" if goal else ""
            print(f"  {name:12} {share:6.1%}   shuffled {results[task]['shuffled'][name]:6.1%}{target}", flush=True)
    if options.json:
        weights = "int8" if options.int8 else str(pipeline.dtype).removeprefix("torch.")
        report = {"torch": torch.__version__, "weights": weights, "settings": settings, "results": results}
        write_json(options.json, report)


if __name__ == "__main__":
    main()
