"""What makes a batch's rows, one after the other, with a model that stays loaded."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, replace

import torch

from ...errors import CheckpointError, NonFiniteError, StarflowError, ran_out
from ...jobs.planner import MAIN, free_for
from ...model.lora import Lora, attach, detach
from ...pipeline import Parts, Pipeline
from ...weights.lora import Chosen
from .. import OUT_OF_MEMORY_ADVICE
from ..generate import make
from ..plan import Plan
from ..progress import Meter
from .folders import folder_of
from .rows import Models, Row

LORAS_KEPT = 16  # in main memory
SETTLED = (CheckpointError, NonFiniteError)  # come back at every try


@dataclass(frozen=True)
class Outcome:
    """What became of a row: made, or the error of its last try."""

    line: int
    name: str
    error: str = ""


class Worker:
    """Makes rows on one device, each tried again up to `retries` times; so many `workers` share a machine's main
    memory. A row's failure is an outcome like another."""

    def __init__(self, folder: str, device: torch.device, retries: int, workers: int = 1, quiet: bool = False):
        self._folder, self._device, self._retries = folder_of(folder), device, retries
        # Jobs are fitted to what is free before anything is loaded, as if each were alone.
        free = free_for(device)
        self._models = Models(free | {MAIN: free[MAIN] and free[MAIN] // workers})
        self._meter, self._model = Meter(quiet), Model()

    def __call__(self, row: Row) -> Outcome:
        for _ in range(1 + self._retries):
            error, again = self._try(row)
            if not again:
                break
        return Outcome(row.line, row.name, error)

    def _try(self, row: Row) -> tuple[str, bool]:
        """Make a row; say what went wrong, if anything did, and whether it may go well the next time."""
        try:
            with self._meter:
                self._make(row)
        except StarflowError as error:
            return str(error), not isinstance(error, SETTLED)
        except Exception as error:  # the other rows have to be made, whatever it is
            return OUT_OF_MEMORY_ADVICE if ran_out(error) else f"{type(error).__name__}: {error}", True
        return "", False

    def _make(self, row: Row) -> None:
        if self._folder.has(row.name):  # made by a worker that was killed before it could say so
            return
        with self._folder.making(row.name) as path:
            args = row.at(output=path, device=str(self._device))
            plan = Plan.make(args, self._models.setup(args), keep_text_encoder=True)
            make(args, plan, self._model.ready(args, plan, self._meter), self._meter)


class Model:
    """A pipeline that stays as long as rows need it as it was loaded. LoRAs are put on and taken off."""

    def __init__(self):
        self._key: tuple | None = None
        self._pipeline: Pipeline | None = None
        self._worn: list[tuple] | None = []  # files and strengths; None if it isn't known
        self._loras: dict[tuple, dict[str, Lora]] = {}

    def ready(self, args: Namespace, plan: Plan, meter: Meter) -> Pipeline:
        """The pipeline for a row, loaded as its plan says."""
        setup, means = plan.setup, plan.memory.means
        # Weights that are streamed are known to what streams them: nothing can be put beside them later.
        fixed = setup.parts if means.streamed else replace(setup.parts, loras=())
        wanted = args.model, args.text_encoder, args.vae, args.dtype, setup.compiles(plan.memory)
        key = *wanted, means.int8, means.streamed, means.in_turn, plan.memory.text_away, *map(_name, fixed.loras)
        if key != self._key:
            self._key = self._pipeline = None  # its memory first
            self._pipeline, self._key, self._worn = replace(setup, parts=fixed).load(meter, plan.memory), key, []
        self._pipeline.plan = plan.memory
        if not means.streamed:
            self._wear(setup.parts, meter)
        return self._pipeline

    def _wear(self, parts: Parts, meter: Meter) -> None:
        """Put on a row's LoRAs alone."""
        names = list(map(_name, parts.loras))
        if names == self._worn:
            return
        self._worn = None
        detach(self._pipeline.flow)
        for layers in self._loras.values():
            for lora in layers.values():
                lora.to("cpu")
        for chosen in parts.loras:
            attach(self._pipeline.flow, self._read(chosen, parts, meter))
        self._worn = names

    def _read(self, chosen: Chosen, parts: Parts, meter: Meter) -> dict[str, Lora]:
        """A LoRA's adapters, read once."""
        name = _name(chosen)
        if name not in self._loras:
            for doubt in replace(parts, loras=(chosen,)).doubts(meter.bytes):
                meter.warn(doubt)
            if len(self._loras) >= LORAS_KEPT:
                self._loras.pop(next(iter(self._loras)))
            self._loras[name] = chosen.load()
        return self._loras[name]


def _name(chosen: Chosen) -> tuple:
    return chosen.file.file.path, chosen.strength
