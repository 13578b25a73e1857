"""A training run from settings: data, what is trained, the loop, and the finished file."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError, NonFiniteError
from ..model.config import FlowConfig
from ..model.flow import Flow
from ..model.placement import default_dtype
from ..model.text import TextEncoder
from ..model.vae.codec import VAE
from ..pipeline import find_parts
from ..weights.flow import APPLE_LICENSE, load_flow
from ..weights.lora import base_metadata
from ..weights.tensorfiles import DTYPES
from .data.cache import Cache
from .data.dataset import Dataset, Plan
from .data.prepare import prepare
from .files import make_folder
from .loop import Check, Loop
from .optimiser import Muon
from .processes import Processes, shard
from .settings import Settings
from .sheets import Sheets
from .subjects import blocks_of, subject_of
from .watch import watching


@dataclass(frozen=True)
class Sources:
    """Where a run's models come from. Each is loaded when it is called for, onto the device given; `base` is what the
    finished file says of the model."""

    config: FlowConfig
    flow: Callable[[torch.dtype, torch.device], Flow]
    vae: Callable[[torch.device], VAE]
    text: Callable[[torch.device], TextEncoder]
    base: Callable[[], dict[str, str]]


def find_sources(settings: Settings) -> Sources:
    """The files that the settings name, or the bundled demo's. Raises InputError for what doesn't go together, and
    CheckpointError for damaged files."""
    parts = find_parts(settings.model, settings.text_encoder, settings.vae)
    config = _fresh_config(settings) if settings.train == "scratch" else parts.config
    if settings.noise is not None:
        config = replace(config, noise_std=settings.noise)

    def flow(dtype: torch.dtype, device: torch.device) -> Flow:
        if settings.train == "scratch":
            return Flow(config).to(device)
        return load_flow(parts.checkpoint, dtype, device, config=config, quantise=settings.int8)

    return Sources(
        config,
        flow,
        lambda device: parts.vae.load(torch.float32, device),
        lambda device: parts.text.load(default_dtype(device), device),
        lambda: base_metadata(parts.checkpoint),
    )


def check(settings: Settings, config: FlowConfig) -> None:
    """Raise InputError for settings that this model can't be trained with."""
    if settings.train == "denoiser" and config.denoiser is None:
        raise InputError(f"{config.name} has no learned denoiser to train; train lora or full")
    if settings.int8 and settings.train != "lora":
        raise InputError(f"int8 is for a LoRA's frozen weights; {settings.train} trains the weights themselves")
    for task in settings.shares:
        if task not in config.tasks and config.kind == "image" and task != "text":
            raise InputError(f"tasks: {config.name} makes pictures, which have no {task}; use text:1")
    blocks = blocks_of(settings)
    if settings.train == "lora" and not isinstance(blocks, str) and not set(blocks) <= set(range(len(config.layers))):
        raise InputError(f"blocks is {settings.blocks}: {config.name} has the blocks 0 to {len(config.layers) - 1}")


def train(
    settings: Settings,
    sources: Sources,
    device: torch.device,
    processes: Processes,
    log: Callable[[str], None] = lambda line: None,
    report: Callable[[int, dict[str, float]], None] = lambda step, figures: None,
) -> Path:
    """Train, or go on where a run with the same settings and folder has stopped; returns the finished file.

    `report` is told the figures of each step, and may raise to stop. Raises InputError for data and settings that can't
    be used, NonFiniteError where numbers go bad.
    """
    config, work = sources.config, Path(settings.work)
    check(settings, config)
    make_folder(work)
    dtype = DTYPES[settings.dtype] if settings.dtype else default_dtype(device)
    cache = Cache(work / "cache")
    sheets = Sheets(settings, config, cache, work / "samples")
    dataset = prepare(
        settings, config, lambda: sources.vae(device), lambda: sources.text(device), cache,
        rank=processes.rank, world=processes.count, extra=sheets.texts, progress=None,
    )  # fmt: skip
    processes.wait()
    for line in dataset.report():
        log(line)
    learns = settings.train in ("full", "scratch")
    flow = sources.flow(torch.float32 if learns else dtype, device)
    with torch.inference_mode(False), torch.enable_grad():
        subject = subject_of(flow, settings)
        for block in flow.blocks:
            block.recompute = settings.recompute
        if processes.count > 1:
            shard(flow, dtype)
        run = Run(settings, dataset, subject, processes, device)
        loop = Loop(
            work / "states", device, dtype if learns else torch.float32, settings.seed, save_every=settings.save_every,
            log_every=settings.log_every, clip=settings.clip, log=log, processes=processes,
        )  # fmt: skip
        checks = [Check(settings.evaluate_every, run.measure)]
        if settings.prompts:
            checks.append(Check(settings.sample_every, partial(sheets.draw, flow, sources, device, processes)))
        with _watched(work / "logs", processes, log) as note:
            loop.note = lambda step, figures: (note(step, figures), report(step, figures))
            loop.run(
                settings.train, flow, optimizer_of(flow, settings), run.step, settings.steps, settings.warmup,
                settings.decay, settings.ema, checks, told=_told(settings, dataset),
            )  # fmt: skip
        subject.write(settings.result, _metadata(settings, sources), processes)
    processes.wait()
    return settings.result


class Run:
    """What a step sees and computes."""

    def __init__(self, settings: Settings, dataset: Dataset, subject, processes: Processes, device: torch.device):
        self.settings, self.dataset, self.subject = settings, dataset, subject
        self.processes, self.device = processes, device

    def step(self, index: int, rng: random.Random, generator: torch.Generator) -> Iterator[tuple[Tensor, dict]]:
        """The loss of this process's rows, in pieces."""
        plan = self.dataset.plan(index, self.settings.seed, self.settings.batch)
        seed = rng.getrandbits(62) + self.processes.rank
        for piece in self._pieces(plan, generator):
            with self._naming(index, plan), self._dropping(seed + piece.rows[0]):
                losses, figures = self.subject.losses(*piece.given)
                loss = (losses * piece.weights).sum()
            told = {name: (value * piece.weights).sum().item() for name, value in figures.items()}
            yield loss, {"loss": loss.item(), **told}

    def measure(self, done: int) -> dict[str, float]:
        """The means of the samples that are held out, under noise that is the same each time."""
        plans, totals = self.dataset.held_out(self.settings.batch), {}
        count = sum(plan.count for plan in plans)
        for index, plan in enumerate(plans):
            for piece in self._pieces(plan, torch.Generator().manual_seed(index)):
                for name, value in self.subject.measured(*piece.given).items():
                    share = (value * piece.weights).sum().item() * plan.count / count
                    totals[name] = totals.get(name, 0.0) + share
        return self.processes.mean(totals)

    def _pieces(self, plan: Plan, generator: torch.Generator) -> Iterator[_Piece]:
        """This process's rows of a batch, as many at once as the settings say. Noise is drawn for the whole batch, so
        that a row's doesn't depend on who computes it."""
        noise = None
        for share in self.processes.share(plan.count).pieces(self.settings.micro_batch):
            clean, text = self.dataset.load(plan, share.rows)
            if noise is None:
                noise = torch.randn(len(plan.picks), *clean.shape[1:], generator=generator)
            noisy = clean + self.subject.module.config.noise_std * noise[share.rows]
            given = (clean.to(self.device), noisy.to(self.device), text.to(self.device), plan.given)
            yield _Piece(share.rows, torch.tensor(share.weights, device=self.device), given)

    @contextmanager
    def _naming(self, index: int, plan: Plan) -> Iterator[None]:
        """Say in which step and batch numbers went bad."""
        try:
            yield
        except NonFiniteError as error:
            files = ", ".join(self.dataset.names(plan))
            raise NonFiniteError(f"step {index}, batch of {files}: {error}") from None

    def _dropping(self, seed: int):
        """Dropout that depends on the step alone; the caller's own random numbers go on as if nothing was drawn."""
        if not self.settings.dropout:
            return nullcontext()
        return _seeded(seed, self.device)


@dataclass(frozen=True)
class _Piece:
    """Rows of a batch, what each counts for, and what the subject is given: clean and noisy latents (b, T, C, h, w),
    text (b, L, D), frames that don't count."""

    rows: list[int]
    weights: Tensor
    given: tuple[Tensor, Tensor, Tensor, int]


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield


def _fresh_config(settings: Settings) -> FlowConfig:
    """The configuration of a flow that begins from nothing."""
    if settings.config is None:
        raise InputError("scratch needs config, a JSON file with the new flow's configuration; `inspect` prints one")
    try:
        values = json.loads(Path(settings.config).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{settings.config} can't be read as a configuration ({reason})") from None
    return FlowConfig.from_dict(values)


def optimizer_of(flow: Flow, settings: Settings) -> torch.optim.Optimizer:
    learned = [weight for weight in flow.parameters() if weight.requires_grad]
    if settings.optimizer == "muon":
        starts = [block.sos_embed for block in flow.blocks]
        return Muon(learned, settings.learning_rate, 0.2 * settings.learning_rate, vectors=starts)
    return torch.optim.AdamW(learned, settings.learning_rate, (0.9, 0.99), weight_decay=settings.weight_decay)


# What may differ between a run and the one that goes on from it.
FREE = (
    "work", "output", "device", "micro_batch", "recompute", "save_every", "log_every", "evaluate_every", "sample_every",
    "prompts", "guidance", "trigger_words", "license", "data", "model", "text_encoder", "vae",
)  # fmt: skip


def _told(settings: Settings, dataset: Dataset) -> dict:
    kept = {name: value for name, value in settings.to_dict().items() if name not in FREE}
    return kept | {"samples": dataset.identity}


def _metadata(settings: Settings, sources: Sources) -> dict[str, str]:
    """What the finished file says of itself. A model's licence covers what is made of it."""
    base = sources.base()
    licences = [APPLE_LICENSE] if not base.get("license") else [base.pop("license")]
    if settings.license:
        licences.append(settings.license)
    told = {name: value for name, value in settings.to_dict().items() if name not in FREE or name == "data"}
    told["data"] = [path.name for path, _ in settings.folders]
    words = {"trigger_words": settings.trigger_words} if settings.trigger_words else {}
    return {**base, **words, "license": " ".join(licences), "settings": json.dumps(told)}


@contextmanager
def _watched(folder: Path, processes: Processes, log) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Where the figures of steps are written; the leader does."""
    if not processes.leads:
        yield lambda step, figures: None
        return
    with watching(folder, log) as watch:
        yield watch.note
