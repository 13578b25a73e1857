"""Image sequences: a folder of numbered pictures, with a metadata.json if it was written here."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import InputError
from .encoding import AddFrame, Job
from .failures import reading
from .paths import PICTURES, Target
from .pictures import read_image, save_picture
from .pixels import Clip, stacked

_RECORD = "metadata.json"
_SCHEMA = 1  # version of the record


def read_sequence(path, target: Target, frames: int | None, size: tuple[int, int] | None) -> Clip:
    """As `read_video`, of a folder or a pattern; `path` is what the user called it."""
    names = _names(path, target)[:frames]
    seen: list[str] = []

    def pictures() -> Iterator[Tensor]:
        for name in names:
            picture = read_image(target.path / name)
            seen.append(_size(picture))
            if seen[0] != seen[-1]:
                raise InputError(f"{target.path / name} is {seen[-1]}, {names[0]} is {seen[0]}; a clip needs one size")
            yield picture

    pixels = stacked(pictures(), size)
    with reading(target.path / _RECORD, "record of a sequence"):
        return Clip(pixels, Fraction(_record(target.path).get("fps", 0)))


def sequence_metadata(path, target: Target) -> dict[str, Any]:
    """As `read_metadata`, of a folder or a pattern; `path` is what the user called it."""
    _names(path, target)  # refuses a folder without pictures
    return _record(target.path).get("metadata", {})


def check_replaceable(folder: Path) -> None:
    """Raise InputError for a folder that holds anything but a sequence written here, or cannot be replaced."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; an image sequence needs a folder")
    if os.path.ismount(folder):
        raise InputError(f"{folder} is a mount point, which cannot be replaced; write into a folder inside it")
    record = _record(folder)
    written_here = {_RECORD, *map(str, record["files"])} if record else set()
    foreign = sorted(set(os.listdir(folder)) - written_here)
    if foreign:
        raise InputError(f"{folder} holds other files ({foreign[0]}); choose an empty folder")


@contextmanager
def sequence_encoder(job: Job, height: int, width: int) -> Iterator[AddFrame]:
    """Encoder of a folder of pictures."""
    names: list[str] = []
    job.part.mkdir()

    def add(frame: np.ndarray) -> None:
        # One picture with everything in it is enough for a program that reads pictures; JPEG has little room.
        metadata = job.metadata if not names and job.target.suffix == ".png" else {}
        names.append(job.target.picture(len(names)))
        save_picture(frame, job, job.part / names[-1], metadata)

    yield add
    record = {"starflow_sequence": _SCHEMA, "fps": str(job.rate), "metadata": job.metadata, "files": names}
    (job.part / _RECORD).write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")


def _record(folder: Path) -> dict[str, Any]:
    """What `sequence_encoder` left; {} in any other folder."""
    with suppress(OSError, ValueError):
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        if isinstance(record, dict) and {"starflow_sequence", "fps", "files", "metadata"} <= set(record):
            return record
    return {}


def _names(path, target: Target) -> list[str]:
    """The pictures of a sequence in the order of their numbers: those of the pattern, or all, if `path` is a folder."""
    with reading(path, "folder"):
        names = os.listdir(target.path)
    if target.path == Path(os.path.abspath(path)):
        names = [name for name in names if Path(name).suffix.lower() in PICTURES]
    else:
        names = [name for name in names if target.has_picture(name)]
    if not names:
        raise InputError(f"{path} holds no pictures; expected files such as 00000.png")
    return sorted(
        names, key=lambda name: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
    )


def _size(picture: Tensor) -> str:
    return f"{picture.shape[-1]} x {picture.shape[-2]}"
