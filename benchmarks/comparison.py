"""The solvers' fronts of sweeps against token evaluations, at equal error: a table and a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

COSTS = ("sweeps", "evaluations", "cpu_seconds")
PARTS = ("deep", "shallow")
COLUMNS, WIDE, HIGH, MARGIN, TOP, FOOT = 3, 250, 190, 42, 44, 70  # panels, their size and what is around, in pixels
COLOURS = {"baseline": "#b35900", "ours": "#0060a8"}


@dataclass(frozen=True)
class Row:
    """What a part of a sample takes by one solver at one tolerance, and the error that remains. `tokens` are solved at
    once: in the first frame, and after it."""

    part: str
    solver: str
    tokens: list[int]
    tolerance: float
    error: float
    sweeps: float
    evaluations: float
    cpu_seconds: float


def at_errors(rows: Sequence[Row], errors: Sequence[float]) -> list[Row]:
    """What each solver needs with each choice of its tokens to reach each error. What doesn't reach it is left out."""
    curves = {}
    for row in rows:
        curves.setdefault((row.part, row.solver, *row.tokens), []).append(row)
    found = [at_error(curve, error) for error in errors for curve in curves.values()]
    return [row for row in found if row]


def at_error(curve: Sequence[Row], error: float) -> Row | None:
    """What it takes to keep the error below `error`, interpolated from rows that differ in tolerance alone; None
    where none does. What the loosest needs, if it is near enough already."""
    curve = sorted(curve, key=lambda row: -row.tolerance)
    above = [i for i, row in enumerate(curve) if row.error > error]
    if not above:
        return replace(curve[0], error=error)
    if above[-1] + 1 == len(curve):
        return None
    loose, tight = curve[above[-1]], curve[above[-1] + 1]
    share = math.log(loose.error / error) / math.log(loose.error / tight.error)
    between = {name: _between(getattr(loose, name), getattr(tight, name), share) for name in ("tolerance", *COSTS)}
    return replace(loose, error=error, **between)


def front(rows: Iterable[Row]) -> list[Row]:
    """Those of which no other one takes both fewer sweeps and fewer evaluations, by rising sweeps."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.sweeps, row.evaluations)):
        if not found or row.evaluations < found[-1].evaluations:
            found.append(row)
    return found


def evaluations_at(points: Sequence[Row], sweeps: float) -> float | None:
    """What a front takes in evaluations with so many sweeps (log against log); None with fewer than it can do with."""
    if sweeps < points[0].sweeps:
        return None
    for few, many in pairwise(points):
        if sweeps <= many.sweeps:
            share = math.log(sweeps / few.sweeps) / math.log(many.sweeps / few.sweeps)
            return _between(few.evaluations, many.evaluations, share)
    return points[-1].evaluations


def gains(ours: Sequence[Row], theirs: Sequence[Row]) -> list[float]:
    """Their evaluations over ours at the sweeps of each of our front's points, where theirs gets along with so few."""
    found = [(row.evaluations, evaluations_at(theirs, row.sweeps)) for row in ours]
    return [their / own for own, their in found if their]


def _between(a: float, b: float, share: float) -> float:
    return a ** (1 - share) * b**share


def choices(case: dict, part: str, error: float) -> dict[str, list[Row]]:
    """What each solver needs with each choice of its tokens."""
    rows = [row for row in (Row(**found) for found in case["at_equal_error"]) if (row.part, row.error) == (part, error)]
    return {name: [row for row in rows if row.solver == name] for name in COLOURS}


def table(cases: Sequence[dict]) -> str:
    """The README's: at each error what the baseline takes over what we take, below 1 in **bold**."""
    heading = ["model", "part", "error", "evaluations at equal sweeps, least to most (median)", "least evaluations",
               "least sweeps", "least CPU seconds"]  # fmt: skip
    lines = [heading, ["---"] * len(heading)]
    for case in cases:
        for part in PARTS:
            lines += [
                [case_name(case), part, _power(error), *cells]
                for error in sorted({row["error"] for row in case["at_equal_error"]}, reverse=True)
                if (cells := _cells(case, part, error))
            ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(case: dict, part: str, error: float) -> list[str]:
    both = choices(case, part, error)
    ours, theirs = both["ours"], both["baseline"]
    if not ours or not theirs:
        return []
    equal = gains(front(ours), front(theirs))
    span = "none of theirs has so few"
    if equal:
        few, most = min(equal), max(equal)
        span = _ratio(few) if len(equal) == 1 else f"{_ratio(few)} to {_ratio(most)} ({_ratio(median(equal))})"
    order = ("evaluations", "sweeps", "cpu_seconds")
    least = [[min(getattr(row, cost) for row in rows) for cost in order] for rows in (ours, theirs)]
    return [span, *(_ratio(their / own) for own, their in zip(*least, strict=True))]


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.995 else f"**{value:.2f}**"


def _power(error: float) -> str:
    return f"{error:.0e}".replace("e-0", "e-")


def case_name(case: dict) -> str:
    frames, height, width = case["tokens"]
    tokens = f"{height * width} tokens" if frames == 1 else f"{frames} frames of {height * width} tokens"
    return f"{case['model']}, {case['kind']}, {tokens}"


def picture(cases: Sequence[dict], error: float = 2e-3) -> str:
    """An SVG: COLUMNS cases side by side, the deep block above the shallow ones; sweeps to the right, evaluations
    upwards, both for each token and on logarithmic axes. Each point is a chunk or a span."""
    panels = []
    for i, case in enumerate(cases):
        for j, part in enumerate(PARTS):
            x, y = i % COLUMNS, i // COLUMNS * len(PARTS) + j
            place = f"translate({MARGIN + x * (WIDE + MARGIN)},{TOP + y * (HIGH + FOOT)})"
            panels.append(f'<g transform="{place}">{_panel(case, part, error)}</g>')
    rows = math.ceil(len(cases) / COLUMNS) * len(PARTS)
    width, height = MARGIN + min(len(cases), COLUMNS) * (WIDE + MARGIN), TOP + rows * (HIGH + FOOT)
    keys = "".join(
        f'<circle cx="{MARGIN + 4 + 190 * i}" cy="10" r="4" fill="{colour}"/>'
        f'<text x="{MARGIN + 14 + 190 * i}" y="14">{"plain block Jacobi" if name == "baseline" else "ours"}</text>'
        for i, (name, colour) in enumerate(COLOURS.items())
    )
    keys += f'<text x="{MARGIN + 400}" y="14">upwards: evaluations a token</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11"><rect width="{width}" height="{height}" fill="white"/>{keys}{"".join(panels)}</svg>\n'
    )


def _panel(case: dict, part: str, error: float) -> str:
    frames, height, width = case["tokens"]
    tokens, both = frames * height * width, choices(case, part, error)
    points = {
        name: [(math.log10(row.sweeps / tokens), math.log10(row.evaluations / tokens)) for row in front(rows)]
        for name, rows in both.items()
    }
    xs, ys = zip(*(point for found in points.values() for point in found), strict=True)
    to_x, to_y = _axis(xs, 0, WIDE), _axis(ys, HIGH, 0)
    parts = [f'<rect width="{WIDE}" height="{HIGH}" fill="none" stroke="#999"/>',
             f'<text x="0" y="-8">{case["model"]}, {case["kind"]}: {part}</text>']  # fmt: skip
    for value in _ticks(xs):
        parts.append(f'<text x="{to_x(math.log10(value)):.0f}" y="{HIGH + 14}" text-anchor="middle">{value:g}</text>')
    for value in _ticks(ys):
        parts.append(f'<text x="-4" y="{to_y(math.log10(value)) + 4:.0f}" text-anchor="end">{value:g}</text>')
    parts.append(f'<text x="{WIDE / 2}" y="{HIGH + 28}" text-anchor="middle">sweeps a token</text>')
    for name, found in points.items():
        line = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in found)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[name]}"/>')
        parts += [f'<circle cx="{to_x(x):.1f}" cy="{to_y(y):.1f}" r="3" fill="{COLOURS[name]}"/>' for x, y in found]
    return "".join(parts)


def _axis(values: Sequence[float], start: float, stop: float):
    """From logarithms to pixels, with a tenth of the range to spare at each end."""
    least, most = min(values), max(values)
    spare = max(0.1 * (most - least), 0.05)
    least, most = least - spare, most + spare
    return lambda value: start + (stop - start) * (value - least) / (most - least)


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers within a range of logarithms."""
    numbers = (digit * 10**power for power in range(-4, 4) for digit in (1, 1.5, 2, 3, 4, 5, 7))
    found = [round(number, 6) for number in numbers if min(values) - 0.03 <= math.log10(number) <= max(values) + 0.03]
    return found[:: math.ceil(len(found) / 7)] if found else []
