"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..parts import clear_stale, part_of, real, remove


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to. It takes the place of `path` at the end; after an error nothing of it stays."""
    path = real(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_stale(path)
    part = part_of(path)
    try:
        yield part
        os.replace(part, path)
    finally:
        remove(part)
