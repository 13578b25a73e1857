"""Speed and memory at full size, with random weights: no checkpoint is needed for either.

    python -m benchmarks.gpu [--jobs NAME ...] [--sweeps 8] [--span N] [--device NAME] [--json PATH] [--small]

Every token of a block is evaluated `--sweeps` times, as a trained flow needs it about, so that solvers and versions
are compared at the same work. A job is run twice and the second run counts, except where the first took longer than
half a minute. Arithmetic is that of the deep block's matrix products and attention; its share is of what the machine
reaches in one large bf16 product. `--small` replaces the models by tiny ones of the same form, to try the benchmark.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.baseline import Baseline, iterate_chunks
from benchmarks.cases import GAIN
from benchmarks.report import machine, write_json
from starflow_core.jobs.build import default_job
from starflow_core.jobs.tasks import Generation, Job
from starflow_core.model.config import KNOWN_MODELS as MODELS
from starflow_core.model.config import Denoiser, FlowConfig, PromptFormat
from starflow_core.model.flow import Flow
from starflow_core.model.placement import pick_device
from starflow_core.model.vae.codec import VAE
from starflow_core.model.vae.layers import with_fast_layers
from starflow_core.solve import solvers
from starflow_core.solve.runs import DeepRun
from starflow_core.solve.solvers import FEW_SWEEPS, SolverSettings, Statistics, Window, solve_span

LONG = 30.0  # seconds after which a first run counts
WAN22 = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
    "temperal_downsample": [False, True, True], "is_residual": True, "in_channels": 12, "out_channels": 12,
    "patch_size": 2, "scale_factor_spatial": 16, "scale_factor_temporal": 4,
}  # fmt: skip
SD_VAE = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
FLAN_T5_XL = {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32, "vocab_size": 32128}


@dataclass(frozen=True)
class Work:
    """A job of a model. `part` is "deep" (the deep block), "baseline" (the same by plain block Jacobi), "flow" (to
    latents) or "all" (from token ids to pixels). `goal` is in seconds on an H200, `floor` its arithmetic there."""

    model: str
    part: str
    height: int
    width: int
    frames: int = 1
    batch: int = 1
    goal: float | None = None
    floor: float | None = None


WORKS = {
    "image": Work("starflow-3b", "flow", 256, 256, goal=0.5, floor=0.15),
    "images": Work("starflow-3b", "flow", 256, 256, batch=8, goal=1.2),
    "deep": Work("starflow-v-7b", "deep", 480, 848, 81, goal=16, floor=10.9),
    "baseline": Work("starflow-v-7b", "baseline", 480, 848, 81),
    "clip": Work("starflow-v-7b", "all", 480, 848, 81, goal=24, floor=15),
    "long": Work("starflow-v-7b", "flow", 480, 848, 481, goal=150, floor=104),
}


@contextmanager
def fixed_work():
    """While this lasts, what is known of tokens, and what their type resolves, changes nothing about the sweeps."""
    with patch.object(solvers, "REACH", 1), patch.object(SolverSettings, "resolvable", lambda settings, _: settings):
        yield


class Bench:
    """Models on one device, each made when it is first needed; only the latest is kept."""

    def __init__(self, device: torch.device, sweeps: int, span: int | None, small: bool):
        self.device, self.small = device, small
        self.dtype = torch.bfloat16
        spans = {"image_span": span, "span": span, "first_span": span}
        fixed = SolverSettings(tolerance=0.0, shallow_tolerance=0.0, max_sweeps=sweeps)
        self.settings = fixed.with_numbers(**spans).spanned(FEW_SWEEPS)
        self.flow = None

    def run(self, work: Work) -> dict:
        """Seconds, seconds to the first picture, sweeps, peak memory and arithmetic of a job."""
        config = shrunk(MODELS[work.model]) if self.small else MODELS[work.model]
        if self.flow is None or self.flow.config != config:
            self.flow = None  # its memory first
            self.flow = random_flow(config, self.device, self.dtype)
        job = self._job(work)
        with fixed_work():
            found = self._timed(work, job)
            return found if found["seconds"] > LONG else self._timed(work, job)

    def _job(self, work: Work) -> Job:
        config = self.flow.config
        size = {"height": work.height, "width": work.width, "frames": work.frames}
        if self.small:
            cells = 4 * config.cell
            size = {"height": cells, "width": cells, "frames": work.frames // 20 * 4 + 1}
        denoise = config.denoiser is not None
        return default_job(config, **size, batch=work.batch, denoise=denoise, solver=self.settings, seed=1)

    def _timed(self, work: Work, job: Job) -> dict:
        parts = {"deep": self._deep, "baseline": self._baseline, "flow": self._flow, "all": self._all}
        with torch.no_grad():
            prepared = parts[work.part](job)
            reset_peak(self.device)
            synchronize(self.device)
            began = time.perf_counter()
            statistics, first = prepared(began)
            synchronize(self.device)
            seconds = time.perf_counter() - began
        arithmetic = operations(self.flow.config, job, statistics)
        return {
            "seconds": seconds,
            "first": first,
            "sweeps": statistics.deep_sweeps,
            "evaluations": statistics.deep_evaluations,
            "peak_bytes": peak(self.device),
            "tflops": arithmetic / seconds / 1e12,
        }

    # Each takes a job, makes what it needs, and gives a call that runs it: (statistics, seconds to the first picture).

    def _deep(self, job: Job) -> Callable:
        z, text, uncond = self._inputs(job)
        grid = self.flow.grid(z)

        def run(began: float):
            statistics = Statistics()
            run = DeepRun(self.flow, grid, text, uncond, job.guidance)
            tokens = self.flow.deep.ordered(self.flow.tokens(z)).flatten(1, 2)
            for _ in solve_span(run, Window(tokens, grid.frame_tokens, grid.width), self.settings, statistics):
                pass
            return statistics, None

        return run

    def _baseline(self, job: Job) -> Callable:
        z, text, uncond = self._inputs(job)
        grid, chunk = self.flow.grid(z), 32 if self.flow.config.kind == "video" else 16

        def run(began: float):
            run = DeepRun(self.flow, grid, text, uncond, job.guidance)
            tokens = self.flow.deep.ordered(self.flow.tokens(z)).flatten(1, 2)
            settings = Baseline(chunk, 0.0, self.settings.max_sweeps)
            _, sweeps, evaluations = iterate_chunks(run, tokens, settings, grid.frame_tokens)
            return Statistics(sweeps, evaluations), None

        return run

    def _flow(self, job: Job) -> Callable:
        _, text, uncond = self._inputs(job)

        def run(began: float):
            generation = Generation(self.flow, job, text, uncond)
            for _ in generation.stream():
                pass
            return generation.statistics, None

        return run

    def _all(self, job: Job) -> Callable:
        encoder = random_text_encoder(self.flow.config, self.device, self.dtype)
        vae = random_vae(self.small, self.device, self.dtype)
        ids = torch.randint(1, 100, (2, self.flow.config.prompt.tokens), device=self.device)

        def run(began: float):
            first = None
            text, uncond = encoder(input_ids=ids).last_hidden_state.split(1)
            generation = Generation(self.flow, job, text, uncond)

            def final():
                nonlocal first
                for piece in generation.stream():
                    if first is None:
                        vae.decode(piece.latents)
                        synchronize(self.device)
                        first = time.perf_counter() - began
                    if piece.final:
                        yield piece.latents

            for frames in vae.decode_frames(final()):
                frames.cpu()
            return generation.statistics, first

        return run

    def _inputs(self, job: Job) -> tuple[Tensor, Tensor, Tensor]:
        """Noise in flow space, text and unconditional text."""
        config, draw = self.flow.config, torch.Generator().manual_seed(0)
        latent = config.latent
        cells = (job.height // latent.spatial, job.width // latent.spatial)
        z = torch.randn(job.batch, latent.latent_frames(job.frames), latent.channels, *cells, generator=draw)
        text = torch.randn(2, config.prompt.tokens, config.text_dim, generator=draw).to(self.device, self.dtype)
        return z.to(self.device), text[:1].expand(job.batch, -1, -1), text[1:]


def random_flow(config: FlowConfig, device: torch.device, dtype: torch.dtype) -> Flow:
    return fill(Flow(config, dtype=dtype, device="meta"), device)


def random_text_encoder(config: FlowConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return filled(T5EncoderModel, device, dtype, T5Config(**t5_settings(config.text_dim)))


def t5_settings(dim: int) -> dict:
    """Those of flan-t5-xl; with other channels than its own, a small one."""
    small = {} if dim == FLAN_T5_XL["d_model"] else {"num_layers": 1, "d_ff": 64}
    return {**FLAN_T5_XL, **small, "d_model": dim, "feed_forward_proj": "gated-gelu"}


def random_vae(small: bool, device: torch.device, dtype: torch.dtype) -> VAE:
    from diffusers import AutoencoderKLWan

    settings = WAN22 | ({"base_dim": 8, "decoder_base_dim": 8, "num_res_blocks": 1} if small else {})
    return VAE(with_fast_layers(filled(AutoencoderKLWan, device, dtype, **settings)))


def filled(kind: type[nn.Module], device: torch.device, dtype: torch.dtype, *settings, **named) -> nn.Module:
    """A library's model, made on the device."""
    with torch.device("meta"):
        module = kind(*settings, **named)
    return fill(module.to(dtype), device)


def fill(module: nn.Module, device: torch.device) -> nn.Module:
    """Memory on the device, with random weights of `spread`."""
    module = module.to_empty(device=device).requires_grad_(False)
    for name, weight in module.named_parameters():
        deviation = spread(name, weight.shape)
        if deviation:
            weight.normal_(std=deviation)
        else:
            weight.fill_(constant(name))
    return module.eval()


def spread(name: str, shape: Sequence[int]) -> float:
    """The deviation of a random weight, 0 for a vector: matrices and kernels have unit gain, a flow's output layers
    less, so that Jacobi contracts."""
    inputs = math.prod(shape[1:])
    return (GAIN if "proj_out" in name else 1.0) * inputs**-0.5 if len(shape) > 1 and inputs > 1 else 0.0


def constant(name: str) -> float:
    """The value of a bias or of a norm's gain."""
    return 0.0 if name.endswith(("bias", "final_norm.weight")) else 1.0


def shrunk(config: FlowConfig) -> FlowConfig:
    """The same form in small."""
    small = {"layers": (1, 1, 2), "width": 64, "deep_width": 64, "text_dim": 32, "prompt": PromptFormat(8)}
    if config.denoiser:
        small["denoiser"] = Denoiser(64, 2, 4)
        small["window"] = 5
    return replace(config, **small)


def operations(config: FlowConfig, job: Job, statistics: Statistics) -> float:
    """Multiplications and additions of the deep block: products with weights, and attention to half of the window."""
    width, layers = config.deep_width, config.layers[-1]
    rows = job.batch * (2 if job.guidance else 1)
    frames = config.latent.latent_frames(job.frames)
    window, _ = config.sliding_window(frames, job.window, job.keep)
    tokens = min(window, frames) * (job.height // config.cell) * (job.width // config.cell)
    keys = config.prompt.tokens + tokens / 2
    return rows * statistics.deep_evaluations * layers * (24 * width**2 + 4 * width * keys)


def limits(device: torch.device, side: int) -> dict[str, float]:
    """What the machine reaches: a bf16 product of side x side matrices, a copy of as many bytes on the device."""
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    b = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    product, copy = fastest(lambda: a @ b, device), fastest(lambda: b.copy_(a), device)
    return {"tflops": 2 * side**3 / product / 1e12, "gigabytes": 2 * a.nbytes / copy / 1e9}


def fastest(work: Callable[[], object], device: torch.device, times: int = 10) -> float:
    seconds = []
    for _ in range(times):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def line(name: str, work: Work, found: dict, most: float) -> str:
    cells = [f"{found['seconds']:9.2f}", _number(found["first"]), _number(work.goal), _number(work.floor)]
    share = f"{100 * found['tflops'] / most:5.0f} %"
    memory = "-" if found["peak_bytes"] is None else f"{found['peak_bytes'] / 1e9:.1f} GB"
    return f"{name:10} {' '.join(cells)} {found['sweeps']:8} {share} {memory:>9}"


def _number(value: float | None) -> str:
    return f"{'-' if value is None else format(value, '.2f'):>7}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--sweeps", type=int, default=8)
    parser.add_argument("--span", type=int, help="tokens solved at once (default: as suits a card)")
    parser.add_argument("--device")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(arguments)
    device = pick_device(options.device)
    bench = Bench(device, options.sweeps, options.span, options.small)
    reached = limits(device, 256 if options.small else 8192)
    print(f"{device}: {reached['tflops']:.1f} TFLOP/s in bf16, copies {reached['gigabytes']:.0f} GB/s")
    print(f"{'job':10} {'seconds':>9} {'first':>7} {'goal':>7} {'floor':>7} {'sweeps':>8} {'share':>7} {'peak':>9}")
    results = {}
    for name in options.jobs:
        work = WORKS[name]
        results[name] = {
            **asdict(work),
            **bench.run(work),
            "parameters": sum(weight.numel() for weight in bench.flow.parameters()),
        }
        print(line(name, work, results[name], reached["tflops"]), flush=True)
    if options.json:
        place = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        settings = asdict(bench.settings) | {"small": options.small}
        write_json(
            options.json, {**machine(), "device": place, "limits": reached, "settings": settings, "jobs": results}
        )


if __name__ == "__main__":
    main()
