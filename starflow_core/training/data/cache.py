"""What has been encoded, in files named by all that it depends on, so that nothing is made twice or used wrongly."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, InputError
from ...parts import replacing
from ...weights.tensorfiles import TensorFile, write_tensors
from .buckets import Facts, look

SCHEMA = 1  # of the files; raised when what they hold changes
CHUNK = 1 << 22  # bytes
PROBES, PROBE = 256, 4096  # places of a file of weights that are read, and bytes of each
ENDS = 1 << 20  # bytes at its start and end


@dataclass(frozen=True)
class Window:
    """What of a file is encoded, and how: pixels, the first frame and the number of frames, at a rate.

    `file` is the hash of its content, `vae` the VAE's identity.
    """

    file: str
    height: int
    width: int
    start: int
    frames: int
    fps: str
    vae: str

    kind = "latents"


@dataclass(frozen=True)
class Text:
    """A wrapped prompt, the identity of its encoder, and the model's length in tokens."""

    prompt: str
    encoder: str
    tokens: int

    kind = "text"


Key = Window | Text  # or anything else with a `kind`, such as what a model has drawn


@dataclass(frozen=True)
class Cache:
    """A folder of encoded windows and prompts, one file each. Several processes may write to it."""

    folder: Path

    def path(self, key: Key) -> Path:
        """The file of an entry, whether it is there or not."""
        name = _hash_of({"schema": SCHEMA, **asdict(key)})
        return Path(self.folder) / key.kind / name[:2] / f"{name}.safetensors"

    def has(self, key: Key) -> bool:
        """Whether an entry is there, complete by its header."""
        return self.note(key) is not None

    def note(self, key: Key) -> str | None:
        """What was noted with an entry; None if it isn't there."""
        try:
            return self._open(key).metadata.get("note", "")
        except CheckpointError:
            return None

    def put(self, key: Key, tensor: Tensor, note: str = "") -> None:
        """Write an entry, over an earlier one."""
        tensor = tensor.detach().cpu().contiguous()
        about = {"crc32": _sum_of(tensor), "of": _said(key), "note": note}
        write_tensors(self.path(key), {key.kind: (tuple(tensor.shape), tensor.dtype)}, about, [tensor])

    def get(self, key: Key, name: str) -> Tensor:
        """An entry's tensor. Raises InputError if it isn't there, or damaged; `name` is what it was made of."""
        try:
            file = self._open(key)
            tensor = file.tensor(key.kind)
            if _sum_of(tensor) != file.metadata.get("crc32"):
                raise CheckpointError("its content has changed")
        except (CheckpointError, KeyError) as error:
            raise InputError(
                f"{self.path(key)}, encoded from {name}, can't be used ({error}); remove it, if it is there, and run "
                "`prepare` with the same settings"
            ) from None
        return tensor

    def _open(self, key: Key) -> TensorFile:
        file = TensorFile.open(self.path(key))
        if list(file.tensors) != [key.kind] or file.metadata.get("of") != _said(key):
            raise CheckpointError(f"{file.path.name} holds something else")
        return file

    def facts(self, path: Path) -> Facts:
        """What a media file holds, looked at once for as long as the file stays the same."""
        return self._record(path)[0]

    def content(self, path: Path) -> str:
        """The hash of a media file's content, as `facts`."""
        return self._record(path)[1]

    def _record(self, path: Path) -> tuple[Facts, str]:
        state = _state(path)
        file = Path(self.folder) / "files" / f"{_hash_of(os.path.abspath(path))}.json"
        values = _read_record(file)
        if values.get("state") != state:
            values = {"state": state, "path": os.path.abspath(path), **_examined(path)}
            if not values["facts"]["error"]:  # what failed may have been a disk that was away
                _write_record(file, values)
        facts = values["facts"]
        return Facts(**{**facts, "fps": Fraction(facts["fps"])}), values["content"]


def identity(files: Iterable[Path], *more: str) -> str:
    """What tells a model's files from others: their sizes, and the bytes at their ends and at many places between.

    Training changes all of a tensor, so that a part of it tells, and a file of gigabytes takes no time.
    """
    digest = hashlib.sha256("\0".join(more).encode())
    for path in sorted(files):
        size = os.path.getsize(path)
        digest.update(str(size).encode())
        with open(path, "rb") as file:
            places = [(size * i // PROBES, PROBE) for i in range(PROBES)]
            for start, length in [(0, ENDS), *places, (max(0, size - ENDS), ENDS)]:
                file.seek(start)
                digest.update(file.read(length))
    return digest.hexdigest()


def _examined(path: Path) -> dict[str, Any]:
    """A file's facts and the hash of its content."""
    try:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        facts, content = look(path), digest.hexdigest()
    except OSError as error:
        facts, content = Facts(error=f"{path} can't be read: {error.strerror or error}"), ""
    return {"facts": {**asdict(facts), "fps": str(facts.fps)}, "content": content}


def _state(path: Path) -> list[int]:
    """What changes with a file: its time and size."""
    try:
        found = os.stat(path)
    except OSError:
        return []
    return [SCHEMA, found.st_mtime_ns, found.st_size]


def _read_record(file: Path) -> Mapping[str, Any]:
    """A record, or nothing where there is none that can be used."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        Facts(**values["facts"]), values["content"], Fraction(values["facts"]["fps"])
        return values
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return {}


def _write_record(file: Path, values: Mapping[str, Any]) -> None:
    try:
        with replacing(file) as part:
            part.write_text(json.dumps(values), encoding="utf-8")  # as ASCII: a file's name may not be text
    except OSError as error:
        raise InputError(f"{file} could not be written ({error.strerror or error}); free some space") from None


def _said(key: Key) -> str:
    return json.dumps(asdict(key), ensure_ascii=False)


def _sum_of(tensor: Tensor) -> str:
    return str(zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy()))


def _hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
