"""What a step of training takes of a device, by arithmetic; `benchmarks/training.py` holds it against a count."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..errors import OutOfMemoryForecast
from ..jobs import memory
from ..model.config import FlowConfig
from ..model.flow import SHALLOW_TOKENS, Flow
from ..model.lora import block_indices, linear_names
from ..weights.flow import expected_shapes, weight_bytes
from .data.buckets import Bucket
from .data.cache import Cache
from .data.prepare import find
from .settings import Settings

# Hidden states of a layer that are alive at once, counted on tensors without memory (`benchmarks/training.py`).
IN_BACKWARD = 26  # while a layer's gradient is computed
KEPT = 20  # from forward to backward, of a layer that isn't computed again
# Bytes for each number that learns, in float32: gradient, average, and what the optimizer keeps.
PER_LEARNED = {"adamw": 16, "muon": 12}


@dataclass(frozen=True)
class Need:
    """Bytes of one device: the model's weights, what learns with all that belongs to it, and a step's activations."""

    weights: int
    learned: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.learned + self.activations

    def __str__(self) -> str:
        parts = {"weights": self.weights, "what learns": self.learned, "activations": self.activations}
        shown = ", ".join(f"{name} {memory.readable(size)}" for name, size in parts.items())
        return f"{memory.readable(self.total)} ({shown})"


def forecast(config: FlowConfig, settings: Settings, dtype: torch.dtype, bucket: Bucket, processes: int = 1) -> Need:
    """Of a step with samples of one size, whose products are in `dtype`."""
    whole = settings.train in ("full", "scratch")
    kept = weight_bytes(config, torch.float32 if whole else dtype, settings.int8)
    count = learned_count(config, settings)
    learned = count * (PER_LEARNED[settings.optimizer] + (0 if whole else 4))
    copies = count * dtype.itemsize if whole and dtype != torch.float32 else 0
    rows = -(-settings.batch // processes)
    rows = min(rows, settings.micro_batch or rows)
    shares = 1 if settings.rehearse else processes  # what is rehearsed is drawn with all weights on each device
    return Need(kept // shares, learned // processes, copies + _activations(config, settings, dtype, bucket, rows))


def require(need: Need, device: torch.device, bucket: Bucket) -> None:
    """Raise OutOfMemoryForecast unless a step fits on the device."""
    there = memory.free(device)
    if there is not None and not memory.fits(need.total, there):
        raise OutOfMemoryForecast(
            f"training on {bucket} needs about {need}, but {memory.readable(there)} are free on {device}. Use "
            "micro_batch 1, recompute, int8, a smaller size, fewer frames, or more devices."
        )


def learned_count(config: FlowConfig, settings: Settings) -> int:
    """How many numbers learn."""
    shapes = expected_shapes(config)
    if settings.train == "lora":
        names = linear_names(Flow(config, device="meta"), settings.blocks)
        return settings.rank * sum(sum(shapes[f"{name}.weight"]) for name in names)
    denoiser = {name: "learnable_self_denoiser" in name for name in shapes}
    return sum(math.prod(shape) for name, shape in shapes.items() if denoiser[name] == (settings.train == "denoiser"))


def _activations(config: FlowConfig, settings: Settings, dtype: torch.dtype, bucket: Bucket, rows: int) -> int:
    frames = config.latent.latent_frames(bucket.frames)
    tokens = frames * (bucket.height // config.cell) * (bucket.width // config.cell)
    slots = [tokens] * (len(config.layers) - 1) + [tokens + config.prompt.tokens]
    sizes = [rows * n * (config.deep_width if i == len(slots) - 1 else config.width) for i, n in enumerate(slots)]
    learning = _through(config, settings)
    held = sum(
        size * layers * (1 if settings.recompute else KEPT)
        for i, (size, layers) in enumerate(zip(sizes, config.layers, strict=True))
        if i in learning
    )
    # Shallow blocks take few frames at once; what they compute for their gradient is of these alone.
    widest = max(sizes[i] * (1 if i == len(sizes) - 1 else min(1, SHALLOW_TOKENS / (rows * tokens))) for i in learning)
    outputs = 10 * rows * tokens * config.token_channels * len(config.layers) * 4
    expanded = 12 * config.deep_width**2 * dtype.itemsize if settings.int8 else 0
    return int((held + IN_BACKWARD * widest) * dtype.itemsize + outputs + expanded)


def _through(config: FlowConfig, settings: Settings) -> list[int]:
    """The blocks that a gradient passes: those that learn, and all that come after them."""
    count = len(config.layers)
    if settings.train != "lora":
        return list(range(count))
    return list(range(min(block_indices(settings.blocks, count)), count))


def forecasts(settings: Settings, config: FlowConfig, dtype: torch.dtype, processes: int) -> Iterator[str]:
    """A line for each size of the settings' data. Nothing is encoded or loaded."""
    dataset = find(settings, config, Cache(settings.cached))
    yield from dataset.report()
    yield f"learning: {learned_count(config, settings) / 1e6:.2f} million numbers"
    for bucket in dataset.buckets:
        yield f"{bucket}: {forecast(config, settings, dtype, bucket, processes)} on each device"
