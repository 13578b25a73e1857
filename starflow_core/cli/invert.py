"""`encode`, `decode` and `score`: a picture or clip to noise and back, and how likely it is."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from .. import __version__
from ..control import Control
from ..errors import InputError
from ..inversion import Inversion, decode_from_noise, encode_to_noise, inversion_job
from ..jobs.build import chosen_size
from ..jobs.prompts import check_text
from ..media import VideoWriter, check_writable, fit, read_video
from ..weights.tensorfiles import check_target
from .generate import report, write
from .progress import Meter, warn
from .settings import OUTPUTS, Setup, check_tile, default_output, size_options, solver, tell_plan, warn_of_cut


def encode(args: Namespace) -> None:
    """Turn a picture or clip into noise."""
    output = args.output or str(OUTPUTS / f"{Path(args.input).stem}.safetensors")
    check_target(Path(output), None, overwrite=True)
    inversion = _encoded(args)
    inversion.save(output)
    print(output)
    _print_likelihood(inversion)


def score(args: Namespace) -> None:
    """Print how likely a picture or clip is."""
    inversion = _encoded(args)
    if not args.json:
        return _print_likelihood(inversion)
    names = ("log_likelihood", "bits_per_dim", "model", "prompt")
    values = {name: getattr(inversion, name) for name in names}
    print(json.dumps({**values, "dimensions": inversion.noise.numel()}))


def decode(args: Namespace) -> None:
    """Turn noise back into its picture or clip."""
    began = time.monotonic()
    check_tile(args.tile)
    inversion = Inversion.load(args.input)
    setup = Setup.find(args)
    config = setup.config
    if inversion.model != config.name:
        warn(f"{args.input} is noise from {inversion.model}; {config.name} will turn it into something else")
    job = inversion.job(config, solver(args))
    output = args.output or default_output(Path(args.input).stem, job.frames)
    check_writable(output, job.frames)
    values = {
        "prompt": inversion.prompt,
        "task": "decode",
        "fps": inversion.fps,
        "solver": asdict(job.solver),
        "model": config.name,
        "version": __version__,
    }
    writer = VideoWriter(output, job.fps, values, args.quality)
    plan = setup.plan(args, job)
    tell_plan(plan)
    with Meter() as meter:
        pipeline = setup.load(meter, plan)
        sampling = meter.sampling(job.frames)
        run = decode_from_noise(pipeline, inversion, job.solver, Control(sampling))
        write(pipeline, run, [writer], sampling, tile=args.tile)
    report([output], began, [run.statistics])


def _encoded(args: Namespace) -> Inversion:
    """The noise of the input, after fitting it to the requested size."""
    check_text(args.prompt)
    setup = Setup.find(args)
    config = setup.config
    latent = config.latent
    longest = latent.frames(max(config.window, 1)) + latent.temporal  # more is refused, and need not be read
    clip = read_video(args.input, args.frames or longest)
    found = len(clip.pixels)
    if args.frames and found < args.frames:
        raise InputError(f"{args.input} has only {found} frames; lower --frames")
    frames = args.frames or latent.frames((found - 1) // latent.temporal + 1)
    height, width = chosen_size(config, clip.pixels, **size_options(args))
    rate = args.fps or clip.fps
    job = inversion_job(config, height, width, frames, fps=float(rate) if rate else None)
    if frames < found:
        warn(f"the last {found - frames} of {found} frames don't fill a latent frame and were left out")
    pixels = fit(clip.pixels[:frames], height, width)
    setup.require(setup.parts.forecast_encode(job, setup.dtype), "encoding this")
    with Meter() as meter:
        pipeline = setup.load(meter)
        inversion, cut = encode_to_noise(pipeline, pixels, args.prompt, job.fps, Control(meter.encoding))
    warn_of_cut(args.prompt, cut, config)
    return inversion


def _print_likelihood(inversion: Inversion) -> None:
    print(f"log-likelihood {inversion.log_likelihood:.2f} nats")
    print(f"bits per dimension {inversion.bits_per_dim:.4f}")
