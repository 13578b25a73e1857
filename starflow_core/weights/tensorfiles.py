"""Files of tensors: open, read, cast and write them.

A file is a `.safetensors`, shards of these with their index, or a `.pth` that holds nothing but tensors;
no file is ever allowed to run code. Tensors are read one at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import safetensors
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..control import Progress
from ..errors import CheckpointError, InputError, NonFiniteError
from ..model.schema import shown
from ..parts import replacing
from . import FLOAT_TYPES
from .pickles import ArchivedTensor, open_archive

DTYPES = dict(zip(FLOAT_TYPES, (torch.bfloat16, torch.float16, torch.float32), strict=True))
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
INDEX = ".safetensors.index.json"
PICKLES = (".pth", ".pt", ".ckpt", ".bin")
LARGEST_HEADER = 100_000_000  # bytes, the format's own limit
HASH_CHUNK = 1 << 22  # bytes

# From 0.8 on safetensors can read a file instead of mapping it. A mapped file crashes the process if it is cut
# meanwhile, stays resident (all 1.4 GB of one of 1.4 GB, see benchmarks/convert_memory.py), and must be smaller
# than the machine's memory. Mapped by an older version, its size is checked first and its tensors are copied.
MAPS = tuple(map(int, safetensors.__version__.split(".")[:2])) < (0, 8)
BACKEND = {} if MAPS else {"backend": "pread"}

Report = Callable[[Progress], None]
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shapes and types of a file's tensors, in their order


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. `dtype` is None for a type not known here; `read` gives a copy, on the CPU.

    For a weight in 8 bit `int8` reads its values and scales, and `read` gives them multiplied, in float32. Where the
    file allows it, `part` reads some of its rows alone.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    read: Callable[[], Tensor]
    int8: Callable[[], tuple[Tensor, Tensor]] | None = None
    part: Callable[[slice], Tensor] | None = None

    def flatten(self) -> StoredTensor:
        """The same values with two axes."""
        shape = (self.shape[0], math.prod(self.shape[1:]))
        return replace(self, shape=shape, read=lambda: self.read().view(shape), part=None)

    def rows(self, ranges: Sequence[slice]) -> StoredTensor:
        """These rows alone, one range after the other."""

        def read() -> Tensor:
            part = self.part or self.read().__getitem__
            return torch.cat([part(rows) for rows in ranges])

        return StoredTensor((sum(rows.stop - rows.start for rows in ranges), *self.shape[1:]), self.dtype, read)


@dataclass(frozen=True)
class TensorFile:
    """An opened file, or shards as one, whose tensors are read one by one.

    `path` is the file or index, `files` what holds the tensors; `metadata`, `shapes` and `dtypes`
    are known without reading any tensor.
    """

    path: Path
    files: list[Path]
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]

    @classmethod
    def open(cls, path: str | Path) -> TensorFile:
        """Open a `.safetensors`, an index of shards, a folder with one of these, or a `.pth`.

        Raises CheckpointError for a missing, truncated or corrupt file, and for a pickle that would
        run code: none of it is run.
        """
        path = Path(path)
        if os.path.isdir(path):
            path = _only_file_in(path)
        if not os.path.isfile(path):
            raise CheckpointError(f"no checkpoint at {path}; check the path")
        with reading_errors(path):
            if path.name.endswith(INDEX):
                file = _open_shards(path)
            elif path.suffix.lower() == ".safetensors":
                file = _open_single(path)
            elif path.suffix.lower() in PICKLES:
                file = _open_pickle(path)
            else:
                raise CheckpointError(
                    f"{path.name} isn't a checkpoint; give a .safetensors, {INDEX} or {', '.join(PICKLES)} file"
                )
        if file.tensors and all(name.startswith("module.") for name in file.tensors):  # of a parallel wrapper
            return replace(file, tensors={name.removeprefix("module."): t for name, t in file.tensors.items()})
        return file

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype | None]:
        return {name: tensor.dtype for name, tensor in self.tensors.items()}

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU, in memory of its own."""
        return self.tensors[name].read()

    def nbytes(self, name: str) -> int:
        """Bytes of one tensor in the file."""
        return math.prod(self.shapes[name]) * self.dtypes[name].itemsize


# Reading


@contextlib.contextmanager
def reading_errors(path: Path) -> Iterator[None]:
    """Turns the system's errors in reading `path` into CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None


def hash_files(files: list[Path], progress: Report | None) -> str:
    """SHA-256 of a file, or for several a JSON object of names and hashes. Reports bytes, as phase "hash"."""
    done, total, hashes = 0, sum(file.stat().st_size for file in files), {}
    for path in files:
        digest = hashlib.sha256()
        with reading_errors(path), open(path, "rb") as file:
            while chunk := file.read(HASH_CHUNK):
                digest.update(chunk)
                done += len(chunk)
                if progress:
                    progress(Progress("hash", done, total))
        hashes[path.name] = digest.hexdigest()
    return json.dumps(hashes) if len(files) > 1 else hashes[files[0].name]


def _only_file_in(folder: Path) -> Path:
    found = sorted(folder.glob(f"*{INDEX}")) or sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    names = ", ".join(file.name for file in found[:5])
    raise CheckpointError(
        f"folder {folder} contains {f'several checkpoints ({names}): choose one' if found else 'no safetensors file'}"
    )


def shards_of(path: Path) -> int:
    """The number of shards of which a file is one, by its name."""
    shard = re.search(r"-\d{5}-of-(\d{5})$", path.stem)
    return int(shard[1]) if shard else 1


def _open_single(path: Path) -> TensorFile:
    if (shards := shards_of(path)) > 1:
        raise CheckpointError(f"{path.name} is one of {shards} shards; open their {INDEX} file")
    return TensorFile(path, [path], *_open_safetensors(path))


def _open_shards(index: Path) -> TensorFile:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{index.name} isn't an index of shards; download it again") from None
    if outside:
        raise CheckpointError(f"{index.name} names a file outside its folder, {outside[0]}; download it again")
    files = [index.parent / name for name in names]
    missing = [file.name for file in files if not os.path.isfile(file)]
    if missing:
        raise CheckpointError(f"{index.name} lacks {', '.join(missing[:5])}; download all of its {len(files)} shards")
    found, metadata = {}, {}
    for file in files:
        tensors, shard_metadata = _open_safetensors(file)
        found[file.name] = tensors
        metadata.update(shard_metadata)
    lost = [f"{name} in {shard}" for name, shard in weight_map.items() if name not in found[shard]]
    if lost:
        raise CheckpointError(f"{index.name} lists tensors that aren't there: {', '.join(lost[:5])}; download it again")
    return TensorFile(index, files, {name: found[shard][name] for name, shard in weight_map.items()}, metadata)


def _open_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file whose header and size the library finds sound."""
    _check_pointer(path)
    try:
        file = safe_open(path, "pt", **BACKEND)
    except (SafetensorError, RuntimeError) as error:  # RuntimeError if it cannot be mapped
        raise CheckpointError(_fault(path, str(error))) from None
    names, size, tensors = file.keys(), path.stat().st_size, {}
    for name in names:
        entry = file.get_slice(name)
        shape, dtype = tuple(entry.get_shape()), SAFETENSORS_DTYPES.get(entry.get_dtype())
        read = partial(_read, path, size, file, name)
        tensors[name] = StoredTensor(shape, dtype, read, part=read)
    return tensors, file.metadata() or {}


def _read(path: Path, size: int, file: safe_open, name: str, rows: slice | None = None) -> Tensor:
    """A tensor of an open safetensors file of `size` bytes, or some rows of it, in memory of its own."""
    with reading_errors(path):
        try:
            if path.stat().st_size != size:
                raise SafetensorError("its size has changed")
            tensor = file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
        except SafetensorError as error:
            raise CheckpointError(
                f"{path} changed while it was read ({error}); load it again when it is complete"
            ) from None
    return tensor.clone() if MAPS else tensor


def _fault(path: Path, reason: str) -> str:
    """What is wrong with a file that safetensors refuses; it doesn't give the sizes."""
    size, kind = path.stat().st_size, "truncated, or isn't a safetensors file"
    with open(path, "rb") as file:
        end = 8 + int.from_bytes(file.read(8), "little")
        header = file.read(min(end - 8, LARGEST_HEADER))
    if "incomplete" in reason.lower() and (last := _last_byte(header)) is not None:
        end += last
        kind = "truncated" if size < end else "corrupt"
    elif size >= end:
        return (
            f"safetensors {safetensors.__version__} cannot open {path.name} ({reason}): the header of the file is "
            "corrupt or of a newer format; download the file again, or install a newer safetensors"
        )
    return f"{path.name} is {kind}: expected {end} bytes, found {size}; download it again"


def _last_byte(header: bytes) -> int | None:
    """Where the last tensor ends, counted from the end of a sound header; None for another."""
    try:
        entries = json.loads(header)
        return max((entries[name]["data_offsets"][1] for name in entries if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, IndexError):
        return None


def _open_pickle(path: Path) -> TensorFile:
    _check_archive(path)
    content = open_archive(path)
    if isinstance(content, dict):
        content = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)), content)
        tensors = {
            str(name): StoredTensor(value.shape, value.dtype, partial(_read_archived, value))
            for name, value in content.items()
            if isinstance(value, ArchivedTensor)
        }
        if tensors:
            return TensorFile(path, [path], tensors, {})
    kind = (
        f"a dictionary of {', '.join(map(shown, list(content)[:5]))}"
        if isinstance(content, dict)
        else f"a {type(content).__name__}"
    )
    raise CheckpointError(f"{path.name} contains {kind}, not a state_dict of tensors; save its state_dict alone")


def _read_archived(tensor: ArchivedTensor) -> Tensor:
    with reading_errors(tensor.record.path):
        return tensor.read()


def _check_archive(path: Path) -> None:
    """Raise CheckpointError unless the file is a complete archive as torch.save writes it."""
    _check_pointer(path)
    with open(path, "rb") as file:
        archive = file.read(4) == b"PK\x03\x04"
    size = path.stat().st_size
    if archive and not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path.name} is truncated: found {size} bytes, but no end of the archive; download it again"
        )
    if not archive:
        raise CheckpointError(
            f"{path.name} ({size} bytes) is damaged, or a pickle from before PyTorch 1.6, which cannot be read "
            "tensor by tensor. If you trust its source, load it with torch.load in an environment of its own and "
            "save it again with torch.save or safetensors.torch.save_file."
        )


def _check_pointer(path: Path) -> None:
    """Raise CheckpointError if a download left something else under the weights' name."""
    with open(path, "rb") as file:
        head = file.read(64).lstrip().lower()
    if head.startswith((b"version https://git-lfs", b"<!doctype", b"<html")):
        kind = "a web page" if head.startswith(b"<") else "a Git LFS pointer"
        raise CheckpointError(f"{path.name} is {kind}, not the weights; download the file itself")


# Casting and writing


def save_tensors(tensors: dict[str, Tensor], path: str | Path, dtype: str, metadata: dict[str, str]) -> None:
    """Write tensors as one safetensors file, over an earlier one.

    `dtype` is one of DTYPES. Raises InputError if the file cannot be written, NonFiniteError for NaN
    or infinity, CheckpointError on overflow. Nothing is left behind on an error.
    """
    torch_dtype, path = parse_dtype(dtype), Path(path)
    check_target(path, None, overwrite=True)
    layout = {name: (tuple(tensor.shape), torch_dtype) for name, tensor in tensors.items()}
    check_space(path, layout)
    write_tensors(path, layout, metadata, (cast(t.cpu(), torch_dtype, name, path) for name, t in tensors.items()))


def write_tensors(path: Path, layout: Layout, metadata: dict[str, str], tensors: Iterable[Tensor]) -> None:
    """Write a safetensors file, over an earlier one, with one tensor in memory at a time. Equal content gives equal
    bytes.

    `tensors` come in the order, shapes and types of `layout`, on the CPU. Raises InputError if the
    file cannot be written; nothing is left behind on an error, be it one of `tensors` themselves.

    safetensors' `save_file` needs all tensors at once: converting a checkpoint of 1.4 GB to bf16 takes
    829 MB with it (1384 MB before 0.8) and 245 MB here, see benchmarks/convert_memory.py. It also writes the
    metadata in an order that changes with each run.
    """
    try:
        with replacing(path) as part, open(part, "wb") as file:
            file.write(_header(layout, metadata))
            file.writelines(map(_bytes, tensors))  # a loop here would keep each one until the next is made
    except OSError as error:
        raise InputError(f"{path} could not be written: {error.strerror or error}") from None


def parse_dtype(name: str, known: tuple[str, ...] = FLOAT_TYPES) -> torch.dtype:
    """The type of a name that is `known`; for int8 that of the weights that aren't in 8 bit. Raises InputError for
    another name."""
    if name not in known:
        raise InputError(f"dtype {name!r}; choose one of {', '.join(known)}")
    return DTYPES.get(name, torch.bfloat16)


def check_target(target: Path, source: TensorFile | None, overwrite: bool) -> None:
    """Raise InputError unless `target` can be written, isn't a file of `source`, and is new or may be replaced."""
    if target.suffix.lower() != ".safetensors":
        raise InputError(f"{target.name} does not end in .safetensors, the format that is written")
    if os.path.isdir(target):
        raise InputError(f"{target} is a folder; give the name of a file")
    try:
        tempfile.TemporaryFile(dir=_folder(target)).close()
    except OSError as error:
        raise InputError(f"{target} cannot be written ({error.strerror}); choose another folder") from None
    if not os.path.exists(target):
        return
    if source and any(target.samefile(file) for file in source.files):
        raise InputError(f"{target} is the source itself; give another name")
    if not overwrite:
        raise InputError(f"{target} exists; give another name, or allow overwriting")


def check_space(target: Path, layout: Layout) -> None:
    """Raise InputError unless there is room for these tensors where `target` will be."""
    needed = sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())
    free = shutil.disk_usage(_folder(target)).free
    if free < needed:
        raise InputError(f"{target} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; make room first")


def _folder(target: Path) -> Path:
    """The innermost folder of `target` that exists; those below are made when it is written."""
    return next(parent for parent in Path(os.path.abspath(target)).parents if os.path.exists(parent))


def cast(tensor: Tensor, dtype: torch.dtype, name: str, file: Path) -> Tensor:
    """`tensor` in `dtype`. Raises NonFiniteError for NaN or infinity and CheckpointError on overflow; both
    name the tensor and its file."""
    reach = _reach(tensor)
    if not math.isfinite(reach):
        raise NonFiniteError(f"{name} of {file.name} has NaN or infinity; use an undamaged copy")
    if not torch.tensor(reach, dtype=tensor.dtype).to(dtype).isfinite():  # nothing is rounded beyond the largest
        raise CheckpointError(f"{name} of {file.name} reaches {reach:.4g}, too large for {dtype}; use bf16 or fp32")
    return tensor.to(dtype)


def _reach(tensor: Tensor) -> float:
    """The largest magnitude, or NaN if there is one. Unlike isfinite it needs no memory."""
    low, high = torch.aminmax(tensor)
    return max(abs(low.item()), abs(high.item()))


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _header(layout: Layout, metadata: dict[str, str]) -> bytes:
    type_names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    entries, end = {"__metadata__": metadata}, 0
    for name, (shape, dtype) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": type_names[dtype], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
