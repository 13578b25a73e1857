"""A picture of how a run converged."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..starflow_core.jobs.tasks import Job
from ..starflow_core.model.config import FlowConfig
from ..starflow_core.solve.solvers import Statistics

WIDTH, HEIGHT = 768, 432
LEFT, TOP, RIGHT, BOTTOM = 64, 44, 24, 48
LOW = -8  # the darkest residual, as a power of ten
PALETTE = np.array([(40, 12, 84), (104, 22, 120), (187, 55, 84), (249, 142, 9), (252, 255, 164)], np.float32)
INK, PAPER, GREY = (230, 230, 236), (22, 22, 28), (140, 140, 150)


def convergence(statistics: Statistics, job: Job, config: FlowConfig) -> Tensor:
    """(1, H, W, 3) in 0..1: for each sweep (across) and frame (down) the largest relative squared
    change of its tokens, dark where it is settled."""
    from PIL import Image, ImageDraw

    residuals = by_frame(statistics, (job.height // config.cell) * (job.width // config.cell))
    canvas = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(canvas)
    if not residuals.size:
        draw.text((LEFT, HEIGHT // 2), "autoregressive: one sweep per token, nothing to converge", fill=INK)
        return _tensor(canvas)
    inner = (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)
    canvas.paste(Image.fromarray(_coloured(residuals)).resize(inner, Image.Resampling.NEAREST), (LEFT, TOP))
    frames, sweeps = residuals.shape
    draw.text((LEFT, 14), f"Residual by sweep and {'latent frame' if frames > 1 else 'image'}", fill=INK)
    draw.text((LEFT, HEIGHT - 40), "1", fill=GREY)
    draw.text((WIDTH - RIGHT, HEIGHT - 40), f"sweep {sweeps}", fill=GREY, anchor="ra")
    draw.text((LEFT - 8, TOP), "1", fill=GREY, anchor="ra")
    draw.text((LEFT - 8, HEIGHT - BOTTOM - 12), f"frame {frames}", fill=GREY, anchor="ra")
    _scale(draw)
    return _tensor(canvas)


def by_frame(statistics: Statistics, frame_tokens: int) -> np.ndarray:
    """Largest change of each frame's tokens at each sweep: (frames, sweeps), NaN where none was solved."""
    changes = [(first, change.cpu()) for first, change in statistics.deep_changes]
    if not changes:
        return np.empty((0, 0), np.float32)
    frames = max((first + len(change) - 1) // frame_tokens for first, change in changes) + 1
    table = np.full((frames, len(changes)), np.nan, np.float32)
    for sweep, (first, change) in enumerate(changes):
        for frame in range(first // frame_tokens, (first + len(change) - 1) // frame_tokens + 1):
            start = max(frame * frame_tokens - first, 0)
            table[frame, sweep] = float(change[start : (frame + 1) * frame_tokens - first].max())
    return table


def _coloured(residuals: np.ndarray) -> np.ndarray:
    """(frames, sweeps, 3) bytes; what isn't being solved has the paper's colour."""
    missing = np.isnan(residuals)
    levels = np.log10(np.clip(np.nan_to_num(residuals), 10.0**LOW, 1))
    place = (levels - LOW) / -LOW * (len(PALETTE) - 1)
    low = np.clip(place.astype(int), 0, len(PALETTE) - 2)
    part = (place - low)[..., None]
    colours = PALETTE[low] * (1 - part) + PALETTE[low + 1] * part
    colours[missing] = PAPER
    return colours.round().astype(np.uint8)


def _scale(draw) -> None:
    """The legend: which colour is which residual."""
    left, top, width = WIDTH - RIGHT - 200, 12, 200
    steps = np.logspace(LOW, 0, width, dtype=np.float32)[None]
    for x, colour in enumerate(_coloured(steps)[0]):
        draw.line((left + x, top, left + x, top + 10), fill=tuple(int(c) for c in colour))
    draw.text((left - 6, top - 1), f"1e{LOW}", fill=GREY, anchor="ra")
    draw.text((left + width, top + 14), "1", fill=GREY, anchor="ra")


def _tensor(canvas) -> Tensor:
    return torch.from_numpy(np.asarray(canvas, np.float32) / 255).unsqueeze(0)
