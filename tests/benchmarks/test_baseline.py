"""The solver benchmark: its baseline is the reference's solver, and fronts are compared at equal error."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import solver
from benchmarks.baseline import Baseline, sample_baseline
from benchmarks.comparison import Row, at_error, evaluations_at, front, gains, table
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


def case(kind: str, seeds: int = 2) -> solver.Case:
    flow = models.flow(kind=kind)
    noise = models.randn(seeds, 3 if kind == "video" else 1, 4, 3, 4)
    return solver.Case("tiny", kind, flow, noise, models.text(flow, seeds), models.text(flow, seed=5), 2.0)


@pytest.mark.parametrize("kind", ["image", "video"])
@torch.inference_mode()
def test_every_solver_reaches_what_is_exact(kind):
    problem, tight = solver.Problem(case(kind), 1), 1e-9
    seen = set()
    for part, name, tokens, solve in problem.solvers():
        found, sweeps, evaluations = solve(tight)
        assert solver.relative_error(found, problem.exact[part]) < 1e-6
        assert 0 < sweeps <= evaluations
        seen.add((part, name, *tokens))
    growth = {("deep", "baseline", 4, 4), ("deep", "baseline", 4, 16)}
    assert growth <= seen if kind == "video" else not {("deep", "baseline", 4, 16)} & seen


def test_sizes_beyond_all_tokens_are_one():
    assert solver._distinct((4, 16, 32, 48, 64, 96), 36) == [4, 16, 32, 48]


def row(sweeps: float, evaluations: float, **others) -> Row:
    same = {"part": "deep", "solver": "ours", "tokens": [8, 8], "tolerance": 1e-3, "error": 1e-3, "cpu_seconds": 1.0}
    return Row(**same | {"sweeps": sweeps, "evaluations": evaluations} | others)


def test_costs_at_equal_error():
    loose, tight = row(10, 100, tolerance=1e-1, error=1e-1), row(1000, 10_000, tolerance=1e-5, error=1e-5)
    between = at_error([tight, loose], 1e-3)
    assert (between.error, between.sweeps, between.evaluations) == pytest.approx((1e-3, 100, 1000))
    assert at_error([loose, tight], 1e-6) is None
    assert at_error([loose, tight], 1.0).sweeps == 10


def test_an_error_that_comes_back_counts_as_not_reached():
    rows = [row(1, 1, tolerance=t, error=t) for t in (1e-1, 1e-4, 1e-7)]
    returning = replace(rows[0], tolerance=1e-5, error=1e-2)
    assert at_error([*rows, returning], 1e-4).tolerance == pytest.approx(1e-5 * 1e-2 ** (2 / 5))


def test_fronts_are_compared_at_equal_sweeps():
    theirs = front([row(1, 100), row(100, 1), row(10, 50), row(200, 2)])
    assert [(point.sweeps, point.evaluations) for point in theirs] == [(1, 100), (10, 50), (100, 1)]
    assert evaluations_at(theirs, 0.5) is None
    assert evaluations_at(theirs, math.sqrt(10)) == pytest.approx(math.sqrt(100 * 50))
    assert evaluations_at(theirs, 1000) == 1
    assert gains([row(0.5, 1), row(10, 25), row(1000, 2)], theirs) == [2, 0.5]


def test_a_measured_case_gives_table_and_picture(tmp_path, monkeypatch, capsys):
    measured = [solver.measure(case(kind, 1)) for kind in ("image", "video")]
    file, svg = tmp_path / "solver-tiny.json", tmp_path / "fronts.svg"
    solver.write_json(file, {"cases": measured})
    monkeypatch.setattr("sys.argv", ["solver", "--table", str(file)])
    solver.main()
    assert capsys.readouterr().out.strip() == table(measured)
    assert len(table(measured).splitlines()) == 2 + 2 * 2 * 2
    monkeypatch.setattr("sys.argv", ["solver", "--picture", str(svg), str(file)])
    solver.main()
    drawn = ElementTree.fromstring(svg.read_text())
    assert len(drawn.findall(".//{*}polyline")) == 2 * 2 * 2


def test_the_table_says_gains_and_losses():
    rows = [
        row(10, 100, solver="baseline", tokens=[8, 8], cpu_seconds=2.0), row(20, 50, solver="baseline", tokens=[4, 4]),
        row(10, 50, tokens=[9, 9]), row(40, 100, tokens=[5, 5]), row(15, 49, tokens=[6, 6], cpu_seconds=4.0),
    ]  # fmt: skip
    found = {"model": "demo", "kind": "video", "tokens": [9, 6, 6], "at_equal_error": [asdict(each) for each in rows]}
    assert table([found]).splitlines()[2] == (
        "| demo, video, 9 frames of 36 tokens | deep | 1e-3 | 1.36 to 2.00 (1.68) | 1.02 | 1.00 | 1.00 |"
    )
