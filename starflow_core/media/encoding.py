"""What encoders of all formats have in common."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from .paths import Target


@dataclass(frozen=True)
class Job:
    """What an encoder needs to know. `part` is the file or folder to write, to be renamed when it is complete."""

    target: Target
    part: Path
    rate: Fraction
    metadata: dict[str, Any]
    quality: int


AddFrame = Callable[[np.ndarray], None]  # takes a frame (H, W, 3) uint8

# Entered with a job and its frames' height and width, it gives the function that takes frames, and completes its
# file when it is left without an error.
Encoder = Callable[[Job, int, int], AbstractContextManager[AddFrame]]
