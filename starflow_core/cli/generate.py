"""`generate`: from prompts and given frames to files, frame by frame."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..applications.likelihood import Best, best_of
from ..control import Control
from ..jobs.tasks import Generation, Job
from ..jobs.timeline import Caption
from ..jobs.unfinished import path_of
from ..media import VideoWriter
from ..parts import remove
from ..pipeline import Pipeline
from ..solve.solvers import Statistics
from .plan import Plan
from .progress import Meter, SamplingBar, warn
from .settings import tell_plan, warn_of_cut
from .together import compute, follows, teamed


def generate(args: Namespace) -> None:
    """Check everything, load the model, and make the files; under `torchrun` with all its processes."""
    began = time.monotonic()
    if follows(args):
        compute(args)
        return
    plan = Plan.make(args)
    tell_plan(plan.memory)
    with teamed(args) as team, Meter() as meter:
        team.tell(plan.memory)
        made = make(args, plan, plan.setup.load(meter, plan.memory, team), meter)
        team.tell(None)
    for line in made.told:
        print(line)
    report(plan.paths, began, made.statistics)


@dataclass(frozen=True)
class Made:
    """What making a plan's files took, and what there is to tell of it."""

    statistics: list[Statistics]
    told: list[str]


def make(args: Namespace, plan: Plan, pipeline: Pipeline, meter: Meter) -> Made:
    """Make a plan's files with a pipeline that is loaded as it says."""
    statistics, told = [], []
    job = pipeline.with_context(**plan.settings, control=Control(meter.encoding))
    together = 1 if args.best_of else job.batch
    for first in range(0, len(plan.captions), together):
        chunk = slice(first, first + together)
        captions, writers = plan.captions[chunk], plan.writers[chunk]
        part = replace(job, seed=plan.seeds[first])
        sampling = meter.sampling(job.frames)
        control = Control(sampling, warn=warn)
        if args.best_of:
            best = best_of(pipeline, captions[0], part, args.best_of, negative=args.negative, control=control)
            part = replace(part, seed=best.seed)
            statistics += best.statistics
            told += _figures(best)
            writers[0].tell(seed=best.seed, best_of=_record(best))
        part = replace(part, batch=len(captions))
        more = plan.keep_text_encoder or chunk.stop < len(plan.captions)
        unfinished = plan.paths[first] if args.resume else None
        run = start(pipeline, captions, part, args.negative, control, keep_text_encoder=more, unfinished=unfinished)
        whole, started = run.sampler.done == run.layout.given, time.monotonic()
        write(pipeline, run, writers, sampling, plan.source, args.tile)
        if (
            whole and run.means == plan.memory.means and not plan.setup.compiles(plan.memory)
        ):  # its first run says little
            plan.setup.pace(part, plan.memory).note(time.monotonic() - started)
        if unfinished:
            remove(path_of(unfinished))
        statistics.append(run.statistics)
    return Made(statistics, told)


def _record(best: Best) -> dict[str, Any]:
    """What the metadata say of a choice."""
    figures = {f"seed {seed}": round(score, 2) for seed, score in best.log_likelihoods.items()}
    return {"latent_frames": best.judged, "unit": "nats", **figures}


def _figures(best: Best) -> list[str]:
    """The same in words."""
    return [
        f"seed {seed}: log-likelihood {score:.2f} nats" + (", kept" if seed == best.seed else "")
        for seed, score in best.log_likelihoods.items()
    ]


def start(
    pipeline: Pipeline, captions: list[Caption], job: Job, negative: str, control: Control, **options
) -> Generation:  # fmt: skip
    """A generation that is ready to run. Warns of prompts that were cut off, and says what it goes on from."""
    run, cut = pipeline.start(captions, job, negative=negative, control=control, **options)
    for caption, rest in dict(zip(captions, cut, strict=True)).items():
        warn_of_cut(str(caption), rest, pipeline.config)
    if run.sampler.done > run.layout.given:
        print(f"going on after {run.sampler.done} of {run.layout.total} latent frames", file=sys.stderr)
    return run


def write(
    pipeline: Pipeline,
    run: Generation,
    writers: list[VideoWriter],
    sampling: SamplingBar,
    source: Tensor | None = None,
    tile: int | None = None,
) -> None:
    """Write frames to their files as they arrive; after a `source` clip, leave out those that only repeat it."""
    repeated = 0 if source is None else run.job.context.overlap(pipeline.config.latent)
    with ExitStack() as files:
        for writer in writers:
            files.enter_context(writer)
            if source is not None:
                writer.add(source)
        for frames in pipeline.frames(run, tile):
            fresh, repeated = frames[:, repeated:], max(repeated - frames.shape[1], 0)
            for writer, clip in zip(writers, fresh, strict=True):
                writer.add(clip)
            sampling.wrote(frames.shape[1])


def report(outputs: list[str], began: float, statistics: list[Statistics]) -> None:
    """Print where the files are and what they took."""
    for path in outputs:
        print(path)
    deep, shallow, evaluations = (
        sum(getattr(s, name) for s in statistics) for name in ("deep_sweeps", "shallow_sweeps", "deep_evaluations")
    )
    seconds = time.monotonic() - began
    print(f"{seconds:.1f} s, {deep} deep sweeps ({evaluations} token evaluations), {shallow} shallow sweeps")
