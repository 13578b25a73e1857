"""Files of tensors: open, read, cast and write them, one tensor at a time.

A `.safetensors` file, a sharded one with its index, or a `.pth` that holds nothing but tensors: no
file is ever allowed to run code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..control import Progress
from ..errors import CheckpointError, InputError, NonFiniteError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
INDEX = ".safetensors.index.json"
PICKLES = (".pth", ".pt", ".ckpt", ".bin")
LARGEST_HEADER = 100_000_000  # bytes, the format's own limit
HASH_CHUNK = 1 << 22  # bytes

Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file. `dtype` is None for a type that isn't known here."""

    file: Path
    offset: int
    dtype: torch.dtype | None
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        # Plain reads rather than a mapping: the bytes land where they stay, and a file that is cut
        # or replaced meanwhile is an error, not a crash.
        data = torch.empty(math.prod(self.shape) * self.dtype.itemsize, dtype=torch.uint8, device="cpu")
        with reading(self.file), open(self.file, "rb") as file:
            file.seek(self.offset)
            count = file.readinto(data.numpy())
        if count != data.numel():
            raise CheckpointError(f"{self.file} changed while it was read; load it again when it is complete")
        return data.view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Mapped:
    """A tensor of a memory-mapped pickle."""

    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self) -> Tensor:
        # A copy: pages of the file must not become weights, it may be overwritten while they live.
        return self.tensor.clone(memory_format=torch.contiguous_format)


class TensorFile:
    """An opened file, or shards as one, whose tensors are read one by one.

    `path` is the file or index, `files` what holds the tensors; `metadata`, `shapes` and `dtypes`
    are known without reading any tensor.
    """

    def __init__(self, path: Path, files: list[Path], tensors: dict[str, Stored | Mapped], metadata: dict[str, str]):
        if tensors and all(name.startswith("module.") for name in tensors):  # saved from a parallel wrapper
            tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
        self.path, self.files, self.metadata, self._tensors = path, files, metadata, tensors
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}

    @classmethod
    def open(cls, path: str | Path) -> TensorFile:
        """Open a `.safetensors`, an index of shards, a folder with one of these, or a `.pth`.

        Raises CheckpointError for a missing, truncated or corrupt file, and for a pickle that would
        have to run code, which isn't read any further.
        """
        path = Path(path)
        if path.is_dir():
            path = _find_in_folder(path)
        if not path.is_file():
            raise CheckpointError(f"no checkpoint at {path}")
        with reading(path):
            if path.name.endswith(INDEX):
                return _open_shards(path)
            if path.suffix.lower() == ".safetensors":
                return _open_single(path)
            if path.suffix.lower() in PICKLES:
                return _open_pickle(path)
        raise CheckpointError(f"{path.name} is no .safetensors, {INDEX} or {', '.join(PICKLES)} file")

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU, in memory of its own."""
        return self._tensors[name].read()

    def nbytes(self, name: str) -> int:
        """Bytes of one tensor in the file."""
        return math.prod(self.shapes[name]) * self.dtypes[name].itemsize


# Reading


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors of the system in reading `path` as CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _unpickle(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU, memory-mapped.

    Nothing but tensors and plain containers is made. Raises pickle.UnpicklingError for a file that
    would have to run code, which isn't read any further; of a damaged one any error of its reader.
    """
    with torch.inference_mode(False):
        return torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def hash_files(files: list[Path], progress: Report | None) -> str:
    """SHA-256 of a file; of several a JSON object of name and hash. Reports bytes, as phase "hash"."""
    done, total, hashes = 0, sum(file.stat().st_size for file in files), {}
    for path in files:
        digest = hashlib.sha256()
        with reading(path), open(path, "rb") as file:
            while chunk := file.read(HASH_CHUNK):
                digest.update(chunk)
                done += len(chunk)
                if progress:
                    progress(Progress("hash", done, total))
        hashes[path.name] = digest.hexdigest()
    return json.dumps(hashes) if len(files) > 1 else hashes[files[0].name]


def _find_in_folder(folder: Path) -> Path:
    found = sorted(folder.glob(f"*{INDEX}")) or sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    names = ", ".join(file.name for file in found[:5])
    raise CheckpointError(
        f"folder {folder} holds {f'several checkpoints ({names}): choose one' if found else 'no safetensors file'}"
    )


def _open_single(path: Path) -> TensorFile:
    shard = re.search(r"-\d{5}-of-(\d{5})$", path.stem)
    if shard and int(shard[1]) > 1:
        raise CheckpointError(f"{path.name} is one of {int(shard[1])} shards; open their {INDEX} file")
    tensors, metadata = _read_header(path)
    return TensorFile(path, [path], tensors, metadata)


def _open_shards(index: Path) -> TensorFile:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{index.name} is no index of shards; get it again") from None
    if outside:
        raise CheckpointError(f"{index.name} names a file outside its folder, {outside[0]}; get it again")
    files = [index.parent / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{index.name} lacks {', '.join(missing[:5])}; get all of its {len(files)} shards")
    found, metadata = {}, {}
    for file in files:
        tensors, shard_metadata = _read_header(file)
        found[file.name] = tensors
        metadata.update(shard_metadata)
    lost = [f"{name} in {shard}" for name, shard in weight_map.items() if name not in found[shard]]
    if lost:
        raise CheckpointError(f"{index.name} lists tensors that aren't there: {', '.join(lost[:5])}; get it again")
    return TensorFile(index, files, {name: found[shard][name] for name, shard in weight_map.items()}, metadata)


def _read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Tensors and metadata of a safetensors file, once its size agrees with its header."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            _check_pointer(path)
            wanted = f", its header alone has {length} bytes" if size >= 8 and length <= LARGEST_HEADER else ""
            raise CheckpointError(f"{path.name} is truncated or no safetensors file: found {size} bytes{wanted}")
        header = file.read(length)
    try:
        entries = json.loads(header)
        metadata = {str(key): str(value) for key, value in entries.pop("__metadata__", {}).items()}
        spans = sorted(tuple(entry["data_offsets"]) for entry in entries.values())
        tensors = {name: _parse_entry(path, 8 + length, entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"the header of {path.name} is corrupt; get the file again") from None
    end = 0
    for start, stop in spans:
        if start != end or stop < start:
            raise CheckpointError(f"the header of {path.name} is corrupt: its tensors overlap or leave gaps")
        end = stop
    if size != 8 + length + end:
        state = "truncated" if size < 8 + length + end else "corrupt"
        raise CheckpointError(f"{path.name} is {state}: expected {8 + length + end} bytes, found {size}; get it again")
    return tensors, metadata


def _parse_entry(path: Path, data: int, entry: dict[str, Any]) -> Stored:
    """One tensor of a header; ValueError, KeyError or TypeError if it makes no sense."""
    (start, stop), shape = entry["data_offsets"], tuple(entry["shape"])
    dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
    if not all(type(value) is int and value >= 0 for value in (start, stop, *shape)):
        raise ValueError(entry)
    if dtype and stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(entry)
    return Stored(path, data + start, dtype, shape)


def _open_pickle(path: Path) -> TensorFile:
    _check_archive(path)
    try:
        content = _unpickle(path)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"reading it would run {culprit[1]}" if culprit else "it holds more than tensors or is damaged"
        raise CheckpointError(
            f"{path.name} was refused, nothing of it was run: {reason}. If you trust its source, unpickle it "
            "in an environment of its own, save its state_dict with safetensors.torch.save_file, and use that file."
        ) from None
    except Exception as error:  # a damaged archive can fail anywhere in its reader
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{path.name} is corrupt ({reason}); get it again") from None
    if isinstance(content, dict):
        content = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)), content)
        tensors = {str(name): Mapped(value) for name, value in content.items() if isinstance(value, Tensor)}
        if tensors:
            return TensorFile(path, [path], tensors, {})
    kind = (
        f"a dictionary of {', '.join(map(str, list(content)[:5]))}"
        if isinstance(content, dict)
        else f"a {type(content).__name__}"
    )
    raise CheckpointError(f"{path.name} holds no state_dict of tensors, but {kind}; save its state_dict alone")


def _check_archive(path: Path) -> None:
    """Raise CheckpointError unless the file is a whole archive as torch.save writes it."""
    with open(path, "rb") as file:
        archive = file.read(4) == b"PK\x03\x04"
    size = path.stat().st_size
    if archive and not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path.name} is truncated: found {size} bytes, and no end of the archive; get it again")
    if not archive:
        _check_pointer(path)
        raise CheckpointError(
            f"{path.name} ({size} bytes) is damaged, or a pickle from before PyTorch 1.6, which cannot be read "
            "piece by piece. If you trust its source, load it with torch.load in an environment of its own and "
            "save it again with torch.save or safetensors.torch.save_file."
        )


def _check_pointer(path: Path) -> None:
    """Raise CheckpointError for what a failed download leaves under the weights' name."""
    with open(path, "rb") as file:
        head = file.read(64).lstrip().lower()
    if head.startswith((b"version https://git-lfs", b"<!doctype", b"<html")):
        kind = "a web page" if head.startswith(b"<") else "a Git LFS pointer"
        raise CheckpointError(f"{path.name} is {kind}, not the weights; download the file itself")


# Casting and writing


def save_tensors(tensors: dict[str, Tensor], path: str | Path, dtype: str, metadata: dict[str, str]) -> None:
    """Write tensors as one safetensors file, in place of an earlier one if there is one.

    `dtype` is one of DTYPES. Raises InputError if the file cannot be written, NonFiniteError for NaN
    or infinity, CheckpointError on overflow.
    """
    torch_dtype, path = parse_dtype(dtype), Path(path)
    check_target(path, None, overwrite=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_space(path, shapes, torch_dtype)
    cast_tensors = (cast(tensor.cpu(), torch_dtype, name, path) for name, tensor in tensors.items())
    write_tensors(path, shapes, torch_dtype, metadata, cast_tensors)


def write_tensors(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    metadata: dict[str, str],
    tensors: Iterable[Tensor],
) -> None:
    """Write a safetensors file beside and rename it, missing folders included; one tensor is in memory at a time.

    `tensors` come in the order and shapes of `shapes`, in `dtype` and on the CPU. Raises InputError if
    the file cannot be written. Nothing is left behind on an error, be it of `tensors` themselves.
    """
    header, part = _header(shapes, dtype, metadata), path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(header)
            file.writelines(map(_bytes, tensors))  # a loop here would keep each one until the next is made
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path} could not be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def parse_dtype(name: str) -> torch.dtype:
    """The type of one of the names in DTYPES. Raises InputError for another."""
    if name not in DTYPES:
        raise InputError(f"dtype {name!r}; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def check_target(target: Path, source: TensorFile | None, overwrite: bool) -> None:
    """Raise InputError unless `target` can be written, is no file of `source`, and is free or may be replaced."""
    if target.suffix.lower() != ".safetensors":
        raise InputError(f"{target.name} does not end in .safetensors, the format that is written")
    if target.is_dir():
        raise InputError(f"{target} is a folder; give the name of a file")
    try:
        tempfile.TemporaryFile(dir=_folder(target)).close()
    except OSError as error:
        raise InputError(f"{target} cannot be written ({error.strerror}); choose another folder") from None
    if not target.exists():
        return
    if source and any(target.samefile(file) for file in source.files):
        raise InputError(f"{target} is the source itself; give another name")
    if not overwrite:
        raise InputError(f"{target} exists; give another name, or allow overwriting")


def check_space(target: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """Raise InputError unless tensors of these shapes fit where `target` is to be."""
    needed = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    free = shutil.disk_usage(_folder(target)).free
    if free < needed:
        raise InputError(f"{target} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; make room first")


def _folder(target: Path) -> Path:
    """The nearest folder of `target` that there is; the ones below are made when it is written."""
    return next(parent for parent in Path(os.path.abspath(target)).parents if parent.exists())


def cast(tensor: Tensor, dtype: torch.dtype, name: str, file: Path) -> Tensor:
    """`tensor` in `dtype`. Raises NonFiniteError for NaN or infinity, CheckpointError on overflow; both
    name the tensor and its file."""
    if not math.isfinite(_reach(tensor)):
        raise NonFiniteError(f"{name} of {file.name} has NaN or infinity; use an undamaged copy")
    result = tensor.to(dtype)
    if not math.isfinite(_reach(result)):
        raise CheckpointError(
            f"{name} of {file.name} reaches {_reach(tensor):.4g}, too large for {dtype}; use bf16 or fp32"
        )
    return result


def _reach(tensor: Tensor) -> float:
    """The largest magnitude, NaN if there is one. Unlike isfinite it needs no memory."""
    low, high = torch.aminmax(tensor)
    return max(abs(low.item()), abs(high.item()))


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _header(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, metadata: dict[str, str]) -> bytes:
    type_name = next(name for name, known in SAFETENSORS_DTYPES.items() if known == dtype)
    entries, offset = {"__metadata__": metadata}, 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": type_name, "shape": shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
