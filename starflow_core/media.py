"""Pictures and clips: reading, fitting to a size, writing frame by frame, metadata in the file.

Pixels are float32 in [-1, 1], a picture (3, H, W), a clip (F, 3, H, W). A path says what its file is: see
`VideoWriter`.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import struct
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError, NonFiniteError, StarflowError

SEQUENCE_SCHEMA = 1  # version of a sequence's metadata.json
STILLS = (".png", ".jpg", ".jpeg")
PICTURES = (*STILLS, ".webp", ".gif", ".bmp", ".tif", ".tiff")  # what Pillow reads here, also as a clip
FORMATS = ".mp4, .webm, .gif, .webp, .png, .jpg, or a folder (with a / at its end) for an image sequence"

_FASTEST = {".gif": 50, ".webp": 90}  # browsers play shorter frames at 10 a second
_NUMBER = re.compile(r"%0?(\d*)d")
_KEY = re.compile(r"[a-z][a-z0-9_]{0,60}")  # what every format gives back as it was; Matroska has one case only
# Set, left out or renamed by ffmpeg itself.
_CONTAINER_KEYS = {"major_brand", "minor_version", "compatible_brands", "encoder", "encoding_tool", "creation_time"}
_CONTAINER_KEYS |= {"duration", "stereo_mode", "part_number"}
_IMAGE_DESCRIPTION = 0x010E  # EXIF
_JPEG_EXIF_LIMIT = 65000
_BT709 = 1  # in ffmpeg's lists of matrices, primaries and transfer curves alike
_LIMITED, _FULL = 1, 2  # ffmpeg's colour ranges

_Add = Callable[[np.ndarray], None]  # takes a frame (H, W, 3) uint8


@dataclass(frozen=True)
class Clip:
    """Frames (F, 3, H, W), float32 in [-1, 1], and their rate; `fps` is 0 where the source has none."""

    pixels: Tensor
    fps: Fraction


@dataclass(frozen=True)
class _Codec:
    """An encoder, its constant rate factors for quality 100 and 0, its options and the container's."""

    name: str
    best: int
    worst: int
    options: dict[str, str]
    container: dict[str, str]


# use_metadata_tags keeps keys that mp4 has no name for.
_CODECS = {
    ".mp4": _Codec("libx264", 12, 51, {}, {"movflags": "faststart+use_metadata_tags"}),
    ".webm": _Codec("libvpx-vp9", 15, 63, {"row-mt": "1", "cpu-used": "4"}, {}),
}


# Reading


def read_image(path: str | os.PathLike) -> Tensor:
    """A picture as (3, H, W), turned as its EXIF orientation says, transparency composed over black.

    16-bit grey keeps its depth; an animation gives its first frame; colour profiles are ignored.
    Raises InputError for a file that is missing, damaged or not a picture.
    """
    with _opened(path) as image:
        return _pixels(image)


def read_video(path: str | os.PathLike, frames: int | None = None) -> Clip:
    """The first `frames` frames (all, if None) of a video, an animation, or a folder of equally large pictures.

    Frames come as they are stored, at the mean rate where a file's rate varies. Rotation in the file is applied.
    Raises InputError for what is missing, damaged, shorter than its header says, or holds no pictures.
    """
    if frames is not None and frames < 1:
        raise InputError(f"{frames} frames of {path}: expected at least 1")
    target = _target(path)
    if target.pattern:
        return _read_sequence(path, frames)
    if target.suffix in PICTURES:
        return _read_animation(path, frames)
    return _read_container(path, frames)


def fit(pixels: Tensor, height: int, width: int) -> Tensor:
    """Scale (..., 3, H, W) to cover height x width (bilinear, antialiased) and crop the centre."""
    old_height, old_width = pixels.shape[-2:]
    scale = max(height / old_height, width / old_width)
    size = max(height, round(old_height * scale)), max(width, round(old_width * scale))
    if size != (old_height, old_width):
        frames = pixels.reshape(-1, *pixels.shape[-3:])
        frames = F.interpolate(frames, size, mode="bilinear", antialias=True, align_corners=False)
        pixels = frames.reshape(*pixels.shape[:-2], *size)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return pixels[..., top : top + height, left : left + width]


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The metadata that `VideoWriter` stored, or another program as JSON under such keys; {} where there is none.

    Raises InputError for a file that is missing or damaged.
    """
    target = _target(path)
    if target.pattern:
        _sequence_names(path)
        return _sequence_record(target.path).get("metadata", {})
    if target.suffix not in PICTURES:
        with _demuxer(path) as container:
            return _decoded_tags({key.lower(): value for key, value in container.metadata.items()})
    with _opened(path) as image:
        if image.format == "PNG":
            return _decoded_tags(image.text)
        if image.format == "GIF":
            return _decoded_object(image.info.get("comment", b"").decode("ascii", "replace"))
        return _decoded_object(image.getexif().get(_IMAGE_DESCRIPTION))


@contextmanager
def _reading(path, kind: str) -> Iterator[None]:
    try:
        yield
    except (StarflowError, MemoryError):
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file or folder; check the path") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; give a file") from None
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise InputError(
            f"{path} cannot be read as a {kind} ({_reason(error)}); it may be damaged or in another format: "
            "open it in a viewer, or export it again"
        ) from error


@contextmanager
def _opened(path) -> Iterator[Any]:
    from PIL import Image

    with _reading(path, "picture"), Image.open(path) as image:
        yield image


@contextmanager
def _demuxer(path) -> Iterator[Any]:
    with _reading(path, "video"):
        _check_complete(path)
        import av

        # An absolute name, because ffmpeg takes "a:b.mp4" for a protocol.
        with av.open(os.path.abspath(path)) as container:
            yield container


def _pixels(image) -> Tensor:
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise InputError("floating-point pixels have no known range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        grey = torch.from_numpy(np.asarray(image).astype(np.float32)) / 65535
        return grey.clamp(0, 1).mul(2).sub(1).expand(3, -1, -1).contiguous()
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return _from_bytes(np.array(image.convert("RGB")))


def _from_bytes(array: np.ndarray) -> Tensor:
    """(..., H, W, 3) uint8 to (..., 3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(array).movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.div_(127.5).sub_(1)


def _read_animation(path, frames: int | None) -> Clip:
    from PIL import ImageSequence

    with _opened(path) as image:
        pictures, milliseconds = [], 0
        for frame in islice(ImageSequence.Iterator(image), frames):
            pictures.append(_pixels(frame))
            milliseconds += frame.info.get("duration", 0)
        step = 10 if image.format == "GIF" else 1
        return Clip(torch.stack(pictures), _rate_of(len(pictures), milliseconds, step))


def _rate_of(frames: int, milliseconds: float, step: int) -> Fraction:
    """Frames a second: a whole number, if that is within the time `step` that durations are rounded to."""
    if not milliseconds:
        return Fraction(0)
    rate = Fraction(1000 * frames) / Fraction(milliseconds)
    whole = max(round(rate), 1)
    return Fraction(whole) if 2 * abs(Fraction(1000 * frames, whole) - Fraction(milliseconds)) <= step else rate


def _read_container(path, frames: int | None) -> Clip:
    from av.video.reformatter import VideoReformatter

    with _demuxer(path) as container:
        if not container.streams.video:
            raise InputError(f"{path} holds no video; give a clip with pictures")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        reformatter = VideoReformatter()
        pictures = [_rgb(frame, reformatter) for frame in islice(container.decode(stream), frames)]
        if not pictures:
            raise InputError(f"{path} holds no frames; it may be damaged: export it again")
        return Clip(_from_bytes(np.stack(pictures)), Fraction(stream.average_rate or stream.guessed_rate or 0))


def _rgb(frame, reformatter) -> np.ndarray:
    """A decoded frame as (H, W, 3) uint8, upright."""
    from av.video.reformatter import Colorspace

    full = frame.color_range == _FULL or frame.format.is_rgb
    rgb = reformatter.reformat(
        frame,
        format="rgb24",
        dst_colorspace=Colorspace.DEFAULT,  # means nothing to RGB, but has older PyAV use the frame's own matrix
        src_color_range=_FULL if full else _LIMITED,
        dst_color_range=_FULL,
    )
    return np.rot90(rgb.to_ndarray(), frame.rotation // 90)


def _check_complete(path) -> None:
    """Raise InputError for an mp4 or webm that ends before its header says: ffmpeg would make a shorter clip of it."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        start = file.read(8)
        file.seek(0)
        if start[:4] == b"\x1a\x45\xdf\xa3":
            end = _matroska_end(file)
        elif start[4:] == b"ftyp":
            end = _mp4_end(file, size)
        else:
            return
    if end > size:
        raise InputError(f"{path} is truncated: {size} of {end} bytes; copy or download it again")


def _mp4_end(file, size: int) -> int:
    """Where the last of an mp4's boxes ends, by its header. A box of size 0 goes to the end of the file."""
    end = 0
    while end < size:
        file.seek(end)
        header = file.read(16).ljust(16, b"\0")
        length, wide = int.from_bytes(header[:4], "big"), int.from_bytes(header[8:], "big")
        length = wide if length == 1 else length
        if length < 8:
            return size
        end += length
    return end


def _matroska_end(file) -> int:
    """Where a Matroska file's one segment ends, by its header; 0 if that was left open, as in a live recording."""

    def element_size() -> int:
        first = file.read(5)[4:]  # after an identifier of four bytes
        width = 9 - first[0].bit_length()
        value = int.from_bytes(first + file.read(width - 1), "big")
        return value - (1 << 7 * width)

    file.seek(element_size(), os.SEEK_CUR)
    size = element_size()
    return file.tell() + size if (size + 1) & size else 0


# Image sequences


@dataclass(frozen=True)
class _Target:
    """What a path stands for: one file, or a sequence's folder with the `pattern` of its pictures' names."""

    path: Path
    suffix: str
    pattern: str = ""


def _target(path: str | os.PathLike) -> _Target:
    text, path = os.fspath(path), Path(os.path.abspath(path))
    if text.endswith(("/", os.sep)) or os.path.isdir(path) or not (path.suffix or os.path.exists(path)):
        return _Target(path, ".png", "%05d.png")
    suffix = path.suffix.lower()
    if len(_NUMBER.findall(path.name)) == 1 and suffix in STILLS:
        return _Target(path.parent, suffix, path.name)
    return _Target(path, suffix)


def _sequence_record(folder: Path) -> dict[str, Any]:
    """The metadata.json of a sequence written here; {} in any other folder."""
    with suppress(OSError, ValueError):
        record = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        if isinstance(record, dict) and {"starflow_sequence", "fps", "files", "metadata"} <= set(record):
            return record
    return {}


def _sequence_names(path) -> list[str]:
    """The pictures of a sequence in the order of their numbers."""
    target = _target(path)
    with _reading(path, "folder"):
        names = [name for name in os.listdir(target.path) if Path(name).suffix.lower() in PICTURES]
    if _NUMBER.search(Path(path).name):
        before, after = (re.escape(part) for part in _NUMBER.split(target.pattern)[::2])
        names = [name for name in names if re.fullmatch(rf"{before}\d+{after}", name)]
    if not names:
        raise InputError(f"{path} holds no pictures; expected files such as 00000.png")
    return sorted(
        names, key=lambda name: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
    )


def _read_sequence(path, frames: int | None) -> Clip:
    folder, names = _target(path).path, _sequence_names(path)[:frames]
    pictures = [read_image(folder / name) for name in names]
    for name, picture in zip(names, pictures, strict=True):
        if picture.shape != pictures[0].shape:
            raise InputError(
                f"{folder / name} is {_size(picture)}, {names[0]} is {_size(pictures[0])}; a clip needs one size"
            )
    with _reading(folder / "metadata.json", "record of a sequence"):
        return Clip(torch.stack(pictures), Fraction(_sequence_record(folder).get("fps", 0)))


def _size(picture: Tensor) -> str:
    return f"{picture.shape[-1]} x {picture.shape[-2]}"


# Metadata


def _dumps(metadata: dict[str, Any]) -> str:
    """JSON for fields that are 7-bit by their format."""
    return json.dumps(metadata, allow_nan=False)


def _tags(metadata: dict[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value, ensure_ascii=False, allow_nan=False) for key, value in metadata.items()}


def _check_metadata(metadata: dict[str, Any]) -> None:
    for key, value in metadata.items():
        if not _KEY.fullmatch(key) or key in _CONTAINER_KEYS:
            raise InputError(f"metadata key {key!r}: expected a lower-case name, not one that file formats use")
        try:
            _tags({key: value})[key].encode()
        except (TypeError, ValueError) as error:
            raise InputError(f"metadata {key!r} cannot be stored as JSON ({error})") from None


def _decoded_tags(tags: dict[str, str]) -> dict[str, Any]:
    values = {}
    for key, text in tags.items():
        if _KEY.fullmatch(key) and key not in _CONTAINER_KEYS:
            with suppress(ValueError, RecursionError):
                values[key] = json.loads(text)
    return values


def _decoded_object(text: Any) -> dict[str, Any]:
    with suppress(ValueError, TypeError, RecursionError):
        values = json.loads(text)
        return values if isinstance(values, dict) else {}
    return {}


def _exif(metadata: dict[str, Any]) -> bytes:
    from PIL import Image

    exif = Image.Exif()
    if metadata:
        exif[_IMAGE_DESCRIPTION] = _dumps(metadata)
    return exif.tobytes() if metadata else b""


# Writing


@dataclass(frozen=True)
class _Job:
    """What an encoder needs to know. `part` is the file or folder to write, to be renamed when it is complete."""

    target: _Target
    part: Path
    rate: Fraction
    metadata: dict[str, Any]
    quality: int


def check_writable(path: str | os.PathLike, frames: int | None = None) -> None:
    """Raise InputError unless a clip (of `frames` frames, if known) can be written to `path`; call it before the work.

    Looks at the format, its encoder, the folder (which may be missing, if it can be made) and the permission to
    write there. Leaves nothing behind.
    """
    target = _target(path)
    if target.suffix not in (*_CODECS, ".gif", ".webp", *STILLS):
        raise InputError(f"{path}: unknown format {target.suffix!r}; known are {FORMATS}")
    if not target.pattern and target.suffix in STILLS and frames not in (None, 1):
        raise InputError(
            f"{path}: {target.suffix} holds one picture, not {frames}; write .mp4 or a name such as %05d.png"
        )
    _check_encoder(path, target.suffix)
    try:
        if target.pattern:
            _check_replaceable(target.path)
        with suppress(FileNotFoundError):
            os.lstat(_part_of(target.path))  # refuses names that are too long
        folder = next(parent for parent in target.path.parents if os.path.exists(parent))
        tempfile.TemporaryFile(dir=folder).close()
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be written ({_reason(error)}); choose another folder or name") from None


class VideoWriter:
    """Writes a clip as its frames come, in bounded memory; nothing is left behind unless it is complete.

        with VideoWriter("clip.mp4", fps=16, metadata={"seed": 1}) as writer:
            writer.add(frames)  # (F, 3, H, W) in [-1, 1], as often as there are any

    The path says the format: .mp4 (h264), .webm (vp9), .gif (256 colours a frame), .webp (animated), .png or .jpg
    (one picture), a folder or a name such as frames/%05d.png (image sequence with a metadata.json).
    Videos are 4:2:0, BT.709, limited range; of an odd height or width the last row or column is doubled.
    A rate up to 50 in gif, up to 90 in webp; their frames last whole steps of 10 ms and 1 ms, which are spread so
    that the whole clip is right to half a step. A picture needs no rate; with rate 0 a .webp is one, too.
    `metadata` maps lower-case names to anything JSON can hold. `quality` is 0 to 100; png and gif ignore it.

    Raises InputError for what cannot be written, as early as it can be known, StarflowError if the disk is full or
    writing fails, NonFiniteError for NaN or infinity in the pixels.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        fps: int | Fraction,
        metadata: dict[str, Any] | None = None,
        quality: int = 90,
    ):
        check_writable(path)
        metadata = dict(metadata or {})
        _check_metadata(metadata)
        target = _target(path)
        if not 0 <= quality <= 100:
            raise InputError(f"quality {quality}: expected 0 to 100")
        if target.suffix in STILLS[1:] and not target.pattern and len(_exif(metadata)) > _JPEG_EXIF_LIMIT:
            raise InputError(f"{path}: the metadata does not fit into {target.suffix}; write .png")
        rate = _checked_rate(fps, target.suffix)
        self.path = path
        self._job = _Job(target, _part_of(target.path), rate, metadata, quality)
        self._encoder = ExitStack()
        self._encode: _Add | None = None
        self._size: tuple[int, int] = (0, 0)
        self._frames = 0

    def __enter__(self) -> VideoWriter:
        return self

    def add(self, frames: Tensor) -> None:
        """Encode frames (F, 3, H, W) in [-1, 1], all of one size."""
        array = self._to_bytes(frames)
        with self._writing():
            for frame in array:
                if self._encode is None:
                    self._job.part.parent.mkdir(parents=True, exist_ok=True)
                    self._encode = self._encoder.enter_context(_encoder(self._job)(self._job, *self._size))
                self._encode(frame)
                self._frames += 1

    def __exit__(self, kind, error, trace) -> None:
        try:
            with self._writing():
                self._encoder.__exit__(kind, error, trace)
                if kind is None:
                    if not self._frames:
                        raise InputError(f"{self.path}: there are no frames to write")
                    _publish(self._job.part, self._job.target.path)
        finally:
            _remove(self._job.part)

    def _to_bytes(self, frames: Tensor) -> np.ndarray:
        """(F, 3, H, W) in [-1, 1] to (F, H, W, 3) uint8."""
        if frames.ndim != 4 or frames.shape[1] != 3:
            raise InputError(f"frames of shape {tuple(frames.shape)}: expected (F, 3, H, W)")
        size = tuple(frames.shape[-2:])
        if self._frames and size != self._size:
            raise InputError(f"{self.path}: a frame of {size} after {self._size} (H, W); a clip has one size")
        self._size = size
        frames = frames.detach().to(torch.float32)
        finite = frames.isfinite().flatten(1).all(1)
        if not finite.all():
            bad = self._frames + int(finite.logical_not().nonzero()[0])
            raise NonFiniteError(f"frame {bad} holds NaN or infinity; {self.path} was not written")
        array = frames.add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
        return array.movedim(1, -1).contiguous().cpu().numpy()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except StarflowError:
            raise
        except Exception as error:  # encoders raise errors of their own kinds
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise StarflowError(
                    f"{self.path}: the disk is full ({_reason(error)}); free some space or write elsewhere"
                ) from error
            raise StarflowError(
                f"{self.path} could not be written ({_reason(error)}); try another folder or format"
            ) from error


def write_video(
    path: str | os.PathLike,
    frames: Tensor | Iterable[Tensor],
    fps: int | Fraction,
    metadata: dict[str, Any] | None = None,
    quality: int = 90,
) -> None:
    """Write a clip (F, 3, H, W), or pieces of it as they come, with a `VideoWriter`."""
    with VideoWriter(path, fps, metadata, quality) as writer:
        for piece in [frames] if isinstance(frames, Tensor) else frames:
            writer.add(piece)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _part_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.part")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _publish(part: Path, target: Path) -> None:
    """Rename to the final name. A folder cannot replace a folder, so an old sequence first steps aside."""
    if not (part.is_dir() and target.is_dir()):
        os.replace(part, target)
        return
    old = _part_of(target)
    os.replace(target, old)
    try:
        os.replace(part, target)
    except BaseException:
        os.replace(old, target)
        raise
    _remove(old)


def _checked_rate(fps: int | Fraction, suffix: str) -> Fraction:
    if not fps and suffix in (*STILLS, ".webp"):
        return Fraction(0)
    fastest = _FASTEST.get(suffix, 1000)
    try:
        rate = Fraction(fps).limit_denominator(65535)
    except (TypeError, ValueError, OverflowError):
        rate = Fraction(0)
    if not Fraction(1, 60) <= rate <= fastest:
        raise InputError(f"frame rate {fps}: {suffix} takes 1/60 to {fastest} a second")
    return rate


def _check_encoder(path, suffix: str) -> None:
    if suffix in _CODECS:
        import av

        name, present = _CODECS[suffix].name, _CODECS[suffix].name in av.codecs_available
    else:
        from PIL import features

        name, present = "webp", suffix != ".webp" or features.check("webp")
    if not present:
        raise InputError(f"{path}: the encoder {name} is not in this installation; write .gif or an image sequence")


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; an image sequence needs a folder")
    if os.path.ismount(folder):
        raise InputError(f"{folder} is a mount point, which cannot be replaced; write into a folder inside it")
    record = _sequence_record(folder)
    written_here = {"metadata.json", *map(str, record["files"])} if record else set()
    foreign = sorted(set(os.listdir(folder)) - written_here)
    if foreign:
        raise InputError(f"{folder} holds other files ({foreign[0]}); choose an empty folder")


# Encoders: each is entered with the first frame's size, gives the function that takes frames, and completes its
# file when it is left without an error.


def _encoder(job: _Job) -> Callable[[_Job, int, int], AbstractContextManager[_Add]]:
    if job.target.pattern:
        return _sequence
    if not job.rate:
        return _still
    return {".mp4": _container, ".webm": _container, ".gif": _gif, ".webp": _webp}.get(job.target.suffix, _still)


@contextmanager
def _container(job: _Job, height: int, width: int) -> Iterator[_Add]:
    import av
    from av.video.reformatter import Colorspace, VideoReformatter

    codec = _CODECS[job.target.suffix]
    padding = (0, height % 2), (0, width % 2), (0, 0)  # 4:2:0 has one chroma value for 2 x 2 pixels
    container = av.open(str(job.part), "w", format=job.target.suffix[1:], container_options=codec.container)
    try:
        container.metadata.update(_tags(job.metadata))
        crf = round(codec.worst + (codec.best - codec.worst) * job.quality / 100)
        stream = container.add_stream(codec.name, rate=job.rate, options={**codec.options, "crf": str(crf)})
        stream.height, stream.width, stream.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED
        reformatter = VideoReformatter()

        def add(frame: np.ndarray) -> None:
            picture = reformatter.reformat(
                av.VideoFrame.from_ndarray(np.pad(frame, padding, mode="edge"), format="rgb24"),
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                src_color_range=_FULL,
                dst_color_range=_LIMITED,
            )
            container.mux(stream.encode(picture))

        yield add
        container.mux(stream.encode(None))
        container.close()
    except BaseException:
        with suppress(Exception):  # closing completes the file, which can fail for the same reason again
            container.close()
        raise


@contextmanager
def _gif(job: _Job, height: int, width: int) -> Iterator[_Add]:
    """Frames are laid into the file one by one, each with its own palette; Pillow's writer would hold them all."""
    from PIL import GifImagePlugin, Image

    with open(job.part, "wb") as file:
        file.write(b"GIF89a" + struct.pack("<HHBBB", width, height, 0x70, 0, 0))  # no common palette
        file.write(b"\x21\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00")  # play for ever
        if job.metadata:
            comment = _dumps(job.metadata).encode()
            blocks = (comment[i : i + 255] for i in range(0, len(comment), 255))
            file.write(b"\x21\xfe" + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0")
        durations = _durations(job.rate, 100)

        def add(frame: np.ndarray) -> None:
            picture = Image.fromarray(frame)
            picture = picture.quantize(palette=picture.quantize(256))  # with a palette given, it dithers
            file.writelines(GifImagePlugin.getdata(picture, duration=10 * next(durations), include_color_table=True))

        yield add
        file.write(b";")


@contextmanager
def _webp(job: _Job, height: int, width: int) -> Iterator[_Add]:
    """Frames are laid into the file one by one, as in `_gif`."""
    from PIL import Image

    def chunk(name: bytes, data: bytes) -> bytes:
        return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)

    def triple(*values: int) -> bytes:
        return b"".join(value.to_bytes(3, "little") for value in values)

    exif = _exif(job.metadata).removeprefix(b"Exif\0\0")
    animated, has_exif, not_blended = 0x02, 0x08 if exif else 0, b"\x02"
    with open(job.part, "wb") as file:
        file.write(b"RIFF\0\0\0\0WEBP")
        file.write(chunk(b"VP8X", struct.pack("<I", animated | has_exif) + triple(width - 1, height - 1)))
        file.write(chunk(b"ANIM", struct.pack("<IH", 0, 0)))  # background, play for ever
        durations = _durations(job.rate, 1000)

        def add(frame: np.ndarray) -> None:
            still = io.BytesIO()
            Image.fromarray(frame).save(still, format="WEBP", quality=job.quality)
            place = triple(0, 0, width - 1, height - 1, next(durations))
            file.write(chunk(b"ANMF", place + not_blended + still.getvalue()[12:]))

        yield add
        if exif:
            file.write(chunk(b"EXIF", exif))
        size = file.tell() - 8
        file.seek(4)
        file.write(struct.pack("<I", size))


@contextmanager
def _still(job: _Job, height: int, width: int) -> Iterator[_Add]:
    def add(frame: np.ndarray) -> None:
        if job.part.exists():
            raise InputError(f"{job.target.suffix} holds one picture; write .mp4, or a name such as frames/%05d.png")
        _save_picture(frame, job, job.part, job.metadata)

    yield add


@contextmanager
def _sequence(job: _Job, height: int, width: int) -> Iterator[_Add]:
    names: list[str] = []
    job.part.mkdir()

    def add(frame: np.ndarray) -> None:
        names.append(_NUMBER.sub(lambda number: f"{len(names):0{number[1] or 1}d}", job.target.pattern))
        _save_picture(frame, job, job.part / names[-1], {})

    yield add
    record = {
        "starflow_sequence": SEQUENCE_SCHEMA,
        "fps": str(job.rate),
        "metadata": job.metadata,
        "files": names,
    }
    text = json.dumps(record, ensure_ascii=False, indent=1)
    (job.part / "metadata.json").write_text(text, encoding="utf-8")


def _save_picture(frame: np.ndarray, job: _Job, path: Path, metadata: dict[str, Any]) -> None:
    from PIL import Image, PngImagePlugin

    picture = Image.fromarray(frame)
    file = io.BytesIO()  # written from here, as Pillow's own writing does not notice a disk that fills up
    if job.target.suffix == ".png":
        text = PngImagePlugin.PngInfo()
        for key, value in _tags(metadata).items():
            text.add_text(key, value)
        picture.save(file, format="PNG", pnginfo=text)
    else:
        kind = "WEBP" if job.target.suffix == ".webp" else "JPEG"
        picture.save(file, format=kind, quality=job.quality, subsampling=0, exif=_exif(metadata))
    path.write_bytes(file.getvalue())


def _durations(rate: Fraction, steps: int) -> Iterator[int]:
    """Each frame's length in whole steps (so many a second), rounded so that no error adds up."""
    frame = 0
    while True:
        yield round((frame + 1) * steps / rate) - round(frame * steps / rate)
        frame += 1
