"""Videos, through ffmpeg: any that it reads, and .mp4 and .webm to write.

imageio's pyav plugin decodes. PyAV itself is used for what imageio (2.38) cannot do. Reading: a rate that is the mean,
turned frames, metadata of a file without pictures. Writing: options of the encoder (quality), colour tags, audio, and
rates with a numerator above 65535.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import InputError
from .completeness import check_complete
from .failures import decoding_errors
from .metadata import Metadata, decode_tags, encode_tags
from .pixels import Clip, from_bytes, stacked
from .targets import Recording, Sound, WriteFrame

_TO_RGB = [("scale", "out_range=full:flags=bilinear"), ("format", "rgb24")]  # from the frame's own matrix and range
_BT709 = {"colorspace": "bt709", "color_primaries": "bt709", "color_trc": "bt709", "color_range": "tv"}


@dataclass(frozen=True)
class Codec:
    """An encoder of ffmpeg's, its constant rate factors for quality 100 and 0, and its options."""

    name: str
    best: int
    worst: int
    options: dict[str, str]
    tag: str = ""  # in the file, where players expect another than ffmpeg's
    least: int = 1  # side of a frame


# cpu-independent: x264's AVX-512 macroblock tree differs from run to run in widths that are no multiple of 128.
H264 = Codec("libx264", 12, 51, {"x264-params": "cpu-independent=1"})
VP9 = Codec("libvpx-vp9", 15, 63, {"row-mt": "1", "cpu-used": "4"})
# x265 (4.1) writes past its memory with frames of 48 x 32, which takes the whole program down.
H265 = Codec("libx265", 12, 51, {"x265-params": "log-level=error"}, "hvc1", least=64)
AV1 = Codec("libsvtav1", 15, 63, {"preset": "8"})
CODECS = {"h264": H264, "h265": H265, "av1": AV1, "vp9": VP9}


@dataclass(frozen=True)
class Container:
    """A file format: its codecs by name, the usual one first, the encoder of its sound, and its own options."""

    codecs: tuple[str, ...]
    sound: str
    options: dict[str, str]


CONTAINERS = {  # use_metadata_tags keeps keys that mp4 has no name for; bitexact makes no random identifiers
    ".mp4": Container(("h264", "h265", "av1"), "aac", {"movflags": "faststart+use_metadata_tags"}),
    ".webm": Container(("vp9", "av1"), "libopus", {"fflags": "bitexact"}),
}
SOUND_RATE = 48000  # Opus takes no other common one
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}


def has_encoder(codec: str) -> bool:
    """Whether ffmpeg, as it is installed, writes a video codec: h264, h265, av1 or vp9."""
    try:
        import av
    except ImportError:
        return False
    return CODECS[codec].name in av.codecs_available


def read_container(path, frames: int | None, size: tuple[int, int] | None) -> Clip:
    """As `read_video`, of anything that ffmpeg reads."""
    first, rate, declared = _beginning(path)
    pixels = stacked(islice(_decoded(path, first), frames), size)
    _check_length(path, len(pixels), min(declared, frames or declared))
    return Clip(pixels, rate)


def container_frames(path) -> Iterator[Tensor]:
    """As `video_frames`, of anything that ffmpeg reads."""
    first, _, declared = _beginning(path)
    found = 0
    for frame in _decoded(path, first):
        found += 1
        yield frame
    _check_length(path, found, declared)


def _beginning(path) -> tuple[Any, Fraction, int]:
    """PyAV's first frame, the rate, and how many frames the header speaks of."""
    with _header(path) as container:
        if not container.streams.video:
            raise InputError(f"{path} has no video stream; give a clip with pictures")
        stream = container.streams.video[0]
        first = next(container.decode(stream), None)
        if first is None:
            raise InputError(f"{path} has no frames; it may be damaged: export it again")
        return first, Fraction(stream.average_rate or stream.guessed_rate or 0), stream.frames


def _decoded(path, first) -> Iterator[Tensor]:
    """Each frame (3, H, W), turned as the first one says."""
    with decoding_errors(path, "video"):
        for array in _arrays(path):
            yield from_bytes(np.rot90(array, first.rotation // 90))


def _arrays(path) -> Iterator[np.ndarray]:
    """Each frame as it is stored."""
    import imageio.v3 as iio

    file = iio.imopen(os.path.abspath(path), "r", plugin="pyav")
    try:
        yield from file.iter(format=None, filter_sequence=_TO_RGB, thread_type="FRAME")
    finally:
        # Closing collects garbage, and does so again when the object goes: half a second where many others are alive.
        gc.freeze()
        file.close()
        del file
        gc.unfreeze()


def _check_length(path, found: int, declared: int) -> None:
    """Raise InputError where a clip ends early. Edit lists hide a few frames of what is stored, which is no damage."""
    if found < declared - max(2, declared // 20):
        raise InputError(f"{path} should have {declared} frames, but only {found} can be read; copy or export it again")


def container_metadata(path) -> Metadata:
    """As `read_metadata`, of anything that ffmpeg reads."""
    with _header(path) as container:
        return decode_tags({key.lower(): value for key, value in container.metadata.items()})


@contextmanager
def _header(path) -> Iterator[Any]:
    """PyAV's container; what goes wrong inside becomes InputError."""
    import av

    with decoding_errors(path, "video"):
        check_complete(path)
        with av.open(os.path.abspath(path)) as container:  # absolute, as ffmpeg takes "a:b.mp4" for a protocol
            yield container


@contextmanager
def container_recorder(recording: Recording, height: int, width: int) -> Iterator[WriteFrame]:
    """Recorder of .mp4 and .webm."""
    import av
    from av.video.reformatter import VideoReformatter

    suffix = recording.target.suffix
    kind, codec = CONTAINERS[suffix], CODECS[recording.codec]
    if min(height, width) < codec.least:
        raise InputError(
            f"{recording.target.path}: {recording.codec} takes frames of {codec.least} x {codec.least} or more, not "
            f"{width} x {height}; use {kind.codecs[0]}"
        )
    os.environ.setdefault("SVT_LOG", "1")  # SVT-AV1 tells its settings in twenty lines otherwise
    crf = round(codec.worst + (codec.best - codec.worst) * recording.quality / 100)
    padding = (0, height % 2), (0, width % 2), (0, 0)  # 4:2:0 has one chroma value for 2 x 2 pixels
    reformatter = VideoReformatter()
    container = av.open(str(recording.part), "w", format=suffix[1:], container_options=kind.options)

    def write(frame: np.ndarray) -> None:
        picture = av.VideoFrame.from_ndarray(np.pad(frame, padding, mode="edge"), format="rgb24")
        picture = reformatter.reformat(
            picture, format="yuv420p", dst_colorspace="ITU709", src_color_range="JPEG", dst_color_range="MPEG"
        )
        container.mux(stream.encode(picture))
        if track:
            container.mux(track.next())

    try:
        container.metadata.update(encode_tags(recording.metadata))
        stream = container.add_stream(codec.name, recording.rate, {**codec.options, **_BT709, "crf": str(crf)})
        stream.height, stream.width, stream.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
        if codec.tag and suffix == ".mp4":
            stream.codec_tag = codec.tag
        track = recording.sound and _Track(container, kind.sound, recording.sound, recording.rate)
        yield write
        container.mux(stream.encode(None))
        if track:
            container.mux(track.stream.encode(None))
        container.close()
    except BaseException:
        with suppress(Exception):  # closing completes the file, which can fail for the same reason again
            container.close()
        raise


class _Track:
    """A clip's sound in a file: written as its frames are, and as long as they are at most."""

    def __init__(self, container, encoder: str, sound: Sound, rate: Fraction):
        self.sound, self.rate = sound, rate
        self.frames = self.done = 0
        self.stream = container.add_stream(encoder, SOUND_RATE)
        self.stream.layout = "mono" if len(sound.samples) == 1 else "stereo"

    def next(self) -> list:
        """The packets that come with the next frame."""
        import av

        self.frames += 1
        stop = round(self.frames * self.sound.rate / self.rate)
        samples = self.sound.samples[:, self.done : stop]
        if not samples.shape[1]:
            return []
        frame = av.AudioFrame.from_ndarray(samples.cpu().float().contiguous().numpy(), "fltp", LAYOUTS[len(samples)])
        frame.sample_rate, frame.time_base, frame.pts = self.sound.rate, Fraction(1, self.sound.rate), self.done
        self.done = stop
        return self.stream.encode(frame)
