"""Files that cannot be read."""

from __future__ import annotations

import logging
import warnings
from contextlib import suppress
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from starflow_core.errors import InputError
from starflow_core.media import pictures, read_image, read_metadata, read_video, videos, write_video
from tests.core.media.samples import noise


@pytest.mark.parametrize("read", [read_image, read_video, read_metadata])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp", "a.mp4", "a.webm"])
def test_unreadable_files(tmp_path, read, name, capfd):
    path = tmp_path / name
    with pytest.raises(InputError, match="no such file or folder; check the path"):
        read(path)
    for content in (b"", b"just a text", np.random.default_rng(0).bytes(5000)):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"cannot be read as a .*export it again") as caught:
            read(path)
        assert str(path) in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.webp", "a.png", "a.jpg"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.9, 0.97])
def test_truncated_files(tmp_path, name, part, capfd):
    path = tmp_path / name
    write_video(path, noise(1 if name[2:] in ("png", "jpg") else 20, 64, 64, cell=2), 16)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(InputError, match=rf"{name}.*again"):
        read_video(path)
    assert capfd.readouterr() == ("", "")


def test_mp4_cut_between_frames_is_truncated(tmp_path):
    """The decoder alone would give a shorter clip."""
    import av

    path = tmp_path / "a.mp4"
    write_video(path, noise(12, 64, 64), 16)
    with av.open(str(path)) as container:
        ends = [packet.pos + packet.size for packet in container.demux() if packet.size]
    path.write_bytes(path.read_bytes()[: ends[6]])
    with pytest.raises(InputError, match="truncated"):
        read_video(path)


def test_missing_things(tmp_path):
    for name in ("nothing", "nothing/", "nothing/%d.png"):
        for read in (read_video, read_metadata):
            with pytest.raises(InputError, match="no such file or folder"):
                read(f"{tmp_path}/{name}")
    with pytest.raises(InputError, match="is a folder"):
        read_image(tmp_path)
    with pytest.raises(InputError, match="contains no pictures"):
        read_video(tmp_path)
    with pytest.raises(InputError, match="at least 1"):
        read_video(tmp_path / "a.mp4", frames=0)


@pytest.mark.parametrize("place", [6, 8])
def test_a_gif_whose_header_says_that_it_is_huge(tmp_path, place):
    """Width and height are at bytes 6 and 8."""
    path = tmp_path / "a.gif"
    write_video(path, torch.zeros(2, 3, 16, 16), 10)
    data = bytearray(path.read_bytes())
    data[place : place + 2] = (32560).to_bytes(2, "little")
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.gif says that it is .*32560.* Scale it down"):
        read_video(path)


def test_an_animation_that_says_more_than_its_bytes_can_tell(tmp_path, monkeypatch):
    """Its frames are small, but each would be put on a canvas of the size that the header says."""
    monkeypatch.setattr(pictures, "LIKELY_AREA", 2 << 20)
    path = tmp_path / "a.gif"
    write_video(path, torch.zeros(3, 3, 16, 16), 10)
    data = bytearray(path.read_bytes())
    for side, most in ((1024, 2), (2048, 0)):
        data[6:10] = 2 * side.to_bytes(2, "little")
        path.write_bytes(data)
        for count, read in ((3, read_video), (2, partial(read_video, frames=2)), (1, read_image)):
            if count <= most:
                read(path)
                continue
            with pytest.raises(InputError, match=f"{count} x {side} x {side} pixels, but it has only {len(data)} byte"):
                read(path)


def test_a_flat_picture_is_larger_than_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "LIKELY_AREA", 0)
    Image.new("RGB", (600, 600)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").shape == (3, 600, 600)


def test_a_clip_that_ends_early(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    write_video(path, torch.zeros(40, 3, 32, 32), 10)
    monkeypatch.setattr(videos, "islice", lambda frames, stop: islice(frames, 30))
    with pytest.raises(InputError, match="should have 40 frames, but only 30 can be read"):
        read_video(path)
    assert len(read_video(path, 20).pixels) == 30


def test_pillow_logs_nothing_to_the_terminal(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])  # pytest's, which would take what is logged
    path = tmp_path / "a.tif"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    samples = np.array([277, 3, 1, 0], "<u2").tobytes()  # SamplesPerPixel
    assert samples + b"\3" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(samples + b"\3\0", samples + b"\3\1"))
    with pytest.raises(InputError, match="cannot be read as a picture"):
        read_image(path)
    assert capfd.readouterr() == ("", "")


def test_a_picture_with_odd_tags_is_read_in_silence(tmp_path, capfd):
    path = tmp_path / "a.tif"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    data = path.read_bytes()
    offset = int.from_bytes(data[4:8], "little")
    count = int.from_bytes(data[offset : offset + 2], "little")
    odd = bytearray(data)
    last = offset + 2 + 12 * (count - 1)
    odd[last : last + 12] = np.array([65000, 5, 9, 0, 0xFFFF, 0xFFFF], "<u2").tobytes()  # a tag far outside the file
    path.write_bytes(odd)
    with warnings.catch_warnings(record=True) as seen, suppress(InputError):
        warnings.simplefilter("always")
        read_image(path)
    assert not seen
    assert capfd.readouterr().err == ""
