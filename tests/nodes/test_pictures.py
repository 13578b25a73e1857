"""The pictures that nodes show: rough previews of latents, and how a run converged."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.core import models
from tests.core.models import randn

from . import pack

plot, preview = pack.module("nodes.plot"), pack.module("nodes.preview")
PAPER, DARK, AMBER, BRIGHT = (22, 22, 28), (40, 12, 84), (249, 142, 9), (252, 255, 164)


def config(channels: int, **latent):
    """A model's configuration with that many latent channels."""
    found = models.config(channels=channels)
    return SimpleNamespace(latent=type(found.latent)(channels, 2, 4, **latent))


def test_a_preview_is_a_linear_map_of_normal_latents():
    """Red is the first channel, green the second with a bias, blue both with their signs changed; the way between
    two latents is smooth."""
    rgb, bias = ((1.0, 0.0, -1.0), (0.0, 1.0, -1.0)), (0.0, 0.5, 0.0)
    known = config(2, mean=(1.0, 0.0), std=(2.0, 4.0), later_factor=0.5, rgb=rgb, rgb_bias=bias)
    latent = torch.tensor([[[1.0, 2.0]], [[0.0, -4.0]]])  # normal: 0 and 0, then 0.5 and -1
    picture = preview.Preview(known).picture(latent[None])
    left, right = torch.tensor([0.5, 0.75, 0.5]), torch.tensor([0.75, 0.25, 0.75])
    row = torch.stack((left, 0.75 * left + 0.25 * right, 0.25 * left + 0.75 * right, right))
    torch.testing.assert_close(picture, row.expand(2, 4, 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("channels", "name"), [(4, "SD15"), (48, "Wan22")])
def test_without_factors_of_its_own_the_hosts_are_taken(channels, name):
    import comfy.latent_formats as formats

    known, latent = getattr(formats, name)(), randn(channels, 3, 5)
    bias = torch.tensor(getattr(known, "latent_rgb_factors_bias", None) or [0.0] * 3)
    wanted = (torch.tensordot(latent.movedim(0, -1), torch.tensor(known.latent_rgb_factors), 1) + bias + 1) / 2
    picture = preview.Preview(config(channels)).picture(latent[None])
    assert picture.shape == (6, 10, 3)
    torch.testing.assert_close(picture[::5, ::9], wanted[::2, ::4])  # the corners are no mixture


@pytest.mark.parametrize(("batch", "columns", "rows"), [(2, 2, 1), (3, 2, 2), (4, 2, 2), (5, 3, 2)])
def test_a_batch_is_shown_as_a_grid(batch, columns, rows):
    shown = preview.Preview(config(1, rgb=((1.0, 0.0, 0.0),), rgb_bias=(0.0, 0.0, 0.0)))
    levels = torch.linspace(-1, 1, batch)
    picture = shown.picture(levels.view(-1, 1, 1, 1).expand(-1, 1, 3, 4))
    height, width = 6 + 2 * preview.GAP, 8 + 2 * preview.GAP
    assert picture.shape == (rows * height, columns * width, 3)
    middles = picture[height // 2 :: height, width // 2 :: width, 0].flatten()
    wanted = torch.cat(((levels + 1) / 2, torch.zeros(rows * columns - batch)))
    torch.testing.assert_close(middles, wanted)
    assert not picture[: preview.GAP].any()


def test_a_preview_is_no_larger_than_it_is_shown():
    host = pack.module("nodes.host")
    one = preview.Preview(config(4)).picture(randn(1, 4, 30, 800))
    many = preview.Preview(config(4)).picture(randn(256, 4, 30, 40))
    assert one.shape == (38, 1024, 3)
    assert max(many.shape) <= host.PREVIEW_SIDE + 16 * 2 * preview.GAP


def test_where_nobody_knows_factors_there_is_no_picture(told):
    shown = preview.Preview(config(16))
    assert shown.picture(randn(1, 16, 3, 5)) is None
    sampling = pack.module("nodes.sampling")
    watch = sampling.Watch(pack.NODE_ID, shown)
    watch.show(sampling.Piece(0, randn(1, 16, 2, 3, 5), True))
    assert told.steps == [(0, 1)]
    assert told.previews == []


def statistics(*changes):
    """Of sweeps that are the first token and what each token changed by."""
    return SimpleNamespace(deep_changes=[(first, torch.tensor(change)) for first, change in changes])


def test_residuals_are_the_largest_of_each_frame():
    """Frames of 2 tokens; a span may begin and end within a frame."""
    found = plot.by_frame(statistics((0, [0.5, 0.25, 0.125]), (1, [0.0, 0.75]), (4, [1.0, 2.0])), 2)
    nan = np.nan
    np.testing.assert_equal(found, np.array([[0.5, 0.0, nan], [0.125, 0.75, nan], [nan, nan, 2.0]], np.float32))


def converged(*changes):
    """The picture for frames of 2 tokens, as bytes."""
    job = SimpleNamespace(height=16, width=32)
    picture = plot.convergence(statistics(*changes), job, models.config())
    assert picture.shape == (1, 432, 768, 3)
    return (picture[0] * 255).round().byte().numpy()


def test_convergence_shows_sweeps_across_and_frames_down():
    picture = converged((0, [0.0, 1e-2, 1e-9, 0.0]), (0, [1.0, 5.0, 1e-2, 0.0]), (2, [1e-3, 0.0]))
    columns, rows = (64 + 680 * np.arange(1, 6, 2) // 6, 44 + 340 * np.arange(1, 4, 2) // 4)
    cells = picture[rows[:, None], columns]
    between = tuple(np.round((187 + 249) / 2 + np.array([0, 55 + 142 - 187 - 249, 84 + 9 - 187 - 249]) / 2).astype(int))
    assert [tuple(cell) for cell in cells[0]] == [AMBER, BRIGHT, PAPER]
    assert [tuple(cell) for cell in cells[1]] == [DARK, AMBER, between]
    assert tuple(picture[44, 64]) == AMBER
    assert tuple(picture[43, 64]) == tuple(picture[44, 63]) == PAPER


def test_the_legend_goes_from_settled_to_changing():
    picture = converged((0, [1.0, 1.0]))
    scale = picture[16, 768 - 24 - 200 : 768 - 24]
    assert tuple(scale[0]) == DARK
    assert tuple(scale[-1]) == BRIGHT
    assert tuple(scale[149]) == tuple(plot._coloured(np.array([[10.0 ** (-8 + 8 * 149 / 199)]]))[0, 0])
    assert (scale.astype(int).sum(1)[1:] >= scale.astype(int).sum(1)[:-1] - 3).all()


def test_an_autoregressive_run_has_nothing_to_converge():
    picture = (plot.convergence(statistics(), SimpleNamespace(height=16, width=16), models.config())[0] * 255).round()
    assert {tuple(colour) for colour in picture[:200].flatten(0, 1).unique(dim=0).tolist()} == {PAPER}
    assert len(picture[210:240].flatten(0, 1).unique(dim=0)) > 1  # it says so
