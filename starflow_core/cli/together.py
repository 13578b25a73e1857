"""`generate --parallel`: the processes that `torchrun` has started make each result together."""

from __future__ import annotations

import os
import signal
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import InputError
from ..jobs import memory
from ..jobs.planner import MemoryPlan
from ..jobs.tasks import Job
from ..model.parallel import ALONE, Mesh, Team
from ..model.placement import Placement
from ..pipeline import follow
from ..processes import joined, started, telling
from .settings import Setup


def follows(args: Namespace) -> bool:
    """Whether this process only computes for another. Raises InputError where each of several would make everything."""
    several = started() > 1 and torch.distributed.is_torchelastic_launched()
    if several and not args.parallel:
        raise InputError(
            f"torchrun has started {started()} processes, each of which would make everything; add --parallel"
        )
    return bool(args.parallel) and int(os.environ.get("RANK", 0)) > 0


def check_parallel(args: Namespace, setup: Setup, job: Job) -> None:
    """Raise InputError for a job that several processes can't make together."""
    if not args.parallel:
        return
    for option in ("best_of", "resume"):
        if getattr(args, option):
            raise InputError(f"--{option.replace('_', '-')} doesn't go with --parallel; leave one of them out")
    setup.mesh.check(setup.config, job.guidance)
    if job.denoise and setup.config.denoiser is None:
        raise InputError(
            f"{setup.config.name} is denoised by a gradient of the whole flow, which is in no one process with "
            "--parallel; leave that out, or add --no-denoise"
        )


@contextmanager
def teamed(args: Namespace) -> Iterator[Team]:
    """With the others, once all are there."""
    if not args.parallel:
        yield ALONE
        return
    with telling(), joined(args.device) as (_, count, device):
        yield Team.join(Mesh.of(args.parallel, count), device)


def compute(args: Namespace) -> None:
    """What a process does that follows: its share of all that the leader makes. It has nothing to tell or to clean up,
    so that a signal ends it, also while it waits for others. The leader has checked all options."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    with teamed(args) as team:
        plan: MemoryPlan = team.tell(None)
        setup = Setup.find(args)
        memory.require(plan.need.others, setup.device, "this process's share")
        flow = setup.parts.load_flow(Placement.following(setup.device), setup.dtype, plan.means, team=team)
        follow(flow, setup.device)
