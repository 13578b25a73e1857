"""`encode`, `decode`, `mix` and `score`: a picture or clip to noise and back, and how likely it is."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import __version__
from ..applications.inversion import decode_from_noise, encode_to_noise, measure
from ..applications.likelihood import Choice, check_captions, choose_caption
from ..control import Control
from ..errors import InputError
from ..jobs.build import chosen_size, default_job
from ..jobs.noises import Noise
from ..jobs.prompts import check_text
from ..jobs.surprise import UNIT, Surprise
from ..jobs.tasks import Job
from ..media import VideoWriter, check_writable, fit, read_video
from ..media.overlay import overlaid
from ..pipeline import Pipeline
from ..weights.tensorfiles import check_target
from .generate import report, write
from .progress import Meter, warn
from .settings import (
    OUTPUTS,
    Setup,
    check_tile,
    chosen,
    default_output,
    size_options,
    solver,
    tell_plan,
    used,
    warn_of_cut,
)

LIKELIHOOD = ("log_likelihood", "bits_per_dim")


def encode(args: Namespace) -> None:
    """Turn a picture or clip into noise."""
    output = args.output or str(OUTPUTS / f"{Path(args.input).stem}.safetensors")
    check_target(Path(output), None, overwrite=True)
    settings = chosen(args, "seed", "window", "keep", "guidance")
    noise = _encoded(args, negative=args.negative, **settings)
    noise.save(output)
    print(output)
    _print_likelihood(noise)


def mix(args: Namespace) -> None:
    """A variation of a noise, or one between two."""
    names = [Path(path).stem for path in args.input]
    output = args.output or str(OUTPUTS / f"{'-'.join(names)}-mixed.safetensors")
    if len(names) > 2:
        raise InputError(f"{len(names)} noises; give one for a variation of it, or two to mix")
    if len(names) == 2 and (args.seed is not None or args.keep_frames):
        raise InputError("--seed and --keep-frames are for variations of one noise; leave them out for two")
    check_target(Path(output), None, overwrite=True)
    first, *others = map(Noise.load, args.input)
    seed, kept = args.seed or 0, args.keep_frames
    made = first.mix(others[0], args.amount) if others else first.vary(args.amount, seed, kept)
    made.save(output)
    print(output)


def score(args: Namespace) -> None:
    """Print how likely a picture or clip is, which caption fits it, or what in it is unlikely."""
    if args.choose is not None:
        if args.prompt:
            raise InputError("--choose compares captions, so leave out --prompt")
        check_captions(args.choose)
    windows = chosen(args, "window", "keep")
    given = Source.read(args, Setup.find(args), guidance=0.0, **windows)
    if args.map:
        _map_writer(args, given)  # raises before the work what it would after it
    choice = None
    with Meter() as meter:
        pipeline, control = given.load(meter)
        if args.choose is None:
            surprise, prompt = _surprise(args, pipeline, given, control, windows), args.prompt
        else:
            choice = choose_caption(pipeline, given.pixels, args.choose, given.fps, control, **windows)
            surprise, prompt = choice.surprise, choice.captions[choice.winner]
    for caption, cut in zip(choice.captions, choice.cut, strict=True) if choice else ():
        warn_of_cut(caption, cut, pipeline.config)
    if args.map:
        values = {"prompt": prompt, **{name: getattr(surprise, name) for name in LIKELIHOOD}}
        with _map_writer(args, given, values) as writer:
            writer.add(overlaid(given.pixels, surprise.map, UNIT))
    _print_score(args, given, surprise, prompt, choice)


def _surprise(args: Namespace, pipeline: Pipeline, given: Source, control: Control, windows: dict) -> Surprise:
    """Under the prompt."""
    found, _, cut = measure(pipeline, given.pixels, args.prompt, given.fps, control, **windows)
    warn_of_cut(args.prompt, cut, pipeline.config)
    return Surprise(found.surprise[0], pipeline.config, *given.pixels.shape[-2:])


def _map_writer(args: Namespace, given: Source, values: dict[str, Any] | None = None) -> VideoWriter:
    """Raises InputError for what can't be written."""
    check_writable(args.map, len(given.pixels))
    made = {"task": "score", "source": Path(args.input).name, "unit": UNIT, **given.setup.named}
    rate = given.fps if len(given.pixels) > 1 else 0
    return VideoWriter(args.map, rate, {**(values or {}), **made, "version": __version__})


def _print_score(args: Namespace, given: Source, surprise: Surprise, prompt: str, choice: Choice | None) -> None:
    if args.json:
        values = {name: getattr(surprise, name) for name in LIKELIHOOD}
        values |= {**given.setup.named, "prompt": prompt, "dimensions": surprise.dimensions}
        if choice:
            captions = dict(zip(choice.captions, choice.log_likelihoods, strict=True))
            values |= {"captions": captions, "winner": prompt, "distance": choice.distance}
        return print(json.dumps({**values, "frames": surprise.curve(), **({"map": args.map} if args.map else {})}))
    if choice:
        for caption, nats in zip(choice.captions, choice.log_likelihoods, strict=True):
            print(f"{nats:.2f} nats: {caption}")
        print(f"best: {prompt} ({choice.distance:.2f} nats ahead)")
    _print_likelihood(surprise)
    if args.map:
        print(args.map)


def decode(args: Namespace) -> None:
    """Turn noise back into its picture or clip."""
    began = time.monotonic()
    check_tile(args.tile)
    noise = Noise.load(args.input)
    setup = Setup.find(args)
    config = setup.config
    if noise.model != config.name:
        warn(f"{args.input} is noise from {noise.model}; {config.name} will turn it into something else")
    prompt, settings = args.prompt, chosen(args, "guidance")
    check_text(prompt or "")
    job = noise.job(config, solver(args), **settings)
    output = args.output or default_output(Path(args.input).stem, job.frames)
    check_writable(output, job.frames)
    plan = setup.plan(args, job)
    job = plan.fitted(job, setup.device)
    values = {
        "prompt": noise.prompt if prompt is None else prompt,
        "negative": noise.negative,
        "task": "decode",
        **{name: getattr(job, name) for name in ("fps", "guidance", "denoise")},
        "noise": [*noise.made, f"prompt {noise.prompt!r}"],
        "solver": used(setup, job),
        **setup.named,
        "version": __version__,
    }
    writer = VideoWriter(output, job.fps, values, args.quality)
    tell_plan(plan)
    with Meter() as meter:
        pipeline = setup.load(meter, plan)
        sampling = meter.sampling(job.frames)
        run = decode_from_noise(pipeline, noise, job.solver, Control(sampling, warn=warn), prompt, **settings)
        write(pipeline, run, [writer], sampling, tile=args.tile)
    report([output], began, [run.statistics])


def _encoded(args: Namespace, **settings) -> Noise:
    """The noise of the input, after fitting it to the requested size. Settings as of `encode_to_noise`."""
    check_text(settings.get("negative", ""))
    numbers = {name: settings[name] for name in ("window", "keep", "guidance") if name in settings}
    source = Source.read(args, Setup.find(args), **{"guidance": 0.0, **numbers})
    with Meter() as meter:
        pipeline, control = source.load(meter)
        noise, cut = encode_to_noise(pipeline, source.pixels, args.prompt, source.fps, control, **settings)
    warn_of_cut(args.prompt, cut, pipeline.config)
    loras = source.setup.named.get("loras")
    return replace(noise, made=(*noise.made, f"with {loras}")) if loras else noise


@dataclass(frozen=True)
class Source:
    """A picture or clip (F, 3, H, W) to invert, fitted to the requested size, and the job that makes its like."""

    setup: Setup
    pixels: Tensor
    job: Job
    size: tuple[int, int]  # height and width before that

    @property
    def fps(self) -> float:
        return self.job.fps

    def load(self, meter: Meter) -> tuple[Pipeline, Control]:
        return self.setup.load(meter), Control(meter.encoding, warn=warn)

    @classmethod
    def read(
        cls, args: Namespace, setup: Setup, change: Callable[[Tensor], Tensor] = lambda pixels: pixels,
        doing: str = "invert", own_size: bool = False, **settings,
    ) -> Source:  # fmt: skip
        """Checks everything before a model is loaded, memory included. Settings are the job's; `change` is done to the
        frames that are used, before they are fitted, with `own_size` to the size that they have then."""
        check_text(args.prompt)
        config, latent = setup.config, setup.config.latent
        longest = latent.frames(settings.get("window") or max(config.window, 1))
        clip = read_video(args.input, args.frames or longest + latent.temporal)  # more need not be read
        found = len(clip.pixels)
        if args.frames and found < args.frames:
            raise InputError(f"{args.input} has only {found} frames; lower --frames")
        if not args.frames and found >= longest + latent.temporal:
            raise InputError(
                f"{args.input} is longer than the window of {longest} frames; give --frames {longest}, or more of them "
                f"to {doing} it window by window"
            )
        frames = args.frames or latent.frames((found - 1) // latent.temporal + 1)
        pixels = change(clip.pixels[:frames])
        size = tuple(pixels.shape[-2:])
        height, width = size if own_size else chosen_size(config, pixels, **size_options(args))
        rate = args.fps or clip.fps
        given = {"height": height, "width": width, "frames": frames, **({"fps": float(rate)} if rate else {})}
        job = default_job(config, **given, **settings)
        setup.require(setup.parts.forecast_encode(job, setup.dtype), "encoding this")
        if frames < found:
            warn(f"the last {found - frames} of {found} frames don't fill a latent frame and were left out")
        return cls(setup, fit(pixels, height, width), job, size)


def _print_likelihood(found: Noise | Surprise) -> None:
    if found.log_likelihood is not None:
        print(f"log-likelihood {found.log_likelihood:.2f} nats")
        print(f"bits per dimension {found.bits_per_dim:.4f}")
