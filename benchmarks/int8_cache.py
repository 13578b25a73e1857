"""What keys and values in 8 bit change: sample error and sweeps, by the slots that are rounded together.

    python -m benchmarks.int8_cache [--seeds 2] [--guidance G] [--json PATH]

On the demo at 192 x 192 (9 latent frames of 144 tokens) and the random mid-size model. Errors are relative squared
ones: of the samples against those with a cache in full, and of the exact preset against autoregressive decoding with
the same cache. Means over the seeds, geometric for errors.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from statistics import mean
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.cases import Case, demo_case, mid_case, relative_error
from benchmarks.report import machine, write_json
from starflow_core.model import cache as caches
from starflow_core.model.cache import RESIDENT, CacheSettings
from starflow_core.solve.sampling import Sample, sample
from starflow_core.solve.solvers import AUTOREGRESSIVE, PRESETS, SolverSettings

GROUPS = (64, 128, 256, 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("| model | cache | error | error of exact to autoregressive | sweeps, balanced | sweeps, exact |")
    print(f"|{' --- |' * 6}")
    for case in (
        demo_case("video", options.seeds, options.guidance, 192),
        mid_case("video", options.seeds, options.guidance),
    ):
        for row in measured(case):
            rows.append(row)
            print(f"| {' | '.join(_cell(value) for value in row.values())} |", flush=True)
    if options.json:
        write_json(options.json, {**machine(), "seeds": options.seeds, "guidance": options.guidance, "rows": rows})


def measured(case: Case) -> list[dict]:
    """In full, then in 8 bit with groups of each size."""
    full = solved(case, AUTOREGRESSIVE, RESIDENT)
    rows = [row(case, "full", RESIDENT, full)]
    for group in GROUPS:
        with patch.object(caches, "GROUP", group):
            rows.append(row(case, f"8 bit, groups of {group}", CacheSettings(quantised=True), full))
    return rows


def row(case: Case, name: str, cache: CacheSettings, full: list[Sample]) -> dict:
    one_by_one = full if cache == RESIDENT else solved(case, AUTOREGRESSIVE, cache)
    balanced, exact = (solved(case, PRESETS[preset], cache) for preset in ("balanced", "exact"))
    return {
        "model": case.model,
        "cache": name,
        "error": 0.0 if cache == RESIDENT else error(one_by_one, full),
        "exact": error(exact, one_by_one),
        "balanced sweeps": mean(found.statistics.deep_sweeps for found in balanced),
        "exact sweeps": mean(found.statistics.deep_sweeps for found in exact),
    }


def solved(case: Case, settings: SolverSettings, cache: CacheSettings) -> list[Sample]:
    """Each seed's sample."""
    options = {"guidance": case.guidance, "settings": settings, "cache": cache}
    pairs: list[tuple[Tensor, Tensor]] = list(zip(case.noise.split(1), case.text.split(1), strict=True))
    return [sample(case.flow, noise, text, case.uncond, **options) for noise, text in pairs]


def error(found: list[Sample], expected: list[Sample]) -> float:
    pairs = zip(found, expected, strict=True)
    return math.exp(mean(math.log(relative_error(ours.latents, theirs.latents)) for ours, theirs in pairs))


def _cell(value) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.1e}" if value < 1 else f"{value:.1f}"


if __name__ == "__main__":
    main()
