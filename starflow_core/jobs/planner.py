"""Fitting a job to a device: the first of several means with which it needs no more than is free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from ..errors import InputError, OutOfMemoryForecast
from ..model.cache import CacheSettings
from . import CACHES, NOWHERE, OFFLOADS, memory
from .memory import Forecast, readable
from .tasks import Job, Means

STREAMED_SPAN = 512  # tokens: every sweep brings all weights in, so that fewer, larger ones are faster


@dataclass(frozen=True)
class MemoryOptions:
    """What a user fixes; the planner chooses the rest. `budget` is in bytes (None: what is free), `cache` one of CACHES
    and `offload` one of OFFLOADS. Raises InputError for other values."""

    budget: int | None = None
    cache: str = "auto"
    offload: str = "auto"

    def __post_init__(self):
        for name, known in (("cache", CACHES), ("offload", OFFLOADS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}")
        if self.budget is not None and self.budget <= 0:
            raise InputError(f"a memory budget of {self.budget} bytes; give more than 0")

    def means(self, device: torch.device, weights: tuple[bool, ...]) -> Iterator[Means]:
        """All means that are allowed, the fastest first; `weights` says whether they may be in 8 bit or not."""
        for streamed, away in self._offloads(device):
            for int8 in sorted(weights, reverse=streamed):  # half as much to bring in
                for quantised in CACHES[self.cache]:
                    for in_turn in (False, True):
                        yield Means(int8, streamed, CacheSettings(quantised, away), in_turn)

    def _offloads(self, device: torch.device) -> tuple[tuple[bool, bool], ...]:
        if device.type != "cpu":
            return OFFLOADS[self.offload]
        if self.offload not in ("auto", "none"):
            raise InputError(f"offload is {self.offload!r}, but everything is in main memory: the device is the CPU")
        return (NOWHERE,)


AUTO = MemoryOptions()


@dataclass(frozen=True)
class MemoryPlan:
    """The means for a job, what it needs with them, and how many bytes are `free` on the device (None: unknown).
    `text_away` says that the text encoder computes on the CPU."""

    means: Means
    need: Forecast
    free: int | None
    text_away: bool = False

    def fitted(self, job: Job, widen: bool) -> Job:
        """The job with a span that suits the means, if `widen` allows it."""
        if not (widen and self.means.streamed):
            return job
        return replace(job, solver=job.solver.with_numbers(span=max(job.solver.span, STREAMED_SPAN)))

    def __str__(self) -> str:
        means = self.means
        words = [
            f"weights {'in 8 bit' if means.int8 else 'in full'}"
            + (", brought in layer by layer" if means.streamed else ""),
            f"keys and values {'in 8 bit' if means.cache.quantised else 'in full'}"
            + (" in main memory" if means.cache.offloaded else ""),
            *(["denoised and decoded after sampling"] if means.in_turn else []),
            *(["text encoder on the CPU"] if self.text_away else []),
        ]
        phases = ", ".join(f"{phase} {readable(size)}" for phase, size in self.need.phases.items())
        away = f"; {readable(self.need.host)} in main memory" if self.need.host else ""
        return f"{'; '.join(words)}. Needs {readable(self.need.total)} ({phases}){away}"


def choose(
    job: Job, device: torch.device, options: MemoryOptions, weights: tuple[bool, ...],
    forecast: Callable[[Job, Means], Forecast], what: str = "this job",
) -> MemoryPlan:  # fmt: skip
    """The first allowed means with which a job fits; `weights` says whether they may be in 8 bit or not, the preferred
    first.

    `forecast` tells what a job needs with some means. Raises OutOfMemoryForecast that names the nearest job that fits.
    """
    free = memory.free(device)
    if options.budget is not None:
        free = options.budget if free is None else min(free, options.budget)
    plans = [_plan(forecast(job, means), means, free, device) for means in options.means(device, weights)]
    for plan in plans:
        if free is None or memory.fits(plan.need.total, free):
            return plan
    least = min(plans, key=lambda plan: plan.need.total)
    nearest = _nearest(job, lambda smaller: memory.fits(forecast(smaller, least.means).total, free))
    raise OutOfMemoryForecast(
        f"{what} needs at least {readable(least.need.total)}, but {readable(free)} are free on {device}; {nearest}"
    )


def _plan(need: Forecast, means: Means, free: int | None, device: torch.device) -> MemoryPlan:
    """With the text encoder on the CPU where that alone makes the job fit."""
    if free is None or device.type == "cpu" or memory.fits(need.total, free):
        return MemoryPlan(means, need, free)
    without = replace(need, text=0, host=need.host + need.text)
    return (
        MemoryPlan(means, without, free, text_away=True)
        if memory.fits(without.total, free)
        else MemoryPlan(means, need, free)
    )


def _nearest(job: Job, fits: Callable[[Job], bool]) -> str:
    """A smaller job that fits, in words."""
    for batch in range(job.batch - 1, 0, -1):
        if fits(replace(job, batch=batch)):
            return f"a batch of {batch} fits"
    for frames in range(job.frames - 4, 1, -4):
        with suppress(InputError):  # fewer than are given
            if fits(replace(job, batch=1, frames=frames)):
                return f"{frames} frames{' and a batch of 1' if job.batch > 1 else ''} fit"
    return "use a smaller size, guidance 0, or another device"
