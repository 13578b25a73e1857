"""What a model sees of each file: a trained shape, and windows of a trained length."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from ...errors import InputError
from ...media import PICTURES, STILLS, read_image, read_video, video_frames
from ...model.config import FlowConfig
from .folders import Item, told

UNREADABLE = "can't be read"
SHORT_SOURCE = "their source is shorter"


@dataclass(frozen=True)
class Facts:
    """What a file holds: its size in pixels, its frames and their rate (0: none known). `error` says why it can't be
    read, then the rest means nothing."""

    height: int = 0
    width: int = 0
    frames: int = 1
    fps: Fraction = Fraction(0)
    error: str = ""

    def at(self, fps: Fraction) -> int:
        """Frames when it is brought to a rate; the nearest one in time is shown for each."""
        return math.ceil((self.frames - Fraction(1, 2)) / self.step(fps))

    def step(self, fps: Fraction) -> Fraction:
        """Frames of the file to one at a rate. A file without a rate of its own is taken frame by frame."""
        return self.fps / fps if self.fps and fps else Fraction(1)


@dataclass(frozen=True, order=True)
class Bucket:
    """Samples that can be in one batch: a trained ratio, and pixels: height, width and frames, 1 for stills."""

    aspect: str
    height: int
    width: int
    frames: int

    def __str__(self) -> str:
        length = f"{self.frames} frames" if self.frames > 1 else "stills"
        return f"{self.aspect}, {self.width} x {self.height}, {length}"


@dataclass(frozen=True)
class Sample:
    """A window of an item, from frame `start` on, counted at the training rate."""

    item: Item
    bucket: Bucket
    start: int = 0


@dataclass
class Notes:
    """What became of the files: the share of its area that each loses, frames at the training rate that are shown and
    trimmed, and files that are enlarged, slower than the training rate, clips of which one frame is shown, and those
    that were left out, by reason."""

    cropped: list[float] = field(default_factory=list)
    shown: int = 0
    trimmed: int = 0
    enlarged: list[Path] = field(default_factory=list)
    slower: list[Path] = field(default_factory=list)
    stills: list[Path] = field(default_factory=list)
    left_out: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))


def assign(
    items: Sequence[Item], config: FlowConfig, size: int | None, frames: int, fps: float,
    probe: Callable[[Path], Facts] | None = None, stride: int | None = None,
) -> tuple[list[Sample], Notes]:  # fmt: skip
    """The samples of all items, in their order.

    Each file gets the trained ratio nearest to its own, at the area of a square of side `size`. Clips are brought to
    `fps` and cut into windows of the longest length of whole latent frames that is at most `frames` and the model's
    window. They begin `stride` frames apart, by default their length; what is left at the end is trimmed. A clip that
    is too short for two latent frames, or any for an image model, gives its middle frame as a still. Files that can't
    be read are left out; raises InputError if no other is there. `probe` says what a file holds, `look` unless given.
    """
    cutter, samples = _Cutter(config, size, _longest(config, frames), Fraction(fps), stride), []
    for item in items:
        facts = [(probe or look)(path) for path in (item.path, item.source or item.path)]
        samples += cutter.windows(item, *facts)
    if not samples:
        why = f"; the first error: {cutter.error}" if cutter.error else ""
        raise InputError(f"data: no file can be used{told(cutter.notes.left_out)}{why}")
    return samples, cutter.notes


def look(path: Path) -> Facts:
    """What a file holds; all of it is read."""
    try:
        if path.suffix.lower() in PICTURES:
            height, width = read_image(path).shape[-2:]
            if path.suffix.lower() in STILLS:
                return Facts(height, width)
            clip = read_video(path, size=(8, 8))
            return Facts(height, width, len(clip.pixels), clip.fps)
        first = read_video(path, 1)
        return Facts(*first.pixels.shape[-2:], sum(1 for _ in video_frames(path)), first.fps)
    except InputError as error:
        return Facts(error=str(error))


def _longest(config: FlowConfig, frames: int) -> int:
    """The longest window in frames."""
    if config.kind == "image":
        return 1
    step = config.latent.temporal
    return min((frames - 1) // step * step + 1, config.latent.frames(config.window))


@dataclass
class _Cutter:
    """Cuts items into samples of at most `longest` frames at `fps`. `error` is the first of a file."""

    config: FlowConfig
    size: int | None
    longest: int
    fps: Fraction
    stride: int | None = None
    notes: Notes = field(default_factory=Notes)
    error: str = ""

    def windows(self, item: Item, own: Facts, source: Facts) -> list[Sample]:
        """The samples of an item, of what its file and its source hold."""
        for path, facts in ((item.path, own), (item.source, source)):
            if facts.error:
                return self._leave_out(path, UNREADABLE, facts.error)
        total, step = own.at(self.fps), self.config.latent.temporal
        length = min(self.longest, (total - 1) // step * step + 1)
        stride = self.stride or length
        starts = range(0, total - length + 1, stride) if length > 1 else [total // 2]
        starts = [start for start in starts if not item.source or start + length <= source.at(self.fps)]
        if not starts:
            return self._leave_out(item.path, SHORT_SOURCE)
        aspect = self.config.nearest_aspect(own.height, own.width)
        bucket = Bucket(aspect, *self.config.size(aspect, self.size), length)
        self._note(item.path, own, bucket, total, (len(starts) - 1) * min(stride, length) + length)
        return [Sample(item, bucket, start) for start in starts]

    def _leave_out(self, path: Path, reason: str, error: str = "") -> list[Sample]:
        self.notes.left_out[reason].append(path)
        self.error = self.error or error
        return []

    def _note(self, path: Path, facts: Facts, bucket: Bucket, total: int, shown: int) -> None:
        notes, scale = self.notes, max(bucket.height / facts.height, bucket.width / facts.width)
        notes.cropped.append(1 - bucket.height * bucket.width / (facts.height * facts.width * scale**2))
        notes.enlarged += [path] if scale > 1 else []
        if total == 1:
            return
        if bucket.frames == 1:
            notes.stills.append(path)
            return
        notes.slower += [path] if 0 < facts.fps < self.fps else []
        notes.shown += shown
        notes.trimmed += total - shown
