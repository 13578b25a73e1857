"""One-line faults that the tests have to find: `python -m tests.faults`, see there."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

ROOMS = (
    "model", "solve", "jobs", "devices", "applications", "weights", "media", "training", "data", "cli", "batch",
    "nodes",
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """In `file`, the one place that reads `old` is made to read `new`; then one of `tests` (paths, node ids) fails."""

    file: str
    old: str
    new: str
    what: str
    tests: str


def all_faults() -> list[Fault]:
    """The faults of every room, in order."""
    return [fault for room in ROOMS for fault in import_module(f"{__name__}.{room}").FAULTS]
