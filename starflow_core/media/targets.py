"""What a path stands for, and a clip that is being written there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from torch import Tensor

from ..parts import real
from .metadata import Metadata

STILLS = (".png", ".jpg", ".jpeg")
PICTURES = (*STILLS, ".webp", ".gif", ".bmp", ".tif", ".tiff")  # what Pillow reads here, also as a clip

_NUMBER = re.compile(r"%0?(\d*)d")


@dataclass(frozen=True)
class Target:
    """One file, or a sequence's folder with the `pattern` of its pictures' names, such as %05d.png."""

    path: Path
    suffix: str
    pattern: str = ""

    def picture(self, index: int) -> str:
        """The name of a sequence's picture."""
        return _NUMBER.sub(lambda number: f"{index:0{number[1] or 1}d}", self.pattern)

    def has_picture(self, name: str) -> bool:
        """Whether a file of this name is one of a sequence's pictures."""
        before, after = (re.escape(part) for part in _NUMBER.split(self.pattern)[::2])
        return re.fullmatch(rf"{before}\d+{after}", name) is not None


def target_of(path: str | os.PathLike) -> Target:
    """A folder, or a name without a suffix, is a sequence; so is a picture's name with one number, such as %d.png."""
    text, path = os.fspath(path), real(path)
    if text.endswith(("/", os.sep)) or os.path.isdir(path) or not (path.suffix or os.path.exists(path)):
        return Target(path, ".png", "%05d.png")
    suffix = path.suffix.lower()
    if len(_NUMBER.findall(path.name)) == 1 and suffix in STILLS:
        return Target(path.parent, suffix, path.name)
    return Target(path, suffix)


@dataclass(frozen=True)
class Sound:
    """Samples (channels, n) in [-1, 1], `rate` of them a second."""

    samples: Tensor
    rate: int


@dataclass(frozen=True)
class Recording:
    """A clip that is being written. `part` is its file or folder, renamed to the target when it is complete. `codec` is
    that of a video, `plays` how often an animation plays (0: without end)."""

    target: Target
    part: Path
    rate: Fraction
    metadata: Metadata
    quality: int
    codec: str = ""
    sound: Sound | None = None
    plays: int = 0


WriteFrame = Callable[[np.ndarray], None]  # takes a frame (H, W, 3) uint8

# Entered with a recording and its frames' height and width, it gives the function that takes frames, and completes
# the file when it is left without an error.
Recorder = Callable[[Recording, int, int], AbstractContextManager[WriteFrame]]
