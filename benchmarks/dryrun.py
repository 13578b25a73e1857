"""Whole jobs at full size on tensors without memory: what they hold, move and compute, against the forecast.

    python -m benchmarks.dryrun [--jobs WORD ...] [--json PATH]

The sampler is the real one. Its tensors are fake: they have shapes, types and devices, but no data, so decisions are
replaced by a fixed schedule: a sweep settles its whole span of SPAN tokens, as many as the forecast is for. Every
storage is counted while it is alive; a layer that is brought in from main memory is stood in for by as many bytes. A
budget is the whole card's: the planner sets CUDA's own share, the text encoder and the VAE against it. Roofline times
are arithmetic, not measurements: SWEEPS evaluations a token of the deep block in spans of the planner's size, at the
card's published figures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.gpu import SD_VAE, WAN22, t5_settings
from benchmarks.meter import Meter
from benchmarks.report import write_json
from starflow_core.jobs import memory
from starflow_core.jobs.context import Context
from starflow_core.jobs.planner import MemoryOptions, MemoryPlan, choose
from starflow_core.jobs.tasks import Generation, Job, Means
from starflow_core.model.config import STARFLOW_3B, STARFLOW_V_7B, FlowConfig
from starflow_core.model.flow import Flow
from starflow_core.model.int8 import replace_linear
from starflow_core.model.placement import Placement
from starflow_core.model.transformer import Layer
from starflow_core.model.vae.codec import VAE
from starflow_core.solve.runs import DeepRun
from starflow_core.solve.solvers import ABSORBED, PRESETS
from starflow_core.weights.flow import QUANTISED

CARD = torch.device("lazy", 0)  # a device type that every build of PyTorch knows and nothing here uses
CPU = torch.device("cpu")
SPAN = ABSORBED
SWEEPS = 8
CUDA = 1 << 29  # bytes of a card that CUDA keeps for itself
GIB = 1 << 30
LOWEST, HIGHEST = 1.0, 1.05  # of the forecast over what is counted
CARDS = {"H200": (0.79e15, 4.8e12, 55e9), "4090": (0.165e15, 1.0e12, 25e9)}  # 16-bit FLOP/s, memory and bus bytes/s


@dataclass(frozen=True)
class DryJob:
    """A job, and the memory of the card for it (None: all it wants)."""

    config: FlowConfig
    job: Job
    budget: float | None = None  # GiB
    dtype: torch.dtype = torch.bfloat16
    means: Means | None = None  # fixed, instead of planned


def video(frames: int = 81, height: int = 480, width: int = 848, **settings) -> Job:
    solver = PRESETS["balanced"].with_numbers(span=SPAN, first_span=SPAN)
    return Job(height, width, frames=frames, **{"guidance": 3.5, "solver": solver, **settings})


def image(size: int = 256, **settings) -> Job:
    return Job(size, size, **{"guidance": 3.6, "solver": PRESETS["balanced"].with_numbers(image_span=SPAN), **settings})


def context(task: str, frames: int, height: int = 30, width: int = 53) -> Context:
    return Context(task, torch.zeros(1, 48, frames, height, width, device="meta"))


JOBS = {
    "3B, image": DryJob(STARFLOW_3B, image()),
    "3B, image, no denoising": DryJob(STARFLOW_3B, image(denoise=False)),
    "3B, image, no guidance": DryJob(STARFLOW_3B, image(guidance=0.0)),
    "3B, 512 x 512, no guidance": DryJob(STARFLOW_3B, image(512, guidance=0.0)),
    "3B, image, float32": DryJob(STARFLOW_3B, image(), dtype=torch.float32),
    "3B, batch of 8": DryJob(STARFLOW_3B, image(batch=8)),
    "3B, 512 x 512": DryJob(STARFLOW_3B, image(512)),
    "3B, image, in 8 GiB": DryJob(STARFLOW_3B, image(), 8),
    "3B, image, no denoising, in 6 GiB": DryJob(STARFLOW_3B, image(denoise=False), 6),
    "3B, batch of 8, in 12 GiB": DryJob(STARFLOW_3B, image(batch=8), 12),
    "7B, 81 frames, in 48 GiB": DryJob(STARFLOW_V_7B, video(), 48),
    "7B, 81 frames, in 32 GiB": DryJob(STARFLOW_V_7B, video(), 32),
    "7B, 81 frames, in 24 GiB": DryJob(STARFLOW_V_7B, video(), 24),
    "7B, 81 frames, in 16 GiB": DryJob(STARFLOW_V_7B, video(), 16),
    "7B, 81 frames, in 12 GiB": DryJob(STARFLOW_V_7B, video(), 12),
    "7B, 81 frames, no guidance": DryJob(STARFLOW_V_7B, video(guidance=0.0)),
    "7B, 81 frames, no denoising": DryJob(STARFLOW_V_7B, video(denoise=False)),
    "7B, 97 frames, window slides, in 24 GiB": DryJob(STARFLOW_V_7B, video(97), 24),
    "7B, 17 frames": DryJob(STARFLOW_V_7B, video(17)),
    "7B, one frame": DryJob(STARFLOW_V_7B, video(1)),
    "7B, 33 frames of 192 x 336, batch of 4": DryJob(STARFLOW_V_7B, video(33, 192, 336, batch=4)),
    "7B, first frame": DryJob(STARFLOW_V_7B, video(41, context=context("first_frame", 1)), 24),
    "7B, extend by 8 latent frames": DryJob(STARFLOW_V_7B, video(65, context=context("extend", 8)), 24),
    "7B, 41 frames, 8-bit cache alone": DryJob(STARFLOW_V_7B, video(41), 27),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="*", default=[], metavar="WORD", help="only jobs with these words")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    print("| job | plan | forecast GB | counted GB | ratio | host GB | PFLOP | moved GB | calls | H200 s | 4090 s |")
    print(f"|{' --- |' * 11}")
    for name, job in JOBS.items():
        if all(word in name for word in options.jobs):
            rows.append({"job": name, **run(job)})
            print(_line(rows[-1]), flush=True)
    if options.json:
        write_json(options.json, rows)
    wrong = [row["job"] for row in rows if not LOWEST <= row["forecast"] / row["counted"] <= HIGHEST]
    print(f"{len(rows) - len(wrong)} of {len(rows)} forecasts within {LOWEST} to {HIGHEST} of what was counted")
    return 1 if wrong else 0


def run(job: DryJob) -> dict:
    """One job's figures."""
    began, plan = time.monotonic(), planned(job)
    need = replace(plan.need, vae=0, text=0)
    meter, deep = measured(job.config, plan.fitted(job.job, CARD), job.dtype, plan.means)
    counted = meter.peak[CARD.type]
    tokens = memory.cache_shape(job.config, job.job).slots - job.config.prompt.tokens
    sweeps = SWEEPS * tokens / span_of(job, plan)
    flops = meter.flops + (SWEEPS * tokens / deep["evaluated"] - 1) * deep["flops"]
    moved = meter.moved + (sweeps / deep["sweeps"] - 1) * deep["moved"]
    read = sweeps * (need.weights + need.cache / 2)  # on average half of the cache is filled
    return {
        "plan": str(plan), "forecast": need.total, "counted": counted, "host": plan.need.host,
        "flops": flops, "moved": moved, "calls": meter.calls, "budget": job.budget, "total": plan.need.total + CUDA,
        "roofline": {card: roofline(flops, read, moved, *limits) for card, limits in CARDS.items()},
        "seconds": time.monotonic() - began,
    }  # fmt: skip


def span_of(job: DryJob, plan: MemoryPlan) -> int:
    """Tokens that a sweep works on, but for the first frame's."""
    solver = plan.fitted(job.job, CARD).solver
    return solver.image_span if job.job.frames == 1 else solver.span


def planned(job: DryJob) -> MemoryPlan:
    """The planner's choice for the job's budget."""
    vae, text = _vae(job.config), 2 * _count(_text_encoder(job.config))
    cells = (side // job.config.latent.spatial for side in (job.job.height, job.job.width))
    step = job.dtype.itemsize * (vae.step_values(*cells, job.job.batch) + _count(vae.module))
    budget = None if job.budget is None else int(job.budget * GIB) - CUDA

    def forecast(one: Job, means: Means) -> memory.Forecast:
        need = memory.forecast(job.config, one, job.dtype, means)
        return replace(need, vae=step).with_text(text)

    with patch.object(memory, "free", lambda device: None), patch.object(memory, "RESERVE", 0.0):
        return choose(job.job, CARD, MemoryOptions(budget), (False, True), forecast)


def roofline(flops: float, read: float, moved: float, rate: float, memory_rate: float, bus_rate: float) -> float:
    """Seconds that arithmetic, memory or the bus take at least, whichever is slowest."""
    return max(flops / rate, read / memory_rate, moved / bus_rate)


def measured(config: FlowConfig, job: Job, dtype: torch.dtype, means: Means) -> tuple[Meter, dict]:
    """Run a job on fake tensors; what the deep block's sweeps took of it is told apart."""
    flow = Flow(config, dtype=dtype, device="meta")
    if means.int8:
        for name in [name for name, _ in flow.named_parameters() if QUANTISED.fullmatch(name)]:
            replace_linear(flow, name.removesuffix(".weight"))
    meter, deep = Meter(), {"flops": 0, "moved": 0, "sweeps": 0, "evaluated": 0}
    with dry(meter, deep):
        meter.mark()
        materialise(flow, CPU if means.streamed else CARD)
        if means.streamed:
            stand_in_for_streaming(flow)
        text = torch.empty(1, config.prompt.tokens, config.text_dim, dtype=dtype, device=CARD)
        given = job.context and replace(job.context, latents=torch.empty(job.context.latents.shape))
        placement = Placement.on(CARD)
        generation = Generation(
            flow, replace(job, context=given), text, text if job.guidance else None, placement=placement, means=means
        )
        for _ in generation.stream():
            pass
    return meter, deep


def materialise(flow: Flow, device: torch.device) -> None:
    """Fake weights where the flow has none; what layers don't hold is always on the card."""
    for name, part in list(flow.named_modules()):
        home = device if ".attn_blocks." in name else CARD
        for key, weight in list(part.named_parameters(recurse=False)):
            fake = torch.empty(weight.shape, dtype=weight.dtype, device=home)
            setattr(part, key, nn.Parameter(fake, requires_grad=False))


def stand_in_for_streaming(flow: Flow) -> None:
    """While a layer computes, it and the next one are on the card."""

    def bring(layer: Layer, _) -> None:
        layer.away = {name: weight.data for name, weight in layer.named_parameters()}
        layer.next = [torch.empty_like(weight, device=CARD) for weight in layer.away.values()]
        _put(layer, {name: weight.to(CARD) for name, weight in layer.away.items()})

    def take_away(layer: Layer, *_) -> None:
        _put(layer, layer.away)
        del layer.next, layer.away

    for layer in flow.modules():
        if isinstance(layer, Layer):
            layer.register_forward_pre_hook(bring)
            layer.register_forward_hook(take_away)


def _put(layer: Layer, weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        part, _, key = name.rpartition(".")
        setattr(layer.get_submodule(part), key, nn.Parameter(weight, requires_grad=False))


@contextmanager
def dry(meter: Meter, deep: dict) -> Iterator[None]:
    """Fake tensors, counted; decisions by schedule; kernels as a card has them; no checks of numbers."""
    evaluate = DeepRun.__call__

    def counted(self, *args):
        flops, moved = meter.flops, meter.moved
        result = evaluate(self, *args)
        deep["flops"] += meter.flops - flops
        deep["moved"] += meter.moved - moved
        deep["sweeps"] += 1
        deep["evaluated"] += result[0].shape[1]
        return result

    def attend(queries, keys, values, causal=False):
        return torch.ops.aten._scaled_dot_product_flash_attention(queries, keys, values, is_causal=causal)[:2]

    core = "starflow_core"
    replaced = {
        "torch.isfinite": lambda x: SimpleNamespace(all=lambda *_: True),
        f"{core}.solve.sampling.require_finite": lambda *_: None,
        f"{core}.model.flow.require_finite": lambda *_: None,
        f"{core}.solve.denoising.require_finite": lambda *_: None,
        f"{core}.solve.solvers.decide": lambda change, *_: (len(change), len(change), 0.0),
        f"{core}.solve.solvers.REACH": 1,
        f"{core}.solve.solvers.still_going": lambda *_: (0.0, torch.arange(0)),
        f"{core}.model.cache.attend": attend,
        f"{core}.model.transformer.scaled_dot_product_attention": lambda *qkv, is_causal: attend(*qkv, is_causal)[0],
        f"{core}.model.denoiser.scaled_dot_product_attention": lambda q, k, v: attend(q, k, v)[0],
        f"{core}.solve.runs.DeepRun.__call__": counted,
    }
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(patch(name, value))
        stack.enter_context(patch("torch.lazy", torch.cpu, create=True))  # a gradient's checkpoints ask for it
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(torch.no_grad())
        stack.enter_context(meter)
        yield


def _vae(config: FlowConfig) -> VAE:
    from diffusers import AutoencoderKL, AutoencoderKLWan

    with torch.device("meta"):
        module = AutoencoderKLWan(**WAN22) if config.kind == "video" else AutoencoderKL(**SD_VAE)
    return VAE(module)


@lru_cache
def _text_encoder(config: FlowConfig) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        return T5EncoderModel(T5Config(**t5_settings(config.text_dim)))


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _line(row: dict) -> str:
    plan = row["plan"].partition(". Needs")[0]
    numbers = [row["forecast"] / 1e9, row["counted"] / 1e9, row["forecast"] / row["counted"], row["host"] / 1e9]
    numbers += [row["flops"] / 1e15, row["moved"] / 1e9]
    cells = [row["job"], plan, *(f"{n:.3f}" for n in numbers), f"{row['calls']:,}"]
    return f"| {' | '.join([*cells, *(f'{s:.1f}' for s in row['roofline'].values())])} |"


if __name__ == "__main__":
    raise SystemExit(main())
