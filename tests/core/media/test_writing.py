"""Writing frame by frame, and what cannot be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch

from starflow_core.errors import InputError, NonFiniteError, StarflowError
from starflow_core.media import Sound, VideoWriter, check_writable, read_metadata, read_video, write_video
from tests.core.media.samples import CLIPS, METADATA, STILLS, file_size_limit, noise


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animations_grow_frame_by_frame(tmp_path, suffix):
    """Frames go to the disk as they come; nothing is collected until the end."""
    with VideoWriter(tmp_path / f"a{suffix}", 16) as writer:
        sizes = []
        for frame in noise(40, 64, 64, cell=1).split(10):
            writer.add(frame)
            (part,) = tmp_path.iterdir()
            sizes.append(part.stat().st_size)
    assert sizes[0] > 0
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("name", [*CLIPS, "a.png"])
def test_nothing_is_left_after_an_error(tmp_path, name, error):
    def frames():
        yield noise(1 if name == "a.png" else 30)
        raise error("stop")

    with pytest.raises(error, match="stop"):
        write_video(f"{tmp_path}/{name}", frames(), 16, METADATA)
    assert [path for path in tmp_path.rglob("*") if path.is_file() or path.suffix == ".part"] == []


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a/"])
def test_an_error_keeps_the_older_clip(tmp_path, name):
    def broken():
        yield noise(5)
        raise RuntimeError

    path = f"{tmp_path}/{name}"
    write_video(path, noise(3), 16, {"seed": 1})
    with pytest.raises(RuntimeError):
        write_video(path, broken(), 16, {"seed": 2})
    assert read_metadata(path) == {"seed": 1}
    assert len(read_video(path).pixels) == 3
    write_video(path, noise(5), 16, {"seed": 2})
    assert read_metadata(path) == {"seed": 2}
    assert len(read_video(path).pixels) == 5
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", CLIPS)
def test_full_disk(tmp_path, name):
    with pytest.raises(StarflowError, match="disk is full") as caught, file_size_limit(3000):
        write_video(f"{tmp_path}/{name}", (noise(1, 96, 96, cell=1, seed=i) for i in range(60)), 16, {"seed": 1})
    assert name.rstrip("/") in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file() or path.suffix == ".part"] == []


def test_bad_frames(tmp_path):
    bad = noise(4)
    bad[2, 1, 3, 4] = float("nan")
    with pytest.raises(NonFiniteError, match="frame 5"):
        write_video(tmp_path / "a.mp4", [noise(3), bad], 16)
    with pytest.raises(InputError, match="expected"):
        write_video(tmp_path / "a.mp4", torch.zeros(4, 8, 8, 3), 16)
    with pytest.raises(InputError, match="one size"):
        write_video(tmp_path / "a.mp4", [noise(1), noise(1, 16, 16)], 16)
    with pytest.raises(InputError, match="one picture"):
        write_video(tmp_path / "a.png", noise(2), 16)
    with pytest.raises(InputError, match="no frames"):
        write_video(tmp_path / "a.mp4", [], 16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [*CLIPS, *STILLS, "new/er/a.mp4", "a:b.mp4", "100%d.mp4", "no_suffix"])
def test_check_writable_leaves_nothing(tmp_path, name):
    check_writable(f"{tmp_path}/{name}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "frames", "message"),
    [
        ("a.avi", None, "known are .mp4"),
        ("a.png", 81, "takes one picture, not 81"),
        ("text.txt/a.mp4", None, "another folder"),
        ("text.txt", None, "unknown format"),
        ("x" * 300 + ".mp4", None, "another folder or name"),
        ("nul\0.mp4", None, "another folder or name"),
        ("full", None, "contains other files"),
        ("full/%04d.png", None, "contains other files"),
    ],
)
def test_check_writable_refuses(tmp_path, name, frames, message):
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "holiday.png").write_text("x")
    with pytest.raises(InputError, match=message) as caught:
        check_writable(f"{tmp_path}/{name}", frames)
    assert Path(name).parts[0] in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["full", "text.txt"]


def test_check_writable_without_permission(tmp_path, monkeypatch):
    def denied(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    with pytest.raises(InputError, match=r"a\.mp4 cannot be written \(Permission denied\)"):
        check_writable(tmp_path / "a.mp4")


def test_missing_encoder_names_another_format(tmp_path, monkeypatch):
    import av
    from PIL import features

    monkeypatch.setattr(av, "codecs_available", set())
    monkeypatch.setattr(features, "check", lambda _: False)
    for name, encoder in (("a.mp4", "libx264"), ("a.webm", "libvpx-vp9"), ("a.webp", "webp")):
        with pytest.raises(InputError, match=rf"{encoder} is not in this installation; write \.gif"):
            check_writable(tmp_path / name)
    check_writable(tmp_path / "a.gif")


@pytest.mark.parametrize(
    ("name", "fps", "limit"),
    [("a.mp4", 0, 1000), ("a.gif", 60, 50), ("a.webp", 100, 90), ("a.mp4", -3, 1000), ("a.mp4", float("nan"), 1000)],
)
def test_impossible_rates(tmp_path, name, fps, limit):
    with pytest.raises(InputError, match=f"to {limit} a second"):
        VideoWriter(tmp_path / name, fps)


def test_impossible_settings(tmp_path):
    with pytest.raises(InputError, match="0 to 100"):
        VideoWriter(tmp_path / "a.mp4", 16, quality=101)
    with pytest.raises(InputError, match=r"does not fit into \.jpg; write \.png"):
        VideoWriter(tmp_path / "a.jpg", 0, {"workflow": "x" * 70000})
    for metadata in ({"Seed": 1}, {"two words": 1}, {"encoder": "x"}, {"": 1}):
        with pytest.raises(InputError, match="lower-case name"):
            VideoWriter(tmp_path / "a.mp4", 16, metadata)
    for value in (torch.zeros(2), float("nan"), "\ud800"):
        with pytest.raises(InputError, match="'thing' cannot be stored"):
            VideoWriter(tmp_path / "a.mp4", 16, {"thing": value})
    assert list(tmp_path.iterdir()) == []


def test_relative_names_that_look_like_protocols(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video("concat:b.mp4", noise(2), 16)
    assert len(read_video("concat:b.mp4").pixels) == 2


TONE = Sound(0.5 * torch.sin(torch.arange(32000) / 10).expand(2, -1), 16000)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.mp4", {"codec": "vp9"}, "codec 'vp9' doesn't go into .mp4; known are h264, h265, av1"),
        ("a.gif", {"codec": "h265"}, "codec 'h265' is for videos; leave it out, or write .mp4"),
        ("a.gif", {"plays": -1}, "plays is -1: expected 0 .without end. to 65535"),
        ("a.mp4", {"sound": Sound(torch.zeros(2, 3, 4), 16000)}, r"sound of shape \(2, 3, 4\): expected 1, 2, 6 or 8"),
        (
            "a.mp4",
            {"sound": Sound(torch.zeros(3, 4), 16000)},
            r"sound of shape \(3, 4\): expected 1, 2, 6 or 8 channels",
        ),
        ("a.mp4", {"sound": Sound(torch.zeros(1, 4), 0)}, "sound of 0 samples a second: expected 1000 to 384000"),
        ("a.mp4", {"sound": Sound(torch.full((1, 4), torch.nan), 16000)}, "the sound contains NaN or infinity"),
    ],
)
def test_codecs_sounds_and_loops_that_cannot_be_are_refused(tmp_path, name, options, message):
    with pytest.raises(StarflowError, match=message):
        VideoWriter(tmp_path / name, 16, **options)
    assert not list(tmp_path.iterdir())


def test_an_encoder_that_is_missing_is_named(monkeypatch, tmp_path):
    import av

    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libsvtav1"})
    with pytest.raises(InputError, match="the encoder libsvtav1 is not in this installation of PyAV; use h264"):
        VideoWriter(tmp_path / "a.mp4", 16, codec="av1")


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "h265"), ("a.mp4", "av1"), ("a.webm", "av1")])
def test_newer_codecs_keep_pictures_metadata_and_sound(tmp_path, name, codec):
    """Of odd sizes, too."""
    clip = noise(5, 72, 80)[..., :71, :]
    with VideoWriter(tmp_path / name, 10, {"seed": 1}, codec=codec, sound=TONE) as writer:
        writer.add(clip)
    written = read_video(tmp_path / name)
    assert written.fps == 10
    assert written.pixels.shape == (5, 3, 72, 80)
    assert (written.pixels[..., :71, :] - clip).abs().mean() < 0.1
    assert read_metadata(tmp_path / name) == {"seed": 1}


def test_frames_that_an_encoder_cannot_hold_are_refused(tmp_path):
    message = "h265 takes frames of 64 x 64 or more, not 48 x 32; use h264"
    with pytest.raises(InputError, match=message), VideoWriter(tmp_path / "a.mp4", 10, codec="h265") as writer:
        writer.add(noise(2, 32, 48))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("frames", "seconds"), [(5, 0.5), (40, 2.0)])
def test_sound_is_as_long_as_the_frames_at_most(tmp_path, frames, seconds):
    import av

    with VideoWriter(tmp_path / "a.mp4", 10, sound=TONE) as writer:
        writer.add(noise(frames))
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.audio[0]
        assert float(stream.duration * stream.time_base) == pytest.approx(seconds, abs=0.05)
        order = [packet.stream.type for packet in container.demux() if packet.size]
    assert "audio" in order[: len(order) // 2]  # beside the pictures, not behind them
