"""Jacobi against the autoregressive answer, and the solver's parts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from starflow_core.control import Control
from starflow_core.errors import Cancelled, InputError
from starflow_core.solve.runs import DeepRun
from starflow_core.solve.sampling import Sampler, sample
from starflow_core.solve.solvers import (
    AUTOREGRESSIVE,
    PRESETS,
    SolverSettings,
    Statistics,
    Window,
    _same_place,
    parallel_scan,
    solve_frames,
    solve_span,
)
from tests.core import models

EXACT = PRESETS["exact"]


@pytest.mark.parametrize("seed", range(10))
def test_jacobi_equals_autoregressive(seed):
    flow, z = models.random_case(seed)
    text, uncond = models.text(flow, len(z)), models.text(flow, 1, seed=7)
    exact = sample(flow, z, text, uncond, guidance=2.0, settings=AUTOREGRESSIVE).latents
    for first_span, span in ((1, 1), (3, 5), (1000, 1000)):
        settings = replace(EXACT, image_span=first_span, first_span=first_span, span=span)
        solved = sample(flow, z, text, uncond, guidance=2.0, settings=settings).latents
        assert models.relative_error(solved, exact) < 1e-6


def test_tolerance_bounds_the_error():
    flow = models.flow()
    z, text, uncond = models.randn(1, 5, 4, 5, 5), models.text(flow), models.text(flow, seed=7)
    exact = sample(flow, z, text, uncond, guidance=3.0, settings=AUTOREGRESSIVE).latents
    errors, sweeps = [], []
    for tolerance in (1e-1, 1e-3, 1e-5, 1e-7):
        settings = SolverSettings(tolerance=tolerance, shallow_tolerance=tolerance / 10)
        solved = sample(flow, z, text, uncond, guidance=3.0, settings=settings)
        errors.append(models.relative_error(solved.latents, exact))
        sweeps.append(solved.statistics.deep_sweeps)
    assert errors == sorted(errors, reverse=True)
    assert sweeps == sorted(sweeps)
    assert errors[-1] < 1e-5


def test_one_sweep_a_token_at_most():
    flow = models.flow()
    z, text = models.randn(1, 3, 4, 3, 3), models.text(flow)
    statistics = sample(flow, z, text, settings=replace(EXACT, tolerance=0.0, shallow_tolerance=0.0)).statistics
    assert statistics.deep_sweeps <= 27
    assert statistics.shallow_sweeps <= 2 * 9


def test_max_sweeps_settles_tokens():
    flow = models.flow()
    z, text = models.randn(1, 4, 4, 4, 4), models.text(flow)
    settings = SolverSettings(first_span=16, span=16, tolerance=0.0, shallow_tolerance=0.0, max_sweeps=2)
    statistics = sample(flow, z, text, settings=settings).statistics
    assert statistics.deep_evaluations <= 2 * 64 + 16
    assert statistics.shallow_sweeps == 2 * (1 + 2)  # what they open with, too


def test_statistics_add_up():
    flow = models.flow()
    z, text = models.randn(1, 3, 4, 4, 4), models.text(flow)
    statistics = sample(flow, z, text).statistics
    assert len(statistics.deep_changes) == statistics.deep_sweeps
    assert sum(len(change) for _, change in statistics.deep_changes) == statistics.deep_evaluations
    starts = [first for first, _ in statistics.deep_changes]
    assert starts == sorted(starts)
    assert len(set(starts)) == len(starts)


def test_statistics_name_tokens_of_the_whole_clip():
    """Also where the window slides: a token is never counted as one of the first window's again."""
    flow = models.flow()
    z, text = models.randn(1, 6, 4, 4, 4), models.text(flow)
    changes = sample(flow, z, text, window=3, keep=2).statistics.deep_changes
    starts = [first for first, _ in changes]
    assert starts == sorted(set(starts))
    assert {first + i for first, change in changes for i in range(len(change))} == set(range(6 * 16))


def test_a_window_slides_on_from_its_last_frames():
    """Also from a context longer than what is kept: the frames after it are those that the kept ones alone give."""
    flow = models.flow()
    z, text, given = models.randn(1, 7, 4, 3, 3), models.text(flow), models.randn(1, 4, 4, 3, 3, seed=2)
    options = {"window": 5, "keep": 2, "settings": AUTOREGRESSIVE}
    whole = sample(flow, z, text, context=given, **options).latents
    rest = sample(flow, z[:, 3:], text, context=whole[:, 3:5], **options).latents
    torch.testing.assert_close(rest, whole[:, 3:], atol=1e-4, rtol=1e-4)


def test_scan_equals_the_loop():
    slope, step = models.randn(2, 13, 1).clamp(-0.9, 0.9), models.randn(2, 13, 3, seed=1)
    expected = step.clone()
    for j in range(1, 13):
        expected[:, j] = step[:, j] + slope[:, j] * expected[:, j - 1]
    torch.testing.assert_close(parallel_scan(slope, step), expected)


def test_same_place_is_the_last_known_period():
    slots = torch.arange(20, 30)
    for period in (3, 7, 20, 25):
        expected = [
            max((s - k * period for k in range(1, 20) if s - k * period < 20), default=None) for s in range(20, 30)
        ]
        assert _same_place(slots, 20, period).tolist() == expected


def test_progress_and_cancel():
    flow = models.flow()
    z, text = models.randn(1, 3, 4, 4, 4), models.text(flow)
    seen = []
    sample(flow, z, text, control=Control(progress=seen.append))
    deep = [p for p in seen if p.phase == "deep"]
    assert deep[-1].settled == deep[-1].tokens == 48
    assert all(p.residual >= 0 for p in deep)
    asked = []

    def cancelled():
        asked.append(1)
        return len(asked) == 3

    sampler = Sampler(flow, z, text, control=Control(cancelled=cancelled))
    with pytest.raises(Cancelled):
        sampler.sample()
    assert sampler.statistics.deep_sweeps == 3


@pytest.mark.parametrize("numbers", [
    {"span": 0}, {"first_span": -1}, {"max_sweeps": 0}, {"tolerance": -1.0}, {"shallow_tolerance": 2.0},
    {"method": "newton"}, {"tolerance": float("nan")}, {"span": "3"}, {"max_sweeps": 2.5}, {"tolerance": "small"},
])  # fmt: skip
def test_impossible_settings_are_refused(numbers):
    with pytest.raises(InputError, match=next(iter(numbers))):
        SolverSettings(**numbers)


def test_a_slot_reads_its_left_neighbour():
    window = Window(models.randn(1, 6, 4), frame_tokens=3, width=3)
    assert torch.equal(window.before(2, 5), window.x[:, 1:4])
    assert torch.equal(window.before(0, 3), window.x[:, :2])


# What makes the host wait for the device, or sends something there. On a tensor that is on the CPU already the others
# cost nothing, so that `cpu` counts, and what is done with its result doesn't.
WAITS = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero", "numpy", "cpu"}
SENDS = {"tensor", "as_tensor", "from_numpy"}


@pytest.mark.parametrize("preset", ["balanced", "exact"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_hardly_more_sweeps(dtype, preset):
    """Below what a type resolves no token settles, and every one of them would take a sweep."""
    z, sweeps = models.randn(1, 3, 4, 6, 6), {}
    for kind in (torch.float32, dtype):
        flow = models.flow().to(kind)
        flow.compute_dtype = kind
        done = sample(flow, z, models.text(flow).to(kind), settings=PRESETS[preset].with_numbers(span=48)).statistics
        sweeps[kind] = (done.deep_sweeps, done.shallow_sweeps)
    for few, many in zip(sweeps[torch.float32], sweeps[dtype], strict=True):
        assert many <= few + 2


class Calls(TorchFunctionMode):
    """Counts these calls by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        self.counts[name] += name in WAITS | SENDS
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_a_sweep_of_the_deep_block_asks_the_device_once(guidance):
    flow = models.flow()
    grid, text = flow.grid(models.randn(1, 3, 4, 2, 3)), models.text(flow, 2)
    run, statistics = DeepRun(flow, grid, text, models.text(flow, seed=8), guidance), Statistics()
    window = Window(models.randn(2, 18, 4), grid.frame_tokens, grid.width)
    with Calls() as calls:
        for _ in solve_span(run, window, PRESETS["balanced"].spanned(16), statistics):
            pass
    assert +calls.counts == {"tolist": statistics.deep_sweeps}


def test_a_sweep_of_a_shallow_block_asks_the_device_once():
    flow, statistics = models.flow(), Statistics()
    rotary, z = flow.frame_rotary(flow.grid(models.randn(1, 3, 4, 2, 3)), "cpu"), models.randn(4, 6, 4)
    opening = torch.ones(1, 1, 4), torch.zeros(1, 1, 4)
    with Calls() as calls:
        solve_frames(
            lambda tokens: flow.shallow_affine(flow.shallow[0], tokens, rotary), z, opening, PRESETS["balanced"],
            statistics, lambda done, residual: None,
        )  # fmt: skip
    assert +calls.counts == {"tolist": statistics.shallow_sweeps}
