"""Animations, through Pillow. They are written here frame by frame: Pillow's own writers would hold every frame."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice

import numpy as np
from torch import Tensor

from .encoding import AddFrame, Job
from .metadata import encode_exif, encode_text
from .pictures import opened, pixels_of
from .pixels import Clip, stacked

FASTEST = {".gif": 50, ".webp": 90}  # browsers play shorter frames at 10 a second


def read_animation(path, frames: int | None, size: tuple[int, int] | None) -> Clip:
    """As `read_video`, of an animation or a picture."""
    from PIL import ImageSequence

    with opened(path) as image:
        durations = []

        def pictures() -> Iterator[Tensor]:
            for frame in islice(ImageSequence.Iterator(image), frames):
                pixels = pixels_of(frame)  # reads the frame, and with it its duration
                durations.append(frame.info.get("duration", 0))
                yield pixels

        pixels, step = stacked(pictures(), size), 10 if image.format == "GIF" else 1
        return Clip(pixels, _rate_of(len(pixels), sum(durations), step))


def _rate_of(frames: int, milliseconds: float, step: int) -> Fraction:
    """Frames a second: a whole number, if that is within the time `step` that durations are rounded to."""
    if not milliseconds:
        return Fraction(0)
    rate = Fraction(1000 * frames) / Fraction(milliseconds)
    whole = max(round(rate), 1)
    return Fraction(whole) if 2 * abs(Fraction(1000 * frames, whole) - Fraction(milliseconds)) <= step else rate


def _durations(rate: Fraction, steps: int) -> Iterator[int]:
    """Each frame's length in whole steps (so many a second), rounded so that no error adds up."""
    frame = 0
    while True:
        yield round((frame + 1) * steps / rate) - round(frame * steps / rate)
        frame += 1


@contextmanager
def gif_encoder(job: Job, height: int, width: int) -> Iterator[AddFrame]:
    """Encoder of .gif; each frame has its own palette."""
    from PIL import GifImagePlugin, Image

    with open(job.part, "wb") as file:
        file.write(b"GIF89a" + struct.pack("<HHBBB", width, height, 0x70, 0, 0))  # no common palette
        file.write(b"\x21\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00")  # play for ever
        if job.metadata:
            comment = encode_text(job.metadata).encode()
            blocks = (comment[i : i + 255] for i in range(0, len(comment), 255))
            file.write(b"\x21\xfe" + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0")
        durations = _durations(job.rate, 100)

        def add(frame: np.ndarray) -> None:
            picture = Image.fromarray(frame)
            picture = picture.quantize(palette=picture.quantize(256))  # with a palette given, it dithers
            file.writelines(GifImagePlugin.getdata(picture, duration=10 * next(durations), include_color_table=True))

        yield add
        file.write(b";")


@contextmanager
def webp_encoder(job: Job, height: int, width: int) -> Iterator[AddFrame]:
    """Encoder of animated .webp."""
    from PIL import Image

    def chunk(name: bytes, data: bytes) -> bytes:
        return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)

    def triple(*values: int) -> bytes:
        return b"".join(value.to_bytes(3, "little") for value in values)

    exif = encode_exif(job.metadata).removeprefix(b"Exif\0\0")
    animated, has_exif, not_blended = 0x02, 0x08 if exif else 0, b"\x02"
    with open(job.part, "wb") as file:
        file.write(b"RIFF\0\0\0\0WEBP")
        file.write(chunk(b"VP8X", struct.pack("<I", animated | has_exif) + triple(width - 1, height - 1)))
        file.write(chunk(b"ANIM", struct.pack("<IH", 0, 0)))  # background, play for ever
        durations = _durations(job.rate, 1000)

        def add(frame: np.ndarray) -> None:
            still = io.BytesIO()
            Image.fromarray(frame).save(still, format="WEBP", quality=job.quality)
            place = triple(0, 0, width - 1, height - 1, next(durations))
            file.write(chunk(b"ANMF", place + not_blended + still.getvalue()[12:]))

        yield add
        if exif:
            file.write(chunk(b"EXIF", exif))
        size = file.tell() - 8
        file.seek(4)
        file.write(struct.pack("<I", size))
