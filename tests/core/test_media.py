from __future__ import annotations

import json
import os
import tempfile
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from starflow_core.errors import InputError, NonFiniteError, StarflowError
from starflow_core.media import (
    Clip,
    VideoWriter,
    animations,
    check_writable,
    containers,
    fit,
    pictures,
    read_image,
    read_metadata,
    read_video,
    write_video,
)

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255,) * 3, "black": (0,) * 3}
CLIPS = ["a.mp4", "a.webm", "a.gif", "a.webp", "a/", "a/frame_%03d.png", "a/%d.jpg"]
STILLS = ["a.png", "a.jpg", "a.webp"]
METADATA = {
    "prompt": '一个红色的球 "moves" \\ left\nand up',
    "seed": 2**40 + 1,
    "settings": {"guidance": 3.5, "solver": None, "sizes": [480, 848]},
    "workflow": "é" * 9000,
}
# Largest error in 8-bit levels of flat colours at the default quality.
TOLERANCE = {".gif": 0, ".png": 0, ".jpg": 2, ".webp": 3}


def flat(*colours, height=32, width=48) -> torch.Tensor:
    """Frames of one colour each, (F, 3, H, W)."""
    rows = torch.tensor(colours, dtype=torch.float32) / 127.5 - 1
    return rows[:, :, None, None].expand(-1, -1, height, width)


def noise(frames, height=32, width=48, cell=8, seed=0) -> torch.Tensor:
    """Random blocks, different in each frame."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(frames, 3, height // cell, width // cell, generator=generator) * 2 - 1
    return small.repeat_interleave(cell, -1).repeat_interleave(cell, -2)


def levels(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference in 8-bit levels."""
    return float((a - b).abs().max() * 127.5)


def tolerance(name: str) -> float:
    return TOLERANCE.get(Path(name).suffix or ".png", 3) + 0.51


@contextmanager
def file_size_limit(limit: int):
    """As a disk that is full: no file of this process may grow beyond `limit` bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Round trips


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


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("fps", [Fraction(30000, 1001), Fraction(25, 2), 24, 60, Fraction(1, 2)])
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


# Streaming


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


# What can be written


@pytest.mark.parametrize("name", [*CLIPS, *STILLS, "new/er/a.mp4", "a:b.mp4", "100%d.mp4", "no_suffix"])
def test_check_writable_leaves_nothing(tmp_path, name):
    check_writable(f"{tmp_path}/{name}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "frames", "message"),
    [
        ("a.avi", None, "known are .mp4"),
        ("a.png", 81, "holds one picture, not 81"),
        ("text.txt/a.mp4", None, "another folder"),
        ("text.txt", None, "unknown format"),
        ("x" * 300 + ".mp4", None, "another folder or name"),
        ("nul\0.mp4", None, "another folder or name"),
        ("full", None, "holds other files"),
        ("full/%04d.png", None, "holds other files"),
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


# Metadata of other programs


def test_metadata_of_other_programs(tmp_path):
    import av

    tags = {"prompt": '{"3": {"inputs": {"text": "\\u7403"}}}', "workflow": '{"nodes": []}', "comment": "a holiday"}
    for suffix in (".mp4", ".webm"):
        options = {"movflags": "use_metadata_tags"} if suffix == ".mp4" else {}
        with av.open(str(tmp_path / f"a{suffix}"), "w", container_options=options) as container:
            container.metadata.update(tags)
            stream = container.add_stream("libvpx-vp9", rate=16)
            stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
            picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
        expected = {"prompt": {"3": {"inputs": {"text": "球"}}}, "workflow": {"nodes": []}}
        assert read_metadata(tmp_path / f"a{suffix}") == expected

    picture = Image.new("RGB", (8, 8))
    picture.save(tmp_path / "plain.gif", comment="made by hand \xe9")
    exif = Image.Exif()
    exif[0x010E] = "a sunset"  # the description
    picture.save(tmp_path / "plain.jpg", exif=exif)
    for name in ("plain.gif", "plain.jpg"):
        assert read_metadata(tmp_path / name) == {}
    (tmp_path / "folder").mkdir()
    picture.save(tmp_path / "folder" / "1.png")
    (tmp_path / "folder" / "metadata.json").write_text('{"camera": 1}')
    assert read_metadata(tmp_path / "folder") == {}
    assert read_video(tmp_path / "folder").fps == 0


# Pictures of all kinds


def test_orientation_is_applied(tmp_path):
    picture = Image.new("RGB", (4, 2))
    picture.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side: turn it clockwise
    picture.save(tmp_path / "a.png", exif=exif)
    pixels = read_image(tmp_path / "a.png")
    assert pixels.shape == (3, 4, 2)
    assert pixels[:, 0, 1].tolist() == [1, -1, -1]


def test_transparency_lies_over_black(tmp_path):
    picture = Image.new("RGBA", (3, 1), (255, 255, 255, 0))
    picture.putpixel((1, 0), (255, 0, 0, 255))
    picture.putpixel((2, 0), (255, 255, 255, 128))
    picture.save(tmp_path / "a.png")
    expected = torch.tensor([[-1, -1, -1], [1, -1, -1], [128 / 127.5 - 1] * 3]).T[:, None]
    assert levels(read_image(tmp_path / "a.png"), expected) < 0.51
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    assert read_image(tmp_path / "p.png")[:, 0].T.tolist() == [[-1, -1, -1], [-1, 1, -1]]


def test_kinds_of_pixels(tmp_path):
    ramp = np.linspace(0, 65535, 300).astype(np.uint16).reshape(3, 100)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    expected = torch.from_numpy(ramp.astype(np.float32)) / 32767.5 - 1
    assert torch.allclose(read_image(tmp_path / "deep.png"), expected.expand(3, -1, -1), atol=1e-6)
    for mode, value in (("L", 200), ("1", 1), ("CMYK", (0, 255, 255, 0)), ("LA", (10, 255))):
        name = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        picture = Image.new(mode, (5, 4), value)
        picture.save(name)
        wanted = torch.tensor(picture.convert("RGB").getpixel((0, 0))) / 127.5 - 1
        pixels = read_image(name)
        assert pixels.shape == (3, 4, 5)
        assert levels(pixels, wanted[:, None, None]) < 0.01
    Image.new("F", (4, 4)).save(tmp_path / "float.tif")
    with pytest.raises(InputError, match="8 or 16 bits"):
        read_image(tmp_path / "float.tif")


def test_rotated_video_is_turned_upright(tmp_path):
    path = tmp_path / "a.mp4"
    frames = flat((0, 0, 0), height=32, width=64).clone()
    frames[:, 0, :, :16] = 1  # red on the left
    write_video(path, frames, 16)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44
    one = 1 << 16
    turned = (0, one, 0, -one & 0xFFFFFFFF, 0, 0, 0, 0, 1 << 30)  # by 90 degrees clockwise
    data[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big") for value in turned)
    path.write_bytes(data)
    pixels = read_video(path).pixels
    assert pixels.shape == (1, 3, 64, 32)
    assert pixels[0, 0, :12].min() > 0.9
    assert pixels[0, 0, 20:].max() < -0.9


# Files that cannot be read


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
    with pytest.raises(InputError, match="holds no pictures"):
        read_video(tmp_path)
    with pytest.raises(InputError, match="at least 1"):
        read_video(tmp_path / "a.mp4", frames=0)


# Sequences and parts of clips


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
    with pytest.raises(InputError, match=r"holds other files \(mine\.txt\)"):
        write_video(tmp_path / "frames", noise(1), 8)


@pytest.mark.parametrize("name", CLIPS)
def test_reading_stops_at_the_frames_asked_for(tmp_path, name, monkeypatch):
    path = f"{tmp_path}/{name}"
    frames = noise(9)
    write_video(path, frames, 10)
    whole = read_video(path).pixels
    decoded = []
    for module, converter in ((pictures, "pixels_of"), (animations, "pixels_of"), (containers, "_rgb")):
        original = getattr(module, converter)
        monkeypatch.setattr(module, converter, lambda *a, original=original: decoded.append(1) or original(*a))
    clip = read_video(path, frames=4)
    assert torch.equal(clip.pixels, whole[:4])
    assert clip.fps == 10
    assert len(decoded) == 4
    assert len(read_video(path, frames=50).pixels) == 9


# Fitting to a size


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
