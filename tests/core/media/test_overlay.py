"""A map over a clip: what can be read from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from starflow_core.errors import InputError
from starflow_core.media import overlay
from starflow_core.media.overlay import Scale, overlaid


def clip(frames=2, height=16, width=24):
    return torch.zeros(frames, 3, height, width)


@pytest.mark.parametrize("size", [(16, 24), (97, 31), (96, 96), (480, 333)])
def test_sides_are_even_and_the_picture_is_enlarged_by_a_whole_factor(size):
    values = torch.zeros(2, *size)
    values[1, 3, 5] = 4
    made = overlaid(clip(2, *size), values, "nats")
    factor = -(-overlay.LEAST_SIDE // min(size)) if min(size) < overlay.LEAST_SIDE else 1
    assert made.shape[2] == size[0] * factor + size[0] * factor % 2
    assert made.shape[3] % 2 == 0
    assert made.shape[3] > size[1] * factor + 40
    block = made[1, :, 3 * factor : 4 * factor, 5 * factor : 6 * factor]
    assert (block == block[:, :1, :1]).all()
    assert (block[:, 0, 0] - made[0, :, 3 * factor, 5 * factor]).abs().max() > 0.5


def test_higher_is_brighter_and_the_lowest_lets_the_clip_through():
    values = torch.linspace(0, 1, 24).expand(1, 16, 24)
    rows = overlaid(clip(1), values, "nats", Scale(0, 1))[0, :, 0, : 24 * 20 : 20]
    light = (rows * torch.tensor(overlay.LUMA)[:, None]).sum(0)
    assert (light[8:].diff() > 0).all()
    dark, bright = (overlaid(torch.full_like(clip(1), v), values, "", Scale(0, 1))[0, :, 0] for v in (-1.0, 1.0))
    difference = (bright - dark).mean(0)
    assert difference[0] > 0.9
    assert difference[23 * 20] < 0.2


def test_the_scale_is_the_whole_clips():
    values = torch.zeros(3, 16, 24)
    values[2, 0, 0], values[1, 0, 0] = 8, 4
    assert Scale.of(values) == Scale(0, 8)
    frames = overlaid(clip(3), values, "nats")
    assert not torch.equal(frames[1, :, 0, 0], frames[2, :, 0, 0])
    values[0] = float("nan")
    assert Scale.of(values) == Scale(0, 8)
    assert torch.equal(overlaid(clip(3), values, "nats")[0, :, 0, 0], frames[0, :, 0, 0])
    flat = Scale.of(torch.full((1, 2, 2), 7.0))
    assert flat.low == 7
    assert flat.high > 7


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-11.02, 110.4), (0.001, 0.0034), (-5e4, 3e6), (7, 7.007)])
def test_ticks_are_round_and_between_the_ends(low, high):
    ticks = Scale(low, high).ticks()
    assert 3 <= len(ticks) <= 7
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    assert np.ptp(np.diff(ticks)) < 1e-6 * (high - low)


def test_the_legend_shows_its_numbers(monkeypatch):
    drawn = []
    text = overlay.ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        overlay.ImageDraw.ImageDraw, "text", lambda self, at, words, *a, **k: drawn.append((at[1], words)) or
        text(self, at, words, *a, **k),
    )  # fmt: skip
    made = overlaid(clip(), torch.zeros(2, 16, 24), "nats", Scale(-20, 100))
    bar = made[0, :, :, 480 + 15 + 5].mean(0)[60:-30]  # the scale's colours, the highest on top
    assert bar[:40].mean() > bar[100:140].mean() > bar[-40:].mean()
    assert drawn[0][1] == "nats"
    assert [words for _, words in drawn[1:]] == ["-20", "0", "20", "40", "60", "80", "100"]
    assert [y for y, _ in drawn[1:]] == sorted((y for y, _ in drawn[1:]), reverse=True)


def test_what_cannot_be_drawn():
    with pytest.raises(InputError, match=r"a map of shape \(1, 16, 24\) over pixels of shape \(2, 3, 16, 24\)"):
        overlaid(clip(), torch.zeros(1, 16, 24), "nats")
    for ends in ((1, 1), (2, 1), (float("nan"), 1), (0, float("inf"))):
        with pytest.raises(InputError, match="give two finite numbers, the lower one first"):
            Scale(*ends)
