"""The plan of `generate`, checked in full before anything is loaded."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import __version__
from ..applications.likelihood import check_count
from ..errors import InputError
from ..jobs.build import chosen_size, job_with_context, shapes_only
from ..jobs.planner import MemoryPlan
from ..jobs.prompts import TASK_PREFIX, check_text
from ..jobs.tasks import Job, Layout, layout
from ..jobs.timeline import EXAMPLE, Caption, Timeline
from ..jobs.unfinished import check_unfinished
from ..media import VideoWriter, check_writable, read_image, read_video
from ..model.config import FlowConfig
from ..solve import noise
from ..weights import INT8
from .progress import warn
from .settings import Setup, check_tile, chosen, default_output, numbered, size_options, slug, solver, used
from .together import check_parallel


@dataclass(frozen=True)
class Plan:
    """A run that is ready to start: `settings` for `Pipeline.with_context`, how it is fitted to the device, and the
    caption, first seed, path and writer of each result. If there is a `source` (F, 3, H, W), the results are joined to
    it. `keep_text_encoder` has it stay after the last one."""

    setup: Setup
    settings: dict[str, Any]
    memory: MemoryPlan
    captions: list[Caption]
    seeds: list[int]
    paths: list[str]
    writers: list[VideoWriter]
    source: Tensor | None
    keep_text_encoder: bool

    @classmethod
    def make(cls, args: Namespace, setup: Setup | None = None, keep_text_encoder: bool = False) -> Plan:
        """With a `setup` that is known already, or the one that the options name. Raises a StarflowError for anything
        that cannot work; warns of anything that may not."""
        captions = read_captions(args)
        candidates = args.best_of or 1
        if args.best_of is not None:
            check_best_of(args)
        if len(captions) == 1 and candidates == 1:
            captions = captions * (args.batch or 1)
        check_tile(args.tile)
        setup = setup or Setup.find(args)
        given = read_given(args, setup.config)
        settings = {**given.settings, **job_settings(args, setup, given, args.best_of or len(captions))}
        settings |= change_settings(args, captions)
        shapes = {name: pixels.to("meta") for name, pixels in given.pixels.items()}  # scaled at no cost
        job = job_with_context(setup.config, shapes_only(setup.config.latent), **{**settings, **shapes})
        several = len(captions) > job.batch or candidates > 1  # the text encoder is kept for the next batch
        check_parallel(args, setup, job)
        plan = setup.plan(args, job, several or keep_text_encoder)
        job = plan.fitted(job, setup.device)
        settings["solver"] = job.solver
        source = given.pixels["clip"] if args.join else None
        seeds = [job.seed + i * candidates for i in range(len(captions))]
        paths = name_outputs(args, setup, job, captions, seeds, source)
        writers = [
            VideoWriter(path, job.fps, metadata(args, setup, plan, given, job, caption, seed), args.quality)
            for path, caption, seed in zip(paths, captions, seeds, strict=True)
        ]
        if job.task not in setup.config.tasks:
            warn_of_task(setup, job.task)
        return cls(setup, settings, plan, captions, seeds, paths, writers, source, keep_text_encoder)


def check_best_of(args: Namespace) -> None:
    """Raise InputError where there is nothing to choose, or the choice can't be gone on from."""
    check_count(args.best_of)
    if args.resume:
        raise InputError("--best-of can't be resumed; choose first, then --resume with the --seed that it names")


@dataclass(frozen=True)
class Given:
    """What a job starts from: `pixels` under the pipeline's names, and the files they came from. For
    a clip also its frame rate (0 if it has none) and the size it was read at."""

    task: str
    pixels: dict[str, Tensor]
    files: dict[str, str]
    fps: float = 0.0
    size: tuple[int, int] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        rate = {"fps": self.fps} if self.fps else {}
        place = dict(zip(("height", "width"), self.size, strict=True)) if self.size else {}
        return {"task": self.task, **self.pixels, **rate, **place}


def read_captions(args: Namespace) -> list[Caption]:
    """The prompts, or the one timeline."""
    check_text(args.negative)
    if args.timeline is None:
        return read_prompts(args)
    if args.prompt or args.prompt_file is not None:
        raise InputError("--timeline has all prompts in it; leave out PROMPT and --prompt-file")
    timeline = Timeline.parse(args.timeline)
    if not timeline.changes:
        raise InputError(f"--timeline has no second prompt; write it as in {EXAMPLE!r}, or give one PROMPT")
    return [timeline]


def change_settings(args: Namespace, captions: list[Caption]) -> dict[str, Any]:
    """Of a timeline. Raises InputError for settings of one where there is none."""
    if not isinstance(captions[0], Timeline):
        for name in chosen(args, "keep_at_change", "change_kept"):
            raise InputError(f"--{name.replace('_', '-')} is for prompts that change; give them with --timeline")
        return {}
    return {"changes": captions[0].changes, **chosen(args, "keep_at_change", "change_kept")}


def read_prompts(args: Namespace) -> list[str]:
    """The prompts, none of them empty."""
    if args.prompt_file is None:
        if not args.prompt:
            raise InputError("no prompt; give one, --timeline, or --prompt-file")
        for number, prompt in enumerate(args.prompt, 1):
            if not prompt.strip():
                raise InputError(f"prompt {number} is empty; say what to show")
            check_text(prompt)
        return args.prompt
    if args.prompt:
        raise InputError("give prompts on the command line or with --prompt-file, not both")
    try:
        lines = Path(args.prompt_file).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"{args.prompt_file} cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise InputError(f"{args.prompt_file} is not UTF-8 text; save it as UTF-8") from None
    if not lines:
        raise InputError(f"{args.prompt_file} is empty; write one prompt per line")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise InputError(f"{args.prompt_file}: line {number} is empty; write a prompt there, or remove the line")
        check_text(line)
    return lines


def read_given(args: Namespace, config: FlowConfig) -> Given:
    """The frames given by --image, --last-image and --video, if they go together."""
    if args.video is None and args.task:
        raise InputError(f"--task {args.task} needs a clip; give it with --video")
    if args.join and args.task != "extend":
        raise InputError("--join puts a source before its continuation; use it with --video and --task extend")
    if args.video is not None:
        if args.image or args.last_image:
            raise InputError("--video cannot be combined with --image or --last-image; use one or the other")
        if not args.task:
            raise InputError("--video needs --task extend, to continue it, or --task edit, to change it")
        place = chosen_size(config, read_video(args.video, 1).pixels, **size_options(args))
        clip = read_video(args.video, args.frames if args.task == "edit" else None, place)
        return Given(args.task, {"clip": clip.pixels}, {"video": Path(args.video).name}, float(clip.fps), place)
    pixels, files = {}, {}
    for name, option, path in (("image", "image", args.image), ("last", "last_image", args.last_image)):
        if path is not None:
            pixels[name], files[option] = read_image(path), Path(path).name
    task = "last_frame" if "last" in pixels else "first_frame" if pixels else "text"
    return Given(task, pixels, files)


def job_settings(args: Namespace, setup: Setup, given: Given, results: int) -> dict[str, Any]:
    """The requested settings, under the core's names."""
    settings = chosen(args, "frames", "guidance", "window", "keep")
    if args.fps is not None:
        settings["fps"] = float(args.fps)
    if args.keep is not None and given.task == "extend":
        settings["keep_latents"] = args.keep
    batch = min(args.batch or 1, results)
    fixed = {"seed": args.seed, "batch": batch, "denoise": args.denoise, "solver": solver(args)}
    return {**settings, **fixed, **({} if given.size else size_options(args))}


def metadata(
    args: Namespace, setup: Setup, plan: MemoryPlan, given: Given, job: Job, caption: Caption, seed: int
) -> dict[str, Any]:
    """What it takes to make a result again."""
    frames = layout(setup.config, job)
    names = ("task", "height", "width", "frames", "fps", "guidance", "denoise")
    return {
        "prompt": str(caption),
        "negative": args.negative,
        "seed": seed,
        **{name: getattr(job, name) for name in names},
        "window": frames.window,
        "keep": frames.keep,
        **changes(setup, job, frames, given.pixels["clip"] if args.join else None),
        "solver": used(setup, job),
        **given.files,
        **({"joined": True, "frames": file_frames(setup, job, given.pixels["clip"])} if args.join else {}),
        **setup.named,
        "dtype": str(setup.dtype).removeprefix("torch."),
        **({"weights": INT8} if plan.means.int8 else {}),
        **({"cache": INT8} if plan.means.cache.quantised else {}),
        **({"compiled": True} if setup.compiles(plan) else {}),
        "noise_version": noise.VERSION,
        "version": __version__,
    }


def changes(setup: Setup, job: Job, plan: Layout, source: Tensor | None) -> dict[str, Any]:
    """What the metadata say of prompts that change: the file's frames at which they begin, and what is kept."""
    if not job.changes:
        return {}
    before = file_frames(setup, job, source) - job.frames
    frames = [setup.config.latent.first_frame(start) + (before if start else 0) for start in plan.starts]
    return {"prompts_begin_at_frames": frames, "keep_at_change": job.keep_at_change, "change_kept": job.change_kept}


def file_frames(setup: Setup, job: Job, source: Tensor | None) -> int:
    """Frames of a result's file, which may begin with the `source`."""
    return job.frames if source is None else job.frames + len(source) - job.context.overlap(setup.config.latent)


def name_outputs(
    args: Namespace, setup: Setup, job: Job, captions: list[Caption], seeds: list[int], source: Tensor | None
) -> list[str]:  # fmt: skip
    """A writable path for each result."""
    frames = file_frames(setup, job, source)
    if args.output is None:
        paths = [default_output(f"{slug(str(c))}-{seed}", frames) for c, seed in zip(captions, seeds, strict=True)]
    elif len(captions) == 1:
        paths = [args.output]
    else:
        paths = [numbered(args.output, i) for i in range(len(captions))]
    for path in paths:
        check_writable(path, frames)
        if args.resume:
            check_unfinished(path)
    return paths


def warn_of_task(setup: Setup, task: str) -> None:
    prefix = TASK_PREFIX.get(task, "").strip()
    name = f"{task} {prefix}" if prefix else task
    warn(
        f"{setup.config.name} was not trained for the task {name}, only for {', '.join(setup.config.tasks)}; "
        "the result may ignore the given frames"
    )
