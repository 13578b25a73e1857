"""A clip's surprise over its pixels, by frame and as a mask: on random flows, with windows and given frames."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from starflow_core.errors import InputError
from starflow_core.jobs.surprise import Surprise
from starflow_core.solve.inverting import invert
from tests.core import models
from tests.core.models import random_case


def of(flow, found, grid) -> list[Surprise]:
    cell = flow.config.cell
    return [Surprise(nats, flow.config, grid.height * cell, grid.width * cell, found.given) for nats in found.surprise]


@pytest.mark.parametrize("seed", range(12))
def test_the_maps_cells_sum_to_minus_the_log_likelihood(seed):
    flow, latents = random_case(seed)
    found = invert(flow, latents, models.text(flow, len(latents)))
    exact = flow.encode(latents, models.text(flow, len(latents))).log_likelihood
    cell, frame = flow.config.cell, [0, *range(1, 4 * latents.shape[1] - 3, flow.config.latent.temporal)]
    for surprise, likelihood in zip(of(flow, found, flow.grid(latents)), exact, strict=True):
        pixels = surprise.map
        assert pixels.shape == (flow.config.latent.frames(latents.shape[1]), surprise.height, surprise.width)
        once = pixels[frame[: latents.shape[1]], ::cell, ::cell]
        assert float(once.sum()) == pytest.approx(-float(likelihood), rel=1e-4, abs=1e-3)
        assert surprise.log_likelihood == pytest.approx(float(likelihood), rel=1e-4, abs=1e-3)
        assert surprise.bits_per_dim == pytest.approx(float(-likelihood) / latents[0].numel() / 0.6931472, rel=1e-4)
        assert sum(point["nats"] for point in surprise.curve()) == pytest.approx(-surprise.log_likelihood, abs=1e-3)


def test_every_pixel_shows_its_tokens_nats():
    config = models.config()  # a token covers 16 pixels and, after the first frame, 4 frames
    nats = torch.arange(18.0).view(3, 6)
    pixels = Surprise(nats, config, 32, 48).map
    for frame, row, column in ((0, 0, 0), (0, 31, 47), (1, 16, 15), (4, 16, 15), (5, 0, 16), (8, 15, 31)):
        latent = (frame + 3) // 4
        assert pixels[frame, row, column] == nats[latent, row // 16 * 3 + column // 16]
    assert set(pixels.unique().tolist()) == set(nats.flatten().tolist())


def test_the_curve():
    nats = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.0]])
    surprise = Surprise(nats, models.config(), 16, 32)
    assert surprise.curve() == [
        {"first": 0, "last": 0, "nats": 3.0, "largest": 2.0},
        {"first": 1, "last": 4, "nats": 2.0, "largest": 3.0},
        {"first": 5, "last": 8, "nats": 0.5, "largest": 0.5},
    ]
    assert replace(surprise, given=2).curve() == surprise.curve()[2:]


def test_the_mask_leaves_given_frames_out():
    nats = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    surprise = Surprise(nats, models.config(), 16, 32)
    mask = surprise.mask(1.0)
    assert mask.shape == (5, 16, 32)
    assert mask[0, :, 16:].all()
    assert mask[1:, :, :16].all()
    assert mask.sum() == 5 * 16 * 16
    assert replace(surprise, given=1).mask(-9.0)[0].sum() == 0
    assert replace(surprise, given=1).map.isnan().flatten(1).all(1).tolist() == [True, False, False, False, False]
    with pytest.raises(InputError, match="the threshold is nan; give a number of nats a token"):
        surprise.mask(float("nan"))


@pytest.mark.parametrize("window", [None, 3, 8])
def test_the_chain_rule(window):
    """Of frames a, then b: log p(a, b) = log p(a) + log p(b | a), token by token, in sliding windows, too."""
    flow, latents = models.flow(), models.randn(2, 7, 4, 2, 3, seed=4)
    text, options = models.text(flow, 2), {"window": window, "keep": None if window is None else 2}
    whole = invert(flow, latents, text, **options).surprise
    first = invert(flow, latents[:, :2], text, window=window).surprise
    rest = invert(flow, latents, text, given=2, **options)
    torch.testing.assert_close(whole[:, :2], first, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(whole[:, 2:], rest.surprise[:, 2:], atol=1e-3, rtol=1e-4)
    assert rest.log_likelihood == pytest.approx(-whole[:, 2:].flatten(1).sum(1), rel=1e-4)
