"""Names beside a file or folder, to write under until it is complete, and what killed programs left there.

A name tells which process of which machine writes it, so that the next one knows what nobody is writing any more.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

_NUMBERS = count()
_NAME = re.compile(r"\.([0-9a-f]{8})-(\d+)-\d+\.(part|old)$")


def part_of(target: Path, kind: str = "part") -> Path:
    """A new name beside `target`: a "part" of it, or the "old" one that steps aside."""
    return target.with_name(f"{target.name}.{_machine()}-{os.getpid()}-{next(_NUMBERS)}.{kind}")


def clear_stale(target: Path) -> None:
    """Remove the parts of `target` whose process is gone; an old one takes its place again if that is empty."""
    for name in glob.glob(f"{glob.escape(os.fspath(target))}.*"):
        match = _NAME.search(name)
        if match and match[1] == _machine() and not _alive(int(match[2])):
            if match[3] == "old" and not os.path.lexists(target):
                os.replace(name, target)
            else:
                remove(Path(name))


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A file beside `path` to write to. It takes the place of `path` at the end; after an error nothing of it stays.

    Makes missing folders, and clears what killed processes left.
    """
    path = real(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_stale(path)
    part = part_of(path)
    try:
        part.touch()
        yield part
        with open(part, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        remove(part)


def remove(path: Path) -> None:
    """Remove a file or folder that may not be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def real(path: str | os.PathLike) -> Path:
    """Where a path leads: what is written to a link goes to its target, which may be missing."""
    try:
        return Path(os.path.realpath(path))
    except ValueError:  # no path at all, such as one with a null byte: whoever opens it says so
        return Path(os.path.abspath(path))


def _machine() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _alive(process: int) -> bool:
    if os.name != "posix":  # elsewhere asking would end the process: leave its parts alone
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
