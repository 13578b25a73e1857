"""The benchmark of the likelihood: its statistics, and that its changed clips change when they say."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from benchmarks import changes
from benchmarks.judge import look
from benchmarks.surprise import _failures, area, area_interval, compared, latent_frame, rate, wilson


def test_intervals():
    assert wilson(0, 96) == pytest.approx([0, 0.0385], abs=1e-3)
    assert wilson(48, 48) == pytest.approx([0.926, 1], abs=1e-3)
    assert wilson(10, 20) == pytest.approx([0.299, 0.701], abs=1e-3)
    assert rate([True, False, True, True])["share"] == 0.75


def test_the_area_under_the_curve():
    low, high = np.arange(10.0), np.arange(20.0, 30.0)
    assert area(high, low) == 1
    assert area(low, high) == 0
    assert area(low, low) == 0.5
    assert area_interval(high, low) == [1, 1]
    lower, upper = area_interval(low + 1, low)
    assert lower < area(low + 1, low) < upper


def test_groups_of_candidates():
    valid = [[True, False, False, False] + [False] * 3 + [True]]
    scores = [[4.0, 3.0, 2.0, 1.0, 0.0, 0.0, 5.0, 1.0]]
    assert _failures(valid, scores, 4) == [False, True]
    assert _failures(valid, scores, 8) == [True]


@pytest.mark.parametrize(("frame", "latent"), [(0, 0), (1, 1), (4, 1), (5, 2), (32, 8)])
def test_the_latent_frame_of_a_frame(frame, latent):
    assert latent_frame(frame) == latent


def test_the_named_frame_is_where_most_is_unlikely():
    calm, found = torch.zeros(9, 4), []
    for frame, peak in ((5, 2), (9, 4), (17, 5)):  # in the latent frames 2, 3 and 5
        surprise = calm.clone()
        surprise[0, 0], surprise[peak, 1] = 100, 5  # the first frame doesn't count
        found.append((surprise, frame))
    report = compared(found, [(calm, None)] * 3, dated=True)
    assert report["frame_named"]["share"] == pytest.approx(2 / 3)
    assert report["within_one"]["share"] == 1
    assert report["area_by_frame"]["area"] == report["area_by_token"]["area"] == 1


@pytest.mark.parametrize("name", changes.KINDS)
def test_clips_change_when_they_say(name):
    for seed in range(6):
        made = changes.KINDS[name](random.Random(seed))
        pixels, at = made.pixels, made.frame
        assert pixels.shape == (33, 3, 96, 96)
        assert pixels.abs().max() <= 1
        if name == "textured background":
            assert look(pixels).background is not None
            assert pixels[0, 0, :3].std() > 0.05
            continue
        steps = (pixels[1:] - pixels[:-1]).abs().mean((1, 2, 3))
        assert (steps[: at - 1] > 0).all()  # it moves until then
        if name == "reversal":
            assert torch.equal(pixels[at], pixels[at - 2])
        elif name == "freeze":
            assert steps[at - 1 :].max() == 0
        else:
            assert steps[at - 1] > 1.2 * steps[: at - 1].max()


def test_normal_clips_are_of_the_demos_world():
    for seed in range(4):
        assert look(changes.normal(random.Random(seed)).pixels).consistent
