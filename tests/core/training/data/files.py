"""Small files to learn from."""

from __future__ import annotations

from pathlib import Path

import torch

from starflow_core.media import write_video


def levels(frames: int, height: int = 16, width: int = 16) -> torch.Tensor:
    """Frames (F, 3, H, W) of one grey each: frame i is told from its neighbours by its level, 4 i of 255."""
    return (4 * torch.arange(frames) / 127.5 - 1).view(-1, 1, 1, 1).expand(-1, 3, height, width)


def write(path: Path, caption: str | None = None, frames: int = 1, height: int = 16, width: int = 16, fps=20) -> Path:
    """A picture or clip of `levels`, with its caption beside it if there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, levels(frames, height, width), fps if path.suffix != ".png" else 0)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def numbers(pixels: torch.Tensor) -> list[int]:
    """Which of `levels` each frame of (F, 3, H, W) shows."""
    return ((pixels.mean((1, 2, 3)) + 1) * 127.5 / 4).round().int().tolist()
