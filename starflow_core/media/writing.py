"""Writing a clip as its frames come, to whatever a path stands for."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, NonFiniteError
from ..parts import clear_stale, part_of, remove
from .animations import MAX_FPS, gif_recorder, webp_recorder
from .failures import encoding_errors, reason
from .metadata import Metadata, check_metadata, encode_exif
from .pictures import still_recorder
from .pixels import to_bytes
from .sequences import check_replaceable, sequence_recorder
from .targets import STILLS, Recorder, Recording, Sound, Target, WriteFrame, target_of
from .videos import CODECS, CONTAINERS, LAYOUTS, container_recorder, has_encoder

_FORMATS = ".mp4, .webm, .gif, .webp, .png, .jpg, or a folder (with a / at its end) for an image sequence"
_RECORDERS: dict[str, Recorder] = {
    **dict.fromkeys(CONTAINERS, container_recorder),
    ".gif": gif_recorder,
    ".webp": webp_recorder,
    **dict.fromkeys(STILLS, still_recorder),
}
_JPEG_EXIF_LIMIT = 65000


def check_writable(path: str | os.PathLike, frames: int | None = None) -> None:
    """Raise InputError unless a clip (of `frames` frames, if known) can be written to `path`; call it before the work.

    Looks at the format, its encoder, the folder (which may be missing, if it can be made) and the permission to
    write there. Leaves nothing behind.
    """
    target = target_of(path)
    suffix = target.suffix
    if suffix not in _RECORDERS:
        raise InputError(f"{path}: unknown format {suffix!r}; known are {_FORMATS}")
    if not target.pattern and suffix in STILLS and frames not in (None, 1):
        raise InputError(f"{path}: {suffix} takes one picture, not {frames}; write .mp4 or a name such as %05d.png")
    _check_encoder(path, suffix)
    try:
        if target.pattern:
            check_replaceable(target.path)
        with suppress(FileNotFoundError):
            os.lstat(part_of(target.path))  # refuses names that are too long
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

    The path says the format: .mp4 (h264; `codec` "h265" or "av1"), .webm (vp9; "av1"), .gif (256 colours a frame),
    .webp (animated), .png or .jpg (one picture), a folder or a name such as frames/%05d.png (image sequence with a
    metadata.json).
    Videos are 4:2:0, BT.709, limited range; of an odd height or width the last row or column is doubled.
    A rate up to 50 in gif, up to 90 in webp; their frames last whole steps of 10 ms and 1 ms, which are spread so
    that the whole clip is right to half a step. A picture needs no rate; with rate 0 a .webp is one, too.
    `metadata` maps lower-case names to anything JSON can hold. `quality` is 0 to 100; png and gif ignore it. `sound`
    goes into videos only, and ends with the frames. `plays` is how often a gif or webp plays, 0 without end.

    Raises InputError for what cannot be written, as early as it can be known, StarflowError if the disk is full or
    writing fails, NonFiniteError for NaN or infinity in the pixels.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        fps: int | Fraction,
        metadata: Metadata | None = None,
        quality: int = 90,
        *,
        codec: str = "",
        sound: Sound | None = None,
        plays: int = 0,
    ):
        target = target_of(path)
        codec = _checked_codec(path, target.suffix, codec)
        check_writable(path)
        metadata = _checked_metadata(path, target, dict(metadata or {}))
        if not 0 <= quality <= 100:
            raise InputError(f"quality {quality}: expected 0 to 100")
        if not 0 <= plays < 2**16:
            raise InputError(f"plays is {plays}: expected 0 (without end) to {2**16 - 1}")
        rate = _checked_rate(fps, target.suffix)
        if sound is not None:
            _check_sound(sound)
        self.path = path
        self._recording = Recording(target, part_of(target.path), rate, metadata, quality, codec, sound, plays)
        self._recorder = ExitStack()
        self._write: WriteFrame | None = None
        self._size: tuple[int, int] = (0, 0)
        self._frames = 0

    def __enter__(self) -> VideoWriter:
        return self

    def tell(self, **metadata: Any) -> None:
        """More metadata, known only now; call it before the first frame. Raises InputError as the constructor does."""
        told = _checked_metadata(self.path, self._recording.target, {**self._recording.metadata, **metadata})
        self._recording = replace(self._recording, metadata=told)

    def add(self, frames: Tensor) -> None:
        """Encode frames (F, 3, H, W) in [-1, 1], all of one size."""
        array = to_bytes(self._checked(frames))
        with encoding_errors(self.path):
            for frame in array:
                if self._write is None:
                    clear_stale(self._recording.target.path)
                    self._recording.part.parent.mkdir(parents=True, exist_ok=True)
                    recorder = _recorder_of(self._recording)
                    self._write = self._recorder.enter_context(recorder(self._recording, *self._size))
                self._write(frame)
                self._frames += 1

    def __exit__(self, kind, error, trace) -> None:
        try:
            with encoding_errors(self.path):
                self._recorder.__exit__(kind, error, trace)
                if kind is None:
                    if not self._frames:
                        raise InputError(f"{self.path}: there are no frames to write")
                    _publish(self._recording.part, self._recording.target.path)
        finally:
            remove(self._recording.part)

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
            raise NonFiniteError(f"frame {bad} contains NaN or infinity; {self.path} was not written")
        return frames


def write_video(
    path: str | os.PathLike,
    frames: Tensor | Iterable[Tensor],
    fps: int | Fraction,
    metadata: Metadata | None = None,
    quality: int = 90,
) -> None:
    """Write a clip (F, 3, H, W), or pieces of it as they come, with a `VideoWriter`."""
    with VideoWriter(path, fps, metadata, quality) as writer:
        for piece in [frames] if isinstance(frames, Tensor) else frames:
            writer.add(piece)


def _publish(part: Path, target: Path) -> None:
    """Rename to the final name. A folder cannot replace a folder, so an old sequence first steps aside."""
    if not (part.is_dir() and target.is_dir()):
        os.replace(part, target)
        return
    old = part_of(target, "old")
    os.replace(target, old)
    try:
        os.replace(part, target)
    except BaseException:
        os.replace(old, target)
        raise
    remove(old)


def _checked_metadata(path, target: Target, metadata: Metadata) -> Metadata:
    check_metadata(metadata)
    if target.suffix in STILLS[1:] and not target.pattern and len(encode_exif(metadata)) > _JPEG_EXIF_LIMIT:
        raise InputError(f"{path}: the metadata does not fit into {target.suffix}; write .png")
    return metadata


def _checked_rate(fps: int | Fraction, suffix: str) -> Fraction:
    if not fps and suffix in (*STILLS, ".webp"):
        return Fraction(0)
    fastest = MAX_FPS.get(suffix, 1000)
    try:
        rate = Fraction(fps).limit_denominator(65535)
    except (TypeError, ValueError, OverflowError):
        rate = Fraction(0)
    if not Fraction(1, 60) <= rate <= fastest:
        raise InputError(f"frame rate {fps}: {suffix} takes 1/60 to {fastest} a second")
    return rate


def _checked_codec(path, suffix: str, codec: str) -> str:
    """The codec of a video, by default the usual one; "" for other formats."""
    if suffix not in CONTAINERS:
        if codec:
            raise InputError(f"{path}: codec {codec!r} is for videos; leave it out, or write .mp4")
        return ""
    known = CONTAINERS[suffix].codecs
    codec = codec or known[0]
    if codec not in known:
        raise InputError(f"{path}: codec {codec!r} doesn't go into {suffix}; known are {', '.join(known)}")
    if codec != known[0] and not has_encoder(codec):
        name = CODECS[codec].name
        raise InputError(f"{path}: the encoder {name} is not in this installation of PyAV; use {known[0]}")
    return codec


def _check_sound(sound: Sound) -> None:
    samples = sound.samples
    if samples.ndim != 2 or len(samples) not in LAYOUTS:
        raise InputError(f"sound of shape {tuple(samples.shape)}: expected 1, 2, 6 or 8 channels of samples")
    if not 1000 <= sound.rate <= 384000:
        raise InputError(f"sound of {sound.rate} samples a second: expected 1000 to 384000")
    if not torch.isfinite(samples).all():
        raise NonFiniteError("the sound contains NaN or infinity; check where it is from, or leave it out")


def _check_encoder(path, suffix: str) -> None:
    if suffix in CONTAINERS:
        import av

        name = CODECS[CONTAINERS[suffix].codecs[0]].name
        present = name in av.codecs_available
    else:
        import imageio  # noqa: F401  if it is missing, that is told before the work
        from PIL import features

        name, present = "webp", suffix != ".webp" or features.check("webp")
    if not present:
        raise InputError(f"{path}: the encoder {name} is not in this installation; write .gif or an image sequence")


def _recorder_of(recording: Recording) -> Recorder:
    if recording.target.pattern:
        return sequence_recorder
    return _RECORDERS[recording.target.suffix] if recording.rate else still_recorder
