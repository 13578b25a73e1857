"""Frames to a file that shows in the node, with the workflow inside."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import torch
from comfy_api.latest import io, ui

from ..starflow_core.errors import InputError
from . import host
from .types import CATEGORY, SEARCH

FORMATS = {  # the ending of the path that a VideoWriter takes, and the codec
    "mp4": (".mp4", ""),
    "webm": (".webm", ""),
    "gif": (".gif", ""),
    "webp": (".webp", ""),
    "png sequence": ("/", ""),
    "mp4 (h265)": (".mp4", "h265"),
    "mp4 (av1)": (".mp4", "av1"),
}
ANIMATED = (".mp4", ".webm", ".webp")  # what the page plays; it shows other files as pictures
WITH_SOUND = (".mp4", ".webm")


class STARFlowVideoCombine(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STARFlowVideoCombine",
            display_name="STARFlow Video Combine",
            category=CATEGORY,
            **SEARCH,
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
                    options=[format for format in FORMATS if _can_write(format)],
                    default="mp4",
                    tooltip="mp4 (h264) plays everywhere; webm (vp9) is smaller, h265 and av1 are smaller still, but "
                    "play in fewer places; gif and webp loop; a png sequence is lossless.",
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
                io.Audio.Input(
                    "audio", optional=True, tooltip="Sound for mp4 and webm: one for all clips, or one for each."
                ),
                io.Video.Input(
                    "video", optional=True, tooltip="A clip whose sound is taken, if no audio is connected."
                ),
                io.Boolean.Input(
                    "save_output",
                    default=True,
                    optional=True,
                    tooltip="Off only shows the result: its file is in the temp folder, which ComfyUI empties when it "
                    "starts.",
                ),
                io.Int.Input(
                    "loop_count",
                    default=0,
                    min=0,
                    max=1000,
                    optional=True,
                    tooltip="How often a gif or webp plays; 0 is without end. Other formats leave it to the player.",
                ),
                io.Boolean.Input(
                    "pingpong", default=False, optional=True, tooltip="Plays forwards, then backwards: a seamless loop."
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
        if format not in FORMATS:
            return f"format is {format!r}; expected one of {', '.join(FORMATS)}"
        return _can_write(format) or f"format {format!r} needs an encoder that this PyAV doesn't have; choose mp4"

    @classmethod
    def execute(
        cls, images, frame_rate: float, format: str, quality: int, filename_prefix: str, clip_frames: int = 0,
        audio=None, video=None, save_output: bool = True, loop_count: int = 0, pingpong: bool = False,
    ) -> io.NodeOutput:  # fmt: skip
        rate = _rate(frame_rate)
        clips = _clips(images, clip_frames or host.clip_frames(images))
        sounds = _sounds(audio or (video and video.get_components().audio), len(clips))
        if pingpong:
            clips = [torch.cat((clip, clip[1:-1].flip(0))) for clip in clips]
        options = {"metadata": host.workflow_metadata(cls.hidden), "quality": quality, "plays": loop_count}
        ending, options["codec"] = FORMATS[format]
        folder, name, counter, subfolder = host.output_folder(filename_prefix, *images.shape[1:3], save_output)
        place = io.FolderType.output if save_output else io.FolderType.temp
        shown = []
        for index, (clip, sound) in enumerate(zip(clips, sounds, strict=True)):
            target = f"{folder / name}_{counter + index:05}_{ending}"
            for file in _write(target, clip, rate, sound if ending in WITH_SOUND else None, options):
                where = Path(subfolder) / file.relative_to(folder).parent
                shown.append(ui.SavedResult(file.name, "" if where == Path() else where.as_posix(), place))
        videos = [host.video(clip, rate, sound) for clip, sound in zip(clips, sounds, strict=True)]
        return io.NodeOutput(videos, ui={"images": shown, "animated": (ending in ANIMATED,)})


NODES = [STARFlowVideoCombine]


def _can_write(format: str) -> bool:
    """Whether the encoder of a format is there; those of the usual codecs are asked for when they write."""
    from ..starflow_core.media import has_encoder

    codec = FORMATS[format][1]
    return not codec or has_encoder(codec)


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


def _sounds(audio: dict | None, clips: int) -> list[dict | None]:
    """The host's AUDIO for each clip."""
    if audio is None:
        return [None] * clips
    waves = audio["waveform"]
    if len(waves) not in (1, clips):
        raise InputError(f"audio has {len(waves)} sounds for {clips} clips; give one, or one each")
    return [{**audio, "waveform": wave} for wave in waves.expand(clips, -1, -1).split(1)]


def _write(target: str, clip: torch.Tensor, rate: Fraction, audio: dict | None, options: dict) -> list[Path]:
    """Write a clip (F, H, W, 3) in 0..1 and return its files."""
    from ..starflow_core.media import Sound, VideoWriter

    sound = audio and Sound(audio["waveform"][0], int(audio["sample_rate"]))
    with VideoWriter(target, rate, sound=sound, **options) as writer:
        for frame in clip:
            host.check_interrupted()
            writer.add((frame[..., :3] * 2 - 1).movedim(-1, 0).unsqueeze(0))
    path = Path(target)
    return sorted(path.glob("*.png")) if path.is_dir() else [path]
