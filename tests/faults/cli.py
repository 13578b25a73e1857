"""Faults in cli."""

from __future__ import annotations

from . import Fault

FAULTS: list[Fault] = []
