"""Writing a clip as its frames come, to whatever a path stands for."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, NonFiniteError
from .animations import FASTEST, gif_encoder, webp_encoder
from .containers import CODECS, container_encoder
from .encoding import AddFrame, Encoder, Job
from .failures import reason, writing
from .metadata import check_metadata, encode_exif
from .paths import STILLS, target_of
from .pictures import still_encoder
from .pixels import to_bytes
from .sequences import check_replaceable, sequence_encoder

_FORMATS = ".mp4, .webm, .gif, .webp, .png, .jpg, or a folder (with a / at its end) for an image sequence"
_ENCODERS: dict[str, Encoder] = {
    **dict.fromkeys(CODECS, container_encoder),
    ".gif": gif_encoder,
    ".webp": webp_encoder,
    **dict.fromkeys(STILLS, still_encoder),
}
_JPEG_EXIF_LIMIT = 65000


def check_writable(path: str | os.PathLike, frames: int | None = None) -> None:
    """Raise InputError unless a clip (of `frames` frames, if known) can be written to `path`; call it before the work.

    Looks at the format, its encoder, the folder (which may be missing, if it can be made) and the permission to
    write there. Leaves nothing behind.
    """
    target = target_of(path)
    if target.suffix not in _ENCODERS:
        raise InputError(f"{path}: unknown format {target.suffix!r}; known are {_FORMATS}")
    if not target.pattern and target.suffix in STILLS and frames not in (None, 1):
        raise InputError(
            f"{path}: {target.suffix} holds one picture, not {frames}; write .mp4 or a name such as %05d.png"
        )
    _check_encoder(path, target.suffix)
    try:
        if target.pattern:
            check_replaceable(target.path)
        with suppress(FileNotFoundError):
            os.lstat(_part_of(target.path))  # refuses names that are too long
        folder = next(parent for parent in target.path.parents if os.path.exists(parent))
        tempfile.TemporaryFile(dir=folder).close()
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be written ({reason(error)}); choose another folder or name") from None


class VideoWriter:
    """Writes a clip as its frames come, in bounded memory; nothing is left behind unless it is complete.

        with VideoWriter("clip.mp4", fps=16, metadata={"seed": 1}) as writer:
            writer.add(frames)  # (F, 3, H, W) in [-1, 1], as often as there are any

    The path says the format: .mp4 (h264), .webm (vp9), .gif (256 colours a frame), .webp (animated), .png or .jpg
    (one picture), a folder or a name such as frames/%05d.png (image sequence with a metadata.json).
    Videos are 4:2:0, BT.709, limited range; of an odd height or width the last row or column is doubled.
    A rate up to 50 in gif, up to 90 in webp; their frames last whole steps of 10 ms and 1 ms, which are spread so
    that the whole clip is right to half a step. A picture needs no rate; with rate 0 a .webp is one, too.
    `metadata` maps lower-case names to anything JSON can hold. `quality` is 0 to 100; png and gif ignore it.

    Raises InputError for what cannot be written, as early as it can be known, StarflowError if the disk is full or
    writing fails, NonFiniteError for NaN or infinity in the pixels.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        fps: int | Fraction,
        metadata: dict[str, Any] | None = None,
        quality: int = 90,
    ):
        check_writable(path)
        metadata = dict(metadata or {})
        check_metadata(metadata)
        target = target_of(path)
        if not 0 <= quality <= 100:
            raise InputError(f"quality {quality}: expected 0 to 100")
        if target.suffix in STILLS[1:] and not target.pattern and len(encode_exif(metadata)) > _JPEG_EXIF_LIMIT:
            raise InputError(f"{path}: the metadata does not fit into {target.suffix}; write .png")
        rate = _checked_rate(fps, target.suffix)
        self.path = path
        self._job = Job(target, _part_of(target.path), rate, metadata, quality)
        self._encoder = ExitStack()
        self._encode: AddFrame | None = None
        self._size: tuple[int, int] = (0, 0)
        self._frames = 0

    def __enter__(self) -> VideoWriter:
        return self

    def add(self, frames: Tensor) -> None:
        """Encode frames (F, 3, H, W) in [-1, 1], all of one size."""
        array = to_bytes(self._checked(frames))
        with writing(self.path):
            for frame in array:
                if self._encode is None:
                    self._job.part.parent.mkdir(parents=True, exist_ok=True)
                    self._encode = self._encoder.enter_context(_encoder_of(self._job)(self._job, *self._size))
                self._encode(frame)
                self._frames += 1

    def __exit__(self, kind, error, trace) -> None:
        try:
            with writing(self.path):
                self._encoder.__exit__(kind, error, trace)
                if kind is None:
                    if not self._frames:
                        raise InputError(f"{self.path}: there are no frames to write")
                    _publish(self._job.part, self._job.target.path)
        finally:
            _remove(self._job.part)

    def _checked(self, frames: Tensor) -> Tensor:
        if frames.ndim != 4 or frames.shape[1] != 3:
            raise InputError(f"frames of shape {tuple(frames.shape)}: expected (F, 3, H, W)")
        size = tuple(frames.shape[-2:])
        if self._frames and size != self._size:
            raise InputError(f"{self.path}: a frame of {size} after {self._size} (H, W); a clip has one size")
        self._size = size
        frames = frames.detach().to(torch.float32)
        finite = frames.isfinite().flatten(1).all(1)
        if not finite.all():
            bad = self._frames + int(finite.logical_not().nonzero()[0])
            raise NonFiniteError(f"frame {bad} holds NaN or infinity; {self.path} was not written")
        return frames


def write_video(
    path: str | os.PathLike,
    frames: Tensor | Iterable[Tensor],
    fps: int | Fraction,
    metadata: dict[str, Any] | None = None,
    quality: int = 90,
) -> None:
    """Write a clip (F, 3, H, W), or pieces of it as they come, with a `VideoWriter`."""
    with VideoWriter(path, fps, metadata, quality) as writer:
        for piece in [frames] if isinstance(frames, Tensor) else frames:
            writer.add(piece)


def _part_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.part")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _publish(part: Path, target: Path) -> None:
    """Rename to the final name. A folder cannot replace a folder, so an old sequence first steps aside."""
    if not (part.is_dir() and target.is_dir()):
        os.replace(part, target)
        return
    old = _part_of(target)
    os.replace(target, old)
    try:
        os.replace(part, target)
    except BaseException:
        os.replace(old, target)
        raise
    _remove(old)


def _checked_rate(fps: int | Fraction, suffix: str) -> Fraction:
    if not fps and suffix in (*STILLS, ".webp"):
        return Fraction(0)
    fastest = FASTEST.get(suffix, 1000)
    try:
        rate = Fraction(fps).limit_denominator(65535)
    except (TypeError, ValueError, OverflowError):
        rate = Fraction(0)
    if not Fraction(1, 60) <= rate <= fastest:
        raise InputError(f"frame rate {fps}: {suffix} takes 1/60 to {fastest} a second")
    return rate


def _check_encoder(path, suffix: str) -> None:
    if suffix in CODECS:
        import av

        name, present = CODECS[suffix].name, CODECS[suffix].name in av.codecs_available
    else:
        from PIL import features

        name, present = "webp", suffix != ".webp" or features.check("webp")
    if not present:
        raise InputError(f"{path}: the encoder {name} is not in this installation; write .gif or an image sequence")


def _encoder_of(job: Job) -> Encoder:
    if job.target.pattern:
        return sequence_encoder
    return _ENCODERS[job.target.suffix] if job.rate else still_encoder
