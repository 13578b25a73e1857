"""How long a job will take, going by the last one like it on this machine.

What a sweep takes depends on the machine, and how many sweeps there are on the weights and the solver's tolerance; both
are known once a job has run. Its seconds are kept for each computation that the deep block needs at the least.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from ..errors import InputError
from ..model.config import FlowConfig
from ..parts import replacing
from .tasks import Job, Means, layout


class Pace:
    """The pace of jobs with this model, devices, type, means and tolerance. A job's other settings scale it."""

    def __init__(
        self, config: FlowConfig, job: Job, device: torch.device, dtype: torch.dtype, means: Means,
        others: Sequence[torch.device] = (),
    ):  # fmt: skip
        solver = job.solver.method if job.solver.method != "jacobi" else f"{job.solver.tolerance:g}"
        self.key = ", ".join([config.name, *map(_name, (device, *others)), str(dtype), str(means), solver])
        self.work = _work(config, job)

    def estimate(self) -> float | None:
        """Seconds that the job will take; None if none like it was noted."""
        pace = _noted().get(self.key)
        return pace * self.work if isinstance(pace, float) and 0 < pace < math.inf else None

    def note(self, seconds: float) -> None:
        """Keep what the job took. Where nothing can be written, nothing is kept."""
        noted = {**_noted(), self.key: seconds / self.work}
        with suppress(OSError, InputError), replacing(_file()) as part:
            part.write_text(json.dumps(noted, indent=1), encoding="utf-8")


def about(seconds: float) -> str:
    """As people say it: about 40 s, 3 min, 2 h."""
    for unit, scale in (("h", 3600), ("min", 60)):
        if seconds >= 2 * scale:
            return f"about {seconds / scale:.0f} {unit}"
    return f"about {max(seconds, 1):.0f} s"


def _work(config: FlowConfig, job: Job) -> float:
    """Products and sums of the deep block if each new token is evaluated once."""
    plan = layout(config, job)
    frame = math.prod(plan.shape[1:]) // config.patch_size**2
    seen = config.prompt.tokens + min(plan.window, plan.total) * frame / 2  # on average
    token = config.layers[-1] * config.deep_width * (24 * config.deep_width + 4 * seen)
    return job.rows * (plan.total - plan.given) * frame * token


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.node()}, {torch.get_num_threads()} threads)"


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "starflow" / "pace.json"


def _noted() -> dict:
    try:
        noted = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return noted if isinstance(noted, dict) else {}
