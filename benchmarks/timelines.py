"""Prompts that change in a clip, on the demo, judged by pixels: `python -m benchmarks.timelines [PART ..] [--clips N]`.

Clips of 49 frames whose prompt changes after one second, in one attribute. A new direction is judged from the change
on; the other attributes from half a second later, since the frames in between show one picture on its way to another.
`colour unchanged` is the same with the kept frames left as they were. `loop` gives one picture as first and last frame,
and measures how far the last frame's shape is from the first one's; `no loop` gives the first frame alone. `loop by
filling in` fills what is missing between the picture and itself, held for the last latent frame, and measures how far
the shape jumps where the two meet. Shares come with their 95 % interval (Wilson).
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

from benchmarks.adherence import prompt, scenes
from benchmarks.flow_features import changed, said
from benchmarks.judge import look, verdict
from benchmarks.report import machine, write_json
from starflow_core.applications.fill import fill
from starflow_core.jobs.tasks import layout
from starflow_core.jobs.timeline import Timeline
from starflow_core.pipeline import Pipeline, load_pipeline
from starflow_core.training.demo import clips

SIDE, FRAMES, LOOP = 96, 49, 33
CHANGE = 1.0  # seconds
ON_THE_WAY = 8  # frames after the change that show no one attribute
ROOM = 16.0  # pixels that a shape has in its new direction
NEAR = 8.0  # pixels between the shapes of the first and the last frame of a loop
SEED = 4001  # of the reported scenes
ATTRIBUTES = ("direction", "kind", "colour", "background")
UNCHANGED = " unchanged"
LOOPS = {"loop": "last_frame", "no loop": "first_frame"}
FILLED = "loop by filling in"
PARTS = (*ATTRIBUTES, *(attribute + UNCHANGED for attribute in ATTRIBUTES), *LOOPS, FILLED)


def wish(scene: clips.Scene, attribute: str, rng: random.Random) -> clips.Scene:
    """What the second prompt says: one attribute is another. A new direction has room where the shape is by then."""
    if attribute != "direction":
        return changed(scene, attribute, rng)
    x, y = clips.centres(scene, torch.tensor([CHANGE * 16]), SIDE, SIDE)[0].tolist()
    reach = scene.radius + clips.MARGIN
    rooms = {"left": x - reach, "right": SIDE - reach - x, "up": y - reach, "down": SIDE - reach - y}
    free = [name for name, room in rooms.items() if name != scene.direction and room >= ROOM]
    return replace(scene, direction=rng.choice(free or [max(rooms, key=rooms.get)]))


def changes(
    pipeline: Pipeline, attribute: str, count: int, seed: int, change_kept: bool, batch: int = 8, **settings
) -> Iterator[dict]:  # fmt: skip
    """Whether clips show the attribute that the second prompt asks for, in one connected shape, and the first one's
    before; and pixels that the shape goes between the frames around the change."""
    rng, wanted = random.Random(seed), scenes(count, seed)
    for first in range(0, count, batch):
        before = wanted[first : first + batch]
        after = [wish(scene, attribute, rng) for scene in before]
        job = pipeline.job(
            height=SIDE, width=SIDE, frames=FRAMES, batch=len(before), seed=1000 + first,
            change_kept=change_kept, **settings,
        )  # fmt: skip
        lines = [Timeline((prompt(a), prompt(b)), (0.0, CHANGE)) for a, b in zip(before, after, strict=True)]
        made = pipeline.generate(lines, job, keep_text_encoder=True).pixels
        begin = pipeline.config.latent.first_frame(layout(pipeline.config, replace(job, changes=(CHANGE,))).starts[1])
        judged = begin if attribute == "direction" else begin + ON_THE_WAY
        for clip, was, now in zip(made, before, after, strict=True):
            met, path = verdict(look(clip[judged:]), now), look(clip).path
            earlier = verdict(look(clip[:begin]), was)
            yield {
                "right": met[attribute] and met["connected"],
                "before": earlier[attribute] and earlier["connected"],
                "others": all(met[name] for name in ATTRIBUTES if name not in (attribute, "direction")),
                "step": float(np.nan_to_num(np.linalg.norm(path[begin] - path[begin - 1]), nan=np.inf)),
            }


def loops(pipeline: Pipeline, count: int, seed: int, task: str, batch: int = 8) -> Iterator[dict]:
    """Clips that begin with a picture, and for `last_frame` shall end with it, too: pixels between the shapes of the
    first and the last frame, and how far it was away at most."""
    wanted = scenes(count, seed)
    for first in range(0, count, batch):
        part = wanted[first : first + batch]
        images = clips.render(part, 1, SIDE, SIDE)[:, :, 0]
        given = {"last": images} if task == "last_frame" else {}
        job = pipeline.with_context(
            task, image=images, frames=LOOP, batch=len(part), seed=1000 + first, height=SIDE, width=SIDE, **given
        )
        captions = [prompt(scene) for scene in part]
        for clip in pipeline.generate(captions, job, keep_text_encoder=True).pixels:
            path = look(clip).path
            off = np.nan_to_num(np.linalg.norm(path - path[0], axis=1), nan=np.inf)
            yield {"off": float(off[-1]), "furthest": float(off.max()), "met": bool(off[-1] < NEAR)}


def filled_loops(pipeline: Pipeline, count: int, seed: int) -> Iterator[dict]:
    """As `loops`, but `off` is what the shape goes from the last filled frame to the first one that is given again."""
    end = LOOP - pipeline.config.latent.temporal
    mask = torch.zeros(LOOP, SIDE, SIDE)
    mask[1:end] = 1
    for index, scene in enumerate(scenes(count, seed)):
        source = clips.render([scene], 1, SIDE, SIDE)[0].transpose(0, 1).expand(LOOP, -1, -1, -1)
        path = look(fill(pipeline, source, mask, prompt(scene), seed=1000 + index).pixels).path
        off = np.nan_to_num(np.linalg.norm(path - path[0], axis=1), nan=np.inf)
        jump = float(np.nan_to_num(np.linalg.norm(path[end] - path[end - 1]), nan=np.inf))
        yield {"off": jump, "furthest": float(off.max()), "met": jump < NEAR}


def measure(pipeline: Pipeline, part: str, count: int, seed: int, **settings) -> tuple[list[dict], list[str]]:
    """A part's rows, and what they come to, in words."""
    if part in (*LOOPS, FILLED):
        rows = list(
            filled_loops(pipeline, count, seed) if part == FILLED else loops(pipeline, count, seed, LOOPS[part])
        )
        off, far = (np.median([row[key] for row in rows]) for key in ("off", "furthest"))
        met = said([row["met"] for row in rows])
        return rows, [f"within {NEAR:g} pixels {met}, {off:.1f} off (median), {far:.1f} at most on the way"]
    rows = list(changes(pipeline, part.removesuffix(UNCHANGED), count, seed, not part.endswith(UNCHANGED), **settings))
    shares = {name: said([row[name] for row in rows]) for name in ("right", "others", "before")}
    step = np.median([row["step"] for row in rows])
    return rows, [
        f"right {shares['right']}, the other attributes {shares['others']}, before the change {shares['before']}",
        f"the shape goes {step:.1f} pixels at the change (median)",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--seed", type=int, default=SEED, help="of the scenes")
    parser.add_argument("--guidance", type=float, help="(default: the model's own)")
    parser.add_argument("--json", type=Path, help="parts that are in it already stay")
    options = parser.parse_args()
    pipeline, results = load_pipeline(device="cpu"), {}
    settings = {} if options.guidance is None else {"guidance": options.guidance}
    if options.json and options.json.exists():
        results = json.loads(options.json.read_text(encoding="utf-8"))["results"]
    for part in options.parts or PARTS:
        began = time.process_time()
        rows, words = measure(pipeline, part, options.clips, options.seed, **settings)
        seconds = (time.process_time() - began) / len(rows)
        print(f"{part}: {options.clips} clips, {seconds:.1f} CPU seconds each", *words, sep="\n  ", flush=True)
        of = {"clips": options.clips, "seed": options.seed, **settings}
        results[part] = {"seconds": seconds, **of, "words": words, "rows": rows}
        if options.json:
            write_json(options.json, {**machine(), "results": results})


if __name__ == "__main__":
    main()
