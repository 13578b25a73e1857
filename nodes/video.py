"""Frames to a file that shows in the node, with the workflow inside."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import torch
from comfy_api.latest import io, ui

from ..starflow_core.errors import InputError
from . import host
from .types import CATEGORY

ANIMATED = ("mp4", "webm", "webp")  # what the page plays; it shows other files as pictures
FORMATS = ("mp4", "webm", "gif", "webp", "png sequence")


class STARFlowVideoCombine(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STARFlowVideoCombine",
            display_name="STARFlow Video Combine",
            category=CATEGORY,
            description="Saves frames as a video, an animation or an image sequence, shows the result here, and stores "
            "the workflow in the file: drag it back onto the canvas to restore the graph (mp4, webm, webp and png).",
            inputs=[
                io.Image.Input("images", tooltip="The frames of one clip, or of several in a row."),
                io.Float.Input(
                    "frame_rate",
                    default=16.0,
                    min=0.1,
                    max=120.0,
                    step=1.0,
                    tooltip="Frames per second; STARFlow-V was trained at 16.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default="mp4",
                    tooltip="mp4 (h264) plays everywhere; webm (vp9) is smaller; gif and webp loop; a png sequence "
                    "is lossless.",
                ),
                io.Int.Input(
                    "quality",
                    default=85,
                    min=1,
                    max=100,
                    tooltip="Higher looks better but makes larger files; ignored for gif and png.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="video/STARFlow",
                    tooltip="Folder and file name inside the output folder; ComfyUI's tokens work, such as "
                    "%date:yyyy-MM-dd%.",
                ),
                io.Int.Input(
                    "clip_frames",
                    default=0,
                    min=0,
                    max=100001,
                    optional=True,
                    tooltip="Frames per clip, if the images are a batch of several clips; each clip becomes a file. 0 "
                    "uses the length from STARFlow VAE Decode if connected directly; otherwise it is all one clip.",
                ),
            ],
            outputs=[
                io.Video.Output(
                    display_name="video", is_output_list=True, tooltip="For ComfyUI's Save Video; one per clip."
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, format: str = "mp4") -> bool | str:
        return format in FORMATS or f"format is {format!r}; expected one of {', '.join(FORMATS)}"

    @classmethod
    def execute(
        cls, images, frame_rate: float, format: str, quality: int, filename_prefix: str, clip_frames: int = 0
    ) -> io.NodeOutput:
        rate = _rate(frame_rate)
        metadata = host.workflow_metadata(cls.hidden)
        clips = _clips(images, clip_frames or host.clip_frames(images))
        folder, name, counter, subfolder = host.output_folder(filename_prefix, *images.shape[1:3])
        shown = []
        for index, clip in enumerate(clips):
            target = _target(folder, name, counter + index, format)
            for file in _write(target, clip, rate, quality, metadata):
                where = Path(subfolder) / file.relative_to(folder).parent
                shown.append(
                    ui.SavedResult(file.name, "" if where == Path() else where.as_posix(), io.FolderType.output)
                )
        videos = [host.video(clip, rate) for clip in clips]
        return io.NodeOutput(videos, ui={"images": shown, "animated": (format in ANIMATED,)})


NODES = [STARFlowVideoCombine]


def _rate(frame_rate: float) -> Fraction:
    """As broadcast has it: 29.97 is 30000/1001."""
    if not 0 < frame_rate < math.inf:
        raise InputError(f"frame_rate is {frame_rate:g}; give frames per second, such as 16")
    return Fraction(frame_rate).limit_denominator(1001)


def _clips(images: torch.Tensor, count: int) -> list[torch.Tensor]:
    if len(images) % count:
        raise InputError(
            f"{len(images)} frames can't be split into clips of {count}; clip_frames has to divide their number"
        )
    return list(images.split(count))


def _target(folder: Path, name: str, number: int, format: str) -> str:
    file = folder / f"{name}_{number:05}_"
    return f"{file}/" if format == "png sequence" else f"{file}.{format}"


def _write(target: str, clip: torch.Tensor, rate: Fraction, quality: int, metadata: dict) -> list[Path]:
    """Write a clip (F, H, W, 3) in 0..1 and return its files."""
    from ..starflow_core.media import VideoWriter

    with VideoWriter(target, rate, metadata, quality) as writer:
        for frame in clip:
            host.check_interrupted()
            writer.add((frame[..., :3] * 2 - 1).movedim(-1, 0).unsqueeze(0))
    path = Path(target)
    return sorted(path.glob("*.png")) if path.is_dir() else [path]
