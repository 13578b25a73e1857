"""What the solvers cost, how they compare at equal error, and the tables that say so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

from benchmarks.convert_memory import MB

COSTS = {
    "deep_sweeps": "deep sweeps",
    "deep_evaluations": "deep evaluations",
    "shallow_sweeps": "shallow sweeps",
    "shallow_evaluations": "shallow evaluations",
    "cpu_seconds": "CPU seconds",
    "seconds": "wall seconds",
}
AUTHORS_CHUNK = {"image": 16, "video": 32}
AUTHORS, BEST, COLUMN = "the authors'", "least CPU seconds", "least in each column"  # chunks to compare with


@dataclass(frozen=True)
class Row:
    """What one sample takes by one solver at one tolerance, and the error that remains.

    `spans` are the tokens that it solves at once: the baseline's "chunk", or our spans.
    """

    solver: str
    spans: dict[str, int]
    tolerance: float
    error: float
    deep_sweeps: float
    deep_evaluations: float
    shallow_sweeps: float
    shallow_evaluations: float
    cpu_seconds: float
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """The baseline's costs over ours at equal error, by `COSTS` (above 1: ours needs less, below 1: more), and the
    baseline's chunk in each."""

    error: float
    chosen: str
    chunks: dict[str, int]
    times: dict[str, float]


def at_errors(rows: Sequence[Row], errors: Sequence[float]) -> list[Row]:
    """What each solver needs with each choice of its spans to reach each error. What doesn't reach it is left out."""
    curves = {}
    for row in rows:
        curves.setdefault((row.solver, *row.spans.items()), []).append(row)
    found = [at_error(curve, error) for error in errors for curve in curves.values()]
    return [row for row in found if row]


def at_error(curve: Sequence[Row], error: float) -> Row | None:
    """What it takes to keep the error below `error`, interpolated from rows that differ in tolerance alone; None
    outside their range."""
    curve = sorted(curve, key=lambda row: -row.tolerance)
    above = [i for i, row in enumerate(curve) if row.error > error]
    if not above or above[-1] + 1 == len(curve):
        return None
    loose, tight = curve[above[-1]], curve[above[-1] + 1]
    share = math.log(loose.error / error) / math.log(loose.error / tight.error)
    between = {
        name: getattr(loose, name) ** (1 - share) * getattr(tight, name) ** share for name in ("tolerance", *COSTS)
    }
    return replace(loose, error=error, **between)


def compare(rows: Sequence[Row], kind: str) -> list[Comparison]:
    """Ours against the baseline at each error at which `rows` are, for each way to choose the baseline's chunk."""
    found = []
    for ours in (row for row in rows if row.solver == "ours"):
        baselines = [row for row in rows if row.solver == "baseline" and row.error == ours.error]
        for chosen, theirs in choices(baselines, kind).items():
            chunks = {cost: row.spans["chunk"] for cost, row in theirs.items()}
            times = {cost: getattr(row, cost) / getattr(ours, cost) for cost, row in theirs.items()}
            found.append(Comparison(ours.error, chosen, chunks, times))
    return found


def choices(baselines: Sequence[Row], kind: str) -> dict[str, dict[str, Row]]:
    """The baselines that ours is compared with, by `COSTS`: one chunk for all of them, or (COLUMN) the best chunk for
    each, which no single chunk equals."""
    if not baselines:
        return {}
    least = {cost: min(baselines, key=attrgetter(cost)) for cost in COSTS}
    one = [(AUTHORS, row) for row in baselines if row.spans["chunk"] == AUTHORS_CHUNK[kind]]
    one.append((BEST, least["cpu_seconds"]))
    return {chosen: dict.fromkeys(COSTS, row) for chosen, row in one} | {COLUMN: least}


def case_text(case: dict) -> str:
    """What each solver costs, for a terminal."""
    lines = [case_name(case), _line("", "tolerance", "error", COSTS.values())]
    presets = [(f"ours, {name}", row) for name, row in case["presets"].items()]
    equal = [(f"{row['solver']} {row['spans'].get('chunk', '')}", row) for row in case["at_equal_error"]]
    for name, row in [("autoregressive", case["autoregressive"]), *presets, *equal]:
        costs = (f"{row[cost]:.{2 if 'seconds' in cost else 1}f}" for cost in COSTS)
        lines.append(_line(name, f"{row['tolerance']:.0e}", f"{row['error']:.0e}", costs))
    if "peak_bytes" in case:
        peaks = ", ".join(f"{solver} {peak / MB:.1f}" for solver, peak in case["peak_bytes"].items())
        lines.append(f"  peak memory in MB: {peaks}")
    return "\n".join(lines)


def _line(name: str, tolerance: str, error: str, costs: Sequence[str]) -> str:
    cells = (f"{cost:>{len(heading)}}" for cost, heading in zip(costs, COSTS.values(), strict=True))
    return "  ".join((f"  {name:20} {tolerance:>9} {error:>6}", *cells))


def case_name(case: dict) -> str:
    frames, height, width = case["tokens"]
    tokens = f"{height * width} tokens" if frames == 1 else f"{frames} frames of {height * width} tokens"
    return f"{case['model']}, {case['kind']}, {tokens}"


def tables(cases: Sequence[dict]) -> str:
    """The README's: one chunk a line, then the best chunk for each column, in brackets."""
    return f"{markdown(cases, (AUTHORS, BEST))}\n\n{markdown(cases, (COLUMN,))}"


def markdown(cases: Sequence[dict], chosen: Sequence[str]) -> str:
    """One line for each case, error, and choice of the baseline's chunk."""
    heading = ["model", "error", "baseline's chunk", *COSTS.values()]
    lines, last = [heading, ["---"] * len(heading)], None
    for case in sorted(cases, key=lambda case: (case["tokens"][1:], case["model"], -case["tokens"][0])):
        for comparison in (Comparison(**found) for found in case["comparisons"]):
            if comparison.chosen in chosen:
                place = case_name(case), f"{comparison.error:.0e}".replace("e-0", "e-")
                lines.append([*_news(place, last), *_cells(comparison)])
                last = place
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _news(place: tuple[str, str], last: tuple[str, str] | None) -> tuple[str, str]:
    """Model and error, left out where they are those of the line above."""
    if last is None or place[0] != last[0]:
        return place
    return "", "" if place == last else place[1]


def _cells(comparison: Comparison) -> list[str]:
    """The chunk and the ratios; those where ours needs more are bold."""
    times = {cost: f"{ratio:.2f}" for cost, ratio in comparison.times.items()}
    times = {cost: f"**{text}**" if float(text) < 1 else text for cost, text in times.items()}
    if comparison.chosen == COLUMN:
        return [COLUMN, *(f"{times[cost]} ({comparison.chunks[cost]})" for cost in COSTS)]
    chunk = min(comparison.chunks.values())
    return [f"{chunk}, {comparison.chosen}", *(times[cost] for cost in COSTS)]
