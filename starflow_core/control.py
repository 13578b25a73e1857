"""How a caller follows a running job and cancels it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import RLock

from .errors import Cancelled


@dataclass(frozen=True)
class Progress:
    """How far a job is: `step` of `total` in this phase: tokens in "deep", blocks in "shallow", layers in "invert",
    latent frames in "encode", "denoise" and "decode", bytes of a file. `settled` counts a solver's tokens of `tokens`
    (in "shallow" those of one block); `residual` is the largest relative squared change of the last sweep."""

    phase: str
    step: int
    total: int
    settled: int = 0
    tokens: int = 0
    residual: float = 0.0


@dataclass(frozen=True)
class Control:
    """`progress` is called for every sweep and frame, `cancelled` at least as often, `warn` where a job goes on, but
    not as it was asked to."""

    progress: Callable[[Progress], None] = lambda progress: None
    cancelled: Callable[[], bool] = lambda: False
    warn: Callable[[str], None] = warnings.warn
    _one: RLock = field(default_factory=RLock, repr=False, compare=False)  # at a time, of the threads that report

    def report(self, progress: Progress) -> None:
        """Raises Cancelled if the caller wants to stop."""
        with self._one:
            if self.cancelled():
                raise Cancelled("cancelled")
            self.progress(progress)
