"""How much memory a job takes, estimated in advance."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..errors import OutOfMemoryForecast
from ..model.cache import RESIDENT, CacheShape
from ..model.config import Denoiser, FlowConfig
from ..model.flow import SHALLOW_TOKENS
from .tasks import Job, layout

RESERVE = 0.03  # share of the free memory that is left alone
# Hidden states that a layer holds at its widest: its input, what attention gave and the sum, the MLP's normed input,
# and four times the width before and after GELU.
LAYER = 12


@dataclass(frozen=True)
class Forecast:
    """A job's memory at its peak, in bytes: the flow's weights, the deep block's keys and values, and the activations
    of the largest step. `vae` is the VAE while it decodes, `text` the text encoder, which is freed before the flow
    starts; both are 0 where they aren't counted."""

    weights: int
    cache: int
    activations: int
    vae: int = 0
    text: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.vae + max(self.cache + self.activations, self.text)

    def with_text(self, text: int, kept: bool = False) -> Forecast:
        """The same job with a text encoder of `text` bytes, freed before the flow starts unless it is `kept`."""
        return replace(self, weights=self.weights + text) if kept else replace(self, text=text)


def forecast(config: FlowConfig, job: Job, dtype: torch.dtype) -> Forecast:
    """What a job needs in the compute type `dtype`. Raises InputError for an impossible job."""
    plan = layout(config, job)
    item = dtype.itemsize
    frame_tokens = (job.height // config.cell) * (job.width // config.cell)
    shape = cache_shape(config, job)
    slots = shape.slots
    cache, _ = shape.bytes(RESIDENT, item)
    shallow = min(SHALLOW_TOKENS, job.batch * plan.total * frame_tokens)
    deep = shape.rows * max(shape.widest, config.prompt.tokens)
    activations = LAYER * item * max(shallow * config.width, deep * config.deep_width)
    if job.denoise and config.denoiser:
        step = LAYER * item * job.batch * slots * config.denoiser.width
        seen = item * job.batch * frame_tokens * _denoiser_values(config.denoiser, min(plan.window, plan.total))
        activations = max(activations, step) + seen
    elif job.denoise:
        activations = max(activations, _score_activations(config, frame_tokens * plan.total, item))
    latents = 4 * 12 * job.batch * plan.total * math.prod(plan.shape)
    return Forecast(parameters(config) * item, cache, activations + latents)


def cache_shape(config: FlowConfig, job: Job) -> CacheShape:
    """Of the deep block's cache. Raises InputError for an impossible job."""
    plan, prefix = layout(config, job), config.prompt.tokens
    frame_tokens = (job.height // config.cell) * (job.width // config.cell)
    slots = prefix + min(plan.window, plan.total) * frame_tokens
    rows, heads = job.batch * (2 if job.guidance else 1), config.deep_width // config.head_dim
    widest = min(job.solver.widest, slots)
    return CacheShape(config.layers[-1], rows, heads, slots, config.head_dim, prefix, widest)


def forecast_encode(config: FlowConfig, job: Job, dtype: torch.dtype) -> Forecast:
    """What encoding such a job's clip to noise needs."""
    plan = layout(config, job)
    tokens = plan.total * (job.height // config.cell) * (job.width // config.cell)
    shallow = min(SHALLOW_TOKENS, job.batch * tokens) * config.width
    deep = job.batch * (config.prompt.tokens + tokens) * config.deep_width
    # Latents, and a log-determinant of their size for each block, all in float32.
    latents = 4 * (3 + len(config.layers)) * job.batch * plan.total * math.prod(plan.shape)
    return Forecast(parameters(config) * dtype.itemsize, 0, LAYER * dtype.itemsize * max(shallow, deep) + latents)


def _denoiser_values(denoiser: Denoiser, frames: int) -> int:
    """Keys and values in all layers' bands, for one token of a frame."""
    return 2 * denoiser.layers * denoiser.width * min(denoiser.window + 1, frames)


def _score_activations(config: FlowConfig, tokens: int, item: int) -> int:
    """One sample's gradient: a hidden state per layer, and one layer's activations, twice."""
    tokens += config.prompt.tokens
    hidden = sum(n * (config.deep_width if i == len(config.layers) - 1 else config.width)
                 for i, n in enumerate(config.layers))  # fmt: skip
    return item * tokens * (hidden + 2 * 16 * max(config.width, config.deep_width))


def parameters(config: FlowConfig) -> int:
    """Number of parameters of the flow and its denoiser, from shapes alone."""
    channels = config.token_channels

    def layers(width: int, count: int) -> int:
        return count * (12 * width**2 + 13 * width)

    total = 0
    for index, count in enumerate(config.layers):
        deep = index == len(config.layers) - 1
        width = config.deep_width if deep else config.width
        total += layers(width, count) + 2 * width + channels + 3 * channels * width + 2 * channels
        total += (config.text_dim + 1) * width if deep else 0
    if config.denoiser:
        width = config.denoiser.width
        total += layers(width, config.denoiser.layers) + 2 * width + 2 * channels * width + channels
        total += (config.text_dim + 1) * width
    return total


def free(device: torch.device) -> int | None:
    """Free bytes on a device; None if unknown."""
    if device.type == "cuda":
        # What PyTorch keeps for its next tensors is free, too.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type == "cpu" and Path("/proc/meminfo").exists():
        lines = Path("/proc/meminfo").read_text().splitlines()
        values = dict(line.split(":", 1) for line in lines)
        return int(values["MemAvailable"].split()[0]) * 1024
    return None


def require(need: int, device: torch.device, what: str) -> None:
    """Raise OutOfMemoryForecast if fewer than `need` bytes are free."""
    available = free(device)
    if available is not None and need > available * (1 - RESERVE):
        raise OutOfMemoryForecast(
            f"{what} needs about {readable(need)}, but {readable(available)} are free on {device}. "
            "Use fewer frames, a smaller size or batch, guidance 0, or a 16-bit type."
        )


def ran_out(error: BaseException) -> bool:
    """Whether an exception means that a device ran out of memory."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def readable(count: int) -> str:
    """Bytes as people read them: 1.5 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
