"""What is known of a clip under a mask, and what stands in for the rest."""

from __future__ import annotations

import pytest
import torch

from starflow_core.errors import InputError
from starflow_core.jobs import masks
from starflow_core.jobs.masks import checked_mask, joined, known_cells, outpainted, parted, stand_in
from tests.core import models

CONFIG = models.config()  # cells of 16 x 16 pixels, 4 frames each after the first


def blank(frames=9, height=48, width=64):
    return torch.zeros(frames, height, width)


def test_a_cell_is_known_only_if_all_its_pixels_are():
    mask = blank()
    mask[6, 20, 33] = 1  # the fourth frame on stands in the second latent frame from 5 to 8
    known = known_cells(CONFIG, mask > 0)
    assert known.shape == (3, 3, 4)
    assert (~known).nonzero().tolist() == [[2, 1, 2]]
    mask = blank()
    mask[0, 15, 16] = 1
    assert (~known_cells(CONFIG, mask > 0)).nonzero().tolist() == [[0, 0, 1]]


def test_an_image_has_one_frame():
    config = models.config("image", patch_size=2)  # 2 x 2 cells of 8 pixels a token
    mask = torch.zeros(1, 32, 48)
    mask[0, 31, 0] = 1
    known = known_cells(config, mask > 0)
    assert known.shape == (1, 2, 3)
    assert (~known).nonzero().tolist() == [[0, 1, 0]]


def test_one_mask_serves_all_frames_and_grey_counts_as_masked():
    mask = torch.zeros(48, 64)
    mask[3, 4] = 0.1
    for given in (mask, mask[None]):
        checked = checked_mask(given, torch.zeros(9, 3, 48, 64))
        assert checked.shape == (9, 48, 64)
        assert checked.sum() == 9


@pytest.mark.parametrize(("mask", "message"), [
    (torch.ones(1, 48, 60), "the mask is of 60 x 48, the frames are 64 x 48; give a mask of that size"),
    (torch.ones(3, 48, 64), "the mask has 3 frames, the clip 9; give one mask, or one for each frame"),
    (torch.zeros(1, 48, 64), "the mask is empty, so nothing is to be filled"),
    (torch.full((1, 48, 64), torch.nan), "the mask has values that are no numbers"),
])  # fmt: skip
def test_bad_masks_are_refused(mask, message):
    with pytest.raises(InputError, match=message):
        checked_mask(mask, torch.zeros(9, 3, 48, 64))


def test_nothing_known_is_refused():
    mask = torch.zeros(9, 48, 64, dtype=torch.bool)
    mask[:, ::16, ::16] = True
    with pytest.raises(InputError, match="no cell of 16 x 16 pixels wholly known"):
        known_cells(CONFIG, mask)


def test_what_stands_in_does_not_depend_on_what_was_masked():
    pixels, other = models.randn(9, 3, 32, 48), models.randn(9, 3, 32, 48, seed=1)
    mask = models.randn(9, 32, 48, seed=2) > 1
    mask[:, :, 30:], mask[4:7] = True, True
    other = torch.where(mask.unsqueeze(1), other, pixels)
    one, two = stand_in(pixels, mask), stand_in(other, mask)
    assert torch.equal(one, two)
    assert torch.equal(torch.where(mask.unsqueeze(1), 0, one), torch.where(mask.unsqueeze(1), 0, pixels))


def test_what_stands_in_goes_on_with_what_is_around():
    pixels = torch.zeros(5, 3, 16, 32)
    pixels[:, 0, :, :16] = torch.linspace(-1, 1, 5).view(-1, 1, 1)
    mask = torch.zeros(5, 16, 32, dtype=torch.bool)
    mask[:, :, 16:] = True
    mask[2:4] = True
    filled = stand_in(pixels, mask)
    expected = torch.linspace(-1, 1, 5).view(-1, 1, 1).expand(5, 16, 32)
    assert torch.allclose(filled[:, 0], expected, atol=1e-5)


def test_a_wide_mask_is_continued_in_few_passes(monkeypatch):
    """Each pixel is visited a few times, however wide the mask is."""
    passes, spread = [], masks._spread
    monkeypatch.setattr(masks, "_spread", lambda *given: passes.append(given[0].numel()) or spread(*given))
    pixels, mask = models.randn(2, 3, 240, 424), torch.zeros(2, 240, 424, dtype=torch.bool)
    mask[:, :, 40:] = True
    filled = stand_in(pixels, mask)
    assert sum(passes) < 1.5 * pixels.numel()  # each a fourth of the one before
    assert torch.isfinite(filled).all()
    assert torch.equal(filled[..., :40], pixels[..., :40])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 13), (33, 48)])
def test_what_stands_in_is_between_what_is_known(height, width):
    pixels, mask = models.randn(2, 3, height, width), torch.ones(2, height, width, dtype=torch.bool)
    mask[:, height // 2, :: max(width // 3, 1)] = False
    filled, known = stand_in(pixels, mask), pixels.movedim(1, -1)[~mask]
    assert filled.amin() >= known.amin() - 1e-6
    assert filled.amax() <= known.amax() + 1e-6


def test_a_mask_may_be_empty_where_there_is_more_to_fill():
    assert not checked_mask(torch.zeros(1, 48, 64), torch.zeros(9, 3, 48, 64), may_be_empty=True).any()


def test_pixels_and_mask_are_joined_and_parted():
    pixels, mask = models.randn(2, 3, 4, 4), models.randn(2, 4, 4) > 0
    one, two = parted(joined(pixels, mask))
    assert torch.equal(one, pixels)
    assert torch.equal(two, mask.float())


@pytest.mark.parametrize("gone", [slice(0, 2), slice(3, 5)])
def test_frames_at_an_end_are_the_nearest_one(gone):
    pixels = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 16, 16)
    mask = torch.zeros(5, 16, 16, dtype=torch.bool)
    mask[gone] = True
    assert stand_in(pixels, mask)[gone].unique().tolist() == [2.0]


def test_outpainting_masks_what_is_added():
    pixels = models.randn(2, 3, 16, 16)
    larger, mask = outpainted(pixels, 1, 2, 3, 4)
    assert larger.shape == (2, 3, 22, 20)
    assert torch.equal(larger[:, :, 2:18, 1:17], pixels)
    assert mask.sum() == 2 * (22 * 20 - 256)
    assert not mask[:, 2:18, 1:17].any()
    with pytest.raises(InputError, match="the margin on the top is -2 pixels"):
        outpainted(pixels, 1, -2, 3, 4)
    wide = torch.zeros(1, 3, 8, 16)
    outpainted(wide, 16, 8, 16, 8)
    for margins, words in (((17, 0, 0, 0), "left is 17 .* 0 to 16"), ((0, 0, 0, 9), "bottom is 9 .* 0 to 8")):
        with pytest.raises(InputError, match=words):
            outpainted(wide, *margins)
