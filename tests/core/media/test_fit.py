"""Fitting to a size."""

from __future__ import annotations

import pytest
import torch

from starflow_core import InputError
from starflow_core.media import fit, read_video, write_video
from tests.core.media.samples import noise


@pytest.mark.parametrize(
    ("old", "new"),
    [((32, 48), (16, 16)), ((32, 48), (64, 64)), ((33, 21), (16, 48)), ((480, 641), (96, 128)), ((7, 5), (96, 96))],
)
def test_fit_covers_and_crops_the_centre(old, new):
    height, width = old
    row = torch.linspace(-1, 1, height)[:, None].expand(old)
    column = torch.linspace(-1, 1, width).expand(old)
    fitted = fit(torch.stack([row, column, torch.full(old, 0.25)]), *new)
    assert fitted.shape == (3, *new)
    scale = max(new[0] / height, new[1] / width)
    for ramp, axis in ((fitted[0].mean(1), 0), (fitted[1].mean(0), 1)):
        seen = min(1.0, new[axis] / (old[axis] * scale))  # the part of this axis that is left
        assert abs(float(ramp[0] + ramp[-1])) < 0.06  # centred
        assert float(ramp[-1] - ramp[0]) == pytest.approx(2 * seen, abs=0.3)
        assert (ramp.diff() >= -1e-6).all()
    assert torch.allclose(fitted[2], torch.tensor(0.25))


def test_fit_keeps_what_fits():
    clip = noise(3)
    assert torch.equal(fit(clip, 32, 48), clip)
    assert torch.equal(fit(clip, 32, 16), clip[..., 16:32])
    assert torch.equal(fit(clip, 10, 48), clip[..., 11:21, :])


@pytest.mark.parametrize(("old", "new"), [((32, 48), (16, 16)), ((33, 21), (16, 48)), ((1, 300), (16, 16))])
def test_padding_shows_the_whole_picture_between_black_bars(old, new):
    fitted = fit(torch.ones(3, *old), *new, "pad")
    assert fitted.shape == (3, *new)
    seen = (fitted[0] > -1).nonzero()
    (top, left), (bottom, right) = seen.amin(0).tolist(), seen.amax(0).tolist()
    height, width = bottom - top + 1, right - left + 1
    scale = min(new[0] / old[0], new[1] / old[1])
    assert (height, width) == (max(1, round(old[0] * scale)), max(1, round(old[1] * scale)))
    assert abs(top - (new[0] - 1 - bottom)) <= 1
    assert abs(left - (new[1] - 1 - right)) <= 1
    assert (fitted == -1).sum() == 3 * (new[0] * new[1] - height * width)


def test_stretching_fills_the_size_with_all_of_the_picture():
    ramps = torch.stack([torch.linspace(-1, 1, 30)[:, None].expand(30, 60), torch.linspace(-1, 1, 60).expand(30, 60)])
    fitted = fit(torch.cat((ramps, ramps[:1])), 40, 40, "stretch")
    assert torch.allclose(fitted[0, :, 5], torch.linspace(-1, 1, 40), atol=0.05)
    assert torch.allclose(fitted[1, 5], torch.linspace(-1, 1, 40), atol=0.05)


def test_another_way_to_fit_is_refused():
    with pytest.raises(InputError, match="fit is 'zoom'; expected one of crop, pad, stretch"):
        fit(noise(1), 16, 16, "zoom")


def test_fit_of_a_clip_is_that_of_its_frames():
    clips = torch.stack([noise(2), noise(2, seed=1)])
    fitted = fit(clips, 24, 24)
    assert fitted.shape == (2, 2, 3, 24, 24)
    assert torch.allclose(fitted[1, 0], fit(clips[1, 0], 24, 24))


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a/"])
def test_frames_are_fitted_as_they_are_read(tmp_path, name):
    write_video(tmp_path / name, noise(3, 40, 64), 16)
    whole, fitted = read_video(tmp_path / name), read_video(tmp_path / name, size=(16, 16))
    assert torch.equal(fitted.pixels, fit(whole.pixels, 16, 16))
    assert fitted.fps == whole.fps


def test_fit_averages_when_it_shrinks():
    assert fit(noise(1, 128, 128, cell=1), 16, 16).std() < 0.15  # 0.58 before, 0.29 without antialiasing
