"""One piece of bad input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """`run` gets an empty folder and does what a user would; it may succeed, or raise one of the core's errors.

    `name` is its class in the table.
    """

    name: str
    run: Callable[[Path], object]
