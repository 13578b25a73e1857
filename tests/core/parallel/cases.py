"""Generations by several processes, held against the same by one: what each process of a test runs."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import torch

from starflow_core.cli import main
from starflow_core.jobs.context import Context
from starflow_core.jobs.tasks import Generation, Job, Means
from starflow_core.model.cache import CacheSettings
from starflow_core.model.flow import Flow
from starflow_core.model.lora import Lora, attach, linear_names
from starflow_core.model.parallel import Mesh, Team
from starflow_core.model.placement import Placement
from starflow_core.pipeline import Told, follow
from starflow_core.processes import joined
from starflow_core.solve.solvers import AUTOREGRESSIVE, PRESETS
from starflow_core.weights.flow import load_flow
from starflow_core.weights.shares import own_lora
from tests.core import models

# What commands import takes seconds; so it is done once, for all processes.
for name in ("starflow_core.cli.generate", "diffusers.models.autoencoders.autoencoder_kl_wan", "transformers"):
    import_module(name)

CPU = torch.device("cpu")
SIZE = {"height": 32, "width": 48}  # 2 x 3 tokens


@dataclass(frozen=True)
class Case:
    """A job by its settings; its weights in 8 bit or with adapters; and whether it is made as a stream."""

    settings: dict
    means: Means = field(default_factory=Means)
    adapted: bool = False
    streamed: bool = False
    prompts: int = 1


def _context(task: str, frames: int, batch: int = 1, hidden: int = 0) -> Context:
    return Context(task, models.randn(batch, 4, frames, 2, 3, seed=5), hidden)


def _case(frames: int, **options) -> Case:
    names = ("means", "adapted", "streamed", "prompts")
    chosen = {name: options.pop(name) for name in names if name in options}
    return Case({"frames": 4 * (frames - 1) + 1, "guidance": 1.5, "solver": PRESETS["exact"]} | options, **chosen)


QUANTISED = CacheSettings(quantised=True)
CASES = {
    "text": _case(3),
    "image": _case(1),
    "first frame": _case(3, context=_context("first_frame", 1)),
    "extend": _case(4, context=_context("extend", 2)),
    "last frame": _case(3, context=_context("last_frame", 1, hidden=1)),
    "edit": _case(2, context=_context("edit", 2, hidden=2)),
    "windows": _case(7, window=4, keep=2, streamed=True),
    "windows after a context, batch": _case(6, window=4, keep=1, batch=2, context=_context("first_frame", 1, 2)),
    "balanced": _case(3, solver=PRESETS["balanced"], streamed=True),
    "autoregressive": _case(2, solver=AUTOREGRESSIVE),
    "no denoising": _case(2, denoise=False),
    "prompts that change": _case(5, prompts=2, changes=(0.5,)),
    "weights in 8 bit": _case(3, means=Means(int8=True)),
    "cache in 8 bit": _case(3, means=Means(cache=QUANTISED)),
    "adapters": _case(3, adapted=True),
    "adapters on 8 bit": _case(2, adapted=True, means=Means(int8=True)),
}


def compared(folder: Path, model: Path, halves: int, shares: int, names: tuple[str, ...]) -> None:
    """FOLDER/found.json gets, of each case, the relative error, and the sweeps together and alone; for each process
    beside the first what it has of the deep block's weights."""
    with joined("cpu") as (rank, _, device), torch.no_grad():
        team = Team.join(Mesh(halves, shares), device)
        assert team.agree(rank + 3, rank + 5, rank / 2) == (3, 5, 0.0)
        found = {name: _compared(CASES[name], model, team) for name in names}
        if rank == 0:
            (folder / "found.json").write_text(json.dumps(found))


def _compared(case: Case, model: Path, team: Team) -> dict | None:
    own = _flow(model, case, team)
    if not team.leads:
        follow(own, CPU)
        return None
    whole = _flow(model, case, None)
    job = Job(**SIZE, **case.settings)
    text = torch.stack([models.text(whole, job.batch, seed=seed) for seed in range(case.prompts)])
    text = text if case.prompts > 1 else text[0]
    uncond = models.text(whole, seed=8) if job.guidance else None
    team.tell(Told.of(job, text, uncond, None, case.means))
    together = Generation(own, job, text, uncond, means=case.means)
    alone = Generation(whole, job, text, uncond, means=case.means)
    latents = [_made(run, case.streamed) for run in (together, alone)]
    team.tell(None)
    sweeps = [run.statistics.deep_sweeps for run in (together, alone)]
    return {"error": models.relative_error(*latents), "sweeps": sweeps}


def _made(run: Generation, streamed: bool) -> torch.Tensor:
    if streamed:
        return torch.cat([piece.latents for piece in run.stream() if piece.final], 2)
    return run.run()


def _flow(model: Path, case: Case, team: Team | None) -> Flow:
    """Whole, or what a process has."""
    if team is None:
        flow = load_flow(model, quantise=case.means.int8)
    else:
        place = Placement.on(CPU) if team.leads else Placement.following(CPU)
        flow = load_flow(model, device=place, quantise=case.means.int8, team=team)
    if case.adapted:
        loras = _loras(load_flow(model))
        attach(flow, {n: own_lora(lora, n, flow.config, team) for n, lora in loras.items()} if team else loras)
    return flow


def _loras(flow: Flow) -> dict[str, Lora]:
    layers = {name: flow.get_submodule(name) for name in linear_names(flow, "all")}
    return {
        name: Lora(0.1 * models.randn(2, layer.in_features, seed=i), 0.1 * models.randn(layer.out_features, 2), 2.0)
        for i, (name, layer) in enumerate(layers.items())
    }


def commanded(words: list[str], said: Path) -> None:
    """A command, which is found to say what it says in files of each process."""
    rank = os.environ["RANK"]
    with ExitStack() as files:
        out, err = (files.enter_context(open(said / f"{rank}.{end}", "w", encoding="utf-8")) for end in ("out", "err"))
        files.enter_context(redirect_stdout(out))
        files.enter_context(redirect_stderr(err))
        code = main(words)
    raise SystemExit(code)
