"""Where a batch's results go: a folder of this machine, or one that fsspec reaches, such as s3://bucket/clips."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ...errors import InputError
from ...media.failures import reason
from ...media.targets import target_of
from ...parts import clear_stale, remove


class Folder(Protocol):
    """A folder, in which results are whole or not there. Names in it are relative and use /."""

    keeps: bool  # whether what is beside an unfinished result is there at the next try

    def key(self, name: str) -> PurePath:
        """What two names for the same result have in common. Raises InputError for a name that leads elsewhere."""

    def has(self, name: str) -> bool:
        """Whether a result is there."""

    def path(self, name: str) -> str:
        """A path of this machine like the one that `making` gives, to check what would be written."""

    @contextmanager
    def making(self, name: str) -> Iterator[str]:
        """A path of this machine to write a result to, by a rename at its end. Then it goes to its place."""

    def discard(self, name: str) -> None:
        """Remove a file that may not be there."""

    def clear(self, name: str) -> None:
        """Remove what killed processes left of a result."""

    def __str__(self) -> str:
        """As it was given."""


def folder_of(path: str) -> Folder:
    """Raises InputError for an address that cannot be reached."""
    system, root = _reached(path)
    return LocalFolder(root, path) if isinstance(system, LocalFileSystem) else RemoteFolder(system, root, path)


def read_text(path: str) -> str:
    """A file's text. Raises InputError for one that can't be read."""
    system, inner = _reached(path)
    with _telling(f"{path} cannot be read"):
        data = system.cat_file(inner)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; save it as UTF-8") from None


class LocalFolder:
    keeps = True

    def __init__(self, root: str, given: str):
        self._root, self._given = root, given.rstrip("/")

    def key(self, name: str) -> Path:
        _check(name)
        path = target_of(self.path(name)).path
        if os.path.abspath(path) == os.path.abspath(self._root):
            raise InputError(f"{name} would fill the batch's own folder; give pictures one, such as shots/%05d.png")
        return path

    def has(self, name: str) -> bool:
        return os.path.exists(self.key(name))

    def path(self, name: str) -> str:
        return os.path.join(self._root, name)

    @contextmanager
    def making(self, name: str) -> Iterator[str]:
        yield self.path(name)

    def discard(self, name: str) -> None:
        remove(Path(self.path(name)))

    def clear(self, name: str) -> None:
        clear_stale(self.key(name))

    def __str__(self) -> str:
        return self._given


class RemoteFolder:
    keeps = False

    def __init__(self, system: fsspec.AbstractFileSystem, root: str, given: str):
        self._system, self._root, self._given = system, root.rstrip("/"), given.rstrip("/")

    def key(self, name: str) -> PurePosixPath:
        _check(name)
        if target_of(self.path(name)).pattern:
            raise InputError(f"{name} is a folder of pictures, which can't be renamed as one in {self}; write a file")
        return PurePosixPath(name)

    def has(self, name: str) -> bool:
        return self._target(name) in self._there

    def path(self, name: str) -> str:
        return os.path.join(tempfile.gettempdir(), PurePosixPath(name).name)

    @contextmanager
    def making(self, name: str) -> Iterator[str]:
        with tempfile.TemporaryDirectory(prefix="starflow-") as here:
            path = os.path.join(here, PurePosixPath(name).name)
            yield path
            with _telling(f"{self}/{name} cannot be written"):
                self._upload(path, self._target(name))

    def discard(self, name: str) -> None:
        with _telling(f"{self}/{name} cannot be removed"), suppress(FileNotFoundError):
            self._system.rm_file(self._target(name))

    def clear(self, name: str) -> None:
        pass

    def __str__(self) -> str:
        return self._given

    @cached_property
    def _there(self) -> set[str]:
        """All files, asked for once: one by one takes long for many."""
        with _telling(f"{self} cannot be listed"):
            return set(self._system.find(self._root))

    def _target(self, name: str) -> str:
        return f"{self._root}/{PurePosixPath(name)}"

    def _upload(self, path: str, target: str) -> None:
        self._system.makedirs(os.path.dirname(target), exist_ok=True)
        part = f"{target}.part"
        try:
            self._system.put_file(path, part)
            self._system.mv(part, target)
        except BaseException:
            with suppress(Exception):
                self._system.rm_file(part)
            raise


def _reached(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    with _telling(f"{path} cannot be reached"):
        return fsspec.core.url_to_fs(path)


@contextmanager
def _telling(what: str) -> Iterator[None]:
    """File systems raise errors of their own kinds, of which people are told in a line."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{what} ({reason(error)}); check the path") from error


def _check(name: str) -> None:
    path = PurePosixPath(name)
    if not path.name or path.is_absolute() or ".." in path.parts or "\\" in name or PureWindowsPath(name).drive:
        raise InputError(f"output is {name!r}; give a name inside the batch's folder, such as a.mp4")
