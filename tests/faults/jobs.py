"""Faults in jobs."""

from __future__ import annotations

from . import Fault

FAULTS: list[Fault] = []
