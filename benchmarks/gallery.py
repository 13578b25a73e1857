"""The README's picture: six clips of the demo side by side. `python -m benchmarks.gallery docs/demo.webp`."""

from __future__ import annotations

import sys

from torch import Tensor

from starflow_core.media import write_video
from starflow_core.pipeline import load_pipeline

CAPTIONS = (
    "a red circle moving right on a white background",
    "a green triangle moving up on a black background",
    "a purple ring moving left on a grey background",
    "a blue square moving down on a white background",
    "a yellow ring moving right on a black background",
    "an orange circle moving up on a grey background",
)
COLUMNS, SCALE, GAP, QUALITY = 3, 2, 6, 80


def tiled(clips: Tensor) -> Tensor:
    """Clips (B, F, 3, H, W) as one (F, 3, rows, columns), enlarged, with white lines between them."""
    clips = clips.repeat_interleave(SCALE, -1).repeat_interleave(SCALE, -2)
    count, frames, _, height, width = clips.shape
    rows = count // COLUMNS
    page = clips.new_ones(frames, 3, rows * (height + GAP) - GAP, COLUMNS * (width + GAP) - GAP)
    for i, clip in enumerate(clips):
        top, left = i // COLUMNS * (height + GAP), i % COLUMNS * (width + GAP)
        page[:, :, top : top + height, left : left + width] = clip
    return page


def main() -> None:
    pipeline = load_pipeline()
    job = pipeline.job(batch=len(CAPTIONS), seed=1)
    clips = pipeline.generate(list(CAPTIONS), job).pixels
    write_video(sys.argv[1], tiled(clips), job.fps, {"prompts": list(CAPTIONS), "seed": 1}, QUALITY)


if __name__ == "__main__":
    main()
