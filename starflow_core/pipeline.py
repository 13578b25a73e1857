"""Text encoder, flow and VAE together: from a prompt to frames in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from . import context as contexts
from . import memory
from .checkpoint import find_config, load_flow
from .config import FlowConfig, LatentFormat
from .control import Control, Progress
from .errors import InputError
from .flow import Flow
from .media import fit
from .solvers import Statistics
from .tasks import Generation, Job
from .tensorfiles import TensorFile
from .text import TextEncoder, TextEncoderFiles, check_fits, find_text_encoder, wrap
from .vae import VAE, VAEFile, find_vae

BUNDLED = Path(__file__).parent / "bundled"
DEMO = "bundled demo"  # the demo's name in every list
FLOW_FILE, TEXT_FILE, VAE_FILE = "flow.safetensors", "text.safetensors", "vae.safetensors"


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


def check_vae(vae: VAE, config: FlowConfig) -> None:
    """Raise InputError unless the model samples this VAE's latents."""
    found = (vae.channels, vae.spatial, vae.temporal)
    wanted = (config.latent.channels, config.latent.spatial, config.latent.temporal)
    if found != wanted:
        channels, spatial, temporal = found
        raise InputError(
            f"this VAE has {channels} channels, 1/{spatial} of the size and 1/{temporal} of the frames; {config.name} "
            f"needs {wanted[0]}, 1/{wanted[1]} and 1/{wanted[2]}"
        )


def wrapped(config: FlowConfig, captions: list[str], job: Job, task: str | None = None) -> list[str]:
    """Captions in the wrapping the model was trained with, for the job's task or another."""
    fps = job.fps if job.frames > 1 else 0
    aspect = config.nearest_aspect(job.height, job.width)
    return [wrap(caption, config, fps=fps, aspect=aspect, task=task or job.task) for caption in captions]


def default_job(config: FlowConfig, **settings) -> Job:
    """A job with the model's defaults; give `height` and `width`, or `aspect` and `size`."""
    defaults = config.defaults
    size = _taken(settings, "height", "width", "aspect", "size")
    unknown = settings.keys() - {field.name for field in fields(Job)}
    if unknown:
        raise InputError(f"unknown setting {', '.join(sorted(unknown))} of a job")
    context = settings.get("context")
    if context is not None and not any(size.values()):
        size |= {name: n * config.latent.spatial for name, n in zip(size, context.latents.shape[-2:], strict=False)}
    height, width = chosen_size(config, **size)
    chosen = {"frames": defaults.frames, "fps": defaults.fps or 16, "guidance": defaults.guidance} | settings
    return Job(height, width, **chosen)


def chosen_size(
    config: FlowConfig, given: Tensor | None = None, *, height: int | None = None, width: int | None = None,
    aspect: str | None = None, size: int | None = None,
) -> tuple[int, int]:  # fmt: skip
    """Height and width as asked for; else in the trained ratio nearest to `given` pixels (.., H, W), or
    the model's own. Raises InputError where sides and ratio are mixed, or don't fit the model."""
    if (height is None) != (width is None):
        raise InputError("height and width go together; give both, or aspect and size")
    if height is not None and (aspect or size):
        raise InputError("height and width leave nothing to aspect and size; give one pair")
    if height is None:
        if aspect is None and given is not None:
            aspect = config.nearest_aspect(*given.shape[-2:])
        height, width = config.size(aspect, size)
    config.check_size(height, width)
    return height, width


def job_with_context(
    config: FlowConfig, encode: contexts.Encode, task: str, *, image: Tensor | None = None, last: Tensor | None = None,
    clip: Tensor | None = None, keep_latents: int | None = None, **settings,
) -> Job:  # fmt: skip
    """A job with given frames, fitted to its size (covered, centre-cropped) and encoded.

    Without a size or ratio the trained ratio nearest to the given frames is taken. `keep_latents`
    limits how many latent frames of an extended clip are given. With `shapes_only` for `encode` the
    job can be checked and its memory forecast before anything is loaded.
    """
    given = next((pixels for pixels in (image, last, clip) if pixels is not None), None)
    size = _taken(settings, "height", "width", "aspect", "size")
    settings["height"], settings["width"] = place = chosen_size(config, given, **size)
    job, latent = default_job(config, **settings), config.latent
    if task == "text":
        return job
    if task == "first_frame":
        context = contexts.first_frame(encode, _batched(fit(image, *place), 4))
    elif task == "last_frame":
        first = None if image is None else _batched(fit(image, *place), 4)
        context = contexts.last_frame(encode, _batched(fit(last, *place), 4), first)
    else:
        pixels = _batched(fit(clip, *place), 5).transpose(1, 2)
        if task == "edit":
            context = contexts.edit(encode, pixels, latent)
            settings.setdefault("frames", latent.frames(context.hidden))
        else:
            if keep_latents is None:
                _, keep_latents = config.sliding_window(latent.latent_frames(job.frames), job.window, job.keep)
            context = contexts.extend(encode, pixels, latent, keep_latents)
    return default_job(config, **settings, context=context)


def shapes_only(latent: LatentFormat) -> contexts.Encode:
    """An encoder that gives latents of the right shape and no values."""

    def encode(pixels: Tensor) -> Tensor:
        batch, _, frames, height, width = pixels.shape
        cells = (height // latent.spatial, width // latent.spatial)
        return torch.empty(batch, latent.channels, latent.latent_frames(frames), *cells, device="meta")

    return encode


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


def default_dtype(device: torch.device) -> torch.dtype:
    """The type that the network runs in where nobody says otherwise."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def pick_device(name: str | None = None) -> torch.device:
    """The named device, or the best there is. Raises InputError for one that isn't there."""
    found = ["cpu"]
    if torch.cuda.is_available():
        found = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + found
    if torch.backends.mps.is_available():
        found = ["mps", *found]
    if name is None:
        return torch.device(found[0])
    if name not in found and f"{name}:0" not in found:
        raise InputError(f"device {name!r} isn't there; this machine has {', '.join(found)}")
    return torch.device(name)


def _taken(settings: dict, *names: str) -> dict:
    """These settings, taken out of the others; None for those that aren't given."""
    return {name: settings.pop(name, None) for name in names}


def _batched(pixels: Tensor, dims: int) -> Tensor:
    return pixels if pixels.ndim == dims else pixels.unsqueeze(0)
