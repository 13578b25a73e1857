"""Videos, through ffmpeg: any that it reads, and .mp4 and .webm to write."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from typing import Any

import numpy as np

from ..errors import InputError
from .completeness import check_complete
from .encoding import AddFrame, Job
from .failures import reading
from .metadata import decode_tags, encode_tags
from .pixels import Clip, from_bytes, stacked

_BT709 = 1  # in ffmpeg's lists of matrices, primaries and transfer curves alike


@dataclass(frozen=True)
class Codec:
    """An encoder, its constant rate factors for quality 100 and 0, its options and the container's."""

    name: str
    best: int
    worst: int
    options: dict[str, str]
    container: dict[str, str]


CODECS = {
    # cpu-independent: x264's AVX-512 macroblock tree differs from run to run in widths that are no multiple of 128.
    # use_metadata_tags keeps keys that mp4 has no name for.
    ".mp4": Codec("libx264", 12, 51, {"x264-params": "cpu-independent=1"}, {"movflags": "faststart+use_metadata_tags"}),
    # bitexact: no random identifiers.
    ".webm": Codec("libvpx-vp9", 15, 63, {"row-mt": "1", "cpu-used": "4"}, {"fflags": "bitexact"}),
}


def read_container(path, frames: int | None, size: tuple[int, int] | None) -> Clip:
    """As `read_video`, of anything that ffmpeg reads."""
    from av.video.reformatter import VideoReformatter

    with _demuxer(path) as container:
        if not container.streams.video:
            raise InputError(f"{path} holds no video; give a clip with pictures")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        reformatter = VideoReformatter()
        pictures = (from_bytes(_rgb(frame, reformatter)) for frame in islice(container.decode(stream), frames))
        first = next(pictures, None)
        if first is None:
            raise InputError(f"{path} holds no frames; it may be damaged: export it again")
        return Clip(stacked(chain([first], pictures), size), Fraction(stream.average_rate or stream.guessed_rate or 0))


def container_metadata(path) -> dict[str, Any]:
    """As `read_metadata`, of anything that ffmpeg reads."""
    with _demuxer(path) as container:
        return decode_tags({key.lower(): value for key, value in container.metadata.items()})


@contextmanager
def _demuxer(path) -> Iterator[Any]:
    with reading(path, "video"):
        check_complete(path)
        import av

        # An absolute name, because ffmpeg takes "a:b.mp4" for a protocol.
        with av.open(os.path.abspath(path)) as container:
            yield container


def _rgb(frame, reformatter) -> np.ndarray:
    """A decoded frame as (H, W, 3) uint8, upright."""
    from av.video.reformatter import ColorRange, Colorspace

    full = frame.color_range == ColorRange.JPEG or frame.format.is_rgb
    rgb = reformatter.reformat(
        frame,
        format="rgb24",
        dst_colorspace=Colorspace.DEFAULT,  # means nothing to RGB, but has older PyAV use the frame's own matrix
        src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
    )
    return np.ascontiguousarray(np.rot90(rgb.to_ndarray(), frame.rotation // 90))


@contextmanager
def container_encoder(job: Job, height: int, width: int) -> Iterator[AddFrame]:
    """Encoder of .mp4 and .webm."""
    import av
    from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

    codec = CODECS[job.target.suffix]
    padding = (0, height % 2), (0, width % 2), (0, 0)  # 4:2:0 has one chroma value for 2 x 2 pixels
    container = av.open(str(job.part), "w", format=job.target.suffix[1:], container_options=codec.container)
    try:
        container.metadata.update(encode_tags(job.metadata))
        crf = round(codec.worst + (codec.best - codec.worst) * job.quality / 100)
        stream = container.add_stream(codec.name, rate=job.rate, options={**codec.options, "crf": str(crf)})
        stream.height, stream.width, stream.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = ColorRange.MPEG
        reformatter = VideoReformatter()

        def add(frame: np.ndarray) -> None:
            picture = reformatter.reformat(
                av.VideoFrame.from_ndarray(np.pad(frame, padding, mode="edge"), format="rgb24"),
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
            )
            container.mux(stream.encode(picture))

        yield add
        container.mux(stream.encode(None))
        container.close()
    except BaseException:
        with suppress(Exception):  # closing completes the file, which can fail for the same reason again
            container.close()
        raise
