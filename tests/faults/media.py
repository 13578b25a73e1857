"""Faults in media."""

from __future__ import annotations

from . import Fault

FAULTS: list[Fault] = []
