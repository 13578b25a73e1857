"""Faults in model."""

from __future__ import annotations

from . import Fault

FAULTS: list[Fault] = []
