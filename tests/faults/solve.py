"""Faults in solve."""

from __future__ import annotations

from . import Fault

FAULTS: list[Fault] = []
