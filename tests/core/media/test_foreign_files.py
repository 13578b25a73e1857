"""Files of other programs."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from starflow_core.errors import InputError
from starflow_core.media import read_image, read_metadata, read_video, write_video
from tests.core.media.samples import COLOURS, flat, levels


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


def test_orientation_is_applied(tmp_path):
    picture = Image.new("RGB", (4, 2))
    picture.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side: turn it clockwise
    picture.save(tmp_path / "a.png", exif=exif)
    pixels = read_image(tmp_path / "a.png")
    assert pixels.shape == (3, 4, 2)
    assert pixels[:, 0, 1].tolist() == [1, -1, -1]


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_every_orientation_of_every_mode(tmp_path, mode, suffix):
    stored = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 6) * 20).convert(mode)
    expected = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: np.transpose,
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).T,
        8: np.rot90,
    }
    for orientation, turned in expected.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(tmp_path / f"a.{suffix}", exif=exif)
        pixels = read_image(tmp_path / f"a.{suffix}")
        wanted = torch.from_numpy(turned(np.asarray(stored.convert("L"))).copy()) / 127.5 - 1
        assert pixels.shape == (3, *wanted.shape)
        assert levels(pixels, wanted) < 0.51


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


@pytest.mark.parametrize(("matrix", "tag"), [("ITU709", 1), ("ITU601", 6)])
@pytest.mark.parametrize("colour_range", ["MPEG", "JPEG"])
def test_colours_are_those_of_the_matrix_and_range_in_the_file(tmp_path, matrix, tag, colour_range):
    import av
    from av.video.reformatter import ColorRange

    colours = list(COLOURS.values())
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = tag, ColorRange[colour_range]
        for colour in colours:
            picture = av.VideoFrame.from_ndarray(np.full((32, 32, 3), colour, np.uint8), format="rgb24").reformat(
                format="yuv420p", dst_colorspace=matrix, src_color_range="JPEG", dst_color_range=colour_range
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    assert levels(read_video(tmp_path / "a.mp4").pixels, flat(*colours, height=32, width=32)) < 3.51


def test_rate_is_the_mean_where_it_varies(tmp_path):
    import av

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=60)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 60)
        for i in range(90):  # half of them at 60 frames a second, half at 30
            picture = av.VideoFrame.from_ndarray(np.full((32, 32, 3), i, np.uint8), format="rgb24")
            picture.pts, picture.time_base = i if i < 45 else 2 * i - 45, Fraction(1, 60)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    clip = read_video(tmp_path / "a.mp4")
    assert len(clip.pixels) == 90
    assert clip.fps == pytest.approx(40, rel=0.03)


def test_file_without_pictures(tmp_path):
    import av

    with av.open(str(tmp_path / "a.mp4"), "w", container_options={"movflags": "use_metadata_tags"}) as container:
        container.metadata["seed"] = "5"
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    assert read_metadata(tmp_path / "a.mp4") == {"seed": 5}
    with pytest.raises(InputError, match="has no video stream"):
        read_video(tmp_path / "a.mp4")
