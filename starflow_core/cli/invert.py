"""`encode`, `decode`, `mix` and `score`: a picture or clip to noise and back, and how likely it is."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from .. import __version__
from ..control import Control
from ..errors import InputError
from ..inversion import decode_from_noise, encode_to_noise
from ..jobs.build import chosen_size, default_job
from ..jobs.noises import Noise
from ..jobs.prompts import check_text
from ..jobs.tasks import Job
from ..media import VideoWriter, check_writable, fit, read_video
from ..weights.tensorfiles import check_target
from .generate import report, write
from .progress import Meter, warn
from .settings import OUTPUTS, Setup, check_tile, chosen, default_output, size_options, solver, tell_plan, warn_of_cut


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
    values = {
        "prompt": noise.prompt if prompt is None else prompt,
        "negative": noise.negative,
        "task": "decode",
        **{name: getattr(job, name) for name in ("fps", "guidance", "denoise")},
        "noise": [*noise.made, f"prompt {noise.prompt!r}"],
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
        run = decode_from_noise(pipeline, noise, job.solver, Control(sampling, warn=warn), prompt, **settings)
        write(pipeline, run, [writer], sampling, tile=args.tile)
    report([output], began, [run.statistics])


def _encoded(args: Namespace, **settings) -> Noise:
    """The noise of the input, after fitting it to the requested size. Settings as of `encode_to_noise`."""
    check_text(settings.get("negative", ""))
    numbers = {name: settings[name] for name in ("window", "keep", "guidance") if name in settings}
    source = Source.read(args, Setup.find(args), **{"guidance": 0.0, **numbers})
    with Meter() as meter:
        pipeline = source.setup.load(meter)
        control = Control(meter.encoding, warn=warn)
        noise, cut = encode_to_noise(pipeline, source.pixels, args.prompt, source.job.fps, control, **settings)
    warn_of_cut(args.prompt, cut, pipeline.config)
    return noise


@dataclass(frozen=True)
class Source:
    """A picture or clip (F, 3, H, W) to invert, fitted to the requested size, and the job that makes its like."""

    setup: Setup
    pixels: Tensor
    job: Job

    @classmethod
    def read(cls, args: Namespace, setup: Setup, **settings) -> Source:
        """Checks everything before a model is loaded, memory included. Settings are the job's."""
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
                "to invert it window by window"
            )
        frames = args.frames or latent.frames((found - 1) // latent.temporal + 1)
        height, width = chosen_size(config, clip.pixels, **size_options(args))
        rate = args.fps or clip.fps
        given = {"height": height, "width": width, "frames": frames, **({"fps": float(rate)} if rate else {})}
        job = default_job(config, **given, **settings)
        setup.require(setup.parts.forecast_encode(job, setup.dtype), "encoding this")
        if frames < found:
            warn(f"the last {found - frames} of {found} frames don't fill a latent frame and were left out")
        return cls(setup, fit(clip.pixels[:frames], height, width), job)


def _print_likelihood(noise: Noise) -> None:
    if noise.log_likelihood is not None:
        print(f"log-likelihood {noise.log_likelihood:.2f} nats")
        print(f"bits per dimension {noise.bits_per_dim:.4f}")
