"""A training run from settings: data, what is trained, the loop, and the finished file."""

from __future__ import annotations

import hashlib
import json
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..bundled import BUNDLED, FLOW_FILE
from ..control import Progress
from ..errors import InputError, NonFiniteError
from ..model.config import FlowConfig
from ..model.flow import Flow
from ..model.lora import block_indices
from ..model.placement import default_dtype
from ..model.text import TextEncoder
from ..model.vae.codec import VAE
from ..weights.flow import APPLE_LICENSE, load_flow
from ..weights.lora import base_metadata
from ..weights.tensorfiles import DTYPES, TensorFile, check_target
from .data.cache import Cache, identity
from .data.dataset import Dataset, Plan
from .data.encoders import Encoders
from .data.folders import find_items
from .data.prepare import check_tasks, prepare
from .files import make_folder
from .forecast import forecast, require
from .loop import RECENT, Check, Loop
from .optimiser import Muon
from .processes import Processes, shard
from .rehearsal import Rehearsal
from .settings import Settings
from .sheets import Sheets
from .subjects import Decoding, Rows, subject_of
from .watch import watching


@dataclass(frozen=True)
class Sources:
    """Where a run's models come from: each is loaded when it is called for, onto a device. `base` is what the finished
    file says of the model, and may take a while."""

    config: FlowConfig
    load_flow: Callable[[torch.dtype, torch.device], Flow]
    load_vae: Callable[[torch.device], VAE]
    load_text: Callable[[torch.device], TextEncoder]
    base: Callable[[], dict[str, str]]
    identity: str  # what tells the flow from others


def find_sources(settings: Settings) -> Sources:
    """The files that the settings name, or the bundled demo's. Raises InputError for what doesn't go together, and
    CheckpointError for damaged files."""
    encoders = Encoders.find(settings)
    config = encoders.config
    if settings.train == "scratch":

        def load(dtype: torch.dtype, device: torch.device) -> Flow:
            return Flow(config).to(device)

        return Sources(config, load, encoders.load_vae, encoders.load_text, dict, _hash_of(config))
    checkpoint = TensorFile.open(settings.model or BUNDLED / FLOW_FILE)

    def load(dtype: torch.dtype, device: torch.device) -> Flow:
        return load_flow(checkpoint, dtype, device, config=config, quantise=settings.int8)

    def base() -> dict[str, str]:
        license = checkpoint.metadata.get("license", APPLE_LICENSE)
        return base_metadata(checkpoint) | {"license": license}

    return Sources(config, load, encoders.load_vae, encoders.load_text, base, identity(checkpoint.files))


def _hash_of(config: FlowConfig) -> str:
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


def check(settings: Settings, config: FlowConfig) -> None:
    """Raise InputError for settings that this model can't be trained with."""
    check_tasks(settings, config)
    if settings.train == "denoiser" and config.denoiser is None:
        raise InputError(f"{config.name} has no learned denoiser to train; train lora or full")
    if settings.train == "vae" and (config.kind != "image" or settings.rehearse or settings.prompts):
        raise InputError(
            "vae trains an image VAE's decoder, for an image model, without rehearse and prompts; the model given is "
            f"{config.name}"
        )
    if settings.rehearse and settings.train == "scratch":
        raise InputError("rehearse: a new flow knows nothing that it could draw; leave it out")
    if settings.train == "lora":
        block_indices(settings.blocks, len(config.layers))


def train(
    settings: Settings,
    sources: Sources,
    device: torch.device,
    processes: Processes,
    log: Callable[[str], None] = lambda line: None,
    report: Callable[[int, dict[str, float]], None] = lambda step, figures: None,
    progress: Callable[[Progress], None] | None = None,
    asked: Callable[[], bool] = lambda: False,
) -> Path:
    """Train, or go on where a run with the same settings and folder has stopped; returns the finished file.

    `report` is told the figures of each step, `progress` how far the data are; both may raise to stop. `asked` is asked
    after each step: if it says so, the step is saved and KeyboardInterrupt raised. Raises InputError for data and
    settings that can't be used, OutOfMemoryForecast where a step can't fit, NonFiniteError where numbers go bad.
    """
    check(settings, sources.config)
    check_target(settings.result, None, overwrite=True)
    find_items(settings.folders)  # what is wrong with them is said before anything is made
    make_folder(Path(settings.work))
    dataset = _prepared(settings, sources, device, processes, progress)
    for line in dataset.report():
        log(line)
    dtype = dtype_of(settings, device, sources.config)
    for bucket in dataset.buckets if settings.train != "vae" else ():
        require(forecast(sources.config, settings, dtype, bucket, processes.count), device, bucket)
    rehearsal = Rehearsal(settings, dataset, sources.identity) if settings.rehearse else None
    with torch.inference_mode(False), torch.enable_grad():
        # Where weights are spread, each layer moves to its device as it is; only what is rehearsed needs all of them.
        spread = processes.count > 1 and settings.train != "vae"
        subject = _subject(settings, sources, dtype, torch.device("cpu") if spread and not rehearsal else device)
        if rehearsal:
            rehearsal.draw(subject.module, device, processes, progress)
        if spread:
            shard(subject.module, dtype)
        run = Run(settings, dataset, subject, processes, device, rehearsal)
        _learn(run, sources, dtype, log, report, asked)
        subject.write(settings.result, _metadata(settings, sources) if processes.leads else {}, processes)
    processes.wait()
    return settings.result


def _prepared(
    settings: Settings, sources: Sources, device: torch.device, processes: Processes, progress
) -> Dataset:  # fmt: skip
    """The data set; of several processes each has encoded its part when all come back."""
    dataset = prepare(
        settings, sources.config, partial(sources.load_vae, device), partial(sources.load_text, device),
        Cache(settings.cached), rank=processes.rank, world=processes.count, progress=progress,
        extra=partial(texts_beside, settings),
    )  # fmt: skip
    processes.wait()
    return dataset


def _learn(
    run: Run, sources: Sources, dtype: torch.dtype, log: Callable[[str], None],
    report: Callable[[int, dict[str, float]], None], asked: Callable[[], bool],
) -> None:  # fmt: skip
    """All steps that are still to do, watched and measured."""
    settings, subject, work = run.settings, run.subject, Path(run.settings.work)
    frozen = settings.train == "lora"  # a LoRA's products are in its flow's type
    checks = [Check(settings.evaluate_every, run.measure)]
    if settings.prompts:
        sheets = Sheets(settings, sources.config, work / "samples")
        draw = partial(sheets.draw, subject.module, run.dataset, sources, run.device, run.processes)
        checks.append(Check(settings.sample_every, draw))
    with _watched(work / "logs", run.processes, log) as watch:
        tokens = deque(maxlen=RECENT)  # of the steps that "seconds a step" is the mean of

        def note(step: int, figures: dict[str, float]) -> None:
            tokens.append(run.tokens(step - 1))
            told = figures | {"tokens a second": sum(tokens) / len(tokens) / figures["seconds a step"]}
            watch(step, told)
            report(step, told)

        loop = Loop(
            work / "states", run.device, torch.float32 if frozen else dtype, settings.seed,
            save_every=settings.save_every, log_every=settings.log_every, clip=settings.clip, log=log, note=note,
            batch_of=run.batch_of, asked=asked, processes=run.processes,
        )  # fmt: skip
        loop.run(
            settings.train, subject.module, optimizer_of(subject.module, settings), run.step, settings.steps,
            settings.warmup, settings.decay, settings.ema, checks,
            told=_told(settings, run.dataset) | {"model": sources.identity},
        )  # fmt: skip


def texts_beside(settings: Settings, dataset: Dataset) -> list[str]:
    """Wrapped prompts that aren't those of data: of samples to look at, and of what is rehearsed."""
    sheets = Sheets(settings, dataset.practice.config, Path(settings.work))
    return [*sheets.texts, *(Rehearsal(settings, dataset, "").texts if settings.rehearse else ())]


def _subject(settings: Settings, sources: Sources, dtype: torch.dtype, device: torch.device):
    if settings.train == "vae":
        return Decoding(sources.load_vae(device), sources.config)
    whole = settings.train in ("full", "scratch")  # what learns is all that is there, in float32
    flow = sources.load_flow(torch.float32 if whole else dtype, device)
    subject = subject_of(flow, settings)
    for block in flow.blocks:
        block.recompute = settings.recompute
    return subject


def dtype_of(settings: Settings, device: torch.device, config: FlowConfig) -> torch.dtype:
    """The type of the matrix products."""
    return DTYPES[settings.dtype] if settings.dtype else default_dtype(device, config)


class Run:
    """What a step sees and computes."""

    def __init__(
        self, settings: Settings, dataset: Dataset, subject, processes: Processes, device: torch.device,
        rehearsal: Rehearsal | None = None,
    ):  # fmt: skip
        self.settings, self.dataset, self.subject = settings, dataset, subject
        self.processes, self.device, self.rehearsal = processes, device, rehearsal

    def step(self, index: int, rng: random.Random, generator: torch.Generator) -> Iterator[tuple[Tensor, dict]]:
        """The loss of this process's rows, in pieces."""
        seen, number = self._seen(index)
        plan = seen.plan(number, self.settings.seed, self.settings.batch)
        seed = rng.getrandbits(62) + self.processes.rank
        for piece in self._pieces(seen, plan, generator):
            with self._naming(index, seen, plan), self._dropping(seed + piece.rows[0]):
                losses, figures = self.subject.losses(piece.seen)
                loss = (losses * piece.weights).sum()
            told = {name: (value * piece.weights).sum().item() for name, value in figures.items()}
            yield loss, {"loss": loss.item(), **told}

    def batch_of(self, index: int) -> str:
        """The files of a step's batch."""
        seen, number = self._seen(index)
        return ", ".join(seen.names(seen.plan(number, self.settings.seed, self.settings.batch)))

    def tokens(self, index: int) -> int:
        """Tokens of a step's clips, on all processes together."""
        seen, number = self._seen(index)
        bucket, config = seen.plan(number, self.settings.seed, self.settings.batch).bucket, self.subject.config
        cells = (bucket.height // config.cell) * (bucket.width // config.cell)
        return self.settings.batch * config.latent.latent_frames(bucket.frames) * cells

    def _seen(self, index: int) -> tuple[Dataset | Rehearsal, int]:
        """What a step sees, and how many steps have seen it before: rehearsals are spread evenly."""
        if self.rehearsal is None:
            return self.dataset, index
        before, after = (int(step * self.settings.rehearsal) for step in (index, index + 1))
        return (self.rehearsal, before) if after > before else (self.dataset, index - before)

    def measure(self, done: int) -> dict[str, float]:
        """The means of the samples that are held out, under noise that is the same each time."""
        plans, totals = self.dataset.held_out(self.settings.batch), {}
        count = sum(plan.count for plan in plans)
        for index, plan in enumerate(plans):
            for piece in self._pieces(self.dataset, plan, torch.Generator().manual_seed(index)):
                for name, value in self.subject.measured(piece.seen).items():
                    share = (value * piece.weights).sum().item() * plan.count / count
                    totals[name] = totals.get(name, 0.0) + share
        return self.processes.mean(totals)

    def _pieces(self, seen: Dataset | Rehearsal, plan: Plan, generator: torch.Generator) -> Iterator[_Piece]:
        """This process's rows of a batch, as many at once as the settings say. Noise is drawn for the whole batch, so
        that a row's doesn't depend on who computes it."""
        noise = None
        for share in self.processes.share(plan.count).pieces(self.settings.micro_batch):
            clean, text = seen.load(plan, share.rows)
            if noise is None:
                noise = torch.randn(len(plan.picks), *clean.shape[1:], generator=generator)
            noisy = clean + self.subject.config.noise_std * noise[share.rows]
            pixels = seen.pixels(plan, share.rows).to(self.device) if self.subject.sees_pixels else None
            rows = Rows(clean.to(self.device), noisy.to(self.device), text.to(self.device), plan.given, pixels)
            yield _Piece(share.rows, torch.tensor(share.weights, device=self.device), rows)

    @contextmanager
    def _naming(self, index: int, seen: Dataset | Rehearsal, plan: Plan) -> Iterator[None]:
        """Say in which step and batch numbers went bad."""
        try:
            yield
        except NonFiniteError as error:
            raise NonFiniteError(f"step {index + 1}, batch of {', '.join(seen.names(plan))}: {error}") from None

    def _dropping(self, seed: int):
        """Dropout that depends on the step and on who computes what; the caller's random numbers go on as before."""
        if not self.settings.dropout:
            return nullcontext()
        return _seeded(seed)


@dataclass(frozen=True)
class _Piece:
    """Rows of a batch, what each counts for, and what a subject sees of them."""

    rows: list[int]
    weights: Tensor
    seen: Rows


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        yield


def optimizer_of(module: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    learned = [weight for weight in module.parameters() if weight.requires_grad]
    if settings.optimizer == "muon":
        starts = [weight for name, weight in module.named_parameters() if name.endswith("sos_embed")]
        return Muon(learned, settings.rate, 0.2 * settings.rate, vectors=starts)
    return torch.optim.AdamW(learned, settings.rate, (0.9, 0.99), weight_decay=settings.weight_decay)


# What may differ between a run and the one that goes on from it.
FREE = (
    "work", "output", "device", "micro_batch", "recompute", "save_every", "log_every", "evaluate_every", "sample_every",
    "prompts", "guidance", "trigger_words", "license", "data", "data_cache", "model", "text_encoder", "tokenizer",
    "vae",
)  # fmt: skip


def _told(settings: Settings, dataset: Dataset) -> dict:
    kept = {name: value for name, value in settings.to_dict().items() if name not in (*FREE, "steps")}
    return kept | {"samples": dataset.identity}


def _metadata(settings: Settings, sources: Sources) -> dict[str, str]:
    """What the finished file says of itself. A model's licence covers what is made of it."""
    base = sources.base()
    licences = [base.pop("license", ""), settings.license]
    told = {name: value for name, value in settings.to_dict().items() if name not in FREE or name == "data"}
    told["data"] = [path.name for path, _ in settings.folders]
    words = {"trigger_words": settings.trigger_words} if settings.trigger_words else {}
    return {**base, **words, "license": " ".join(filter(None, licences)), "settings": json.dumps(told)}


@contextmanager
def _watched(folder: Path, processes: Processes, log) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Where the figures of steps are written; the leader does."""
    if not processes.leads:
        yield lambda step, figures: None
        return
    with watching(folder, log) as watch:
        yield watch.note
