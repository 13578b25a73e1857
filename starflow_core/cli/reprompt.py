"""`reprompt`: a clip under another prompt, by the noise that it has under its own."""

from __future__ import annotations

import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from .. import __version__
from ..applications.reprompt import Edited, Wish, check_hold
from ..applications.reprompt import reprompt as make
from ..control import Control
from ..media import VideoWriter, check_writable
from .invert import Source
from .progress import Meter, warn
from .settings import Setup, check_tile, default_output, slug, solver, used, warn_of_cut


def reprompt(args: Namespace) -> None:
    """Make the candidates, keep the best, and say what each was worth."""
    began = time.monotonic()
    check_tile(args.tile)
    names = ("negative", "hold", "strength", "guidance", "candidates", "seed")
    wish = Wish(args.prompt, args.new, **{name: getattr(args, name) for name in names})
    settings = solver(args)
    source = Source.read(args, Setup.find(args), guidance=wish.guidance, solver=settings)
    job = source.job
    check_hold(wish, job)
    output = args.output or default_output(f"{Path(args.input).stem}-{slug(args.new)}", job.frames)
    check_writable(output, job.frames)
    with Meter() as meter:
        pipeline = source.setup.load(meter)
        sampling = meter.sampling(job.frames * wish.candidates)
        edited = make(
            pipeline, source.pixels, wish, job.fps, settings, Control(sampling, warn=warn), tile=args.tile
        )  # fmt: skip
    for caption, cut in zip((wish.was, wish.prompt), edited.cut, strict=True):
        warn_of_cut(caption, cut, pipeline.config)
    with VideoWriter(output, job.fps, _metadata(args, source, wish, edited), args.quality) as writer:
        writer.add(edited.pixels)
    _report(output, edited, time.monotonic() - began)


def _metadata(args: Namespace, source: Source, wish: Wish, edited: Edited) -> dict:
    """What it takes to make the result again."""
    job = source.job
    return {
        "prompt": wish.prompt,
        "task": "reprompt",
        "source": Path(args.input).name,
        **{k: v for k, v in asdict(wish).items() if k != "prompt"},
        **{name: getattr(job, name) for name in ("height", "width", "frames", "fps")},
        "candidate": edited.kept,
        "scores": edited.scores,
        "noise": list(edited.best.noise.made),
        "solver": used(source.setup, job),
        **source.setup.named,
        "version": __version__,
    }


def _report(output: str, edited: Edited, seconds: float) -> None:
    print(output)
    for index, score in enumerate(edited.scores):
        print(f"candidate {index}: {score:.3f}{' (kept)' if index == edited.kept else ''}")
    print(f"{seconds:.1f} s")
