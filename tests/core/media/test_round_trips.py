"""Clips and pictures come back as they were written."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import product

import pytest
import torch
from PIL import Image

from starflow_core.media import Clip, read_image, read_metadata, read_video, video_frames, write_video
from tests.core.media.samples import CLIPS, COLOURS, METADATA, STILLS, flat, levels, noise, tolerance


@pytest.mark.parametrize("name", CLIPS)
def test_clip_comes_back(tmp_path, name, capfd):
    path = f"{tmp_path}/{name}"
    frames = flat(*COLOURS.values(), (128, 128, 128), (255, 200, 30))
    write_video(path, frames, 12, METADATA)
    clip = read_video(path)
    assert isinstance(clip, Clip)
    assert clip.fps == Fraction(12)
    assert clip.pixels.shape == frames.shape
    assert clip.pixels.dtype == torch.float32
    assert clip.pixels.abs().max() <= 1
    for frame, wanted in zip(clip.pixels, frames, strict=True):
        assert levels(frame, wanted) <= tolerance(name)
    assert read_metadata(path) == METADATA
    assert not list(tmp_path.rglob("*.part"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", CLIPS)
def test_frames_come_one_by_one(tmp_path, name):
    path = f"{tmp_path}/{name}"
    write_video(path, noise(5), 12)
    frames = video_frames(path)
    first = next(frames)
    assert torch.equal(torch.stack([first, *frames]), read_video(path).pixels)


@pytest.mark.parametrize("name", STILLS)
def test_picture_comes_back(tmp_path, name):
    for colour in COLOURS.values():
        frames = flat(colour, height=31, width=47)
        write_video(tmp_path / name, frames, 0, METADATA)
        assert levels(read_image(tmp_path / name), frames[0]) <= tolerance(name)
    assert read_metadata(tmp_path / name) == METADATA
    assert read_video(tmp_path / name).fps == 0


@pytest.mark.parametrize("name", CLIPS)
def test_one_frame_is_a_clip(tmp_path, name):
    path = f"{tmp_path}/{name}"
    write_video(path, noise(1), 20)
    clip = read_video(path)
    assert clip.pixels.shape == (1, 3, 32, 48)
    assert clip.fps == 20
    assert read_metadata(path) == {}


RATES = [Fraction(30000, 1001), Fraction(25, 2), 24, 60, Fraction(1, 2)]


@pytest.mark.parametrize(
    ("suffix", "fps"),
    [*product([".mp4", ".webm"], RATES), (".mp4", Fraction(120000, 1001))],  # webm holds whole nanoseconds
)
def test_rates_of_videos_are_exact(tmp_path, suffix, fps):
    path = tmp_path / f"a{suffix}"
    write_video(path, noise(5), fps)
    clip = read_video(path)
    assert clip.fps == fps
    assert len(clip.pixels) == 5


@pytest.mark.parametrize(("suffix", "step"), [(".gif", Fraction(1, 100)), (".webp", Fraction(1, 1000))])
@pytest.mark.parametrize("fps", [Fraction(24000, 1001), Fraction(25, 2), 24, 7, 50])
def test_rates_of_animations_are_right_to_half_a_step(tmp_path, suffix, step, fps):
    path = tmp_path / f"a{suffix}"
    write_video(path, noise(11, 8, 8), fps)
    clip = read_video(path)
    assert abs(11 / clip.fps - Fraction(11) / fps) <= step / 2
    if isinstance(fps, int):
        assert clip.fps == fps


def test_moving_detail_survives_mp4(tmp_path):
    frames = noise(6, 64, 64)
    write_video(tmp_path / "a.mp4", frames, 16)
    assert ((read_video(tmp_path / "a.mp4").pixels - frames) * 127.5).pow(2).mean().sqrt() < 12  # chroma is halved


def test_quality_changes_the_size(tmp_path):
    for suffix in (".mp4", ".webm", ".webp"):
        sizes = []
        for quality in (10, 95):
            write_video(tmp_path / f"a{suffix}", noise(4, 64, 64, cell=2), 16, quality=quality)
            sizes.append((tmp_path / f"a{suffix}").stat().st_size)
        assert sizes[0] < 0.7 * sizes[1]


def test_odd_sizes(tmp_path):
    frames = flat((255, 0, 0), height=31, width=47)
    for suffix, size in ((".mp4", (32, 48)), (".webm", (32, 48)), (".gif", (31, 47)), (".webp", (31, 47))):
        write_video(tmp_path / f"a{suffix}", frames, 16)
        pixels = read_video(tmp_path / f"a{suffix}").pixels
        assert pixels.shape[-2:] == size
        assert levels(pixels, frames[:, :, :1, :1]) <= tolerance(f"a{suffix}")


def test_values_beyond_the_range_are_clipped(tmp_path):
    write_video(tmp_path / "a.png", torch.full((1, 3, 8, 8), 1.5), 0)
    assert (read_image(tmp_path / "a.png") == 1).all()


def test_half_precision_and_gradients_are_written(tmp_path):
    frames = noise(1).bfloat16().requires_grad_()
    write_video(tmp_path / "a.png", frames, 0)
    assert levels(read_image(tmp_path / "a.png"), frames[0].detach().float()) <= 0.51


@pytest.mark.parametrize("name", CLIPS)
def test_pieces_equal_all_at_once(tmp_path, name):
    frames = noise(9)
    write_video(f"{tmp_path}/once_{name}", frames, 16)
    write_video(f"{tmp_path}/pieces_{name}", iter(frames.split([1, 0, 5, 3])), 16)
    once, pieces = (read_video(f"{tmp_path}/{kind}_{name}") for kind in ("once", "pieces"))
    assert pieces.fps == once.fps
    assert torch.equal(pieces.pixels, once.pixels)


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize(("height", "width"), [(96, 96), (272, 480)])
def test_equal_frames_give_equal_bytes(tmp_path, suffix, height, width):
    frames = noise(33, height, width)
    for name in ("a", "b"):
        write_video(tmp_path / f"{name}{suffix}", frames, 16, METADATA)
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_webp_has_what_comfyui_reads_back(tmp_path):
    """ComfyUI's page takes the workflow from EXIF texts that begin with their key."""
    graph = {"1": {"class_type": "A", "inputs": {"text": "a: b"}}}
    metadata = {"prompt": graph, "workflow": {"nodes": []}, "seed": 5}
    write_video(tmp_path / "a.webp", noise(3), 8, metadata)
    exif = Image.open(tmp_path / "a.webp").getexif()
    assert json.loads(exif[0x0110].removeprefix("prompt:")) == graph
    assert json.loads(exif[0x010F].removeprefix("workflow:")) == {"nodes": []}
    assert read_metadata(tmp_path / "a.webp") == metadata


def test_first_picture_of_a_sequence_has_the_metadata(tmp_path):
    write_video(f"{tmp_path}/a/", noise(2), 8, {"seed": 5})
    assert [read_metadata(file).get("seed") for file in sorted((tmp_path / "a").glob("*.png"))] == [5, None]
