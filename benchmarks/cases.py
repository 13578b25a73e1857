"""What solvers and types are measured on: samples of the demo at two sizes, and of a random model."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from starflow_core.model.config import FlowConfig, PromptFormat
from starflow_core.model.flow import Flow
from starflow_core.model.latent import LatentFormat
from starflow_core.pipeline import load_pipeline
from starflow_core.solve import noise as noises
from starflow_core.solve.sampling import sample
from starflow_core.solve.solvers import SolverSettings
from starflow_core.training.demo import clips

LEAST_ERROR = 1e-14  # below what float32 resolves; an error of zero has no logarithm
COSTS = ("deep_sweeps", "deep_evaluations", "shallow_sweeps", "shallow_evaluations", "cpu_seconds", "seconds")
GAIN = 0.5  # of the output layers of the random model


@dataclass(frozen=True)
class Case:
    """A flow, and one sample per seed: noise (S, T, C, H, W), text (S, L, D); uncond is (1, L, D)."""

    model: str
    kind: str
    flow: Flow
    noise: Tensor
    text: Tensor
    uncond: Tensor | None
    guidance: float


@torch.no_grad()
def sampled(
    case: Case, seed: int, settings: SolverSettings, flow: Flow | None = None
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """Latents of a case's sample, by another `flow` if one is given, and its `COSTS`."""
    one = slice(seed, seed + 1)
    wall, cpu = time.perf_counter(), time.process_time()
    out = sample(
        flow or case.flow, case.noise[one], case.text[one], case.uncond, guidance=case.guidance, settings=settings
    )
    spent = {"cpu_seconds": time.process_time() - cpu, "seconds": time.perf_counter() - wall}
    costs = vars(out.statistics) | spent
    return out.latents, {name: costs[name] for name in COSTS}


def relative_error(latents: Tensor, exact: Tensor) -> float:
    return max(float((latents - exact).square().sum() / exact.square().sum()), LEAST_ERROR)


def demo_case(kind: str, seeds: int, guidance: float, side: int = 96, quantise: bool = False) -> Case:
    """The bundled model and captions of its grammar: 33 frames of side x side, or a still.

    `quantise` brings the weights of flow and text encoder to 8 bit. The model was trained at 96, where a frame has 36
    tokens; with 192 it has 144.
    """
    pipeline = load_pipeline(device="cpu", quantise=quantise)
    job = pipeline.job(height=side, width=side, frames=33 if kind == "video" else 1, guidance=guidance)
    draw = random.Random(0)
    captions = [clips.caption(clips.random_scene(draw, 96, 96, kind == "video"), draw) for _ in range(seeds)]
    text, uncond, _ = pipeline.encode_text(captions, "", job)
    latent = pipeline.config.latent
    cells = (job.height // latent.spatial, job.width // latent.spatial)
    noise = noises.draw(0, seeds, latent.latent_frames(job.frames), (latent.channels, *cells))
    return Case(f"demo at {side} x {side}", kind, pipeline.flow, noise, text, uncond, guidance)


def mid_case(kind: str, seeds: int, guidance: float) -> Case:
    """A random flow over 5 frames (an image: 1) of 12 x 12 tokens."""
    flow = random_flow(kind)
    config, draw = flow.config, torch.Generator().manual_seed(1)
    text = torch.randn(seeds + 1, config.prompt.tokens, config.text_dim, generator=draw)
    noise = noises.draw(0, seeds, max(config.window, 1), (config.latent.channels, 12, 12))
    return Case("random mid-size model", kind, flow, noise, text[1:], text[:1], guidance)


CASES = {"demo": demo_case, "demo-192": partial(demo_case, side=192), "mid": mid_case}


def random_flow(kind: str, gain: float = GAIN) -> Flow:
    """Linear layers of unit gain, no biases; the output layers have `gain`, so that scale and shift depend on the
    past moderately, as they do in a trained flow, and Jacobi contracts."""
    config = FlowConfig(
        name="mid-size random model",
        kind=kind,
        latent=LatentFormat(16, 16, 4) if kind == "video" else LatentFormat(16, 8),
        prompt=PromptFormat(16),
        layers=(2, 2, 8),
        width=256,
        deep_width=384,
        text_dim=64,
        rope_length=12,
        noise_std=0.3,
        rounding="exact",
        window=5 if kind == "video" else 0,
    )
    flow, draw = Flow(config), torch.Generator().manual_seed(0)
    for name, weight in flow.named_parameters():
        if weight.ndim == 2:
            scale = (gain if "proj_out" in name else 1.0) / math.sqrt(weight.shape[1])
            weight.data = scale * torch.randn(weight.shape, generator=draw)
        elif name.endswith("bias"):
            weight.data.zero_()
    return flow.eval().requires_grad_(False)
