"""Windows of frames, at a trained size and rate, read in one pass over a file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from ...errors import InputError
from ...media import fit, video_frames
from .buckets import Facts

Span = tuple[int, int]  # first frame and number of frames, at the training rate


def read_windows(
    path: Path, facts: Facts, height: int, width: int, fps: Fraction, spans: Sequence[Span]
) -> Iterator[tuple[Span, Tensor]]:
    """Each span and its pixels (F, 3, height, width) in [-1, 1], in the order of their ends.

    Of a file brought to `fps`, scaled to cover the size and cropped. No more frames are held than spans need. Raises
    InputError for a file that ends before a span does, or can't be read.
    """
    step = facts.step(fps)
    todo = sorted(((span, _places(span, step)) for span in set(spans)), key=lambda one: (one[1][-1], one[0]))
    wanted, held = {place for _, places in todo for place in places}, {}
    for index, frame in enumerate(video_frames(path)):
        if index in wanted:
            held[index] = fit(frame, height, width)
        while todo and todo[0][1][-1] <= index:
            span, places = todo.pop(0)
            yield span, torch.stack([held[place] for place in places])
        if not todo:
            return
        first = min(places[0] for _, places in todo)
        held = {place: pixels for place, pixels in held.items() if place >= first}
    raise InputError(f"{path} ended before frame {todo[0][1][-1] + 1}; has it changed? Run it again")


def _places(span: Span, step: Fraction) -> list[int]:
    """The frames of the file that are nearest in time."""
    start, frames = span
    return [math.floor((start + i) * step + Fraction(1, 2)) for i in range(frames)]
