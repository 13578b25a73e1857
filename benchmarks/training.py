"""What a step of training costs: speed, memory against the forecast, and frozen weights in 8 bit.

    python -m benchmarks.training [--parts speed memory int8] [--json PATH]

speed: steps of the random mid-size models on this machine, every way in turn; of several rounds the fastest counts. The
share is that of a large matrix product of the same type, measured in between. memory: full-size models on tensors
without memory, every storage counted while it is alive, against the forecast. int8: the demo's LoRA learns beside
frozen weights in full and in 8 bit, from the same noise.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.cases import mid_case
from benchmarks.dryrun import CARD, GIB, dry, materialise
from benchmarks.meter import Meter
from benchmarks.report import machine, write_json
from starflow_core.bundled import BUNDLED, FLOW_FILE
from starflow_core.model.config import STARFLOW_3B, STARFLOW_V_7B, FlowConfig
from starflow_core.model.flow import Flow
from starflow_core.model.int8 import replace_linear
from starflow_core.model.lora import adapt
from starflow_core.training.data.buckets import Bucket
from starflow_core.training.forecast import forecast
from starflow_core.training.settings import Settings
from starflow_core.training.subjects import Rows, subject_of
from starflow_core.weights.flow import QUANTISED, load_flow

ROWS, ROUNDS = 4, 3
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MEGA = 1e6


# Speed


def speed() -> Iterator[dict]:
    """A row for each way to train the mid-size models."""
    for kind, train, dtype, recompute in product(("image", "video"), ("lora", "full"), TYPES, (False, True)):
        settings = Settings(train=train, dtype=dtype, recompute=recompute)
        yield {"kind": kind, "train": train, "dtype": dtype, "recompute": recompute} | _cost(kind, settings)


def _cost(kind: str, settings: Settings) -> dict:
    step, tokens = _stepper(kind, settings)
    step()
    with Meter() as meter:
        meter.mark()
        before = meter.now["cpu"]
        step()
    best, product_rate = float("inf"), 0.0
    for _ in range(ROUNDS):
        product_rate = max(product_rate, _product_rate(TYPES[settings.dtype]))
        began = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - began)
    rate = meter.flops / best
    return {"tokens_per_second": tokens / best, "seconds": best, "flops": meter.flops,
            "peak_bytes": meter.peak["cpu"] - before, "share_of_products": rate / product_rate}  # fmt: skip


def _stepper(kind: str, settings: Settings):
    """A function that makes a step, and how many tokens it sees."""
    dtype = TYPES[settings.dtype]
    flow = mid_case(kind, 1, 0.0).flow
    whole = settings.train == "full"
    if not whole:
        flow = flow.to(dtype)
        flow.compute_dtype = dtype
    subject = subject_of(flow, settings)
    for block in flow.blocks:
        block.recompute = settings.recompute
    learned = [weight for weight in flow.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learned, 1e-6)
    config = flow.config
    clean = torch.randn(ROWS, max(config.window, 1), config.latent.channels, 12, 12)
    text = torch.randn(ROWS, config.prompt.tokens, config.text_dim)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=whole and dtype != torch.float32):
            losses, _ = subject.losses(Rows(clean, clean, text, 0))
        losses.mean().backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()

    return step, clean[:, :, 0].numel() // config.patch_size**2


def _product_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """Floating point operations a second of one large product."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    a @ b
    began = time.perf_counter()
    a @ b
    return 2 * size**3 / (time.perf_counter() - began)


# Memory


@dataclass(frozen=True)
class Case:
    config: FlowConfig
    bucket: Bucket
    settings: dict


SMALL, LARGE = Bucket("1:1", 256, 256, 1), {n: Bucket("16:9", 480, 848, n) for n in (17, 41)}
LORA = {"rank": 32, "batch": 1}
CASES = {
    "3B, LoRA": Case(STARFLOW_3B, SMALL, LORA),
    "3B, LoRA, batch of 4": Case(STARFLOW_3B, SMALL, LORA | {"batch": 4}),
    "3B, LoRA, not computed again": Case(STARFLOW_3B, SMALL, LORA | {"recompute": False}),
    "3B, LoRA, weights in 8 bit": Case(STARFLOW_3B, SMALL, LORA | {"int8": True}),
    "3B, LoRA on all blocks": Case(STARFLOW_3B, SMALL, LORA | {"blocks": "all"}),
    "7B, LoRA, 17 frames": Case(STARFLOW_V_7B, LARGE[17], LORA),
    "7B, LoRA, 41 frames, weights in 8 bit": Case(STARFLOW_V_7B, LARGE[41], LORA | {"int8": True}),
}


def memory() -> Iterator[dict]:
    """A row for each case: what is counted, and the forecast."""
    for name, case in CASES.items():
        settings = Settings(**case.settings)
        need = forecast(case.config, settings, torch.bfloat16, case.bucket)
        counted = _counted(case, settings)
        yield {"case": name, "forecast": need.total, "counted": counted, "ratio": need.total / counted}


def _counted(case: Case, settings: Settings) -> int:
    """The largest number of bytes that are alive in the second step, when the optimizer has its state."""
    flow, meter = _outline(case.config, settings), Meter()
    with dry(meter, {"flops": 0, "moved": 0, "sweeps": 0, "evaluated": 0}), torch.enable_grad():
        materialise(flow, CARD)
        learned = [weight.requires_grad_() for name, weight in flow.named_parameters() if ".lora_" in name]
        average = [weight.detach().clone() for weight in learned]
        optimizer = torch.optim.AdamW(learned, 1e-3)
        for _ in range(2):
            meter.mark()
            _dry_step(flow, case, settings.batch, learned, optimizer)
        del average
    return meter.peak[CARD.type]


def _outline(config: FlowConfig, settings: Settings) -> Flow:
    flow = Flow(config, dtype=torch.bfloat16, device="meta")
    for name in [name for name, _ in flow.named_parameters() if settings.int8 and QUANTISED.fullmatch(name)]:
        replace_linear(flow, name.removesuffix(".weight"))
    adapt(flow, settings.rank, settings.rank, blocks=settings.blocks)
    for block in flow.blocks:
        block.recompute = settings.recompute
    return flow


def _dry_step(flow: Flow, case: Case, rows: int, learned: list[nn.Parameter], optimizer) -> None:
    config, bucket = case.config, case.bucket
    cells = (bucket.height // config.latent.spatial, bucket.width // config.latent.spatial)
    shape = (rows, config.latent.latent_frames(bucket.frames), config.latent.channels, *cells)
    latents = torch.empty(shape, device=CARD)
    text = torch.empty(rows, config.prompt.tokens, config.text_dim, device=CARD)
    flow.loss(latents, text).mean().backward()
    nn.utils.clip_grad_norm_(learned, 1.0)
    optimizer.step()
    optimizer.zero_grad()


# Frozen weights in 8 bit


def int8(steps: int = 60) -> Iterator[dict]:
    """How a LoRA of the demo learns beside weights in full and in 8 bit, and how small its part of them is."""
    full, eight = (_learn(quantise, steps) for quantise in (False, True))
    for name in ("first", "last"):
        yield {"loss": name, "full": full[name], "int8": eight[name]}
    a, b = (torch.cat([delta.flatten() for delta in run["deltas"]]) for run in (full, eight))
    yield {"delta": "cosine of full and int8", "value": float(a @ b / (a.norm() * b.norm()))}
    yield {"delta": "norm over the weight's", "value": float(a.norm()) / full["norm"]}


def _learn(quantise: bool, steps: int) -> dict:
    flow = load_flow(BUNDLED / FLOW_FILE, torch.float32, quantise=quantise)
    loras = adapt(flow, 16, 16.0, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([w for lora in loras.values() for w in lora.parameters()], 3e-3)
    generator, losses = torch.Generator().manual_seed(1), []
    wanted = 0.8 * torch.randn(1, 3, 16, 6, 6, generator=generator)
    text = torch.randn(1, 48, 128, generator=generator)
    for _ in range(steps):
        noisy = wanted + 0.2 * torch.randn(8, *wanted.shape[1:], generator=generator)
        loss = flow.loss(noisy, text.expand(8, -1, -1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    norm = float("nan") if quantise else _norm([flow.get_submodule(name).weight for name in loras])
    deltas = [lora.delta().detach() for lora in loras.values()]
    return {"first": losses[0], "last": sum(losses[-5:]) / 5, "deltas": deltas, "norm": norm}


def _norm(weights: list[Tensor]) -> float:
    return float(torch.stack([weight.float().norm() for weight in weights]).norm())


PARTS = {"speed": speed, "memory": memory, "int8": int8}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = {"machine": machine()}
    for part in options.parts:
        report[part] = []
        for row in PARTS[part]():
            report[part].append(row)
            print(part, "  ".join(f"{key} {_shown(key, value)}" for key, value in row.items()), flush=True)
            if options.json:
                write_json(options.json, report)
    wrong = [row["case"] for row in report.get("memory", ()) if not 1.0 <= row["ratio"] <= 1.05]
    return 1 if wrong else 0


def _shown(key: str, value) -> str:
    if key in ("forecast", "counted"):
        return f"{value / GIB:.2f} GiB"
    if key == "peak_bytes":
        return f"{value / MEGA:.1f} MB"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    raise SystemExit(main())
