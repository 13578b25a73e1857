"""What all training stages share: schedule, mixed precision, averaging, resuming, logging."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError, NonFiniteError
from ..parts import replacing
from .files import load_state

LOG_EVERY = 20  # steps
CLIP_NORM = 1.0  # of the gradient
LEAST_RATE = 0.02  # share of the learning rate that is left at the end

# (index, rng, generator) -> loss, figures for the log
Step = Callable[[int, random.Random, torch.Generator], tuple[Tensor, dict[str, float]]]


@dataclass
class Loop:
    """Where and how a stage is trained.

    `folder` holds one state a stage, to resume from. `scale` shortens every schedule, to try things out. `log` takes
    one line of text.
    """

    folder: Path
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    scale: float = 1.0
    save_every: int = 100
    log: Callable[[str], None] = lambda line: None

    def scaled(self, steps: int) -> int:
        return max(1, round(steps * self.scale))

    def autocast(self) -> torch.autocast:
        """Matrix products in `dtype`."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def run(self, name: str, module, optimizer, step: Step, total: int, warmup: int = 50, decay: float = 0.999):
        """Train `module` for the steps that are still to do; returns the exponential average of its weights.

        What `step` draws may depend on (seed, index) alone, so that a resumed run sees what an unbroken one sees.
        """
        module.to(self.device).train()
        average = copy.deepcopy(module).eval().requires_grad_(False)
        path = Path(self.folder) / f"{name}.state.pt"
        run = {"steps": total, "seed": self.seed, "dtype": str(self.dtype)}
        parts = {"module": module, "average": average, "optimizer": optimizer}
        first = self._resume(path, run, parts)
        began = time.monotonic()
        for index in range(first, total):
            optimizer.set_scale(schedule(index, total, warmup))
            figures = self._advance(name, index, module, optimizer, step)
            _update_average(average, module, min(decay, (index + 1) / (index + 10)))
            done = index + 1
            if index % LOG_EVERY == 0 or done == total:
                pace = (time.monotonic() - began) / (done - first)
                shown = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
                self.log(f"{name} {done}/{total}  {shown}  {pace:.2f} s/step")
            if done % self.save_every == 0 or done == total:
                _save(path, run, parts, done)
        return average

    def _advance(self, name: str, index: int, module, optimizer, step: Step) -> dict[str, float]:
        """One step of the optimizer; gives the figures for the log."""
        rng = random.Random(f"{name}:{self.seed}:{index}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        with self.autocast():
            loss, figures = step(index, rng, generator)
        if not torch.isfinite(loss):
            raise NonFiniteError(f"{name}: the loss is not finite at step {index}; try --dtype fp32 or another --seed")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP_NORM)
        optimizer.step()
        return figures

    def _resume(self, path: Path, run: dict, parts: dict) -> int:
        """Steps that are done. Raises InputError for the state of a run with other numbers."""
        if not path.exists():
            return 0
        state = load_state(path, self.device)
        if state.get("run") != run:
            raise InputError(f"{path} belongs to a run with {state.get('run')}, this one has {run}; use another folder")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state["done"]


def _save(path: Path, run: dict, parts: dict, done: int) -> None:
    with replacing(path) as part:
        torch.save({"run": run, "done": done, **{name: p.state_dict() for name, p in parts.items()}}, part)


def schedule(index: int, total: int, warmup: int) -> float:
    """The share of the learning rate at a step: a linear rise over `warmup` steps, level until half of the steps are
    done, then a linear fall."""
    rise = min(1.0, (index + 1) / warmup)
    fall = min(1.0, 2 * (1 - index / total))
    return rise * max(fall, LEAST_RATE)


@torch.no_grad()
def _update_average(average, module, decay: float) -> None:
    for kept, new in zip(average.state_dict().values(), module.state_dict().values(), strict=True):
        if kept.is_floating_point():
            kept.lerp_(new, 1 - decay)
        else:
            kept.copy_(new)
