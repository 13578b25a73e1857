"""Clips to write, and how far they may be off when they come back."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255,) * 3, "black": (0,) * 3}
CLIPS = ["a.mp4", "a.webm", "a.gif", "a.webp", "a/", "a/frame_%03d.png", "a/%d.jpg"]
STILLS = ["a.png", "a.jpg", "a.webp"]
METADATA = {
    "prompt": '一个红色的球 "moves" \\ left\nand up',
    "seed": 2**40 + 1,
    "settings": {"guidance": 3.5, "solver": None, "sizes": [480, 848]},
    "workflow": "é" * 9000,
    "mode": "RGB",  # a key that decoders use, too
}
# Largest error in 8-bit levels of flat colours at the default quality.
TOLERANCE = {".gif": 0, ".png": 0, ".jpg": 2, ".webp": 3}


def flat(*colours, height=32, width=48) -> torch.Tensor:
    """Frames of one colour each, (F, 3, H, W)."""
    rows = torch.tensor(colours, dtype=torch.float32) / 127.5 - 1
    return rows[:, :, None, None].expand(-1, -1, height, width)


def noise(frames, height=32, width=48, cell=8, seed=0) -> torch.Tensor:
    """Random blocks, different in each frame."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(frames, 3, height // cell, width // cell, generator=generator) * 2 - 1
    return small.repeat_interleave(cell, -1).repeat_interleave(cell, -2)


def levels(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference in 8-bit levels."""
    return float((a - b).abs().max() * 127.5)


def tolerance(name: str) -> float:
    return TOLERANCE.get(Path(name).suffix or ".png", 3) + 0.51


@contextmanager
def file_size_limit(limit: int):
    """As a disk that is full: no file of this process may grow beyond `limit` bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
