"""Where the deep block's sweeps go, and how many a better start could save at best.

    python -m benchmarks.sweeps [--json PATH] [--picture docs/sweeps.webp]

The picture has a strip for each case, a row for each sweep and a column for each token: the brighter, the further a
token still is from the autoregressive answer after that sweep (white: as far as itself, dark grey: 1e-6 of it; black:
not evaluated). The oracle lets each token enter at a known relative squared error, in the direction in which its real
start is off: what a draft of that quality would give. What each start needs is interpolated at equal error of the
result, as in benchmarks/solver.py; two seeds, one thread, balanced spans of a CPU.
"""

from __future__ import annotations

import argparse
from contextlib import contextmanager
from pathlib import Path
from statistics import geometric_mean
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor

from benchmarks.cases import CASES, relative_error
from benchmarks.comparison import Row, at_errors
from benchmarks.report import machine, write_json
from benchmarks.solver import ERRORS, THRESHOLDS, Problem
from starflow_core.solve import solvers
from starflow_core.solve.solvers import FEW_EVALUATIONS, PRESETS, Statistics, solve_span

SHOWN = (("demo", "image"), ("demo", "video"), ("mid", "image"))
STARTS = (None, 1.0, 0.3, 0.1, 0.03, 0.01, 0.001)  # squared error of the tokens that enter; None: as they do
DARKEST, FLOOR = 6, 0.15  # digits of an error that are told apart; brightness of the least
WIDTH, HEIGHT = 972, 6  # of a strip, and of a row, in pixels


def errors(found: Tensor, exact: Tensor) -> Tensor:
    """Squared error of each token (n,) relative to the exact ones' mean square."""
    return (found - exact).square().mean((0, 2)) / exact.square().mean()


@contextmanager
def watched(problem: Problem, rows: list[Tensor]):
    """While this lasts, the error of each token after each sweep comes into `rows`, NaN for those not evaluated."""
    sweep = solvers._sweep

    def noted(evaluate, window, start, stop):
        output, change = sweep(evaluate, window, start, stop)
        row = torch.full((problem.z.shape[1],), torch.nan)
        row[start:stop] = errors(output, problem.deep[:, start:stop])
        rows.append(row)
        return output, change

    with patch.object(solvers, "_sweep", noted):
        yield


@contextmanager
def started(problem: Problem, error: float | None, found: list[Tensor]):
    """While this lasts, tokens enter at this error; at what error they would have comes into `found`."""
    warm_start = solvers.warm_start

    def start(window, first, stop):
        warm_start(window, first, stop)
        now = slice(first, stop)
        off = window.x[:, now] - problem.deep[:, now]
        own = errors(window.x[:, now], problem.deep[:, now])
        found.append(own)
        if error is not None and first < stop:
            scale = (error / own.clamp(min=1e-12)).sqrt()[:, None] * (own > 0)[:, None]
            window.x[:, now] = problem.deep[:, now] + scale * off

    with patch.object(solvers, "warm_start", start):
        yield


def solved(problem: Problem, threshold: float) -> tuple[float, Statistics]:
    """The error that remains, and the work."""
    window, done = problem.window(), Statistics()
    for _ in solve_span(problem.run, window, PRESETS["balanced"].with_numbers(tolerance=threshold).spanned(
        FEW_EVALUATIONS), done):  # fmt: skip
        pass
    return relative_error(window.x, problem.deep), done


def oracle(problems: list[Problem], error: float | None) -> dict:
    """Sweeps and evaluations a token at each of `ERRORS`, and the mean error that tokens enter with by themselves."""
    rows, entered = [], []
    for threshold in THRESHOLDS:
        found = []
        for problem in problems:
            with started(problem, error, entered):
                found.append(solved(problem, threshold))
        count = len(found) * problems[0].z.shape[1]
        sweeps, evaluations = (sum(getattr(work, f"deep_{name}") for _, work in found) / count
                               for name in ("sweeps", "evaluations"))  # fmt: skip
        remains = geometric_mean(error for error, _ in found)
        rows.append(Row("deep", "ours", [], threshold, remains, sweeps, evaluations, 1.0))
        if remains < min(ERRORS):
            break
    at = {f"{row.error:g}": [row.sweeps, row.evaluations] for row in at_errors(rows, ERRORS)}
    return {"start": error, "enters_at": float(torch.cat(entered).mean()), "sweeps_and_evaluations": at}


def strip(rows: list[Tensor]) -> Image.Image:
    """A picture of errors (sweeps, tokens)."""
    table = torch.stack(rows)
    digits = (table.clamp(10.0**-DARKEST, 1).log10() + DARKEST) / DARKEST
    shade = torch.where(table.isnan(), 0.0, FLOOR + (1 - FLOOR) * digits)
    return Image.fromarray((255 * shade).to(torch.uint8).numpy()).resize((WIDTH, HEIGHT * len(rows)), 0)


def stacked(strips: list[Image.Image], gap: int = 12) -> Image.Image:
    whole = Image.new("L", (WIDTH, sum(each.height + gap for each in strips) - gap), 128)
    top = 0
    for each in strips:
        whole.paste(each, (0, top))
        top += each.height + gap
    return whole


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--picture", type=Path, help="draw where the sweeps go")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report, strips = [], []
    for model, kind in SHOWN:
        case = CASES[model](kind, 2, 3.0)
        problems = [Problem(case, seed) for seed in range(2)]
        rows: list[Tensor] = []
        with watched(problems[0], rows):
            solved(problems[0], PRESETS["balanced"].tolerance)
        strips.append(strip(rows))
        for error in STARTS:
            report.append({"model": case.model, "kind": kind, **oracle(problems, error)})
            print(report[-1], flush=True)
    if arguments.picture:
        stacked(strips).save(arguments.picture, lossless=True)
    if arguments.json:
        write_json(arguments.json, {**machine(), "span": FEW_EVALUATIONS, "oracle": report})


if __name__ == "__main__":
    main()
