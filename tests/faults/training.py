"""Faults in training."""

from __future__ import annotations

from . import Fault

FAULTS: list[Fault] = []
