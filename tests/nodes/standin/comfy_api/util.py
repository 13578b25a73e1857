from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor


@dataclass
class VideoComponents:
    images: Tensor
    frame_rate: Fraction
    audio: dict | None = None
