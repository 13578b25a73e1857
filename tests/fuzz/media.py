"""Pictures and clips with bytes changed, cut, doubled or of another kind than their name says."""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

import torch

from starflow_core.errors import StarflowError
from starflow_core.media import read_image, read_metadata, read_video, write_video

from .case import Case
from .values import wrong_bytes

STILLS, CLIPS = (".png", ".jpg"), (".mp4", ".webm", ".gif", ".webp")
FOREIGN = (".tif", ".bmp")


def cases(seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    while True:
        suffix = rng.choice((*STILLS, *CLIPS, *FOREIGN))
        data = whole(suffix)
        start = 64 if rng.random() < 0.3 else None  # headers say how much there is
        changed = wrong_bytes(data, random.Random(rng.random()), start)
        shown = rng.choice((*STILLS, *CLIPS, *FOREIGN)) if rng.random() < 0.1 else suffix
        yield Case("under another name" if shown != suffix else suffix, partial(read, data=changed, suffix=shown))


@lru_cache
def whole(suffix: str) -> bytes:
    """A small file, with metadata where we write it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        frames = torch.rand(1 if suffix in STILLS else 6, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
        if suffix in FOREIGN:
            from PIL import Image

            Image.fromarray(((frames[0] + 1) * 127).byte().permute(1, 2, 0).numpy()).save(path)
        else:
            write_video(path, frames, 0 if suffix in STILLS else 10, {"seed": 1, "prompt": "a ring"})
        return path.read_bytes()


def read(folder: Path, data: bytes, suffix: str) -> None:
    """Every reader is tried, and one that gives pixels is enough. Nothing may be printed."""
    path = folder / f"a{suffix}"
    path.write_bytes(data)
    refusals = []
    with _listening(folder / "said"):
        for reader in (read_image, read_video, read_metadata):
            try:
                reader(path)
            except StarflowError as error:
                refusals.append(error)
    said = (folder / "said").read_text(errors="replace")
    assert not said, said
    if len(refusals) > 1:
        raise refusals[0]


@contextmanager
def _listening(path: Path) -> Iterator[None]:
    """What is printed as errors, by libraries in C as well, goes into a file."""
    stderr = os.dup(2)
    with open(path, "wb") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
