"""Animations, written here frame by frame.

imageio's writer, which is Pillow's, holds all frames until the end: 0.9 GB for 481 of 480 x 848.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import count, islice, pairwise

import numpy as np
from torch import Tensor

from .metadata import encode_exif, encode_text
from .pictures import encoded, frames_of, opened
from .pixels import Clip, stacked
from .targets import Recording, WriteFrame

MAX_FPS = {".gif": 50, ".webp": 90}  # browsers play shorter frames at 10 a second


def read_animation(path, frames: int | None, size: tuple[int, int] | None) -> Clip:
    """As `read_video`, of an animation or a picture."""
    notes: list[dict] = []
    with opened(path, frames) as file:
        pixels = stacked(islice(frames_of(file, notes), frames), size)
    step = 10 if "version" in notes[0] else 1  # milliseconds; only a GIF has a version
    return Clip(pixels, _rate_of(len(notes), sum(note.get("duration", 0) for note in notes), step))


def animation_frames(path) -> Iterator[Tensor]:
    """As `video_frames`, of an animation or a picture."""
    with opened(path, None) as file:
        yield from frames_of(file, [])


def _rate_of(frames: int, milliseconds: float, step: int) -> Fraction:
    """Frames a second: a whole number, if that is within the time `step` that durations are rounded to."""
    if not milliseconds:
        return Fraction(0)
    rate = Fraction(1000 * frames) / Fraction(milliseconds)
    whole = max(round(rate), 1)
    return Fraction(whole) if 2 * abs(Fraction(1000 * frames, whole) - Fraction(milliseconds)) <= step else rate


def _durations(rate: Fraction, steps: int) -> Iterator[int]:
    """Each frame's length in whole steps (so many a second), rounded so that no error adds up."""
    return (end - start for start, end in pairwise(round(frame * steps / rate) for frame in count()))


@contextmanager
def gif_recorder(recording: Recording, height: int, width: int) -> Iterator[WriteFrame]:
    """Recorder of .gif; each frame has its own palette."""
    from PIL import GifImagePlugin, Image

    durations = _durations(recording.rate, 100)
    repeats = {} if recording.plays == 1 else {"loop": max(recording.plays - 1, 0)}  # after the first time
    info = {**repeats, "comment": encode_text(recording.metadata) if recording.metadata else ""}
    with open(recording.part, "wb") as file:

        def write(frame: np.ndarray) -> None:
            picture = Image.fromarray(frame)
            picture = picture.quantize(palette=picture.quantize(256))  # with a palette given, it dithers
            if not file.tell():
                file.writelines(GifImagePlugin.getheader(picture.copy(), info=info)[0])
            file.writelines(GifImagePlugin.getdata(picture, duration=10 * next(durations), include_color_table=True))

        yield write
        file.write(b";")


@contextmanager
def webp_recorder(recording: Recording, height: int, width: int) -> Iterator[WriteFrame]:
    """Recorder of animated .webp: imageio's pictures, each in a chunk."""
    animated, has_exif, not_blended = 0x02, 0x08, b"\x02"
    durations = _durations(recording.rate, 1000)
    exif = encode_exif(recording.metadata).removeprefix(b"Exif\0\0")
    with open(recording.part, "wb") as file:

        def chunk(name: bytes, data: bytes) -> None:
            file.write(name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2))

        def triple(*values: int) -> bytes:
            return b"".join(value.to_bytes(3, "little") for value in values)

        def write(frame: np.ndarray) -> None:
            place = triple(0, 0, width - 1, height - 1, next(durations))
            chunk(b"ANMF", place + not_blended + encoded(frame, ".webp", recording.quality, {})[12:])

        file.write(b"RIFF\0\0\0\0WEBP")
        chunk(b"VP8X", struct.pack("<I", animated | (has_exif if exif else 0)) + triple(width - 1, height - 1))
        chunk(b"ANIM", struct.pack("<IH", 0, recording.plays))  # background
        yield write
        if exif:
            chunk(b"EXIF", exif)
        size = file.tell() - 8
        file.seek(4)
        file.write(struct.pack("<I", size))
