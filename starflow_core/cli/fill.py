"""`fill`: parts of a picture or clip, what is around it, or missing frames."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor

from .. import __version__
from ..applications.fill import PARTICLES, Filled, check_prompt, fewer, filling_job, fitting, forecast_fill, told
from ..applications.fill import fill as make
from ..control import Control
from ..errors import InputError
from ..jobs import memory
from ..jobs.masks import checked_mask, joined, outpainted, parted
from ..jobs.planner import MemoryPlan
from ..jobs.prompts import check_text
from ..jobs.tasks import Means
from ..media import VideoWriter, check_writable, read_video
from .invert import Source
from .progress import Meter, warn
from .settings import (
    Setup,
    check_tile,
    chosen,
    default_output,
    size_options,
    slug,
    solver,
    tell_plan,
    used,
    warn_of_cut,
)

BLACK = 0.1  # of 2: darker pixels of a mask stay, although a .jpg or .mp4 may have blurred its black


def fill(args: Namespace) -> None:
    """Check everything, fill the source in, and write it."""
    began = time.monotonic()
    check_tile(args.tile)
    if not (args.mask or args.outpaint or args.missing):
        raise InputError("nothing is to be filled; give --mask, --outpaint or --missing")
    check_prompt(args.prompt)
    check_text(args.negative)
    numbers = chosen(args, "guidance", "window", "keep")
    setup = Setup.find(args)
    own_size = bool(args.outpaint) and not size_options(args)

    def change(pixels: Tensor) -> Tensor:
        changed = with_mask(args, pixels)
        if own_size:
            check_margins(args.outpaint, pixels, setup.config.cell)
        return changed

    source = Source.read(args, setup, change, "fill", own_size, solver=solver(args), **numbers)
    pixels, mask = parted(source.pixels)
    if args.outpaint and pixels.shape[-2:] != source.size:
        (height, width), found = pixels.shape[-2:], source.size
        warn(
            f"with its margins it is {found[1]} x {found[0]}; that is scaled to cover {width} x {height}, then cropped"
        )
    settings = {"fps": source.fps, "seed": args.seed, "solver": source.job.solver, **numbers}
    _, known, job = filling_job(setup.config, pixels, mask, args.particles, **settings)
    means = Means(setup.parts.in_int8)

    def fitted(particles: int) -> memory.Forecast:
        need = forecast_fill(setup.config, job, setup.dtype, means, particles=particles, known=known)
        need = setup.parts.with_others(need, job, setup.dtype, args.tile)
        setup.require(need, "filling this")
        return need

    particles, need = fitting(args.particles, fitted)
    if warning := fewer(particles, args.particles or PARTICLES):
        warn(warning)
    output = args.output or default_output(f"{Path(args.input).stem}-{slug(args.prompt)}", job.frames)
    check_writable(output, job.frames)
    tell_plan(MemoryPlan(means, need, memory.free(setup.device)))
    with Meter() as meter:
        pipeline = setup.load(meter)
        control = Control(meter.sampling(job.frames), warn=warn)
        found = make(
            pipeline, pixels, mask, args.prompt, negative=args.negative, particles=particles, control=control,
            tile=args.tile, **settings,
        )  # fmt: skip
    warn_of_cut(args.prompt, found.cut, setup.config)
    with VideoWriter(output, job.fps, _metadata(args, source, found, mask), args.quality) as writer:
        writer.add(found.pixels)
    print(output)
    print(told(found.effective, found.particles, known))
    print(f"{time.monotonic() - began:.1f} s")


def with_mask(args: Namespace, pixels: Tensor) -> Tensor:
    """A clip with its margins and its mask, `joined`."""
    mask = torch.zeros(len(pixels), *pixels.shape[-2:])
    if args.mask:
        drawn = (read_video(args.mask, len(pixels) + 1).pixels.mean(1) > BLACK - 1).float()
        if len(drawn) > len(pixels) > 1:
            warn(f"only the first {len(pixels)} frames of {args.mask} are used")
            drawn = drawn[:-1]
        mask = checked_mask(drawn, pixels, bool(args.missing or args.outpaint)).float()
    if args.missing:
        first, last = args.missing
        if not first <= last < len(pixels):
            raise InputError(
                f"frames {first} to {last} are missing, but the clip's are 0 to {len(pixels) - 1}; give FIRST-LAST"
            )
        mask[first : last + 1] = 1
    pixels, margins = outpainted(pixels, *(args.outpaint or (0, 0, 0, 0)))
    around = torch.nn.functional.pad(mask, [args.outpaint[i] for i in (0, 2, 1, 3)]) if args.outpaint else mask
    return joined(pixels, torch.maximum(around, margins))


def check_margins(margins: tuple[int, int, int, int], pixels: Tensor, cell: int) -> None:
    """Raise InputError, with the nearest margins that do, unless a clip has sides of whole cells with them."""
    left, top, right, bottom = margins
    height, width = pixels.shape[-2:]
    sizes = width + left + right, height + top + bottom
    if all(size % cell == 0 for size in sizes):
        return
    (left, right), (top, bottom) = _nearest(left, right, width, cell), _nearest(top, bottom, height, cell)
    raise InputError(
        f"with its margins it is {sizes[0]} x {sizes[1]}, but sides are multiples of {cell}; the nearest margins are "
        f"{left},{top},{right},{bottom}, or give --height and --width to scale it"
    )


def _nearest(before: int, after: int, side: int, cell: int) -> tuple[int, int]:
    """Margins that make a side whole cells long; one that isn't 0 is changed if there is one, the last if both."""
    total = before + side + after
    for target in sorted((total // cell * cell, -(-total // cell) * cell), key=lambda size: abs(size - total)):
        changed = [(before, after + target - total), (before + target - total, after)]
        for found in changed if after or not before else changed[::-1]:
            if all(0 <= margin <= side for margin in found):
                return found
    return before, after


def _metadata(args: Namespace, source: Source, found: Filled, mask: Tensor) -> dict:
    """What it takes to make the result again."""
    job = source.job
    return {
        "prompt": args.prompt,
        "negative": args.negative,
        "task": "fill",
        "source": args.input,
        "mask": args.mask or "",
        "outpaint": ",".join(map(str, args.outpaint or ())),
        "missing": "-".join(map(str, args.missing or ())),
        "filled": round(float(mask.mean()), 4),
        "particles": found.particles,
        "seed": args.seed,
        **{name: getattr(job, name) for name in ("guidance", "height", "width", "frames", "fps", "window", "keep")},
        "effective": [round(n, 2) for n in found.effective],
        "solver": used(source.setup, job),
        **source.setup.named,
        "version": __version__,
    }
