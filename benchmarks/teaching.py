"""Teaches the demo what it doesn't know, from drawn clips, as anybody would: a folder, `train`, a LoRA.

    python -m benchmarks.teaching [--subjects cross diagonal] [--json PATH] [--sheet PATH]

Judged by pixels, on new prompts: what it was taught, before and after, and what it knew. Times are of the process on
all its cores.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import adherence
from benchmarks.judge import look, verdict
from benchmarks.report import machine, write_json
from starflow_core.media import write_video
from starflow_core.pipeline import Pipeline, load_pipeline
from starflow_core.training.demo import clips
from starflow_core.training.processes import Processes
from starflow_core.training.settings import Settings
from starflow_core.training.train import find_sources, train

SIDE, FRAMES, FPS = adherence.SIDE, adherence.FRAMES, 16
CLIPS = 64
KNOWN = ("text", "stills", "first frame", "extend", "edit", "last frame")


@dataclass(frozen=True)
class Subject:
    """What is taught: kinds and motions of the clips, and how the LoRA is trained."""

    kinds: Sequence[str]
    motions: Sequence[str]
    settings: dict


COMMON = {
    "rank": 16, "learning_rate": 1e-2, "held_out": 0.0, "dtype": "bf16", "recompute": False, "frames": 17, "stride": 4,
}  # fmt: skip
SUBJECTS = {
    "cross": Subject(
        clips.NEW_KINDS, tuple(clips.DIRECTIONS),
        COMMON | {"steps": 1600, "batch": 12, "blocks": "all", "rehearsal": 0.5},
    ),
    "diagonal": Subject(clips.KINDS, tuple(clips.DIAGONALS), COMMON | {"steps": 400, "batch": 20}),
}  # fmt: skip


def scene(rng: random.Random, kind: str, motion: str) -> clips.Scene:
    """A shape that moves for at least a second before it halts."""
    radius = rng.uniform(21, 26) if kind in clips.NEW_KINDS else rng.uniform(15, 20)
    reach = radius + clips.MARGIN

    def place(towards: int) -> float:
        if not towards:
            return rng.uniform(reach, SIDE - reach)
        behind = reach + rng.uniform(0, 0.4) * (SIDE - 2 * reach)
        return behind if towards > 0 else SIDE - behind

    x, y = map(place, clips.MOTIONS[motion])
    colour, background = rng.choice(list(clips.COLOURS)), rng.choice(list(clips.BACKGROUNDS))
    return clips.Scene(kind, colour, background, motion, x, y, radius, rng.uniform(0.9, 1.5))


def scenes(subject: Subject, count: int, seed: int) -> list[clips.Scene]:
    """Scenes that go through kinds and motions evenly."""
    rng = random.Random(seed)
    kinds, motions = subject.kinds, subject.motions
    return [scene(rng, kinds[i // len(motions) % len(kinds)], motions[i % len(motions)]) for i in range(count)]


def write_clips(folder: Path, drawn: Sequence[clips.Scene], seed: int) -> None:
    """Clips with their captions beside them."""
    rng = random.Random(seed)
    for number, one in enumerate(drawn):
        path = folder / f"{number:03}.mp4"
        write_video(path, clips.render([one], FRAMES, SIDE, SIDE)[0].transpose(0, 1), FPS)
        path.with_suffix(".txt").write_text(clips.caption(one, rng), encoding="utf-8")


def rehearsed(seed: int, texts: int = 32, edits: int = 48, lasts: int = 16) -> tuple[str, ...]:
    """Captions of what the demo knows, edits, which suffer most, and clips with a last frame."""
    rng = random.Random(seed)

    def captions(number: int) -> list[str]:
        return [clips.caption(clips.random_scene(rng, SIDE, SIDE), rng) for _ in range(number)]

    wishes = [clips.edit_caption(rng.choice(list(clips.COLOURS)), rng) for _ in range(edits)]
    return (*captions(texts), *(f"(v2v) {wish}" for wish in wishes), *(f"(last) {text}" for text in captions(lasts)))


def taught(subject: Subject, folder: Path, **changes) -> Path:
    """The LoRA of a subject, trained from a folder that is drawn first."""
    data = folder / "clips"
    data.mkdir(parents=True)
    write_clips(data, scenes(subject, CLIPS, seed=1), seed=1)
    chosen = subject.settings | {"data": (str(data),), "work": str(folder / "run"), "rehearse": rehearsed(2)}
    settings = Settings(**chosen | changes)
    return train(settings, find_sources(settings), torch.device("cpu"), Processes(), print)


def share_right(
    pipeline: Pipeline, wanted: Sequence[clips.Scene], seed: int, batch: int = 8
) -> tuple[dict[str, float], torch.Tensor]:
    """The shares of clips that show what their prompts say, by what is judged, and of those that show all of it; and
    the first few clips (B, F, 3, H, W)."""
    verdicts, first = [], None
    for i in range(0, len(wanted), batch):
        part = wanted[i : i + batch]
        job = pipeline.job(height=SIDE, width=SIDE, frames=FRAMES, batch=len(part), seed=seed + i)
        pixels = pipeline.generate([adherence.prompt(s) for s in part], job, keep_text_encoder=True).pixels
        first = pixels if first is None else first
        verdicts += [verdict(look(clip), one) for clip, one in zip(pixels, part, strict=True)]
    shares = {name: sum(v[name] for v in verdicts) / len(verdicts) for name in verdicts[0]}
    return shares | {"all": sum(all(v.values()) for v in verdicts) / len(verdicts)}, first


def known(pipeline: Pipeline, prompts: int) -> dict[str, dict[str, float]]:
    """Of each task, the shares as `benchmarks.adherence` has them."""
    return {task: adherence.measure(pipeline, task, prompts, seeds=1)["met"] for task in KNOWN}


def measure(name: str, prompts: int, folder: Path) -> tuple[dict, torch.Tensor]:
    """One subject's figures, and some of its clips."""
    subject = SUBJECTS[name]
    wanted = scenes(subject, prompts, seed=4001)
    base = load_pipeline(device="cpu")
    before = {"new": share_right(base, wanted, seed=5000)[0], "known": known(base, prompts)}
    began, cpu = time.monotonic(), time.process_time()
    lora = taught(subject, folder)
    took = {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - cpu}
    pipeline = load_pipeline(device="cpu", loras=[str(lora)])
    new, shown = share_right(pipeline, wanted, seed=5000)
    after = {"new": new, "known": known(pipeline, prompts)}
    return {"subject": name, "clips": CLIPS, "prompts": prompts, "settings": subject.settings,
            "before": before, "after": after, "bytes": lora.stat().st_size, **took}, shown  # fmt: skip


def largest_loss(row: dict) -> tuple[float, str]:
    """By how much a share of what was known has fallen at most, and which."""
    losses = [
        (share - row["after"]["known"][task][name], f"{task}, {name}")
        for task, shares in row["before"]["known"].items()
        for name, share in shares.items()
    ]
    return max(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path, help="picture of the first clips of the last subject")
    options = parser.parse_args()
    rows = []
    for name in options.subjects:
        with tempfile.TemporaryDirectory() as folder:
            row, shown = measure(name, options.prompts, Path(folder))
        rows.append(row)
        loss, where = largest_loss(row)
        print(f"{name}: right {row['before']['new']['all']:.0%} before, {row['after']['new']['all']:.0%} after; "
              f"known: at most {loss:+.1%} less ({where}); {row['cpu_seconds']:.0f} s of CPU")  # fmt: skip
        print(json.dumps(row["after"]["new"]), flush=True)
        if options.json:
            write_json(options.json, {**machine(), "subjects": rows})
        if options.sheet:
            frames = torch.cat([torch.cat(list(clip[[0, FRAMES // 2, FRAMES - 1]]), -1) for clip in shown], -2)
            write_video(options.sheet, frames[None], 1)


if __name__ == "__main__":
    main()
