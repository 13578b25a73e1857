"""A small training run for tests, in one process of several: together.py FOLDER STEPS SETTINGS. The losses of its steps
are added to FOLDER/losses.json."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path

import torch

from starflow_core.processes import joined
from starflow_core.training.data.dataset import Plan
from starflow_core.training.loop import Loop
from starflow_core.training.processes import Processes, shard
from starflow_core.training.settings import Settings
from starflow_core.training.subjects import subject_of
from starflow_core.training.train import Run, optimizer_of
from tests.core import models

LENGTHS = (3, 1, 2)  # latent frames, which differ from step to step
SHAPE = (4, 3, 2)


class Drawn:
    """Data that needs no files: each row depends on the step and the row alone."""

    def plan(self, index: int, seed: int, batch: int) -> Plan:
        frames = LENGTHS[index % len(LENGTHS)]
        return Plan(frames, "text", tuple(range(index, index + batch)), ("",) * batch, 0, batch)

    def load(self, plan: Plan, rows):
        latents = torch.stack([models.randn(plan.bucket, *SHAPE, seed=plan.picks[row]) for row in rows])
        text = torch.stack([models.randn(5, 12, seed=100 + plan.picks[row]) for row in rows])
        return latents, text

    def names(self, plan: Plan) -> list[str]:
        return [str(pick) for pick in plan.picks]


def run(folder: Path, steps: int, **options) -> None:
    settings = Settings(steps=10**6, warmup=5, batch=4, learning_rate=0.001, **options)
    with joined("cpu") as (rank, count, device):
        processes = Processes(rank, count)
        torch.manual_seed(0)
        flow = models.flow()
        with torch.no_grad():
            for weight in flow.parameters():
                weight.copy_(0.2 * torch.randn(weight.shape))
        subject = subject_of(flow, settings)
        for block in flow.blocks:
            block.recompute = settings.recompute
        if processes.count > 1:
            shard(flow, torch.float32)
        loop = Loop(folder / "states", device, torch.float32, save_every=7, processes=processes)
        losses = {}

        def note(step: int, figures: dict[str, float]) -> None:
            losses[step] = figures["loss"]
            if step == steps:
                raise KeyboardInterrupt

        loop.note = note
        work = Run(settings, Drawn(), subject, processes, device)
        with suppress(KeyboardInterrupt):
            loop.run("fit", flow, optimizer_of(flow, settings), work.step, settings.steps, settings.warmup)
        if processes.leads:
            path = folder / "losses.json"
            before = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(before | losses))


def started(folder: Path, steps: int, options: dict) -> None:
    run(folder, steps, **options)


def trained(work: Path, data: Path, options: dict) -> None:
    """A whole run from a folder, by one process of several."""
    from starflow_core.training.train import find_sources, train

    settings = Settings(data=(str(data),), work=str(work), **options)
    with joined("cpu") as (rank, count, device):
        processes = Processes(rank, count)
        train(settings, find_sources(settings), device, processes)


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), **json.loads(sys.argv[3]))
