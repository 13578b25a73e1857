"""Faults in weights."""

from __future__ import annotations

from . import Fault

FAULTS: list[Fault] = []
