"""Fitting a job to a device: the first of several means with which it needs no more than is free.

`choose` is for programs that place weights themselves, `choose_hosted` for guests of one that moves them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch

from ..errors import InputError, OutOfMemoryForecast
from ..model.cache import CacheSettings
from ..model.parallel import ONE, Mesh
from ..solve.solvers import span_for
from . import CACHE_PLACES, CACHES, NOWHERE, OFFLOADS, memory
from .memory import Forecast, readable
from .pace import Pace, about
from .tasks import Job, Means

REMEDY = "use a smaller size, guidance 0, or another device"
MAIN = torch.device("cpu")  # main memory
Free = dict[torch.device, int | None]  # bytes by place; None where they are unknown
STREAMED_SPAN = 512  # tokens: every sweep brings all weights in, so that fewer, larger ones are faster


def can_stream() -> bool:
    """Whether weights can be brought in layer by layer: diffusers does it with another package's help."""
    return find_spec("accelerate") is not None


def _check(options: Any, **known: dict) -> None:
    """Raise InputError for options whose names aren't `known`, or for a budget of nothing."""
    for name, values in known.items():
        if getattr(options, name) not in values:
            raise InputError(f"{name} is {getattr(options, name)!r}; choose one of {', '.join(values)}")
    if options.budget is not None and options.budget <= 0:
        raise InputError(f"a memory budget of {options.budget} bytes; give more than 0")


@dataclass(frozen=True)
class MemoryOptions:
    """What a user fixes; the planner chooses the rest. `budget` is in bytes (None: what is free), `cache` one of CACHES
    and `offload` one of OFFLOADS; over the processes of a `mesh` nothing is offloaded. Raises InputError for other
    values."""

    budget: int | None = None
    cache: str = "auto"
    offload: str = "auto"
    mesh: Mesh = ONE

    def __post_init__(self):
        _check(self, cache=CACHES, offload=OFFLOADS)
        if self.mesh.count > 1 and self.offload not in ("auto", "none"):
            raise InputError(f"offload is {self.offload!r}, but over several processes all stays on their devices")

    def means(self, device: torch.device, weights: tuple[bool, ...]) -> Iterator[Means]:
        """All means that are allowed, the fastest first; `weights` says whether they may be in 8 bit or not."""
        for streamed, away in self._offloads(device):
            for int8 in sorted(weights, reverse=streamed):  # half as much to bring in
                for quantised in sorted(CACHES[self.cache], reverse=away):
                    for in_turn in (False, True):
                        yield Means(int8, streamed, CacheSettings(quantised, away), in_turn, self.mesh)

    def _offloads(self, device: torch.device) -> tuple[tuple[bool, bool], ...]:
        wanted = self.offload not in ("auto", "none")
        if wanted and device.type == "cpu":
            raise InputError(f"offload is {self.offload!r}, but everything is in main memory: the device is the CPU")
        if wanted and not can_stream():
            raise InputError(f"offload {self.offload!r} needs the package accelerate: pip install accelerate")
        stays = device.type == "cpu" or self.mesh.count > 1 or not can_stream()
        return (NOWHERE,) if stays else OFFLOADS[self.offload]


AUTO = MemoryOptions()


@dataclass(frozen=True)
class Room:
    """What a host that moves weights by its own ways can give a flow: `free` bytes on `device` for weights and work,
    of which the flow's `weights` take so many, in 8 bit or not (`int8`). `streamed` says whether it computes with
    weights that wait in main memory: all it can do, the preferred first; `kept` bytes of them stay all the same."""

    device: torch.device
    free: int
    weights: int
    int8: bool = False
    streamed: tuple[bool, ...] = (False,)
    kept: int = 0

    def need(self, forecast: Forecast, means: Means) -> Forecast:
        """A forecast with the weights that the host has on the device at the least."""
        least = max(forecast.weights, self.kept) if means.streamed else self.weights
        return replace(forecast, weights=min(least, self.weights))

    def work(self, plan: MemoryPlan) -> int:
        """Bytes that the host must leave free of weights for a plan; where it could keep more of them on the device
        than the budget allows, those beyond the budget, too."""
        beyond = self.free - plan.free if plan.means.streamed else 0
        return plan.need.total - plan.need.weights + beyond


@dataclass(frozen=True)
class HostedOptions:
    """What a user fixes where a host moves the weights. `budget` is in bytes (None: what is free), `cache` one of
    CACHES, `offload_cache` one of CACHE_PLACES, `span` in tokens (None: as the solver's settings say). Raises
    InputError for other values."""

    budget: int | None = None
    cache: str = "auto"
    offload_cache: str = "auto"
    span: int | None = None

    def __post_init__(self):
        _check(self, cache=CACHES, offload_cache=CACHE_PLACES)

    def spanned(self, job: Job) -> Job:
        """The job with the span that is fixed, if one is."""
        return replace(job, solver=job.solver.with_numbers(span=self.span))

    def means(self, room: Room) -> Iterator[Means]:
        """All means that are allowed, the fastest first. Before anything moves, the cache is made as small as it may
        be, since fewer weights have to move then."""
        caches = CACHES[self.cache]
        for away in self._places(room.device):
            for streamed in room.streamed:
                tried = caches[-1:] if away or streamed else caches
                for quantised, in_turn in product(tried, (False, True)):
                    yield Means(room.int8, streamed, CacheSettings(quantised, away), in_turn)

    def _places(self, device: torch.device) -> tuple[bool, ...]:
        if device.type != "cpu":
            return CACHE_PLACES[self.offload_cache]
        if self.offload_cache == "yes":
            raise InputError("offload_cache is 'yes', but everything is in main memory on a CPU; choose auto or no")
        return (False,)


@dataclass(frozen=True)
class MemoryPlan:
    """The means for a job, what it needs with them, and how many bytes are `free` on the device (None: unknown).
    `text_away` says that the text encoder computes on the CPU, `fallbacks` what takes less with weights as they are;
    `seconds` is about how long it takes, if known. Over several devices `spread` has the need of each, and `need` and
    `free` are the first one's."""

    means: Means
    need: Forecast
    free: int | None
    text_away: bool = False
    fallbacks: tuple[Means, ...] = ()
    seconds: float | None = None
    spread: dict[torch.device, Forecast] | None = None

    def timed(self, pace: Pace) -> MemoryPlan:
        """With what the pace of this machine says."""
        return replace(self, seconds=pace.estimate())

    def fitted(self, job: Job, device: torch.device) -> Job:
        """The job with spans that suit the means and the device, where its solver's settings leave them open."""
        span = STREAMED_SPAN if self.means.streamed else span_for(device, job.rows)
        return replace(job, solver=job.solver.spanned(span))

    def __str__(self) -> str:
        words = f"{self.means}{'; text encoder on the CPU' if self.text_away else ''}"
        away = f"; {readable(self.need.host)} in main memory" if self.need.host else ""
        away += f"; {readable(self.need.others)} on each other device" if self.need.others else ""
        long = f". Takes {about(self.seconds)}, going by the last such job here" if self.seconds else ""
        needs = [f"{_told(need)} on {device}" for device, need in (self.spread or {}).items()] or [_told(self.need)]
        return f"{words}. Needs {', '.join(needs)}{away}{long}"


def _told(need: Forecast) -> str:
    phases = ", ".join(f"{phase} {readable(size)}" for phase, size in need.phases.items())
    return f"{readable(need.total)} ({phases})"


def spread(
    job: Job, options: MemoryOptions, weights: tuple[bool, ...],
    forecasts: Callable[[Job, Means], dict[torch.device, Forecast]],
) -> MemoryPlan:  # fmt: skip
    """As `choose`, over several devices; `forecasts` tells the need of each. Nothing is moved to main memory: weights
    and caches in 8 bit are all that is tried. A budget is each device's."""
    if options.offload not in ("auto", "none"):
        raise InputError(f"offload is {options.offload!r}, but several devices are given; leave one of them out")
    tried = [
        Means(int8, cache=CacheSettings(quantised)) for int8 in weights for quantised in CACHES[options.cache]
    ]  # fmt: skip
    for means in tried:
        needs = forecasts(job, means)
        room = {device: _within(options.budget, memory.free(device)) for device in needs}
        lacking = [device for device, need in needs.items() if not _has_room(room[device], need.total)]
        if not lacking:
            first = next(iter(needs))
            return MemoryPlan(means, needs[first], room[first], spread=needs)
    device = lacking[0]
    raise OutOfMemoryForecast(
        f"this job needs at least {readable(needs[device].total)} on {device}, but {readable(room[device])} are free "
        f"there; {REMEDY}"
    )


def _within(budget: int | None, free: int | None) -> int | None:
    """The smaller of a budget and what is free, None where neither is known."""
    return min((size for size in (budget, free) if size is not None), default=None)


def choose(
    job: Job, device: torch.device, options: MemoryOptions, weights: tuple[bool, ...],
    forecast: Callable[[Job, Means], Forecast], what: str = "this job", free: Free | None = None,
) -> MemoryPlan:  # fmt: skip
    """The first allowed means with which a job fits; `weights` says whether they may be in 8 bit or not, the preferred
    first.

    `forecast` tells what a job needs with some means; `free` is as of `free_for` (None: as it is now). Raises
    OutOfMemoryForecast that names the nearest job that fits.
    """
    allowed, free = options.means(device, weights), free or free_for(device)
    remedy = REMEDY if can_stream() else f"{REMEDY}, or install accelerate, to keep weights in main memory"
    return _first(job, allowed, device, free, options.budget, forecast, what, remedy)


def free_for(device: torch.device) -> Free:
    """What is free now for jobs on a device: there, and in main memory."""
    return {place: memory.free(place) for place in (MAIN, device)}


def choose_hosted(
    job: Job, room: Room, options: HostedOptions, forecast: Callable[[Job, Means], Forecast], what: str = "this job"
) -> MemoryPlan:
    """As `choose`, where a host moves the weights."""

    def need(job: Job, means: Means) -> Forecast:
        return room.need(forecast(job, means), means)

    free = {MAIN: memory.free(MAIN)} | {room.device: room.free}
    return _first(job, options.means(room), room.device, free, options.budget, need, what, REMEDY)


def _first(
    job: Job, allowed: Iterable[Means], device: torch.device, room: Free, budget: int | None,
    forecast: Callable[[Job, Means], Forecast], what: str, remedy: str,
) -> MemoryPlan:  # fmt: skip
    """The first means with which a job fits into its budget, in bytes or None, and what is free."""
    free = _within(budget, room[device])
    room = room | {device: free}
    allowed, plans = iter(allowed), []
    for means in allowed:
        plan = _plan(forecast(job, means), means, free, device)
        if _lacks(plan.need, device, room) is None:
            return replace(plan, fallbacks=_fallbacks(means, allowed))
        plans.append(plan)
    least = min(plans, key=lambda plan: plan.need.total)
    nearest = _nearest(job, lambda smaller: _lacks(forecast(smaller, least.means), device, room) is None, remedy)
    lacking = _lacks(least.need, device, room)
    need = least.need.total if lacking == device else least.need.host
    raise OutOfMemoryForecast(
        f"{what} needs at least {readable(need)}, but {readable(room[lacking])} are free on {lacking}; {nearest}"
    )


def _lacks(need: Forecast, device: torch.device, room: Free) -> torch.device | None:
    """Where there is too little room for a job on a device, there or in main memory; None where there is enough. Room
    of None is unknown."""
    needs = {MAIN: need.host} | {device: need.total}
    lacking = [place for place, size in needs.items() if size and not _has_room(room[place], size)]
    return lacking[-1] if lacking else None


def _has_room(free: int | None, size: int) -> bool:
    return free is None or memory.fits(size, free)


def _fallbacks(means: Means, others: Iterable[Means]) -> tuple[Means, ...]:
    """Of the others those that differ in the cache alone, each smaller than the one before."""
    steps = [means]
    for other in others:
        now, then = steps[-1].cache, other.cache
        smaller = (now.quantised, now.offloaded) < (then.quantised, then.offloaded)
        if smaller and other == replace(means, cache=then):
            steps.append(other)
    return tuple(steps[1:])


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


def _nearest(job: Job, fits: Callable[[Job], bool], remedy: str) -> str:
    """A smaller job that fits, in words; where there is none, the `remedy`."""
    alone, one = replace(job, batch=1), " and a batch of 1" if job.batch > 1 else ""
    smaller = [(replace(job, batch=n), f"a batch of {n} fits") for n in range(job.batch - 1, 0, -1)]
    smaller += [(replace(alone, frames=n), f"{n} frames{one} fit") for n in range(job.frames - 4, 1, -4)]
    for candidate, words in smaller:
        with suppress(InputError):  # fewer than are given
            if fits(candidate):
                return words
    return remedy
