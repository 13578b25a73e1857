"""Reading whatever a path stands for."""

from __future__ import annotations

import os
from collections.abc import Iterator

from torch import Tensor

from ..errors import InputError
from .animations import animation_frames, read_animation
from .metadata import Metadata
from .pictures import picture_metadata
from .pixels import Clip
from .sequences import read_sequence, sequence_metadata
from .targets import PICTURES, target_of
from .videos import container_frames, container_metadata, read_container


def read_video(path: str | os.PathLike, frames: int | None = None, size: tuple[int, int] | None = None) -> Clip:
    """The first `frames` frames (all, if None) of a video, an animation, or a folder of equally large pictures.

    With `size` (height, width) each frame is scaled to cover it and cropped as it is read; else frames come as they
    are stored. The rate is the mean where a file's varies. Rotation in the file is applied.
    Raises InputError for what is missing, damaged, shorter than its header says, or without pictures.
    """
    if frames is not None and frames < 1:
        raise InputError(f"{frames} frames of {path}: expected at least 1")
    target = target_of(path)
    if target.pattern:
        return read_sequence(path, target, frames, size)
    return (read_animation if target.suffix in PICTURES else read_container)(path, frames, size)


def video_frames(path: str | os.PathLike) -> Iterator[Tensor]:
    """Each frame (3, H, W) of what `read_video` reads, as it is stored: a video, however long, is never held at once.

    Raises InputError as `read_video`, for a clip that ends early when its end is reached.
    """
    target = target_of(path)
    if target.pattern:
        yield from read_sequence(path, target, None, None).pixels
    else:
        yield from (animation_frames if target.suffix in PICTURES else container_frames)(path)


def read_metadata(path: str | os.PathLike) -> Metadata:
    """The metadata that `VideoWriter` stored, or another program as JSON under such keys; {} where there is none.

    Raises InputError for a file that is missing or damaged.
    """
    target = target_of(path)
    if target.pattern:
        return sequence_metadata(path, target)
    return picture_metadata(path) if target.suffix in PICTURES else container_metadata(path)
