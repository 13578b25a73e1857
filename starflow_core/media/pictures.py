"""Pictures, through imageio's pillow plugin."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .failures import decoding_errors
from .metadata import Metadata, decode_exif, decode_tags, decode_text, encode_exif, encode_png
from .pixels import from_bytes
from .targets import Recording, WriteFrame

LARGEST_SIDE, LARGEST_AREA = 16384, 1 << 27
LIKELY_AREA, DENSEST = 1 << 25, 2731  # what any file may hold; pixels of a byte, beyond that: the most that a GIF has
logging.getLogger("PIL").addHandler(logging.NullHandler())  # without any, what it logs of a damaged file is printed


def read_image(path: str | os.PathLike) -> Tensor:
    """A picture as (3, H, W), turned as its EXIF orientation says, transparency composed over black.

    16-bit grey keeps its depth; an animation gives its first frame; colour profiles are ignored.
    Raises InputError for a file that is missing, damaged or not a picture.
    """
    with opened(path) as file:
        return next(frames_of(file, []))


def picture_metadata(path) -> Metadata:
    """As `read_metadata`, of a picture or an animation."""
    from PIL import Image

    # Not through imageio: its own "mode" and "shape" replace texts of a PNG with these keys.
    with decoding_errors(path, "picture"), _quiet(), Image.open(path) as image:
        if image.format == "PNG":
            return decode_tags(image.text)
        if image.format == "GIF":
            return decode_text(image.info.get("comment", b"").decode("ascii", "replace"))
        return decode_exif(image.getexif())


@contextmanager
def still_recorder(recording: Recording, height: int, width: int) -> Iterator[WriteFrame]:
    """Recorder of one .png, .jpg or .webp."""
    suffix = recording.target.suffix

    def write(frame: np.ndarray) -> None:
        if recording.part.exists():
            raise InputError(f"{suffix} takes one picture; write .mp4, or a name such as frames/%05d.png")
        recording.part.write_bytes(encoded(frame, suffix, recording.quality, recording.metadata))

    yield write


def encoded(frame: np.ndarray, suffix: str, quality: int, metadata: Metadata) -> bytes:
    """A frame (H, W, 3) uint8 as a picture's file: in memory, as Pillow does not notice that a disk is full."""
    import imageio.v3 as iio

    if suffix == ".png":
        options = {"pnginfo": encode_png(metadata)}
    else:
        options = {"quality": quality, "subsampling": 0, "exif": encode_exif(metadata)}
    return iio.imwrite("<bytes>", frame, plugin="pillow", extension=suffix, **options)


@contextmanager
def opened(path, frames: int | None = 1) -> Iterator[Any]:
    """imageio's file of pictures, of which `frames` will be read; what goes wrong inside becomes InputError."""
    import imageio.v3 as iio

    with decoding_errors(path, "picture"), _quiet():
        _check_size(path, frames)
        try:
            file = iio.imopen(Path(os.path.abspath(path)), "r", plugin="pillow")
        except OSError as error:
            raise (error.__cause__ or error) from None  # imageio's own words hide the reason
        with file:
            yield file


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warnings of tags that no picture needs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _check_size(path, frames: int | None) -> None:
    """Raise InputError for a file that says it is larger than any, or than its bytes can tell; its pictures would be
    made at that size."""
    from PIL import Image

    with Image.open(path) as image:
        width, height = image.size
        count = 1 if frames == 1 else min(getattr(image, "n_frames", 1), frames or LARGEST_AREA)
    if max(width, height) > LARGEST_SIDE or width * height > LARGEST_AREA:
        raise InputError(
            f"{path} says that it is {width} x {height} pixels; at most {LARGEST_SIDE} a side and "
            f"{LARGEST_AREA >> 20} million in all are read. Scale it down, or export it again if that is wrong"
        )
    size = os.path.getsize(path)
    if count * width * height > max(LIKELY_AREA, DENSEST * size):
        raise InputError(
            f"{path} says that it has {count} x {width} x {height} pixels, but it has only {size} bytes; scale it "
            "down, or export it again if that is wrong"
        )


def frames_of(file, notes: list[dict]) -> Iterator[Tensor]:
    """Each frame as `read_image` gives it; what the file tells of it is added to `notes`."""
    stored = file.properties(index=0).dtype
    if stored.kind == "f":
        raise InputError("floating-point pixels have no known range; save it with 8 or 16 bits")
    for index, array in enumerate(file.iter(mode="RGBA" if stored.itemsize == 1 else None)):
        notes.append(file.metadata(index=index, exclude_applied=False))
        yield _upright(_over_black(array) if array.ndim == 3 else _grey(array), notes[-1].get("Orientation"))


def _over_black(rgba: np.ndarray) -> Tensor:
    colour, alpha = rgba[..., :3], rgba[..., 3:]
    return from_bytes(colour if alpha.min() == 255 else (colour * (alpha / 255)).round().astype(np.uint8))


def _grey(levels: np.ndarray) -> Tensor:
    """16-bit levels (H, W) as a picture."""
    return torch.from_numpy(levels.astype(np.float32)).div_(32767.5).sub_(1).clamp_(-1, 1).repeat(3, 1, 1)


def _upright(picture: Tensor, orientation: int | None) -> Tensor:
    """Turned as EXIF says. imageio (2.38) mirrors the channels, not the columns, of what is stored in one channel."""
    if orientation not in range(2, 9):
        return picture
    if orientation > 4:
        picture = picture.mT
    return picture.flip([(), (2,), (1, 2), (1,)][(orientation - 1) % 4])
