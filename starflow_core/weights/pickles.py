"""PyTorch's `.pth` archives: a list of tensors and where they lie, without running or believing what is in them.

`torch.load(weights_only=True)` runs no code either, but allocates whatever a file declares. Here the pickle can name
nothing but tensors, and each is checked against the archive before a byte of it is read.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import CheckpointError

LARGEST_PICKLE = 4_000_000  # bytes; a tensor takes some hundred. A byte can cost 80 of memory, and 1.5 microseconds
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field
UNTRUSTED = (
    "If you trust its source, unpickle it in an environment of its own, save its state_dict with "
    "safetensors.torch.save_file, and use that file."
)
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
OTHER_TENSORS = ("_rebuild_qtensor", "_rebuild_sparse_tensor", "_rebuild_nested_tensor", "_rebuild_tensor_v3")
# What torch.save writes of dictionaries, lists, strings, numbers and tensors.
OPCODES = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.MEMOIZE, pickle.BINPUT,
    pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT,
    pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINUNICODE,
    pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.APPEND,
    pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS, pickle.GLOBAL, pickle.STACK_GLOBAL,
    pickle.REDUCE, pickle.BUILD, pickle.BINPERSID,
)  # fmt: skip


class Refused(Exception):
    """What a pickle would do, or hold, that a list of tensors doesn't."""


@dataclass(frozen=True)
class Record:
    """Where a storage lies: its file, the first byte and the number of bytes."""

    path: Path
    start: int
    size: int


@dataclass(frozen=True)
class ArchivedTensor:
    """A tensor in an archive that was checked to lie within its record: `offset` and `stride` count elements."""

    record: Record
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    stride: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor, on the CPU, in memory of its own. Raises CheckpointError if the file has become shorter."""
        count = _extent(self.shape, self.stride)
        if not count:
            return torch.empty(self.shape, dtype=self.dtype)
        numbers = torch.empty(count, dtype=self.dtype)  # unlike a bytearray not filled with zeros first
        buffer = numbers.view(torch.uint8).numpy()
        with open(self.record.path, "rb") as file:
            file.seek(self.record.start + self.offset * self.dtype.itemsize)
            if file.readinto(buffer) != len(buffer):
                name = self.record.path.name
                raise CheckpointError(f"{name} changed while it was read; load it again when it is complete")
        return numbers.as_strided(self.shape, self.stride).contiguous()


def open_archive(path: Path) -> Any:
    """What `torch.save` wrote, with an `ArchivedTensor` for each tensor.

    Raises CheckpointError for an archive that is damaged or compressed, whose tensors aren't where it says, or that
    holds more than dictionaries, lists, strings, numbers and plain tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            records = _records(path, archive, file)
            return _Tensors(records).load()
    except Refused as reason:
        raise CheckpointError(f"{path.name} was refused; none of its code ran: {reason}. {UNTRUSTED}") from None
    except CheckpointError:
        raise
    except OSError:
        raise
    except Exception as error:  # a damaged archive can fail anywhere in its readers
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise CheckpointError(f"{path.name} is corrupt ({reason}); download it again") from None


def _records(path: Path, archive: zipfile.ZipFile, file) -> dict[str, Record]:
    """The archive's entries by name below its folder. Nothing of theirs is read."""
    size, records = path.stat().st_size, {}
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"{path.name} is a compressed archive, which torch.save doesn't make; save it again with torch.save"
            )
        file.seek(entry.header_offset)
        signature, name_length, extra_length = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
        start = entry.header_offset + LOCAL_HEADER.size + name_length + extra_length
        if signature != b"PK\x03\x04" or start + entry.file_size > size:
            raise ValueError(f"{entry.filename} lies outside of it")
        records[entry.filename.partition("/")[2]] = Record(path, start, entry.file_size)
    return records


class _Tensors(pickle._Unpickler):
    """Reads the list of tensors. The pure Python unpickler, since that of C allocates as a pickle says."""

    dispatch: ClassVar = {opcode[0]: pickle._Unpickler.dispatch[opcode[0]] for opcode in OPCODES}

    def __init__(self, records: dict[str, Record]):
        record = records["data.pkl"]
        if record.size > LARGEST_PICKLE:
            raise Refused(f"its list of tensors has {record.size} bytes")
        with open(record.path, "rb") as file:
            file.seek(record.start)
            super().__init__(io.BytesIO(file.read(record.size)), encoding="utf-8")
        self.records = records

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _parameter
        if name in OTHER_TENSORS:
            raise Refused(f"it contains a tensor that isn't plain numbers ({name.removeprefix('_rebuild_')})")
        raise Refused(f"reading it would run {module[:60]}.{name[:60]}")

    def persistent_load(self, pid: Any) -> tuple[Record, torch.dtype]:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not (
            isinstance(dtype, torch.dtype) and isinstance(key, str) and isinstance(count, int)
        ):
            raise ValueError("an entry of its list isn't a storage")
        record = self.records[f"data/{key}"]
        if count < 0 or count * dtype.itemsize > record.size:
            raise ValueError(f"data/{key} has {record.size} bytes, too few for {count} numbers of {dtype}")
        return record, dtype

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        make = self.stack[-1]
        if make not in (OrderedDict, _tensor, _parameter) or (make is OrderedDict and arguments):
            raise Refused("it calls something other than a tensor constructor")
        self.stack[-1] = make(*arguments)

    def load_build(self) -> None:
        self.stack.pop()  # attributes, such as the versions in a state_dict

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], [(key, value)])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set(self.stack[-1], list(zip(items[::2], items[1::2], strict=True)))

    def _set(self, target: Any, items: list[tuple[Any, Any]]) -> None:
        # Other keys could be nested such that hashing them never ends.
        if not isinstance(target, dict) or not all(isinstance(key, (str, int)) for key, _ in items):
            raise Refused("it contains a dictionary whose keys aren't names")
        target.update(items)

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems


def _tensor(storage: tuple[Record, torch.dtype], offset: int, shape: tuple, stride: tuple, *_: Any) -> ArchivedTensor:
    record, dtype = storage
    numbers = (offset, *shape, *stride)
    if len(shape) != len(stride) or not all(isinstance(n, int) and 0 <= n < 1 << 62 for n in numbers):
        raise ValueError("a tensor has impossible sizes")
    room = record.size // dtype.itemsize
    if offset + _extent(shape, stride) > room or math.prod(shape) > room:
        raise ValueError(f"a tensor of {shape} does not fit into its {record.size} bytes")
    return ArchivedTensor(record, dtype, tuple(shape), offset, tuple(stride))


def _parameter(tensor: ArchivedTensor, *_: Any) -> ArchivedTensor:
    if not isinstance(tensor, ArchivedTensor):
        raise ValueError("a parameter isn't a tensor")
    return tensor


def _extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last of a tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
