"""Single pictures, through Pillow."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .encoding import AddFrame, Job
from .failures import reading
from .metadata import decode_exif, decode_tags, decode_text, encode_exif, encode_tags
from .pixels import from_bytes


def read_image(path: str | os.PathLike) -> Tensor:
    """A picture as (3, H, W), turned as its EXIF orientation says, transparency composed over black.

    16-bit grey keeps its depth; an animation gives its first frame; colour profiles are ignored.
    Raises InputError for a file that is missing, damaged or not a picture.
    """
    with opened(path) as image:
        return pixels_of(image)


def picture_metadata(path) -> dict[str, Any]:
    """As `read_metadata`, of a picture or an animation."""
    with opened(path) as image:
        if image.format == "PNG":
            return decode_tags(image.text)
        if image.format == "GIF":
            return decode_text(image.info.get("comment", b"").decode("ascii", "replace"))
        return decode_exif(image.getexif())


@contextmanager
def opened(path) -> Iterator[Any]:
    """Pillow's image; its errors inside become InputError."""
    from PIL import Image

    with reading(path, "picture"), Image.open(path) as image:
        yield image


def pixels_of(image) -> Tensor:
    """Pillow's image, or one frame of it, as `read_image` gives it."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise InputError("floating-point pixels have no known range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        grey = torch.from_numpy(np.asarray(image).astype(np.float32)) / 65535
        return grey.clamp(0, 1).mul(2).sub(1).expand(3, -1, -1).contiguous()
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return from_bytes(np.array(image.convert("RGB")))


@contextmanager
def still_encoder(job: Job, height: int, width: int) -> Iterator[AddFrame]:
    """Encoder of one .png, .jpg or .webp."""

    def add(frame: np.ndarray) -> None:
        if job.part.exists():
            raise InputError(f"{job.target.suffix} holds one picture; write .mp4, or a name such as frames/%05d.png")
        save_picture(frame, job, job.part, job.metadata)

    yield add


def save_picture(frame: np.ndarray, job: Job, path: Path, metadata: dict[str, Any]) -> None:
    """Write a frame (H, W, 3) uint8 to `path` in the job's format."""
    from PIL import Image, PngImagePlugin

    picture = Image.fromarray(frame)
    file = io.BytesIO()  # written from here, as Pillow's own writing does not notice a disk that fills up
    if job.target.suffix == ".png":
        text = PngImagePlugin.PngInfo()
        for key, value in encode_tags(metadata).items():
            text.add_text(key, value)
        picture.save(file, format="PNG", pnginfo=text)
    else:
        kind = "WEBP" if job.target.suffix == ".webp" else "JPEG"
        picture.save(file, format=kind, quality=job.quality, subsampling=0, exif=encode_exif(metadata))
    path.write_bytes(file.getvalue())
