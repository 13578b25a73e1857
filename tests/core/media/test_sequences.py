"""Image sequences, and parts of clips."""

from __future__ import annotations

import os

import pytest
import torch

from starflow_core.errors import InputError
from starflow_core.media import pictures, read_video, videos, write_video
from starflow_core.media.pixels import from_bytes
from tests.core.media.samples import CLIPS, levels, noise


def test_folder_is_read_in_the_order_of_its_numbers(tmp_path):
    frames = noise(12)
    for i, frame in enumerate(frames):
        write_video(tmp_path / f"f{i}.png", frame[None], 0)
    (tmp_path / "notes.txt").write_text("x")
    write_video(tmp_path / "other_1.png", noise(1, 8, 8), 0)
    clip = read_video(tmp_path / "f%d.png")
    assert levels(clip.pixels, frames) <= 0.51
    assert clip.fps == 0
    with pytest.raises(InputError, match=r"other_1\.png is 8 x 8, f0\.png is 48 x 32"):
        read_video(tmp_path)


def test_sequence_names(tmp_path):
    write_video(tmp_path / "frames" / "x_%03d.jpg", noise(3), 16)
    names = sorted(os.listdir(tmp_path / "frames"))
    assert names == ["metadata.json", "x_000.jpg", "x_001.jpg", "x_002.jpg"]
    write_video(f"{tmp_path}/frames", noise(2), 8)
    assert sorted(os.listdir(tmp_path / "frames")) == ["00000.png", "00001.png", "metadata.json"]
    (tmp_path / "frames" / "mine.txt").write_text("x")
    with pytest.raises(InputError, match=r"contains other files \(mine\.txt\)"):
        write_video(tmp_path / "frames", noise(1), 8)


@pytest.mark.parametrize("name", CLIPS)
def test_reading_stops_at_the_frames_asked_for(tmp_path, name, monkeypatch):
    path = f"{tmp_path}/{name}"
    frames = noise(9)
    write_video(path, frames, 10)
    whole = read_video(path).pixels
    decoded = []
    for module in (pictures, videos):
        monkeypatch.setattr(module, "from_bytes", lambda array: decoded.append(1) or from_bytes(array))
    clip = read_video(path, frames=4)
    assert torch.equal(clip.pixels, whole[:4])
    assert clip.fps == 10
    assert len(decoded) == 4
    assert len(read_video(path, frames=50).pixels) == 9
