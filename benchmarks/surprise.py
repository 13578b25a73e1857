"""What the demo's likelihood is good for: `python -m benchmarks.surprise`. Every clip is judged from its pixels.

captions   which of 128 captions (all colours, kinds and directions, background left open) fits a drawn clip
changes    clips in which something happens that shouldn't, told from normal ones by their largest surprise
best       prompts that leave the background open, and the likeliest of 1, 4 and 8 results

Seeds and scenes are others than those that the settings were chosen on.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import adherence, changes
from benchmarks.judge import look
from benchmarks.report import machine, write_json
from starflow_core.applications.inversion import measure
from starflow_core.applications.likelihood import JUDGED, choose_caption, judging_job
from starflow_core.jobs.noises import inverted
from starflow_core.pipeline import Pipeline, load_pipeline
from starflow_core.training.demo import clips

SIDE, FRAMES = changes.SIDE, changes.FRAMES
RESULTS = Path(__file__).parent / "results" / "surprise.json"
SIZES = (1, 4, 8)  # of how many the best is kept
MOST = SIZES[-1]


def wilson(hits: int, cases: int) -> list[float]:
    """The 95% interval of a share."""
    z, share = 1.96, hits / cases
    middle = (share + z * z / (2 * cases)) / (1 + z * z / cases)
    half = z / (1 + z * z / cases) * (share * (1 - share) / cases + z * z / (4 * cases * cases)) ** 0.5
    return [max(0.0, middle - half), min(1.0, middle + half)]


def rate(hits: list[bool]) -> dict:
    """A share with its interval."""
    return {"share": float(np.mean(hits)), "interval": wilson(sum(hits), len(hits)), "cases": len(hits)}


def area(found: np.ndarray, normal: np.ndarray) -> float:
    """Area under the curve: how often a score (n,) is above one of normal clips (m,)."""
    difference = found[:, None] - normal[None]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def area_interval(found: np.ndarray, normal: np.ndarray, rounds: int = 1000) -> list[float]:
    """Its 95% interval, by the bootstrap over both kinds of clips."""
    rng = np.random.default_rng(0)
    drawn = [area(rng.choice(found, len(found)), rng.choice(normal, len(normal))) for _ in range(rounds)]
    return [float(q) for q in np.quantile(drawn, (0.025, 0.975))]


# Which caption fits


def captions(pipeline: Pipeline, count: int, seed: int) -> dict:
    wanted = adherence.scenes(count, seed=seed)
    some = {
        adherence.prompt(replace(wanted[0], colour=colour, kind=kind, direction=direction, background=None))
        for colour, kind, direction in product(clips.COLOURS, clips.KINDS, clips.DIRECTIONS)
    }
    right, distances, seconds = [], [], time.process_time()
    for scene in wanted:
        pixels = clips.render([scene], FRAMES, SIDE, SIDE)[0].transpose(0, 1)
        found = choose_caption(pipeline, pixels, sorted(some))
        right.append(found.captions[found.winner] == adherence.prompt(replace(scene, background=None)))
        distances.append(found.distance)
    quantiles = [float(q) for q in np.quantile(distances, (0, 0.5, 1))]
    seconds = (time.process_time() - seconds) / count
    return {"captions": len(some), "right": rate(right), "distance": quantiles, "cpu_seconds": round(seconds, 2)}


# What doesn't belong


def token_score(surprise: Tensor) -> float:
    """The largest surprise of a token after the first frame, where much has to be guessed."""
    return float(surprise[1:].max())


def frame_score(surprise: Tensor) -> float:
    """The same of whole latent frames."""
    return float(surprise[1:].sum(1).max())


def named_frame(surprise: Tensor) -> int:
    return 1 + int(surprise[1:].sum(1).argmax())


def latent_frame(frame: int) -> int:
    return (frame + 3) // 4


def surprises(pipeline: Pipeline, make, name: str, count: int, seed: int) -> list[tuple[Tensor, int | None]]:
    """Each clip's surprise (T, N) under the empty prompt, and when it changes."""
    rng = random.Random(f"{seed} {name}")
    made = [make(rng) for _ in range(count)]
    return [(measure(pipeline, clip.pixels)[0].surprise[0], clip.frame) for clip in made]


def compared(found: list[tuple[Tensor, int | None]], normal: list[tuple[Tensor, int | None]], dated: bool) -> dict:
    report = {"cases": len(found)}
    for name, score in (("frame", frame_score), ("token", token_score)):
        some, others = (np.array([score(surprise) for surprise, _ in each]) for each in (found, normal))
        report[f"area_by_{name}"] = {"area": area(some, others), "interval": area_interval(some, others)}
    if dated:
        off = [named_frame(surprise) - latent_frame(frame) for surprise, frame in found]
        report["frame_named"] = rate([o == 0 for o in off])
        report["within_one"] = rate([abs(o) <= 1 for o in off])
    return report


def all_changes(pipeline: Pipeline, count: int, seed: int) -> dict:
    normal = surprises(pipeline, changes.normal, "normal", count, seed)
    results = {}
    for name, make in changes.KINDS.items():
        found = surprises(pipeline, make, name, count, seed)
        results[name] = compared(found, normal, dated=name != "textured background")
        print(change_row(name, results[name]), flush=True)
    return results


# Best of N


def best(pipeline: Pipeline, count: int, seed: int) -> dict:
    """Eight results of each prompt; the first 1, 4 and 8 of them, and the last 4, are chosen from."""
    wanted, valid, scores = adherence.scenes(count, seed=seed), [], {}
    for index, scene in enumerate(wanted):
        caption = adherence.prompt(replace(scene, background=None))
        job = pipeline.job(height=SIDE, width=SIDE, frames=FRAMES, batch=MOST, seed=1000 * seed + MOST * index)
        output = pipeline.generate([caption] * MOST, job, keep_text_encoder=True)
        valid.append([all(adherence.judged("any background", look(clip), scene).values()) for clip in output.pixels])
        judging = judging_job(pipeline.config, job, output.latents.shape[2])
        for name, prompt in (("own", caption), ("empty", "")):
            text, _, _ = pipeline.encode_text([prompt], "", judging, keep_encoder=True)
            frames = inverted(pipeline.flow, judging, output.latents, text).surprise.sum(2)
            scores.setdefault(f"beginning_{name}_prompt", []).append((-frames[:, :JUDGED].sum(1)).tolist())
            scores.setdefault(f"whole_{name}_prompt", []).append((-frames.sum(1)).tolist())
    report = {"1": {"fails": rate([not v for each in valid for v in each])}}
    for size in SIZES[1:]:
        report[str(size)] = {f"fails_by_{name}": rate(_failures(valid, each, size)) for name, each in scores.items()}
    return {**report, "valid": valid, "log_likelihoods": scores}


def _failures(valid: list[list[bool]], scores: list[list[float]], size: int) -> list[bool]:
    """Whether the likeliest of so many fails, over disjoint groups of the candidates."""
    failures = []
    for good, score in zip(valid, scores, strict=True):
        for first in range(0, MOST, size):
            group = range(first, first + size)
            failures.append(not good[max(group, key=score.__getitem__)])
    return failures


# The table


def percent(found: dict) -> str:
    low, high = found["interval"]
    return f"{found['share']:6.1%} ({low:.1%} to {high:.1%}, {found['cases']} cases)"


def change_row(name: str, found: dict) -> str:
    areas = [found[f"area_by_{by}"] for by in ("frame", "token")]
    text = "   ".join(f"{a['area']:.3f} ({a['interval'][0]:.3f} to {a['interval'][1]:.3f})" for a in areas)
    frames = [f"{found[key]['share']:4.0%}" for key in ("frame_named", "within_one") if key in found]
    return f"{name:20} {text}   {' '.join(frames)}"


def table(results: dict) -> str:
    lines = []
    if "captions" in results:
        found = results["captions"]
        low, middle, high = found["distance"]
        text = f"{low:.1f} to {high:.0f}"
        lines += [f"caption, of {found['captions']}: right in {percent(found['right'])}",
                  f"  ahead by {middle:.0f} nats ({text}), {found['cpu_seconds']} CPU s a clip"]  # fmt: skip
    if "changes" in results:
        lines.append("change: area by frame, by token; frame named, within one")
        lines += [change_row(name, results["changes"][name]) for name in changes.KINDS]
    for size in SIZES if "best" in results else ():
        shares = results["best"][str(size)].items()
        lines += [f"best of {size}, {name.replace('_', ' ')}: {percent(share)}" for name, share in shares]
    return "\n".join(lines)


PARTS = {"captions": captions, "changes": all_changes, "best": best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--count", type=int, default=48, help="clips of each kind, or prompts (default: 48)")
    parser.add_argument("--seed", type=int, default=41)
    parser.add_argument("--json", type=Path, default=RESULTS, help="parts that aren't run stay as they are there")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    if not options.table:
        run(options)
    print(table(json.loads(options.json.read_text())))


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    pipeline = load_pipeline()
    for part in options.parts:
        found = PARTS[part](pipeline, options.count, options.seed)
        results = json.loads(options.json.read_text()) if options.json.exists() else {}
        write_json(options.json, {**results, part: {**machine(), "seed": options.seed, **found}})


if __name__ == "__main__":
    main()
