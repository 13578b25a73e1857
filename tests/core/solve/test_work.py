"""How much work the solver does, recorded: what makes it slower, or stops it early, shows here."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import random_flow
from starflow_core.pipeline import load_pipeline
from starflow_core.solve import noise
from starflow_core.solve.sampling import Sampler, sample
from starflow_core.solve.solvers import (
    PRESETS,
    SLOPE_LIMIT,
    Secant,
    Statistics,
    Window,
    absorb,
    solve_frames,
    solve_span,
    warm_start,
)
from tests.core import models

WORK = ("deep_sweeps", "deep_evaluations", "shallow_sweeps", "shallow_evaluations")
EXACT = PRESETS["exact"].spanned(32)
BAND = 0.07  # another CPU's rounding moves a sweep now and then; what the solver's parts save is more


def total(runs: list[Statistics]) -> list[int]:
    return [sum(getattr(run, name) for run in runs) for name in WORK]


@pytest.mark.parametrize(("frames", "recorded"), [(1, (31, 525, 30, 870)), (17, (88, 2547, 30, 4326))])
def test_work_on_the_demo(frames, recorded):
    pipeline, runs = load_pipeline(device="cpu"), []
    for seed in (1, 2, 3):
        job = pipeline.job(frames=frames, seed=seed, guidance=1.0, denoise=False)
        generation, _ = pipeline.start("a red circle moving left on a black background", job, keep_text_encoder=True)
        generation.run()
        runs.append(generation.statistics)
    assert total(runs) == pytest.approx(recorded, rel=BAND)


@pytest.mark.parametrize(
    ("kind", "frames", "recorded"), [("image", 1, (25, 665, 28, 1540)), ("video", 3, (54, 2028, 30, 4804))]
)
def test_work_on_a_random_model(kind, frames, recorded):
    flow, runs = random_flow(kind), []
    for seed in (0, 1):
        z = noise.draw(seed, 1, frames, (flow.config.latent.channels, 8, 8))
        runs.append(sample(flow, z, models.text(flow)).statistics)
    assert total(runs) == pytest.approx(recorded, rel=BAND)


class Linear:
    """A block whose shift is half the token before: x_j = z_j + x_(j-1) / 2, with a = 1."""

    def __call__(self, before, start):
        inputs = before if start else torch.cat((torch.zeros_like(before[:, :1]), before), 1)
        return torch.ones_like(inputs), inputs / 2

    def horizon(self, start):
        return 1 << 30

    def agree(self, leading, known, residual):
        return leading, known, residual


def test_a_residual_is_the_largest_change_of_its_sweep():
    window, statistics = Window(models.randn(1, 12, 3), frame_tokens=4, width=2), Statistics()
    residuals = [residual for _, residual in solve_span(Linear(), window, EXACT, statistics)]
    assert residuals == [float(change.max()) for _, change in statistics.deep_changes]
    assert residuals[0] > 1e-3


def test_only_tokens_that_settled_are_committed():
    """The answer is known: no sweep may commit a token that is still off by more than its tolerance."""
    window = Window(models.randn(1, 12, 3), frame_tokens=12, width=4)
    answer = [window.z[:, 0]]
    for token in range(1, 12):
        answer.append(window.z[:, token] + answer[-1] / 2)
    answer = torch.stack(answer, 1)
    for settled, _ in solve_span(Linear(), window, EXACT, Statistics()):
        torch.testing.assert_close(window.x[:, :settled], answer[:, :settled], atol=1e-4, rtol=1e-4)


def test_slopes_are_limited():
    """Of a map that doubles its left neighbour the step takes 0.9, not 2."""
    assert SLOPE_LIMIT == 0.9
    secant, first, second = Secant(), torch.zeros(1, 3, 1), torch.ones(1, 3, 1)
    doubled = [torch.cat((torch.zeros(1, 1, 1), 2 * x[:, :-1]), 1) for x in (first, second)]
    secant.step(first, doubled[0])
    step = secant.step(second, doubled[1]) - second
    rest = doubled[1] - second
    expected = [rest[0, 0, 0]]
    for j in (1, 2):
        expected.append(rest[0, j, 0] + 0.9 * expected[-1])
    torch.testing.assert_close(step[0, :, 0], torch.stack(expected))


def test_known_tokens_leave_their_scale_and_shift():
    window = Window(models.randn(1, 8, 3), frame_tokens=4, width=2, known=4)
    absorb(Linear(), window)
    torch.testing.assert_close(window.b[:, 1:4], window.x[:, :3] / 2)
    assert torch.equal(window.b[:, 4:], torch.zeros(1, 4, 3))


class Recorded(Linear):
    """Notes the tokens that each sweep reads."""

    def __init__(self):
        self.seen = []

    def __call__(self, before, start):
        self.seen.append(before.clone())
        return super().__call__(before, start)


class Wild(Recorded):
    """Each token is thrice the one before it: nothing is known of a token before that one is."""

    def __call__(self, before, start):
        a, b = super().__call__(before, start)
        return a, 6 * b


@pytest.mark.parametrize(("block", "most"), [(Wild(), 2), (Recorded(), 6)], ids=["nothing known", "something known"])
def test_a_span_ends_soon_after_a_token_of_which_nothing_is_known(block, most):
    window = Window(1 + models.randn(1, 24, 3).square(), frame_tokens=24, width=6)
    for _ in solve_span(block, window, PRESETS["exact"].spanned(6), Statistics()):
        pass
    read = [tokens.shape[1] for tokens in block.seen]
    assert read[0] + 1 == 2  # a quarter of the span; the first token reads nothing
    assert max(read[1:]) == most


@pytest.mark.parametrize("span", [3, 4])
def test_small_spans_take_fewer_sweeps_than_tokens(span):
    window, statistics = Window(models.randn(1, 24, 3), frame_tokens=24, width=6), Statistics()
    for _ in solve_span(Linear(), window, PRESETS["fast"].spanned(span), statistics):
        pass
    assert statistics.deep_sweeps < 24


def test_frames_start_from_the_scale_and_shift_they_are_given():
    z, statistics = models.randn(3, 5, 2), Statistics()
    a, b = torch.full((1, 1, 2), 2.0), torch.full((1, 1, 2), 0.5)
    x = solve_frames(lambda tokens: (a, b), z, (a, b), PRESETS["exact"], statistics, lambda done, residual: None)
    assert torch.equal(x, 2 * z + 0.5)
    assert statistics.shallow_sweeps == 1


def test_shallow_blocks_start_as_their_first_token_once_a_job():
    flow, z = models.flow(), models.randn(2, 3, 4, 3, 3)
    sampler = Sampler(flow, z, models.text(flow, 2))
    for _ in sampler.stream():
        pass
    rotary = flow.frame_rotary(flow.grid(z), "cpu")
    for block in flow.shallow:
        a, b = flow.shallow_affine(block, models.randn(4, 9, 4), rotary)
        opening = sampler._openings[block.index]
        for own, of_all in zip(opening, (a, b), strict=True):
            torch.testing.assert_close(own.expand(4, 1, -1), of_all[:, :1])
    evaluated = sampler.statistics.shallow_evaluations
    assert evaluated % 9 == len(flow.shallow)  # one token each, beside whole frames


class Careful(Linear):
    """Of several processes the other one would commit one token a sweep."""

    def agree(self, leading, known, residual):
        return 1, known, residual


def test_what_is_committed_is_agreed_on():
    window = Window(models.randn(1, 12, 3), frame_tokens=4, width=2)
    settled = [settled for settled, _ in solve_span(Careful(), window, EXACT, Statistics())]
    assert settled == list(range(1, 13))


def test_tokens_that_enter_the_span_are_warm_started():
    """After a known frame the first sweep sees tokens with the frame's shift, not bare noise."""
    window, block = Window(models.randn(1, 8, 3), frame_tokens=4, width=2, known=4), Recorded()
    noise, tokens = window.z[:, 4:].clone(), window.x[:, :4].clone()
    absorb(block, window)
    next(solve_span(block, window, EXACT, Statistics()))
    shift = torch.cat((torch.zeros(1, 1, 3), tokens[:, :-1] / 2), 1)
    torch.testing.assert_close(block.seen[1], torch.cat((tokens[:, -1:], (noise + shift)[:, :-1]), 1))


def test_new_tokens_start_from_the_same_place_a_frame_earlier():
    window = Window(models.randn(1, 12, 3), frame_tokens=4, width=2)
    window.a, window.b = models.randn(1, 12, 3, seed=1), models.randn(1, 12, 3, seed=2)
    warm_start(window, 4, 8)
    torch.testing.assert_close(window.x[:, 4:8], window.a[:, :4] * window.z[:, 4:8] + window.b[:, :4])
    window = Window(models.randn(1, 4, 3), frame_tokens=4, width=2)
    window.a, window.b = models.randn(1, 4, 3, seed=1), models.randn(1, 4, 3, seed=2)
    warm_start(window, 2, 4)  # no frame before: the row before
    torch.testing.assert_close(window.x[:, 2:], window.a[:, :2] * window.z[:, 2:] + window.b[:, :2])
