"""Faults in nodes."""

from __future__ import annotations

from . import Fault

FAULTS: list[Fault] = []
