"""What all training stages share: schedule, mixed precision, averaging, resuming, logging."""

from __future__ import annotations

import copy
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import InputError


@dataclass
class Loop:
    """Where and how a stage trains.

    `folder` keeps one resumable state a stage. `scale` shortens every schedule (for tests).
    `log` takes one line of text.
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

    def run(self, name: str, module, optimizer, step: Callable, total: int, warmup: int = 50, decay: float = 0.999):
        """Call `step(index, rng, generator) -> (loss, figures)` for each step that is still to do.

        Data depend on (seed, index) alone, so that a resumed run sees what an unbroken one sees.
        Returns the exponential average of the weights.
        """
        module.to(self.device).train()
        average = copy.deepcopy(module).eval().requires_grad_(False)
        path = Path(self.folder) / f"{name}.state.pt"
        run = {"steps": total, "seed": self.seed, "dtype": str(self.dtype)}
        done = self._resume(path, run, module, average, optimizer)
        began, first = time.monotonic(), done
        for index in range(done, total):
            optimizer.set_scale(schedule(index, total, warmup))
            rng = random.Random(f"{name}:{self.seed}:{index}")
            generator = torch.Generator().manual_seed(rng.getrandbits(62))
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                loss, figures = step(index, rng, generator)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"{name}: the loss is not finite at step {index}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            _average(average, module, min(decay, (index + 1) / (index + 10)))
            if index % 20 == 0 or index + 1 == total:
                pace = (time.monotonic() - began) / (index + 1 - first)
                shown = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
                self.log(f"{name} {index + 1}/{total}  {shown}  {pace:.2f} s/step")
            if (index + 1) % self.save_every == 0 or index + 1 == total:
                self._save(path, run, index + 1, module, average, optimizer)
        return average

    def _resume(self, path: Path, run: dict, module, average, optimizer) -> int:
        """Steps that are done. Raises InputError for the state of a run with other numbers."""
        if not path.exists():
            return 0
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state.get("run") != run:
            raise InputError(f"{path} is of a run with {state.get('run')}, this one has {run}; use another folder")
        module.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        return state["done"]

    def _save(self, path: Path, run: dict, done: int, module, average, optimizer) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "run": run,
            "done": done,
            "module": module.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)


def schedule(index: int, total: int, warmup: int) -> float:
    """Linear rise over `warmup` steps, level for half the run, linear fall to 2 %."""
    rise = min(1.0, (index + 1) / warmup)
    fall = min(1.0, 2 * (1 - index / total))
    return rise * max(fall, 0.02)


@torch.no_grad()
def _average(average, module, decay: float) -> None:
    for kept, new in zip(average.state_dict().values(), module.state_dict().values(), strict=True):
        if kept.is_floating_point():
            kept.lerp_(new, 1 - decay)
        else:
            kept.copy_(new)
