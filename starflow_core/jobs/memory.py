"""How much memory a job takes, estimated in advance.

Held against counted bytes by `benchmarks/dryrun.py`, which runs whole jobs at full size on tensors without memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..errors import OutOfMemoryForecast
from ..model.cache import CacheShape
from ..model.config import FlowConfig
from ..model.flow import SHALLOW_TOKENS
from ..model.parallel import ONE, Mesh
from ..model.placement import PARTS, Placement
from ..weights.flow import weight_bytes
from .tasks import PLAIN, Job, Means, layout

RESERVE = 0.03  # share of the free memory that is left alone
STREAMED_LAYERS = 2  # on the device at once: the one that computes, and the next
# Hidden states that a layer holds at its widest, counted: its input, what attention gave and the sum, the MLP's normed
# input, and four times the width before and after GELU; or with 16 bit, what rotation computes in float32.
LAYER = {2: 14.2, 4: 12.05}
VECTORS = 12  # of the solvers, in float32 and as large as the latents


@dataclass(frozen=True)
class Forecast:
    """A job's memory, in bytes.

    On the device: the flow's `weights`, the deep block's keys and values (`cache`), the `activations` of the largest
    step of sampling, and those of denoising where that comes after it (`denoise`); the `text` encoder, which is freed
    before the flow starts, and the `vae` with its step, which is there all the time or in its turn. `host` stays in
    main memory. `text` and `vae` are 0 where they aren't counted. Where the deep block is spread over processes, this
    is the leader's device, and `others` is what each of the others takes on its own.
    """

    weights: int
    cache: int
    activations: int
    denoise: int = 0
    vae: int = 0
    text: int = 0
    host: int = 0
    in_turn: bool = False
    others: int = 0

    @property
    def phases(self) -> dict[str, int]:
        """Bytes on the device at each phase of the job."""
        work = {"text": self.text, "sample": self.cache + self.activations, "denoise": self.denoise}
        if self.in_turn:
            work, there = {**work, "decode": self.vae}, self.weights
        else:
            there = self.weights + self.vae
        return {phase: there + size for phase, size in work.items() if size or phase == "sample"}

    @property
    def total(self) -> int:
        return max(self.phases.values())

    def with_text(self, text: int, kept: bool = False) -> Forecast:
        """The same job with a text encoder of `text` bytes, freed before the flow starts unless it is `kept`."""
        return replace(self, weights=self.weights + text) if kept else replace(self, text=text)


def forecast(
    config: FlowConfig, job: Job, dtype: torch.dtype, means: Means = PLAIN, parts: tuple[str, ...] = PARTS
) -> Forecast:  # fmt: skip
    """What a job needs in the compute type `dtype`, fitted by `means`, on a device that has these parts of the flow.
    Raises InputError for an impossible job."""
    plan, item = layout(config, job), dtype.itemsize
    tokens = (job.height // config.cell) * (job.width // config.cell)
    shape = cache_shape(config, job, means.mesh)
    cache, cache_away = shape.bytes(means.cache, item) if "deep" in parts else (0, 0)
    weights, weights_away = _weights(config, dtype, means, parts)
    angles = 3 * 4 * config.head_dim * shape.slots
    prompts = item * shape.rows * shape.prefix * config.text_dim * len(plan.starts)
    vectors = angles + prompts + 4 * VECTORS * job.batch * plan.total * math.prod(plan.shape)
    deep = _layer(item, shape.rows * max(shape.widest, shape.prefix), config.deep_width, means)
    deep = deep + shape.moving(means.cache) if "deep" in parts else 0
    frames = min(max(1, SHALLOW_TOKENS // tokens), job.batch * plan.total)
    shallow = _layer(item, frames * tokens, config.width, means) if "shallow" in parts else 0
    denoising = job.denoise and ("denoiser" if config.denoiser else "deep") in parts  # a score is the flow's own
    held, step = _denoising(config, job, item, min(plan.window, plan.total), tokens, means) if denoising else (0, 0)
    denoise = held + step + vectors if denoising else 0
    sample = max(deep, shallow) + vectors
    if denoising and config.denoiser and not means.in_turn:
        sample, denoise = max(deep, shallow, step) + held + vectors, 0
    away, alone = cache_away + weights_away, means.mesh.count == 1 or "shallow" not in parts
    others = 0 if alone else forecast(config, job, dtype, means, ("deep",)).total
    return Forecast(weights, cache, sample, denoise, host=away, in_turn=means.in_turn, others=others)


def forecasts(
    config: FlowConfig, job: Job, dtype: torch.dtype, placement: Placement, means: Means = PLAIN
) -> dict[torch.device, Forecast]:  # fmt: skip
    """What a job needs on each device of a placement. Where guidance is split, each of its devices has half of the
    rows."""
    half = replace(job, guidance=0.0) if len(placement.deep) > 1 else job
    return {
        device: forecast(config, half if device in placement.deep else job, dtype, means, placement.parts_on(device))
        for device in placement.devices
    }


def cache_shape(config: FlowConfig, job: Job, mesh: Mesh = ONE) -> CacheShape:
    """Of the deep block's cache, or of each process's of a mesh. Raises InputError for an impossible job."""
    plan, prefix = layout(config, job), config.prompt.tokens
    frame_tokens = (job.height // config.cell) * (job.width // config.cell)
    slots = prefix + min(plan.window, plan.total) * frame_tokens
    rows = job.rows // mesh.guidance
    heads = config.deep_width // config.head_dim // mesh.tensor
    widest = min(job.solver.widest, slots)
    return CacheShape(config.layers[-1], rows, heads, slots, config.head_dim, prefix, widest)


def forecast_encode(config: FlowConfig, job: Job, dtype: torch.dtype, means: Means = PLAIN) -> Forecast:
    """What inverting such a job's clip needs: as much as sampling it, and a log-determinant of the latents' size for
    each block."""
    need, plan = forecast(config, replace(job, denoise=False), dtype, means), layout(config, job)
    logdets = 4 * len(config.layers) * job.batch * plan.total * math.prod(plan.shape)
    return replace(need, activations=need.activations + logdets)


def _layer(item: int, tokens: int, width: int, means: Means) -> int:
    """What a layer takes while it computes: activations, and the weights that are there for that alone."""
    return int(LAYER[item] * item * tokens * width) + _brought(width, item, means)


def _brought(width: int, item: int, means: Means) -> int:
    """Layers' weights that were brought in, and the largest of a layer in 8 bit, expanded."""
    expanded = 4 * width**2 * item if means.int8 else 0
    return expanded + (STREAMED_LAYERS * _layer_bytes(width, item, means.int8) if means.streamed else 0)


def _weights(config: FlowConfig, dtype: torch.dtype, means: Means, parts: tuple[str, ...]) -> tuple[int, int]:
    """The weights of a flow's parts that are on the device all the time, and those in main memory."""
    total = weight_bytes(config, dtype, means.int8, parts, means.mesh)
    if not means.streamed:
        return total, 0
    widths = [config.width] * sum(config.layers[:-1]) + [config.deep_width] * config.layers[-1]
    if config.denoiser:
        widths += [config.denoiser.width] * config.denoiser.layers
    return total - sum(_layer_bytes(width, dtype.itemsize, means.int8) for width in widths), total


def _layer_bytes(width: int, item: int, int8: bool) -> int:
    """Weights of one transformer layer: four matrices of 12 width^2 in all, their biases and the norms."""
    matrices = 12 * width**2 + 4 * 9 * width if int8 else 12 * width**2 * item
    return matrices + 13 * width * item


def _denoising(config: FlowConfig, job: Job, item: int, frames: int, tokens: int, means: Means) -> tuple[int, int]:
    """What denoising holds from frame to frame, and what its largest step takes on top."""
    if not job.denoise:
        return 0, 0
    if config.denoiser is None:
        return 0, _score_step(config, tokens * frames, item, means)
    net, one = config.denoiser, item * job.batch * tokens * config.denoiser.width
    text = item * job.batch * config.prompt.tokens * net.width
    seen = min(net.window, frames)
    held = net.layers * (2 * (seen + net.look_ahead) * one + 4 * text)
    leaving = min(frames, net.look_ahead * net.layers + 1)  # frames that the last push lets go
    step = max(2 * (seen + 1) + 11, 8.4 * leaving) * one + LAYER[item] * text
    return held, int(step) + _brought(net.width, item, means)


def _score_step(config: FlowConfig, tokens: int, item: int, means: Means) -> int:
    """One sample's gradient: a hidden state per layer, one layer's activations and their gradients, counted, the masks
    of its attention, and that layer's weights, expanded from 8 bit, which wait for the way back."""
    tokens += config.prompt.tokens
    hidden = sum(n * (config.deep_width if i == len(config.layers) - 1 else config.width)
                 for i, n in enumerate(config.layers))  # fmt: skip
    widest = max(config.width, config.deep_width)
    kept = 8 * widest**2 * item if means.int8 else 0
    return item * tokens * (hidden + 28 * widest) + 3 * tokens**2 + kept + _brought(widest, item, means)


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


def fits(need: int, available: int) -> bool:
    """Whether `need` bytes fit into those `available`, of which some are left alone."""
    return need <= available * (1 - RESERVE)


def require(need: int, device: torch.device, what: str) -> None:
    """Raise OutOfMemoryForecast if fewer than `need` bytes are free."""
    available = free(device)
    if available is not None and not fits(need, available):
        raise OutOfMemoryForecast(
            f"{what} needs about {readable(need)}, but {readable(available)} are free on {device}. "
            "Use fewer frames, a smaller size or batch, guidance 0, or a 16-bit type."
        )


def readable(count: int) -> str:
    """Bytes as people read them: 1.5 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
