"""How fast the flow is inverted, at what error: plain block Jacobi, and ours, of deep and shallow blocks apart.

    python -m benchmarks.solver [--model demo demo-192 mid] [--kind image video] [--seeds 5] [--json PATH]
    python -m benchmarks.solver --table benchmarks/results/solver-*.json
    python -m benchmarks.solver --picture docs/fronts.svg benchmarks/results/solver-*.json

Larger chunks and spans take fewer sweeps and more token evaluations, so neither figure says anything alone: each solver
runs over a range of them, and their fronts are compared. An error is the relative squared error of a part's tokens
against the autoregressive answer: the deep block's from noise, the shallow blocks' from the deep block's exact tokens.
All figures are geometric means over the seeds, whose samples are made one at a time. A threshold is not an error:
both solvers run over a range of thresholds, and what each needs for one and the same error is interpolated between
these (log against log). The baseline's chunks are GROWTH times as large after a clip's first frame, as its
authors' are, or equal. The solvers take turns on one thread, so that whatever else the machine does slows all of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import geometric_mean

import torch
from torch import Tensor

from benchmarks.baseline import GROWTH, Baseline, invert_shallow, iterate_chunks
from benchmarks.cases import CASES, Case, relative_error
from benchmarks.comparison import Row, at_errors, picture, table
from benchmarks.report import machine, write_json
from starflow_core.solve.runs import DeepRun
from starflow_core.solve.sampling import Sampler
from starflow_core.solve.solvers import (
    AUTOREGRESSIVE,
    REACH,
    SolverSettings,
    Statistics,
    Window,
    solve_span,
    solve_tokens,
)

SPANS = (4, 8, 16, 32, 64, 96, 128, 256, 512, 1024)  # of ours, of which far less is evaluated at first
CHUNKS = (4, 8, 16, 24, 32, 48, 64, 96, 128, 256)  # of the baseline
THRESHOLDS = tuple(0.9 * 10 ** (-digits / 2) for digits in range(15))
ERRORS = (2e-3, 1e-4)  # at which the solvers are compared

Solve = Callable[[float], tuple[Tensor, int, int]]  # a threshold -> tokens, sweeps, evaluations


class Problem:
    """A case's sample of one seed, and what is exact of it: the tokens of the deep block, and of the latents."""

    def __init__(self, case: Case, seed: int):
        self.flow, one = case.flow, slice(seed, seed + 1)
        self.noise, self.text, self.kind = case.noise[one], case.text[one], case.kind
        self.grid = self.flow.grid(self.noise)
        self.run = DeepRun(self.flow, self.grid, self.text, case.uncond, case.guidance)
        block = self.flow.deep
        self.z = block.ordered(self.flow.tokens(self.noise)).flatten(1, 2)
        window = self.window()
        for _ in solve_tokens(self.run, window):
            pass
        self.deep = window.x
        self.between = block.ordered(self.deep.unflatten(1, (self.grid.frames, -1)))  # (1, T, N, c), row-major
        self.exact = {"deep": self.deep, "shallow": self._shallow_ours(AUTOREGRESSIVE)[0]}

    def solvers(self) -> Iterator[tuple[str, str, list[int], Solve]]:
        """Part, name, tokens that are solved at once in the first frame and after it, and the solver."""
        tokens, frame = self.z.shape[1], self.grid.frame_tokens
        for span in _distinct(SPANS, REACH * tokens):
            yield "deep", "ours", [span, span], partial(self._deep_ours, span)
        for chunk in _distinct(CHUNKS, tokens):
            for growth in (1, GROWTH) if self.grid.frames > 1 and chunk * GROWTH <= CHUNKS[-1] else (1,):
                yield "deep", "baseline", [chunk, chunk * growth], partial(self._deep_baseline, chunk, growth)
        yield "shallow", "ours", [frame, frame], lambda t: self._shallow_ours(SolverSettings(shallow_tolerance=t))
        for chunk in _distinct(CHUNKS, frame):
            yield "shallow", "baseline", [chunk, chunk], partial(self._shallow_baseline, chunk)

    def window(self) -> Window:
        return Window(self.z, self.grid.frame_tokens, self.grid.width)

    def _deep_ours(self, span: int, threshold: float) -> tuple[Tensor, int, int]:
        window, done = self.window(), Statistics()
        for _ in solve_span(self.run, window, SolverSettings(tolerance=threshold).spanned(span), done):
            pass
        return window.x, done.deep_sweeps, done.deep_evaluations

    def _deep_baseline(self, chunk: int, growth: int, threshold: float) -> tuple[Tensor, int, int]:
        frame = self.grid.frame_tokens if self.kind == "video" else None
        return iterate_chunks(self.run, self.z, Baseline(chunk, threshold), frame, growth)

    def _shallow_ours(self, settings: SolverSettings) -> tuple[Tensor, int, int]:
        sampler = Sampler(self.flow, self.noise, self.text, settings=settings)
        latents = sampler.through_shallow(self.between, 0)
        return latents, sampler.statistics.shallow_sweeps, sampler.statistics.shallow_evaluations

    def _shallow_baseline(self, chunk: int, threshold: float) -> tuple[Tensor, int, int]:
        return invert_shallow(self.flow, self.between, self.grid, Baseline(chunk, threshold))


def _distinct(sizes: Sequence[int], tokens: int) -> list[int]:
    """Without those that do the same as a smaller one, which holds all tokens already."""
    return [size for i, size in enumerate(sizes) if i == 0 or sizes[i - 1] < tokens]


@torch.inference_mode()
def measure(case: Case) -> dict:
    """All solvers on one case, ready for JSON."""
    problems = [Problem(case, seed) for seed in range(len(case.noise))]
    rows = []
    for solvers in zip(*(problem.solvers() for problem in problems), strict=True):
        part, name, tokens, _ = solvers[0]
        exact = [problem.exact[part] for problem in problems]
        for threshold in THRESHOLDS:
            found = [_figures(solve, threshold, answer) for (*_, solve), answer in zip(solvers, exact, strict=True)]
            rows.append(
                Row(part, name, tokens, threshold, *(geometric_mean(values) for values in zip(*found, strict=True)))
            )
            if rows[-1].error < min(ERRORS):
                break
    grid = problems[0].grid
    return {
        "model": case.model,
        "kind": case.kind,
        "tokens": [grid.frames, grid.height, grid.width],
        "seeds": len(problems),
        "rows": [asdict(row) for row in rows],
        "at_equal_error": [asdict(row) for row in at_errors(rows, ERRORS)],
    }


def _figures(solve: Solve, threshold: float, exact: Tensor) -> tuple[float, ...]:
    began = time.process_time()
    tokens, sweeps, evaluations = solve(threshold)
    return relative_error(tokens, exact), sweeps, evaluations, time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--kind", choices=("image", "video"), nargs="+", default=["image", "video"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--table", type=Path, nargs="+", metavar="JSON", help="only print the table of these files")
    parser.add_argument(
        "--picture", type=Path, nargs="+", metavar="FILE", help="only draw, to an SVG, the fronts of JSON"
    )
    arguments = parser.parse_args()
    if arguments.table:
        print(table(read_cases(arguments.table)))
    elif arguments.picture:
        target, *files = arguments.picture
        target.write_text(picture(read_cases(files)))
    else:
        run(arguments)


def read_cases(files: Sequence[Path]) -> list[dict]:
    return [case for path in files for case in json.loads(path.read_text())["cases"]]


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    results = []
    for model in arguments.model:
        for kind in arguments.kind:
            results.append(measure(CASES[model](kind, arguments.seeds, arguments.guidance)))
            print(table(results[-1:]), end="\n\n", flush=True)
            if arguments.json:
                settings = {"guidance": arguments.guidance, "spans": SPANS, "chunks": CHUNKS}
                write_json(arguments.json, {**machine(), "settings": settings, "cases": results})


if __name__ == "__main__":
    main()
