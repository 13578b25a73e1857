"""Text encoder, flow and VAE together: from a prompt to frames in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .bundled import BUNDLED, FLOW_FILE, TEXT_FILE, VAE_FILE
from .control import Control, Progress
from .errors import InputError
from .jobs import memory
from .jobs.build import check_fits, check_vae, default_job, job_with_context
from .jobs.prompts import wrapped
from .jobs.tasks import Generation, Job
from .model.config import FlowConfig
from .model.flow import Flow
from .model.placement import default_dtype, pick_device
from .model.text import TextEncoder
from .model.vae.codec import VAE
from .solve.solvers import Statistics
from .weights.flow import find_config, load_flow
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


class Pipeline:
    """A flow with the text encoder and the VAE that belong to it. The text encoder is loaded when a
    prompt is read and dropped afterwards, unless it is kept."""

    def __init__(self, flow: Flow, vae: VAE, text_source, device: torch.device, dtype: torch.dtype):
        self.flow, self.vae, self.device, self.dtype = flow, vae, device, dtype
        self._text_source = text_source
        self._encoder: TextEncoder | None = None
        check_vae(vae, self.config)

    @property
    def config(self) -> FlowConfig:
        return self.flow.config

    def job(self, **settings) -> Job:
        """A job with the model's defaults; give `height` and `width`, or `aspect` and `size`."""
        return default_job(self.config, **settings)

    def prompts(self, captions: list[str], job: Job, task: str | None = None) -> list[str]:
        """As `wrapped`."""
        return wrapped(self.config, captions, job, task)

    def encode_text(self, captions: list[str], negative: str, job: Job, keep_encoder: bool = False):
        """Embeddings of the prompts and of the negative prompt (None without guidance), and what
        each prompt was too long for."""
        encoder = self._encoder or self._text_source()
        check_fits(encoder, self.config)
        tokens = self.config.prompt.tokens
        text = encoder.encode(self.prompts(captions, job), tokens)
        uncond = encoder.encode(self.prompts([negative], job, "text"), tokens) if job.guidance else None
        self._encoder = encoder if keep_encoder else None
        place = {"device": self.device}
        return text.embeddings.to(**place), uncond.embeddings.to(**place) if uncond else None, text.cut

    def start(
        self, captions: list[str] | str, job: Job, *, negative: str = "", control: Control | None = None,
        keep_text_encoder: bool = False, noise: Tensor | None = None,
    ) -> tuple[Generation, list[str]]:  # fmt: skip
        """Check a job, read its prompts; the generation is ready to run or to stream. `noise` as in
        `Generation`."""
        need = memory.forecast(self.config, job, self.dtype)
        memory.require(need.cache + need.activations, self.device, "this job")
        captions = [captions] if isinstance(captions, str) else captions
        text, uncond, cut = self.encode_text(captions, negative, job, keep_text_encoder)
        return Generation(self.flow, job, text, uncond, control, noise), cut

    @torch.no_grad()
    def generate(self, captions: list[str] | str, job: Job, **options) -> Output:
        """Run a job to its pixels; options as in `start`."""
        generation, cut = self.start(captions, job, **options)
        latents = generation.run()
        pixels = torch.cat(list(self._decoded([latents], generation)), 1)
        overlap = job.context.overlap(self.config.latent) if job.context else 0
        return Output(pixels, latents.cpu(), generation.statistics, overlap, cut)

    @torch.no_grad()
    def frames(self, generation: Generation, tile: int | None = None) -> Iterator[Tensor]:
        """Final frames (B, f, 3, H, W) in [-1, 1] of a generation, while it goes on."""
        yield from self._decoded((piece.latents for piece in generation.stream() if piece.final), generation, tile)

    def text_to_image(self, prompt, **settings) -> Output:
        """Images; settings as in `job`."""
        return self.generate(prompt, self.job(**{**settings, "frames": 1}))

    def text_to_video(self, prompt, **settings) -> Output:
        """Clips; settings as in `job`."""
        return self.generate(prompt, self.job(**settings))

    def image_to_video(self, prompt, image: Tensor, **settings) -> Output:
        """A clip that begins with an image (3, H, W) or one of (B, 3, H, W) each, in [-1, 1]."""
        return self.generate(prompt, self.with_context("first_frame", image=image, **settings))

    def extend(self, prompt, clip: Tensor, **settings) -> Output:
        """What comes after a clip (F, 3, H, W). `frames` counts the overlap, see `Output.overlap`."""
        return self.generate(prompt, self.with_context("extend", clip=clip, **settings))

    def edit(self, prompt, clip: Tensor, **settings) -> Output:
        """A clip (F, 3, H, W) changed as the prompt says; the result has the source's length."""
        return self.generate(prompt, self.with_context("edit", clip=clip, **settings))

    def last_frame(self, prompt, last: Tensor, image: Tensor | None = None, **settings) -> Output:
        """A clip that ends with an image and may begin with another, (3, H, W) each."""
        return self.generate(prompt, self.with_context("last_frame", last=last, image=image, **settings))

    @torch.no_grad()
    def with_context(self, task: str, *, control: Control | None = None, **given) -> Job:
        """A job with given frames, as `job_with_context`."""
        return job_with_context(self.config, lambda pixels: self.encode_pixels(pixels, control), task, **given)

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor, control: Control | None = None) -> Tensor:
        """VAE latents (B, C, T, h, w) of clips (B, 3, F, H, W); an image VAE takes F = 1."""
        if self.vae.kind == "image":
            return self.vae.encode(pixels.squeeze(2), control=control).unsqueeze(2)
        return self.vae.encode(pixels, control=control)

    def _decoded(self, pieces: Iterable[Tensor], generation: Generation, tile: int | None = None) -> Iterator[Tensor]:
        latents = (piece if self.vae.kind == "video" else piece.squeeze(2) for piece in pieces)
        for done, frames in enumerate(self.vae.decode_frames(latents, tile=tile), 1):
            generation.control.report(Progress("decode", done, generation.layout.frames))
            yield frames.transpose(1, 2).float().cpu()


def load_pipeline(
    model: str | Path | None = None,
    text_encoder: str | Path | None = None,
    vae: str | Path | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Pipeline:
    """Load a model with what belongs to it; without arguments the bundled demo.

    `device` None takes the best there is, `dtype` None bfloat16 on an accelerator and float32 on the
    CPU. `progress` counts the flow's bytes. Raises InputError for a device that isn't there and for
    missing parts.
    """
    place = pick_device(device)
    return find_parts(model, text_encoder, vae).load(place, dtype or default_dtype(place), progress)


@dataclass(frozen=True)
class Parts:
    """A flow with its text encoder and VAE, looked at but not loaded."""

    checkpoint: TensorFile
    config: FlowConfig
    text: TextEncoderFiles
    vae: VAEFile

    def forecast(
        self, job: Job, dtype: torch.dtype, tile: int | None = None, keep_text_encoder: bool = False
    ) -> memory.Forecast:
        """What a job will take with all parts on one device; `tile` is that of decoding."""
        need = self._with_others(memory.forecast(self.config, job, dtype), job, dtype, tile)
        return replace(need, weights=need.weights + need.text, text=0) if keep_text_encoder else need

    def forecast_encode(self, job: Job, dtype: torch.dtype) -> memory.Forecast:
        """What it takes to encode the clip of such a job to noise."""
        return self._with_others(memory.forecast_encode(self.config, job, dtype), job, dtype)

    def _with_others(
        self, need: memory.Forecast, job: Job, dtype: torch.dtype, tile: int | None = None
    ) -> memory.Forecast:
        cells = (side // self.config.latent.spatial for side in (job.height, job.width))
        vae = self.vae.step_bytes(*cells, job.batch, dtype, tile) + self.vae.weight_bytes(dtype)
        return replace(need, vae=vae, text=self.text.weight_bytes(dtype))

    def load(
        self, device: torch.device, dtype: torch.dtype, progress: Callable[[Progress], None] | None = None
    ) -> Pipeline:
        """Read the weights, the flow's last: where something is wrong with a smaller file, it is known at once."""
        vae = self.vae.load(dtype, device)
        flow = load_flow(self.checkpoint, dtype=dtype, device=device, progress=progress)
        text = self.text  # alone: the flow's file isn't kept open
        return Pipeline(flow, vae, lambda: text.load(dtype, device), device, dtype)


def find_parts(model: str | Path | None, text_encoder: str | Path | None, vae: str | Path | None) -> Parts:
    """A flow, its text encoder and its VAE, once they go together; the bundled demo's without arguments.

    Raises InputError for a part that isn't given or isn't there, CheckpointError for one that is
    something else.
    """
    model, text_encoder, vae = _find_paths(model, text_encoder, vae)
    checkpoint = TensorFile.open(model)
    parts = Parts(checkpoint, find_config(checkpoint), find_text_encoder(text_encoder), find_vae(vae))
    check_fits(parts.text, parts.config)
    check_vae(parts.vae.outline, parts.config)
    return parts


def _find_paths(
    model: str | Path | None, text_encoder: str | Path | None, vae: str | Path | None
) -> tuple[Path, Path, Path]:
    parts = {
        "checkpoint": (model, FLOW_FILE),
        "text encoder (flan-t5-xl)": (text_encoder, TEXT_FILE),
        "VAE": (vae, VAE_FILE),
    }
    missing = [name for name, (given, _) in parts.items() if given is None]
    if model is not None and missing:
        raise InputError(f"{model} needs a {' and a '.join(missing)}; only the bundled demo brings its own")
    found = tuple(BUNDLED / file if given is None else Path(given) for given, file in parts.values())
    for name, path in zip(parts, found, strict=True):
        if not path.exists():
            raise InputError(f"no {name} at {path}; check the path")
    return found
