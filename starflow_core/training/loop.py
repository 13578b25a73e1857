"""What all training stages share: schedule, mixed precision, accumulation, averaging, resuming, watching."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, NonFiniteError
from .optimiser import set_rates
from .processes import Processes, is_sharded, whole
from .states import States

LEAST_RATE = 0.02  # share of the learning rate that is left at the end
RECENT = 50  # steps whose mean tells how fast it goes

# (index, rng, generator) -> this process's parts of the loss, whose sum is its share of the step's, and figures that
# add up in the same way. Draws are the whole batch's, so that they don't depend on the number of processes.
Step = Callable[[int, random.Random, torch.Generator], Iterator[tuple[Tensor, dict[str, float]]]]


@dataclass(frozen=True)
class Check:
    """What is done every so many steps, and after the last, with the average of the weights: figures come back."""

    every: int
    act: Callable[[int], dict[str, float]]


@dataclass
class Loop:
    """Where and how a stage is trained.

    `folder` holds the states to resume from. `scale` shortens every schedule, to try things out. `log` takes one line
    of text, `note` the figures of a step.
    """

    folder: Path
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    scale: float = 1.0
    save_every: int = 100
    log_every: int = 20
    clip: float = 1.0  # largest norm of the gradient
    log: Callable[[str], None] = lambda line: None
    note: Callable[[int, dict[str, float]], None] = lambda step, figures: None
    batch_of: Callable[[int], str] = lambda index: ""  # what a step saw, for where its numbers go bad
    asked: Callable[[], bool] = lambda: False  # whether to save and stop, as a signal asks for it
    processes: Processes = field(default_factory=Processes)

    def scaled(self, steps: int) -> int:
        return max(1, round(steps * self.scale))

    def autocast(self) -> torch.autocast:
        """Matrix products in `dtype`."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def run(
        self, name: str, module: nn.Module, optimizer, step: Step, total: int, warmup: int = 50, fall: float = 0.5,
        ema: float = 0.999, checks: Sequence[Check] = (), told: dict[str, Any] | None = None,
    ):  # fmt: skip
        """Train what of `module` needs a gradient, for the steps that are still to do; returns the module with the
        exponential average of its weights.

        What `step` draws may depend on (seed, index) alone, so that a resumed run sees what an unbroken one sees. A
        state says what was `told`; one of a run that was told otherwise is refused, but for the number of steps.
        SIGTERM and Ctrl-C save and stop; a second one stops at once.
        """
        module.to(self.device).train()
        weights = {key: value for key, value in module.named_parameters() if value.requires_grad}
        average = {key: value.detach().clone() for key, value in weights.items()}
        run = {"seed": self.seed, "scale": self.scale, "dtype": str(self.dtype), **(told or {})}
        states = States(self.folder, name, self.processes)
        first = states.begin(json.loads(json.dumps(run)))
        if first > total:
            raise InputError(
                f"{self.folder} has step {first} of {name} already, and {total} are asked for; give {first} steps or "
                "more, or another folder"
            )
        if first:
            states.load(first, _tensors(weights, average, optimizer, states.names(first)))
            done = f"all {total} steps are done already" if first == total else f"goes on after step {first} of {total}"
            self.log(f"{name}: {done}")
        pace = _Pace(total - first)
        with states.written(), Stop() as stop:
            for index in range(first, total):
                set_rates(optimizer, schedule(index, total, warmup, fall))
                figures = self._advance(name, index, weights, optimizer, step)
                update_average(average, weights, min(ema, (index + 1) / (index + 10)))
                done = index + 1
                pace.step()
                checked = {}
                for check in checks:
                    if done % check.every == 0 or done == total:
                        with averaged(module, weights, average), self.autocast():
                            checked |= check.act(done)
                shown = checked or done in (1, total) or done % self.log_every == 0
                self._tell(f"{name} {done}/{total}", done, figures | checked, pace, bool(shown))
                stopping = self._asked(stop)
                states.finish_if_written()
                if done % self.save_every == 0 or done == total or stopping:
                    states.save(_tensors(weights, average, optimizer), run, done)
                if stopping:
                    states.finish()
                    self.log(f"{name}: stopped after step {done}, which is saved; the same command goes on from there")
                    stop.go()
        _swap(weights, average)
        return module.eval().requires_grad_(False)

    def _asked(self, stop: Stop) -> bool:
        """Whether any process was asked to stop."""
        return self.processes.mean({"stop": float(stop.kind is not None or self.asked())})["stop"] > 0

    def _advance(self, name: str, index: int, weights: dict[str, nn.Parameter], optimizer, step: Step):
        """One step of the optimizer; gives the figures for the log."""
        rng = random.Random(f"{name}:{self.seed}:{index}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        optimizer.zero_grad(set_to_none=True)
        figures: dict[str, float] = {}
        for loss, part in self._parts(step(index, rng, generator)):
            finite = torch.isfinite(loss)
            loss.backward()
            for key, value in part.items():
                figures[key] = figures.get(key, 0.0) + (value if finite else float("nan"))
        figures = self.processes.mean(figures)
        self.processes.average_gradients(weights.values())
        norm = whole(nn.utils.clip_grad_norm_(weights.values(), self.clip)).item()
        if not (norm < float("inf") and all(value == value for value in figures.values())):
            batch = f", batch of {found}" if (found := self.batch_of(index)) else ""
            raise NonFiniteError(
                f"{name}: the loss or its gradient is not finite at step {index + 1} ({_culprit(weights)}{batch}), of "
                "which nothing is kept. Try dtype fp32, a smaller learning rate, or another seed"
            )
        optimizer.step()
        return figures | {"gradient": norm, "learning rate": optimizer.param_groups[0]["lr"]}

    def _parts(self, parts: Iterator) -> Iterator[tuple[Tensor, dict[str, float]]]:
        """Each computed under autocast, and given out of it."""
        while True:
            with self.autocast():
                part = next(parts, None)
            if part is None:
                return
            yield part

    def _tell(self, what: str, done: int, figures: dict[str, float], pace: _Pace, shown: bool) -> None:
        self.note(done, figures | {"seconds a step": pace.seconds})
        if shown:
            text = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
            self.log(f"{what}  {text}  {pace}")


class _Pace:
    """How long the last steps took, and how long all that are left will, checks and states between them included."""

    def __init__(self, total: int):
        self.left = total
        self.ends = deque([time.monotonic()], RECENT + 1)

    def step(self) -> None:
        self.left -= 1
        self.ends.append(time.monotonic())

    @property
    def seconds(self) -> float:
        return (self.ends[-1] - self.ends[0]) / max(len(self.ends) - 1, 1)

    def __str__(self) -> str:
        minutes = self.left * self.seconds / 60
        return f"{self.seconds:.2f} s/step" + (f", {minutes:.1f} min left" if minutes else "")


class Stop:
    """While it is open, SIGTERM and Ctrl-C are taken note of; a second one acts at once."""

    def __init__(self) -> None:
        self.kind: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for kind in (signal.SIGINT, signal.SIGTERM):
                self.before[kind] = signal.signal(kind, self._take_note)
        return self

    def __exit__(self, *_) -> None:
        self._give_back()

    def go(self) -> None:
        """Stop as the signal would have done. Raises KeyboardInterrupt."""
        self._give_back()
        if self.kind is not None:
            signal.raise_signal(self.kind)
        raise KeyboardInterrupt

    def _take_note(self, kind: int, _) -> None:
        self.kind = kind
        self._give_back()

    def _give_back(self) -> None:
        for kind, handler in self.before.items():
            signal.signal(kind, handler)
        self.before = {}


def schedule(index: int, total: int, warmup: int, fall: float = 0.5) -> float:
    """The share of the learning rate at a step: a linear rise over `warmup` steps, then level, then a linear fall over
    the last steps, of which `fall` is the share."""
    rise = min(1.0, (index + 1) / max(warmup, 1))
    left = min(1.0, (1 - index / total) / fall) if fall else 1.0
    return rise * max(left, LEAST_RATE)


@torch.no_grad()
def update_average(average: dict[str, Tensor], weights: dict[str, nn.Parameter], decay: float) -> None:
    for key, kept in average.items():
        kept.lerp_(weights[key], 1 - decay)


@contextmanager
def averaged(module: nn.Module, weights: dict[str, nn.Parameter], average: dict[str, Tensor]) -> Iterator[None]:
    """The module with the average in place of its weights, in no second copy; it doesn't train meanwhile."""
    _swap(weights, average)
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train()
        _swap(weights, average)


@torch.no_grad()
def _swap(weights: dict[str, nn.Parameter], average: dict[str, Tensor]) -> None:
    for key, weight in weights.items():
        kept = average[key].clone()
        average[key].copy_(weight)
        weight.copy_(kept)


def _tensors(
    weights: dict[str, nn.Parameter], average: dict[str, Tensor], optimizer, saved: dict[str, torch.Size] | None = None
) -> dict[str, Tensor]:
    """All tensors of a state. Where it is `saved`, the optimizer's are made first, for it to be read into."""
    for name in saved or ():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            key, _, part = rest.rpartition("/")
            _make_state(optimizer, weights, key, part, saved[name])
    tensors = {f"weights/{key}": value.detach() for key, value in weights.items()}
    tensors |= {f"average/{key}": value for key, value in average.items()}
    for key, weight in weights.items():
        parts = optimizer.state.get(weight, {})
        tensors |= {f"optimizer/{key}/{part}": value for part, value in parts.items()}
    return tensors


def _make_state(optimizer, weights: dict[str, nn.Parameter], key: str, part: str, size: torch.Size) -> None:
    """An empty tensor of an optimizer's state: like its weight, or one number."""
    if key not in weights:
        raise InputError(f"the state has {key}, which isn't trained now; use another folder")
    weight = weights[key].detach()
    optimizer.state[weights[key]][part] = torch.zeros_like(weight) if size == weight.shape else torch.zeros(size)


def _culprit(weights: dict[str, nn.Parameter]) -> str:
    """The first weight whose gradient is not finite."""
    for key, weight in weights.items():
        grad = weight.grad
        if grad is not None and not torch.isfinite(grad.to_local() if is_sharded(grad) else grad).all():
            return f"first in {key}"
    return "in the loss alone"
