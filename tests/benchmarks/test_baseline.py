"""The solver benchmark: its baseline is the reference's solver, and its comparison is at equal error."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks import solver
from benchmarks.baseline import Baseline, sample_baseline
from benchmarks.comparison import AUTHORS, BEST, COLUMN, COSTS, Row, at_error, at_errors, compare, tables
from starflow_core.model.flow import Grid
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
    assert [row.spans.get("chunk") for row in rows] == [4, 4, None]
    assert rows[0].error > rows[1].error > rows[2].error
    assert rows[2].error < 1e-10
    assert rows[0].deep_sweeps < rows[1].deep_sweeps
    assert all(row.cpu_seconds > 0 and row.seconds > 0 for row in rows)


def curve(name: str, spans: dict[str, int], *costs: float) -> list[Row]:
    """Costs at an error of 1e-4, in the order of `COSTS`; they grow with the digits of the error."""
    return [Row(name, spans, t, t, *(cost * -math.log10(t) / 4 for cost in costs)) for t in (1e-1, 1e-4, 1e-7)]


def test_costs_at_equal_error():
    row = Row("ours", {}, 1e-1, 1e-1, *[10.0] * len(COSTS))
    tight = replace(row, tolerance=1e-5, error=1e-5, deep_sweeps=1000.0)
    between = at_error([tight, row], 1e-3)
    assert (between.error, between.deep_sweeps, between.seconds) == pytest.approx((1e-3, 100, 10))
    assert at_error([row, tight], 1e-6) is None
    assert at_error([row, tight], 1.0) is None


def test_an_error_that_comes_back_counts_as_not_reached():
    rows = curve("ours", {}, *[1.0] * len(COSTS))
    returning = replace(rows[0], tolerance=1e-5, error=1e-2)
    assert at_error([*rows, returning], 1e-4).tolerance == pytest.approx(1e-5 * 1e-2 ** (2 / 5))


def test_each_choice_of_the_baselines_chunk():
    rows = [
        *curve("baseline", {"chunk": 8}, 12, 2, 12, 2, 9, 8),
        *curve("baseline", {"chunk": 16}, 8, 3, 8, 3, 6, 7),
        *curve("baseline", {"chunk": 32}, 3, 8, 3, 8, 5, 9),
        *curve("ours", {"image_span": 18}, *[4] * len(COSTS)),
    ]
    authors, best, column = compare(at_errors(rows, [1e-4, 1e-9]), "image")
    assert (authors.chosen, best.chosen, column.chosen) == (AUTHORS, BEST, COLUMN)
    assert list(authors.times.values()) == pytest.approx([2, 0.75, 2, 0.75, 1.5, 1.75])
    assert list(best.times.values()) == pytest.approx([0.75, 2, 0.75, 2, 1.25, 2.25])
    assert list(column.times.values()) == pytest.approx([0.75, 0.5, 0.75, 0.5, 1.25, 1.75])
    assert set(authors.chunks.values()) == {16}
    assert set(best.chunks.values()) == {32}
    assert list(column.chunks.values()) == [32, 8, 32, 8, 32, 16]


def test_chunks_beyond_all_tokens_are_one():
    assert solver.distinct((4, 16, 32, 48, 64, 96), Grid(1, 6, 6)) == [4, 16, 32, 48]
    assert solver.distinct((4, 16, 32, 48), Grid(9, 6, 6)) == [4, 16, 32, 48]


def test_a_measured_case_gives_the_tables(tmp_path, monkeypatch, capsys):
    flow = models.flow(kind="image")
    case = solver.Case(
        "tiny", "image", flow, models.randn(1, 1, 4, 3, 4), models.text(flow), models.text(flow, seed=5), 2.0
    )
    measured = solver.measure(case, [0.9 * 10.0**-digits for digits in range(10)], (4, 16), None)
    file = tmp_path / "solver-tiny.json"
    solver.write_json(file, {"cases": [measured]})
    monkeypatch.setattr("sys.argv", ["solver", "--table", str(file)])
    solver.main()
    assert capsys.readouterr().out.strip() == tables([measured])
    assert [len(measured["rows"]), len(measured["at_equal_error"])] == [30, 6]
    assert len(tables([measured]).splitlines()) == 2 + 2 * 2 + 1 + 2 + 2


def test_the_table_says_gains_and_losses():
    rows = [
        *curve("baseline", {"chunk": 16}, 8, 3, 8, 3, 6, 7),
        *curve("baseline", {"chunk": 32}, 3, 8, 3, 8, 5, 9),
        *curve("ours", {"image_span": 18}, *[4] * len(COSTS)),
    ]
    found = [asdict(comparison) for comparison in compare(at_errors(rows, [1e-4]), "image")]
    image = {"model": "demo", "kind": "image", "tokens": [1, 6, 6], "comparisons": found}
    video = {"model": "demo", "kind": "video", "tokens": [9, 6, 6], "comparisons": found[:1]}
    heads = " | ".join(COSTS.values())
    assert tables([image, video]).splitlines() == [
        f"| model | error | baseline's chunk | {heads} |",
        f"|{' --- |' * 9}",
        "| demo, video, 9 frames of 36 tokens | 1e-4 | 16, the authors' "
        "| 2.00 | **0.75** | 2.00 | **0.75** | 1.50 | 1.75 |",
        "| demo, image, 36 tokens | 1e-4 | 16, the authors' | 2.00 | **0.75** | 2.00 | **0.75** | 1.50 | 1.75 |",
        "|  |  | 32, least CPU seconds | **0.75** | 2.00 | **0.75** | 2.00 | 1.25 | 2.25 |",
        "",
        f"| model | error | baseline's chunk | {heads} |",
        f"|{' --- |' * 9}",
        "| demo, image, 36 tokens | 1e-4 | least in each column "
        "| **0.75** (32) | **0.75** (16) | **0.75** (32) | **0.75** (16) | 1.25 (32) | 1.75 (16) |",
    ]
