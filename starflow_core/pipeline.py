"""Text encoder, flow and VAE together: from a prompt to frames in one call."""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .bundled import BUNDLED, FLOW_FILE, TEXT_FILE, VAE_FILE
from .control import Control, Progress
from .errors import InputError, NonFiniteError
from .jobs import memory
from .jobs.build import default_job, job_with_context
from .jobs.planner import AUTO, Free, MemoryOptions, MemoryPlan, choose, spread
from .jobs.prompts import wrapped
from .jobs.tasks import Generation, Job, Means
from .jobs.timeline import Caption, timed
from .jobs.unfinished import Unfinished, identity
from .model.compiled import require_compiler
from .model.config import FlowConfig
from .model.flow import Flow
from .model.lora import attach
from .model.parallel import ALONE, Team
from .model.placement import Placement, default_dtype, pick_device
from .model.text import TextEncoder
from .model.vae.codec import VAE
from .solve.solvers import Statistics
from .weights.flow import find_config, has_int8, in_int8, load_flow
from .weights.lora import Chosen, LoraPath
from .weights.shares import own_lora
from .weights.streaming import stream_layers
from .weights.tensorfiles import TensorFile
from .weights.text import TextEncoderFiles, find_text_encoder
from .weights.vae import VAEFile, find_vae


@dataclass(frozen=True)
class Output:
    """Pixels (B, F, 3, H, W) in [-1, 1] on the CPU, latents (B, C, T, h, w) in VAE space, and how.

    `overlap` counts the frames at the start that an extended source already has; `cut` is, for each
    prompt, what was too long for the text encoder.
    """

    pixels: Tensor
    latents: Tensor
    statistics: Statistics
    overlap: int
    cut: list[str]


OPTIONS = ("negative", "control", "keep_text_encoder", "noise")  # of `Pipeline.start`, for the one-call tasks, too


class Pipeline:
    """A flow with its text encoder and VAE.

    The text encoder is loaded to read a prompt and dropped afterwards, unless it is kept for the next one. `plan` says
    how jobs are fitted to the device; without it each job is fitted by itself to what is free beside the weights.
    """

    def __init__(
        self, flow: Flow, vae: VAE, text: TextEncoderFiles, placement: Placement, dtype: torch.dtype,
        plan: MemoryPlan | None = None,
    ):  # fmt: skip
        self.flow, self.vae, self.text, self.placement, self.dtype = flow, vae, text, placement, dtype
        self.plan = plan
        self._encoder: TextEncoder | None = None
        self.config.check_vae(vae.channels, vae.spatial, vae.temporal)

    @property
    def config(self) -> FlowConfig:
        return self.flow.config

    def job(self, **settings) -> Job:
        """A job with the model's defaults; give `height` and `width`, or `aspect` and `size`."""
        return default_job(self.config, **settings)

    def prompts(self, captions: list[str], job: Job, task: str | None = None) -> list[str]:
        """As `wrapped`."""
        return wrapped(self.config, captions, job, task)

    def encode_text(self, captions: list[Caption], negative: str, job: Job, keep_encoder: bool = False):
        """Embeddings (B, L, D) of the prompts, or (S, B, L, D) where they change; of the negative prompt (None without
        guidance); and what was cut off each caption."""
        timelines, job = timed(captions, job)
        encoder = self._encoder or self.text.load(self.dtype, self.placement.text)
        tokens, home = self.config.prompt.tokens, self.placement.deep[0]
        texts = [self.prompts(list(prompts), job) for prompts in zip(*(t.prompts for t in timelines), strict=True)]
        parts = [encoder.encode(prompts, tokens) for prompts in texts]
        uncond = encoder.encode(self.prompts([negative], job, "text"), tokens) if job.guidance else None
        self._encoder = encoder if keep_encoder else None
        if not keep_encoder:
            del encoder
            _give_back()
        text = torch.stack([part.embeddings for part in parts]) if job.changes else parts[0].embeddings
        cut = [" | ".join(filter(None, rests)) for rests in zip(*(part.cut for part in parts), strict=True)]
        return text.to(home), uncond.embeddings.to(home) if uncond else None, cut

    def start(
        self, captions: list[Caption] | Caption, job: Job, *, negative: str = "", control: Control | None = None,
        keep_text_encoder: bool = False, noise: Tensor | None = None, unfinished: str | None = None,
    ) -> tuple[Generation, list[str]]:  # fmt: skip
        """Check a job and read its prompts; the generation is ready to run or to stream. `noise` as in `Generation`.
        Beside the file `unfinished` each complete window is kept, and gone on from if it is there: see `Unfinished`.
        A `Timeline` among the captions changes the prompt in the clip; all of a batch change at the same times. Raises
        OutOfMemoryForecast if the job or the text encoder can't be made to fit on the deep block's device."""
        captions, job = timed(captions, job)
        plan = self.plan_for(job, keep_text_encoder)
        job = plan.fitted(job, self.placement.deep[0])
        team, kept = self.flow.team, {}
        if unfinished:
            file = Unfinished(unfinished, identity(self.flow, job, plan.means, captions, negative))
            kept = {"settled": file.load(), "on_window": file.save}
        text, uncond, cut = self.encode_text(captions, negative, job, keep_text_encoder)
        fallbacks = plan.fallbacks
        if team.mesh.count > 1:
            fallbacks = ()  # memory may run out in one process alone
            team.tell(Told.of(job, text, uncond, noise, plan.means))
        run = Generation(self.flow, job, text, uncond, control, noise, self.placement, plan.means, fallbacks, **kept)
        return run, cut

    def plan_for(self, job: Job, keep_text_encoder: bool = False) -> MemoryPlan:
        """The pipeline's plan, or else one for this job, whose weights stay as they are. Raises OutOfMemoryForecast."""

        def needs(job: Job, means: Means) -> dict[torch.device, memory.Forecast]:
            found = memory.forecasts(self.config, job, self.dtype, self.placement, means)
            return {device: self._beside(need, device, keep_text_encoder) for device, need in found.items()}

        home, weights = self.placement.deep[0], (has_int8(self.flow),)
        if self.plan:
            for device, need in needs(job, self.plan.means).items():
                memory.require(need.total, device, "this job")
            return self.plan
        if self.placement.several:
            return spread(job, MemoryOptions(), weights, needs)
        return choose(
            job, home, MemoryOptions(offload="none"), weights, lambda job, means: needs(job, means)[home]
        )  # fmt: skip

    def require(self, need: memory.Forecast, what: str) -> None:
        """Raise OutOfMemoryForecast unless the job fits next to the flow and the VAE, which are loaded."""
        home = self.placement.deep[0]
        memory.require(self._beside(need, home).total, home, what)

    def _beside(self, need: memory.Forecast, device: torch.device, keep_text_encoder: bool = False) -> memory.Forecast:
        """What is needed on a device beside the weights that are there."""
        need = replace(need, weights=0)
        if self._encoder is not None or self.placement.text != device:
            return need
        return need.with_text(self.text.weight_bytes(self.dtype), keep_text_encoder)

    @torch.no_grad()
    def generate(self, captions: list[Caption] | Caption, job: Job, **options) -> Output:
        """Run a job to its pixels; options as in `start`."""
        generation, cut = self.start(captions, job, **options)
        latents = generation.run()
        pixels = torch.cat(list(self.decoded(latents, generation)), 1)
        overlap = job.context.overlap(self.config.latent) if job.context else 0
        return Output(pixels, latents.cpu(), generation.statistics, overlap, cut)

    @torch.no_grad()
    def frames(self, generation: Generation, tile: int | None = None) -> Iterator[Tensor]:
        """Final frames (B, f, 3, H, W) in [-1, 1] of a generation, as they are made."""
        pieces = (piece.latents for piece in generation.stream() if piece.final)
        # Where parts take turns, all is made before the VAE comes.
        pieces = list(pieces) if generation.means.in_turn else pieces
        yield from self._decoded(pieces, generation.layout.frames, generation.control, tile)

    @torch.no_grad()
    def decoded(self, latents: Tensor, generation: Generation, tile: int | None = None) -> Iterator[Tensor]:
        """Frames (B, f, 3, H, W) in [-1, 1], piece by piece, of latents (B, C, T, h, w) that a generation made."""
        yield from self._decoded([latents], generation.layout.frames, generation.control, tile)

    @torch.no_grad()
    def decode_clip(self, latents: Tensor, control: Control | None = None, tile: int | None = None) -> Tensor:
        """One clip (F, 3, H, W) in [-1, 1] of its latents (1, C, T, h, w)."""
        return torch.cat(list(self._decoded([latents], latents.shape[2], control or Control(), tile)), 1)[0]

    # One call for each task. A prompt is a string, a `Timeline`, or a list with one for each result. Settings are those
    # of `job`, and the options of `start`.

    def text_to_image(self, prompt, **settings) -> Output:
        """Images (F = 1)."""
        if settings.get("frames", 1) != 1:
            raise InputError(f"text_to_image makes one frame, not {settings['frames']}; use text_to_video")
        return self._task("text", prompt, {**settings, "frames": 1})

    def text_to_video(self, prompt, **settings) -> Output:
        """Clips."""
        return self._task("text", prompt, settings)

    def image_to_video(self, prompt, image: Tensor, **settings) -> Output:
        """A clip that begins with an image (3, H, W) or one of (B, 3, H, W) each, in [-1, 1]."""
        return self._task("first_frame", prompt, settings, image=image)

    def extend(self, prompt, clip: Tensor, **settings) -> Output:
        """What comes after a clip (F, 3, H, W). `frames` counts the overlap, see `Output.overlap`."""
        return self._task("extend", prompt, settings, clip=clip)

    def edit(self, prompt, clip: Tensor, **settings) -> Output:
        """A clip (F, 3, H, W) changed as the prompt says; the result has the source's length."""
        return self._task("edit", prompt, settings, clip=clip)

    def last_frame(self, prompt, last: Tensor, image: Tensor | None = None, **settings) -> Output:
        """A clip that ends with an image and may begin with another, (3, H, W) each."""
        return self._task("last_frame", prompt, settings, last=last, image=image)

    def _task(self, task: str, prompt, settings: dict, **given) -> Output:
        options = {name: value for name, value in settings.items() if name in OPTIONS}
        settings = {name: value for name, value in settings.items() if name not in OPTIONS}
        job = self.with_context(task, control=options.get("control"), **given, **settings)
        return self.generate(prompt, job, **options)

    @torch.no_grad()
    def with_context(self, task: str, *, control: Control | None = None, **given) -> Job:
        """A job with given frames, as `job_with_context`."""
        return job_with_context(self.config, lambda pixels: self.encode_pixels(pixels, control), task, **given)

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor, control: Control | None = None) -> Tensor:
        """VAE latents (B, C, T, h, w) of clips (B, 3, F, H, W); an image VAE takes F = 1."""
        with self._vae_in_place():
            if self.vae.kind == "image":
                return self.vae.encode(pixels.squeeze(2), control=control).unsqueeze(2)
            return self.vae.encode(pixels, control=control)

    def encode_clip(self, pixels: Tensor, control: Control | None = None) -> Tensor:
        """VAE latents (1, C, T, h, w) of one clip (F, 3, H, W)."""
        return self.encode_pixels(pixels.transpose(0, 1).unsqueeze(0), control)

    def _decoded(self, pieces: Iterable[Tensor], total: int, control: Control, tile: int | None) -> Iterator[Tensor]:
        """Of `total` latent frames."""
        latents = (piece if self.vae.kind == "video" else piece.squeeze(2) for piece in pieces)
        with self._vae_in_place():
            for done, frames in enumerate(self.vae.decode_frames(latents, tile=tile), 1):
                control.report(Progress("decode", done, total))
                yield frames.transpose(1, 2).float().cpu()

    @contextmanager
    def _vae_in_place(self) -> Iterator[None]:
        """Where parts take turns, the VAE is on its device only while it computes."""
        self.vae.module.to(self.placement.vae)
        try:
            yield
        finally:
            if self.plan and self.plan.means.in_turn:
                self.vae.module.to("cpu")


@dataclass(frozen=True)
class Told:
    """What the leader of a team tells the others of a generation, all on the CPU. Of given frames they need to know how
    many there are: the job's have no values."""

    job: Job
    text: Tensor
    uncond: Tensor | None
    noise: Tensor | None
    means: Means

    @classmethod
    def of(cls, job: Job, text: Tensor, uncond: Tensor | None, noise: Tensor | None, means: Means) -> Told:
        if job.context:
            job = replace(job, context=replace(job.context, latents=job.context.latents.to("meta")))
        return cls(job, *(part if part is None else part.cpu() for part in (text, uncond, noise)), means)


@torch.no_grad()
def follow(flow: Flow, device: torch.device) -> None:
    """Compute this process's share of each generation that the leader of the flow's team starts, until it tells no
    more."""
    placement = Placement.following(device)
    while told := flow.team.tell(None):
        run = Generation(flow, told.job, told.text.to(device), told.uncond, None, told.noise, placement, told.means)
        with suppress(NonFiniteError):  # the leader finds it, too, and says where; it won't tell anything more
            run.follow()


def _give_back() -> None:
    """Return freed main memory to the system. glibc may keep that of tensors below 32 MB: 0.8 GB of a T5-XL's 2.4."""
    with suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def load_pipeline(
    model: str | Path | None = None,
    text_encoder: str | Path | None = None,
    vae: str | Path | None = None,
    device: str | Placement | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[Progress], None] | None = None,
    quantise: bool = False,
    loras: Iterable[LoraPath] = (),
    compile: bool = False,
) -> Pipeline:
    """Load a model with its text encoder and VAE, or the bundled demo if no arguments are given.

    `device` None takes the best there is; a `Placement` names one for each part. `dtype` None takes bfloat16 on an
    accelerator, and for large models on a CPU that multiplies in it, otherwise float32. `quantise` brings the large
    weights of flow and text encoder to 8 bit. `progress` counts the flow's bytes. `loras` are files, or pairs of a file
    and its strength; one that is of other weights is warned of, which may take hashing the model. `compile` as of
    `Flow.compile`, for one device. Raises InputError for a device that isn't there and for missing parts, a compiler
    included, CheckpointError for a part or LoRA that doesn't fit.
    """
    placement = device if isinstance(device, Placement) else Placement.on(pick_device(device))
    if compile:
        require_compiler(*placement.devices)
    parts = find_parts(model, text_encoder, vae, quantise, loras)
    for doubt in parts.doubts(progress):
        warnings.warn(doubt, stacklevel=2)
    pipeline = parts.load(placement, dtype or default_dtype(placement.deep[0], parts.config), progress)
    if compile:
        pipeline.flow.compile()
    return pipeline


@dataclass(frozen=True)
class Parts:
    """A flow with its text encoder, VAE and LoRAs, inspected, not loaded. `quantise` brings the flow's large weights to
    8 bit when they are loaded."""

    checkpoint: TensorFile
    config: FlowConfig
    text: TextEncoderFiles
    vae: VAEFile
    quantise: bool = False
    loras: tuple[Chosen, ...] = ()

    def with_loras(self, loras: Iterable[LoraPath]) -> Parts:
        """The same with these LoRAs. Raises CheckpointError for one that doesn't fit."""
        chosen = tuple(map(Chosen.open, loras))
        for each in chosen:
            each.file.check(self.config)
        return replace(self, loras=chosen)

    @property
    def in_int8(self) -> bool:
        """Whether the flow's large weights will be in 8 bit."""
        return self.quantise or in_int8(self.checkpoint)

    def plan(
        self, job: Job, dtype: torch.dtype, placement: Placement, options: MemoryOptions = AUTO,
        may_quantise: bool = False, tile: int | None = None, keep_text_encoder: bool = False, free: Free | None = None,
    ) -> MemoryPlan:  # fmt: skip
        """The means to fit a job to its devices; `tile` is the VAE's when decoding. `may_quantise` allows weights in 8
        bit if nothing else fits; `free` as of `choose`, for one device. Raises OutOfMemoryForecast for a job that can't
        be made to fit."""
        weights = tuple(dict.fromkeys((self.in_int8, True) if may_quantise else (self.in_int8,)))
        others = {"dtype": dtype, "tile": tile, "keep_text_encoder": keep_text_encoder}
        if placement.several:
            return spread(job, options, weights, partial(self.forecasts, placement=placement, **others))
        return choose(job, placement.deep[0], options, weights, partial(self.forecast, **others), free=free)

    def forecasts(
        self, job: Job, means: Means, *, placement: Placement, dtype: torch.dtype, tile: int | None = None,
        keep_text_encoder: bool = False,
    ) -> dict[torch.device, memory.Forecast]:  # fmt: skip
        """What a job needs on each device."""
        needs = memory.forecasts(self.config, job, dtype, placement, means)
        home = self.with_others(memory.Forecast(0, 0, 0), job, dtype, tile)  # text encoder, VAE and LoRAs alone
        for device, need in needs.items():
            loras = home.weights if device in placement.deep else 0
            needs[device] = replace(need, weights=need.weights + loras, vae=home.vae * (device == placement.vae))
        text = needs[placement.text]
        needs[placement.text] = text.with_text(self.text.weight_bytes(dtype), keep_text_encoder)
        return needs

    def forecast(
        self, job: Job, means: Means | None = None, *, dtype: torch.dtype, tile: int | None = None,
        keep_text_encoder: bool = False,
    ) -> memory.Forecast:  # fmt: skip
        """What a job needs with all parts on one device; `tile` is the VAE's when decoding."""
        need = memory.forecast(self.config, job, dtype, means or Means(self.in_int8))
        return self.with_others(need, job, dtype, tile, keep_text_encoder)

    def forecast_encode(self, job: Job, dtype: torch.dtype) -> memory.Forecast:
        """What encoding such a job's clip to noise needs."""
        need = memory.forecast_encode(self.config, job, dtype, Means(self.in_int8))
        return self.with_others(need, job, dtype)

    def with_others(
        self, need: memory.Forecast, job: Job, dtype: torch.dtype, tile: int | None = None, keep_text: bool = False
    ) -> memory.Forecast:
        """A flow's need, with text encoder, VAE and LoRAs on the same device."""
        cells = (side // self.config.latent.spatial for side in (job.height, job.width))
        vae = self.vae.step_bytes(*cells, job.batch, dtype, tile) + self.vae.weight_bytes(dtype)
        weights = need.weights + sum(chosen.file.nbytes for chosen in self.loras)
        return replace(need, vae=vae, weights=weights).with_text(self.text.weight_bytes(dtype), keep_text)

    def doubts(self, progress: Callable[[Progress], None] | None = None) -> list[str]:
        """Warnings of LoRAs that may be of other weights than these, which may take hashing the model's file."""
        used = (chosen.file for chosen in self.loras if chosen.strength)
        return [doubt for file in used if (doubt := file.doubt(self.checkpoint, progress))]

    def load(
        self, placement: Placement, dtype: torch.dtype, progress: Callable[[Progress], None] | None = None,
        plan: MemoryPlan | None = None, team: Team = ALONE,
    ) -> Pipeline:  # fmt: skip
        """Read the weights, the flow's last, so that trouble with a smaller file shows at once."""
        wanted, cpu = plan.means if plan else Means(self.in_int8), Placement.on("cpu")
        vae = self.vae.load(dtype, cpu.vae if wanted.in_turn else placement.vae)
        home = cpu if wanted.streamed else placement
        flow = self.load_flow(home, dtype, wanted, progress, team)
        if wanted.streamed:
            stream_layers(flow, placement)
        return Pipeline(flow, vae, self.text, placement, dtype, plan)

    def load_flow(
        self, placement: Placement, dtype: torch.dtype, means: Means,
        progress: Callable[[Progress], None] | None = None, team: Team = ALONE,
    ) -> Flow:  # fmt: skip
        """The flow alone, with its LoRAs, or what a process of a team has of them."""
        adapters = [chosen.load() for chosen in self.loras]
        flow = load_flow(self.checkpoint, dtype, placement, progress=progress, quantise=means.int8, team=team)
        for loras in adapters:
            attach(flow, {layer: own_lora(lora, layer, self.config, team) for layer, lora in loras.items()})
        return flow


def find_parts(
    model: str | Path | None, text_encoder: str | Path | None, vae: str | Path | None, quantise: bool = False,
    loras: Iterable[LoraPath] = (), tokenizer: str | Path | None = None,
) -> Parts:  # fmt: skip
    """Find a flow, its text encoder and its VAE, and check that they fit; without arguments the bundled demo's.

    `quantise` brings the large weights of flow and text encoder to 8 bit when they are loaded; `loras` as of
    `load_pipeline`; `tokenizer` is a folder, by default the text encoder's own. Raises InputError for a missing part,
    CheckpointError for one that is something else.
    """
    model, text_encoder, vae = _find_paths(model, text_encoder, vae)
    checkpoint = TensorFile.open(model)
    text = find_text_encoder(text_encoder, tokenizer, quantise)
    parts = Parts(checkpoint, find_config(checkpoint), text, find_vae(vae), quantise).with_loras(loras)
    parts.config.check_text_encoder(parts.text.dim)
    outline = parts.vae.outline
    parts.config.check_vae(outline.channels, outline.spatial, outline.temporal)
    return parts


def _find_paths(
    model: str | Path | None, text_encoder: str | Path | None, vae: str | Path | None
) -> tuple[Path, Path, Path]:
    parts = {
        "checkpoint": (model, FLOW_FILE),
        "text encoder (flan-t5-xl)": (text_encoder, TEXT_FILE),
        "VAE": (vae, VAE_FILE),
    }
    for name, (given, _) in parts.items():
        if given is not None and not os.path.exists(given):
            raise InputError(f"no {name} at {given}; check the path")
    missing = [name for name, (given, _) in parts.items() if given is None]
    if model is not None and missing:
        raise InputError(f"{model} needs a {' and a '.join(missing)}; only the bundled demo brings its own")
    return tuple(BUNDLED / file if given is None else Path(given) for given, file in parts.values())
