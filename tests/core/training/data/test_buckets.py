"""Shapes, windows and rates, and what is said of them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch

from starflow_core.errors import InputError
from starflow_core.media import fit, read_image, write_video
from starflow_core.model.config import Defaults
from starflow_core.training.data import buckets
from starflow_core.training.data.buckets import Bucket, Facts, assign, look
from starflow_core.training.data.folders import Item
from starflow_core.training.data.windows import read_windows
from tests.core import models
from tests.core.training.data.files import levels, numbers, write

CONFIG = models.config(window=5, defaults=Defaults(1.0, 32, frames=9, fps=16))


def dealt(facts: Facts, frames=9, fps=16.0, config=CONFIG, source: Facts | None = None):
    """Buckets and starts of one file with these facts, and the notes."""
    item = Item(Path("a"), "a caption", source=Path("b") if source else None)
    samples, notes = assign([item], config, 32, frames, fps, {Path("a"): facts, Path("b"): source}.get)
    return [(sample.bucket, sample.start) for sample in samples], notes


@pytest.mark.parametrize(("size", "aspect"), [((100, 100), "1:1"), ((90, 160), "16:9"), ((300, 130), "9:21")])
def test_the_nearest_ratio(size, aspect):
    [(bucket, start)], _ = dealt(Facts(*size))
    assert bucket == Bucket(aspect, *CONFIG.size(aspect, 32), 1)
    assert start == 0


@pytest.mark.parametrize(
    ("total", "frames", "length", "starts"),
    [
        (23, 9, 9, [0, 9]),
        (18, 9, 9, [0, 9]),
        (9, 9, 9, [0]),
        (8, 9, 5, [0]),
        (5, 9, 5, [0]),
        (80, 41, 17, [0, 17, 34, 51]),  # the window is 5 latent frames
        (4, 9, 1, [2]),  # too short: its middle
        (30, 1, 1, [15]),
    ],
)
def test_windows(total, frames, length, starts):
    found, notes = dealt(Facts(32, 32, total, Fraction(16)), frames)
    assert found == [(Bucket("1:1", 32, 32, length), start) for start in starts]
    assert notes.trimmed == (0 if length == 1 else total - length * len(starts))
    assert notes.stills == ([Path("a")] if length == 1 else [])


def test_clips_are_brought_to_the_rate():
    found, notes = dealt(Facts(32, 32, 36, Fraction(32)))
    assert [start for _, start in found] == [0, 9]
    assert (notes.shown, notes.trimmed, notes.slower) == (18, 0, [])
    found, notes = dealt(Facts(32, 32, 9, Fraction(8)))
    assert [start for _, start in found] == [0]
    assert (notes.shown, notes.trimmed, notes.slower) == (9, 8, [Path("a")])
    assert len(dealt(Facts(32, 32, 9, Fraction(0)))[0]) == 1  # without a rate of its own


@pytest.mark.parametrize("rate", [16, 8, 32, 24, Fraction(30000, 1001), 5])
def test_frames_at_a_rate_are_the_nearest_in_time(rate):
    """And there are as many as the file has, none beyond its end."""
    facts = Facts(8, 8, 40, Fraction(rate))
    count, step = facts.at(Fraction(16)), Fraction(rate) / 16
    nearest = [min(range(80), key=lambda i: (abs(i - frame * step), -i)) for frame in range(count + 1)]
    assert nearest[count - 1] <= 39 < nearest[count]


def test_an_image_model_sees_one_frame_of_each_clip():
    config = models.config("image", defaults=Defaults(1.0, 32))
    [(bucket, start)], notes = dealt(Facts(32, 32, 50, Fraction(16)), 1, 0, config)
    assert (bucket.frames, start) == (1, 25)
    assert notes.stills == [Path("a")]


def test_a_source_has_to_be_as_long():
    clip = Facts(32, 32, 18, Fraction(16))
    assert len(dealt(clip, source=clip)[0]) == 2
    assert len(dealt(clip, source=Facts(32, 32, 17, Fraction(16)))[0]) == 1
    with pytest.raises(InputError, match=f"{buckets.SHORT_SOURCE}: 1, a"):
        dealt(clip, source=Facts(32, 32, 8, Fraction(16)))


def test_notes_of_size():
    _, notes = dealt(Facts(64, 80))
    assert notes.cropped == [pytest.approx(0.2)]  # 5:4 in whole tokens is 32 x 32
    _, notes = dealt(Facts(20, 20))
    assert notes.enlarged == [Path("a")]
    _, notes = dealt(Facts(64, 70))
    assert notes.cropped == [pytest.approx(1 - 64 / 70)]
    assert notes.enlarged == []


def test_unreadable_files_are_left_out(tmp_path):
    good, bad, half = write(tmp_path / "a.png", "a"), tmp_path / "b.png", tmp_path / "c.mp4"
    bad.write_bytes(b"no picture")
    write(half, None, 9, 32, 32)
    half.write_bytes(half.read_bytes()[:-200])
    items = [Item(path, "x") for path in (bad, good, half)] + [Item(good, "x", 1, bad)]
    samples, notes = assign(items, CONFIG, 32, 9, 16)
    assert [sample.item for sample in samples] == [items[1]]
    assert notes.left_out == {buckets.UNREADABLE: [bad, half, bad]}
    with pytest.raises(
        InputError, match=r"no file can be used \(left out: can't be read: 1, .*b.png\); .*b.png cannot"
    ):
        assign(items[:1], CONFIG, 32, 9, 16)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp"])
def test_looking_at_clips(tmp_path, name):
    assert look(write(tmp_path / name, None, 7, 32, 48, 20)) == Facts(32, 48, 7, Fraction(20))


def test_looking_at_pictures(tmp_path):
    assert look(write(tmp_path / "a.png", None, 1, 20, 30)) == Facts(20, 30)


@pytest.mark.parametrize(
    ("rate", "spans", "wanted"),
    [
        (20, [(0, 5), (9, 5), (4, 1)], {(0, 5): [0, 1, 2, 3, 4], (4, 1): [4], (9, 5): [9, 10, 11, 12, 13]}),
        (10, [(1, 5)], {(1, 5): [2, 4, 6, 8, 10]}),
        (40, [(0, 5)], {(0, 5): [0, 1, 1, 2, 2]}),
        (16, [(0, 9)], {(0, 9): [0, 1, 3, 4, 5, 6, 8, 9, 10]}),
    ],
)
def test_windows_hold_the_nearest_frames(tmp_path, rate, spans, wanted):
    path = write(tmp_path / "a.gif", None, 20, fps=20)
    found = dict(read_windows(path, look(path), 16, 16, Fraction(rate), spans))
    assert {span: numbers(pixels) for span, pixels in found.items()} == wanted


def test_windows_are_scaled_and_cropped(tmp_path):
    path = write(tmp_path / "a.png", None, 1, 40, 64)
    torch.manual_seed(0)
    write_video(path, torch.rand(1, 3, 40, 64) * 2 - 1, 0)
    [(_, pixels)] = read_windows(path, look(path), 16, 16, Fraction(16), [(0, 1)])
    torch.testing.assert_close(pixels[0], fit(read_image(path), 16, 16))


def test_a_file_that_ends_early_is_named(tmp_path):
    path = write(tmp_path / "a.gif", None, 5)
    with pytest.raises(InputError, match=r"a.gif ended before frame 9"):
        list(read_windows(path, Facts(16, 16, 9, Fraction(20)), 16, 16, Fraction(20), [(0, 9)]))


def test_levels_are_told_apart():
    assert numbers(levels(20)) == list(range(20))


def test_windows_may_overlap():
    """A clip of 21 frames holds four windows of 9 frames that begin 4 apart, and nothing is trimmed."""
    facts, item = Facts(32, 32, 21, Fraction(16)), Item(Path("a"), "a caption")
    samples, notes = assign([item], CONFIG, 32, 9, 16, lambda path: facts, stride=4)
    assert [sample.start for sample in samples] == [0, 4, 8, 12]
    assert (notes.shown, notes.trimmed) == (21, 0)
