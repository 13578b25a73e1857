"""The solver benchmark: its baseline is the reference's solver, and its comparison is at equal error."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import solver
from benchmarks.baseline import Baseline, sample_baseline
from starflow_core.solve.solvers import PRESETS
from tests.core import models
from tests.core.test_golden import recorded


@pytest.mark.parametrize("name", ["image", "video"])
def test_the_baseline_is_the_references_solver(name):
    flow, data, notes = recorded(name)
    settings = Baseline(notes["jacobi_block_size"], notes["jacobi_threshold"])
    noise = data["noise"] if data["noise"].ndim == 5 else data["noise"].unsqueeze(1)
    latents, _ = sample_baseline(flow, noise, data["y"], data["y_uncond"], notes["guidance"], settings)
    torch.testing.assert_close(latents.view_as(data["noise"]), data["sample_jacobi_cfg"], atol=1e-4, rtol=0)


def test_the_baseline_counts_its_work():
    flow, noise = models.flow(kind="image"), models.randn(2, 1, 4, 2, 3)
    settings = Baseline(chunk=4, threshold=0.0, max_sweeps=3)
    _, statistics = sample_baseline(flow, noise, models.text(flow, 2), None, 0.0, settings)
    shallow = len(flow.shallow)
    assert (statistics.deep_sweeps, statistics.deep_evaluations) == (6, 18)  # chunks of 4 and 2 tokens
    assert (statistics.shallow_sweeps, statistics.shallow_evaluations) == (6 * shallow, 2 * 18 * shallow)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_rows_of_a_case(kind):
    flow = models.flow(kind=kind)
    noise = models.randn(2, 3 if kind == "video" else 1, 4, 3, 4)
    settings = [Baseline(4, 1e-1), Baseline(4, 1e-4), PRESETS["exact"]]
    rows = solver.run_case(flow, noise, models.text(flow, 2), models.text(flow, seed=5), 2.0, settings)
    assert [row.solver for row in rows] == ["baseline", "baseline", "ours"]
    assert rows[0].error > rows[1].error > rows[2].error
    assert rows[2].error < 1e-10
    assert rows[0].deep_sweeps < rows[1].deep_sweeps


def test_ratios_at_equal_error():
    def rows(factor):
        """Sweeps grow with the digits of the error."""
        return [
            solver.Row("any", t, t, *[factor * 10 ** (-0.25 * math.log10(t))] * len(solver.COSTS))
            for t in (1e-1, 1e-3, 1e-5)
        ]

    found = solver.ratios(rows(3.0), rows(2.0), 2e-4)
    assert all(ratio == pytest.approx(1.5) for ratio in found.values())
    assert solver.at_error(rows(1.0), "seconds", 1e-4) == pytest.approx(10)
    assert solver.at_error(rows(1.0), "seconds", 1e-6) is None
    assert solver.at_error(rows(1.0), "seconds", 1.0) is None
