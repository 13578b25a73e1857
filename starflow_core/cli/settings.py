"""From options to the core's settings, checked before anything is loaded."""

from __future__ import annotations

import os
import re
import sys
from argparse import Namespace
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..jobs import memory
from ..jobs.pace import Pace
from ..jobs.planner import Free, MemoryOptions, MemoryPlan
from ..jobs.tasks import Job
from ..media import STILLS
from ..model.compiled import require_compiler
from ..model.config import FlowConfig
from ..model.parallel import ALONE, ONE, Mesh, Team
from ..model.placement import Placement, default_dtype, pick_device
from ..model.vae.tiles import LEAST_TILE
from ..pipeline import Parts, Pipeline, find_parts
from ..processes import own_device, started
from ..solve.solvers import AUTOREGRESSIVE, PRESETS, SolverSettings, span_for
from ..weights import INT8
from ..weights.tensorfiles import DTYPES
from .progress import Meter, warn

NUMBERS = tuple(f.name for f in fields(SolverSettings) if f.name != "method")
OUTPUTS = Path("outputs")


@dataclass(frozen=True)
class Setup:
    """What a run will use: the configuration is known, the weights are not loaded yet. `free` are the bytes that count
    as free on the device and in main memory (None: those that are free now); `compile` says that the user wants it."""

    parts: Parts
    placement: Placement
    dtype: torch.dtype
    mesh: Mesh = ONE
    free: Free | None = None
    compile: bool = False

    @classmethod
    def find(cls, args: Namespace) -> Setup:
        mesh = Mesh.of(args.parallel, started()) if getattr(args, "parallel", None) else ONE
        devices = pick_devices(args)
        parts = find_parts(args.model, args.text_encoder, args.vae, quantise=args.dtype == INT8, loras=args.lora)
        guidance = getattr(args, "guidance", None)
        guidance = parts.config.defaults.guidance if guidance is None else guidance
        placement = Placement.over(devices, guided=bool(guidance))
        dtype = DTYPES.get(args.dtype, default_dtype(devices[0], parts.config))
        compile = getattr(args, "compile", False)
        if compile:
            require_compiler(*devices)
        return cls(parts, placement, dtype, mesh, compile=compile)

    @property
    def device(self) -> torch.device:
        """The deep block's, or the first of its two."""
        return self.placement.deep[0]

    @property
    def config(self) -> FlowConfig:
        return self.parts.config

    @property
    def named(self) -> dict[str, str]:
        """What metadata say of the weights."""
        loras = ", ".join(map(str, self.parts.loras))
        return {"model": self.config.name, **({"loras": loras} if loras else {})}

    def plan(self, args: Namespace, job: Job, keep_text_encoder: bool = False) -> MemoryPlan:
        """How a job is fitted to the device. Raises OutOfMemoryForecast if it can't be."""
        options = MemoryOptions(args.memory, args.cache, args.offload, self.mesh)
        may_quantise = args.dtype == "auto"
        plan = self.parts.plan(
            job, self.dtype, self.placement, options, may_quantise, args.tile, keep_text_encoder, self.free
        )
        return plan.timed(self.pace(job, plan))

    def pace(self, job: Job, plan: MemoryPlan) -> Pace:
        """How long such jobs take here."""
        others = self.placement.devices[1:] if self.placement.several else ()
        return Pace(self.config, job, self.device, self.dtype, plan.means, others)

    def require(self, need: memory.Forecast, what: str) -> None:
        """Raise OutOfMemoryForecast unless weights and work will fit."""
        memory.require(need.total, self.device, what)

    def load(self, meter: Meter, plan: MemoryPlan | None = None, team: Team = ALONE) -> Pipeline:
        placement = self.placement
        if plan and plan.text_away:
            placement = replace(placement, text=torch.device("cpu"))
        for doubt in self.parts.doubts(meter.bytes):
            meter.warn(doubt)
        pipeline = self.parts.load(placement, self.dtype, meter.bytes, plan, team)
        meter.close()
        if self.compiles(plan):
            pipeline.flow.compile()
            print("compiling what sweeps compute, which takes about a minute the first time", file=sys.stderr)
        elif self.compile:
            meter.warn(f"the flow isn't compiled: {plan.means.uncompiled}")
        return pipeline

    def compiles(self, plan: MemoryPlan | None) -> bool:
        """Whether the flow is to be compiled, and can be with the plan's means."""
        return self.compile and not (plan and plan.means.uncompiled)


def pick_devices(args: Namespace) -> list[torch.device]:
    """Those of --devices, or the one of --device; of several processes, each one's own. Raises InputError for one that
    isn't there."""
    names, parallel = getattr(args, "devices", None), getattr(args, "parallel", None)
    if names is None:
        return [own_device(args.device) if parallel else pick_device(args.device)]
    if parallel:
        raise InputError("--devices is for one process, --parallel for several; give one")
    if args.device is not None:
        raise InputError("--device and --devices say the same; give one")
    devices = [pick_device(name.strip()) for name in names.split(",")]
    if len(set(devices)) < len(devices):
        raise InputError(f"--devices {names} names a device twice; name each once")
    return devices


def solver(args: Namespace) -> SolverSettings:
    """The preset, with any numbers given in place of its own."""
    numbers = {name: getattr(args, name) for name in NUMBERS}
    if args.solver == "jacobi":
        return PRESETS[args.preset or args.default_preset].with_numbers(**numbers)
    if args.preset or any(value is not None for value in numbers.values()):
        raise InputError("the autoregressive solver has no settings; leave out --preset and its numbers")
    return AUTOREGRESSIVE


def used(setup: Setup, job: Job) -> dict[str, Any]:
    """The solver's settings as they are used, for metadata."""
    if job.solver.method == "autoregressive":
        return {"method": job.solver.method}
    return asdict(job.solver.spanned(span_for(setup.device, job.rows)).resolvable(setup.dtype))


def size_options(args: Namespace) -> dict[str, Any]:
    """The size options that were given, under the core's names."""
    return chosen(args, "height", "width", "aspect", "size")


def check_tile(tile: int | None) -> None:
    """Raise InputError for tiles that the VAE cannot blend."""
    if tile is not None and tile < LEAST_TILE:
        raise InputError(f"tile is {tile} latent cells; the minimum is {LEAST_TILE}")


def chosen(args: Namespace, *names: str) -> dict:
    """The options of these names that were given."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def default_output(name: str, frames: int) -> str:
    return str(OUTPUTS / with_ending(name, frames))


def with_ending(name: str, frames: int) -> str:
    """A file name for that many frames."""
    return f"{name}{'.png' if frames == 1 else '.mp4'}"


def slug(text: str, longest: int = 40) -> str:
    """A file name made from a prompt."""
    words = re.findall(r"[^\W_]+", text.lower())
    while len(words) > 1 and len("-".join(words)) > longest:
        words.pop()
    return "-".join(words)[:longest] or "clip"


def numbered(path: str, index: int) -> str:
    """NAME-0.mp4 for NAME.mp4; for image sequences the folder gets the number."""
    folder = path.endswith(("/", os.sep)) or not Path(path).suffix
    if folder:
        return f"{path.rstrip('/' + os.sep)}-{index}/"
    file = Path(path)
    if "%" in file.name and file.suffix.lower() in STILLS:
        return str(file.parent.with_name(f"{file.parent.name}-{index}") / file.name)
    return str(file.with_stem(f"{file.stem}-{index}"))


def tell_plan(plan: MemoryPlan) -> None:
    """Say how a job is fitted to its device, where it isn't taken for a result."""
    print("memory:", plan, file=sys.stderr)


def warn_of_cut(prompt: str, cut: str, config: FlowConfig) -> None:
    if cut:
        warn(f"{config.name} reads only {config.prompt.tokens} tokens; left out of {prompt!r}: {cut!r}")
