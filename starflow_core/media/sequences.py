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
from ..parts import real
from .failures import decoding_errors
from .metadata import Metadata
from .pictures import encoded, read_image
from .pixels import Clip, stacked
from .targets import PICTURES, Recording, Target, WriteFrame

_RECORD = "metadata.json"
_SCHEMA = 1  # version of the record


def read_sequence(path, target: Target, frames: int | None, size: tuple[int, int] | None) -> Clip:
    """As `read_video`, of a folder or a pattern; `path` is what the user called it."""
    names = _names(path, target)[:frames]

    def pictures() -> Iterator[Tensor]:
        first = ""
        for name in names:
            picture = read_image(target.path / name)
            seen = "{2} x {1}".format(*picture.shape)
            first = first or seen
            if seen != first:
                raise InputError(f"{target.path / name} is {seen}, {names[0]} is {first}; a clip needs one size")
            yield picture

    pixels = stacked(pictures(), size)
    with decoding_errors(target.path / _RECORD, "record of a sequence"):
        return Clip(pixels, Fraction(_record(target.path).get("fps", 0)))


def sequence_metadata(path, target: Target) -> Metadata:
    """As `read_metadata`, of a folder or a pattern; `path` is what the user called it."""
    _names(path, target)  # refuses a folder without pictures
    return _record(target.path).get("metadata", {})


def check_replaceable(folder: Path) -> None:
    """Raise InputError for a folder that holds anything but a sequence written here, or cannot be replaced."""
    if not os.path.exists(folder):
        return
    if not os.path.isdir(folder):
        raise InputError(f"{folder} is a file; an image sequence needs a folder")
    if os.path.ismount(folder):
        raise InputError(f"{folder} is a mount point, which cannot be replaced; write into a folder inside it")
    record = _record(folder)
    written_here = {_RECORD, *map(str, record["files"])} if record else set()
    foreign = sorted(set(os.listdir(folder)) - written_here)
    if foreign:
        raise InputError(f"{folder} contains other files ({foreign[0]}); choose an empty folder")


@contextmanager
def sequence_recorder(recording: Recording, height: int, width: int) -> Iterator[WriteFrame]:
    """Recorder of a folder of pictures."""
    names: list[str] = []
    recording.part.mkdir()
    suffix = recording.target.suffix

    def write(frame: np.ndarray) -> None:
        # One picture with everything in it is enough for a program that reads pictures; JPEG has little room.
        metadata = recording.metadata if not names and suffix == ".png" else {}
        names.append(recording.target.picture(len(names)))
        (recording.part / names[-1]).write_bytes(encoded(frame, suffix, recording.quality, metadata))

    yield write
    about = {"fps": str(recording.rate), "metadata": recording.metadata, "files": names}
    text = json.dumps({"starflow_sequence": _SCHEMA, **about}, ensure_ascii=False, indent=1)
    (recording.part / _RECORD).write_text(text, encoding="utf-8")


def _record(folder: Path) -> dict[str, Any]:
    """What `sequence_recorder` left; {} in any other folder."""
    with suppress(OSError, ValueError):
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        if isinstance(record, dict) and {"starflow_sequence", "fps", "files", "metadata"} <= set(record):
            return record
    return {}


def _names(path, target: Target) -> list[str]:
    """The pictures of a sequence in the order of their numbers: those of the pattern, or all, if `path` is a folder."""
    with decoding_errors(path, "folder"):
        names = os.listdir(target.path)
    if target.path == real(path):
        names = [name for name in names if Path(name).suffix.lower() in PICTURES]
    else:
        names = [name for name in names if target.has_picture(name)]
    if not names:
        raise InputError(f"{path} contains no pictures; expected files such as 00000.png")
    return sorted(
        names, key=lambda name: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
    )
