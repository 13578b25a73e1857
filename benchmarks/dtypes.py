"""Whether bfloat16 pays on this CPU: time against float32, and what it changes.

    python -m benchmarks.dtypes [--models demo mid wide] [--seeds 2] [--guidance G] [--json PATH]

Each flow samples in float32 and in bfloat16 in turn, with one thread and with two, in the balanced preset; a ratio is
bfloat16's cost divided by float32's. The error is the relative squared error of the final latents in the exact preset
against float32's; with it come the sweeps of both. The wide model has a few random layers of the 3B's width. All
figures are geometric means over the seeds. What a step of training costs is in benchmarks/training.py.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean

import torch

from benchmarks.cases import CASES, Case, mid_case, relative_error, sampled
from benchmarks.report import machine, write_json
from starflow_core.model.config import STARFLOW_3B
from starflow_core.model.flow import Flow
from starflow_core.solve import noise as noises
from starflow_core.solve.solvers import PRESETS

THREADS = (1, 2)
TYPES = (torch.float32, torch.bfloat16)
RATIOS = ("cpu_seconds", "seconds", "deep_sweeps")


def wide_case(kind: str, seeds: int, guidance: float) -> Case:
    """A random flow of 3 layers as wide as the 3B's, over one frame (a clip: 2) of 6 x 6 tokens."""
    mid = mid_case(kind, seeds, guidance)
    width = STARFLOW_3B.width
    config = replace(mid.flow.config, layers=(1, 2), width=width, deep_width=width, head_dim=STARFLOW_3B.head_dim)
    torch.manual_seed(0)
    flow = Flow(config).eval().requires_grad_(False)
    noise = noises.draw(0, seeds, 2 if kind == "video" else 1, (config.latent.channels, 6, 6))
    return replace(mid, model="random layers of the 3B's width", flow=flow, noise=noise)


MODELS = {"demo": CASES["demo"], "mid": mid_case, "wide": wide_case}


def measure(case: Case) -> dict:
    """Both types on one case, ready for JSON."""
    flows = {dtype: in_type(case.flow, dtype) for dtype in TYPES}
    exact = {dtype: [sampled(case, i, PRESETS["exact"], flow) for i in seeds(case)] for dtype, flow in flows.items()}
    whole, half = exact.values()
    error = geometric_mean(relative_error(b[0], a[0]) for a, b in zip(whole, half, strict=True))
    return {
        "model": case.model,
        "kind": case.kind,
        "tokens": list(vars(case.flow.grid(case.noise)).values()),
        "error": error,
        "sweeps": {str(t): mean_cost([costs for _, costs in found], "deep_sweeps") for t, found in exact.items()},
        "balanced": [in_turn(case, flows, threads) for threads in THREADS],
    }  # fmt: skip


def in_turn(case: Case, flows: dict[torch.dtype, Flow], threads: int) -> dict:
    """Seconds of float32, and bfloat16's divided by them."""
    torch.set_num_threads(threads)
    for flow in flows.values():
        sampled(case, 0, PRESETS["balanced"], flow)  # the first run prepares
    costs = {dtype: [] for dtype in flows}
    for i in seeds(case):
        for dtype, flow in flows.items():
            costs[dtype].append(sampled(case, i, PRESETS["balanced"], flow)[1])
    found = {"threads": threads}
    for name in RATIOS:
        whole, half = (mean_cost(each, name) for each in costs.values())
        found |= {name: whole, f"{name}_ratio": half / whole}
    return found


def in_type(flow: Flow, dtype: torch.dtype) -> Flow:
    flow = copy.deepcopy(flow).to(dtype)
    flow.compute_dtype = dtype
    return flow


def seeds(case: Case) -> range:
    return range(len(case.noise))


def mean_cost(costs: list[dict[str, float]], name: str) -> float:
    return geometric_mean(each[name] for each in costs)


def text(found: dict) -> str:
    sweeps = " and ".join(f"{count:.1f}" for count in found["sweeps"].values())
    lines = [f"{found['model']}, {found['kind']}: error {found['error']:.1e}, exact preset in {sweeps} sweeps"]
    for row in found["balanced"]:
        ratios = (f"{name.replace('_', ' ')} {row[f'{name}_ratio']:.2f}" for name in RATIOS)
        lines.append(f"  {row['threads']} threads: {', '.join(ratios)} of {row['seconds']:.1f} s")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    cases = []
    for model in arguments.models:
        for kind in ("image", "video"):
            cases.append(measure(MODELS[model](kind, arguments.seeds, arguments.guidance)))
            print(text(cases[-1]), flush=True)
    if arguments.json:
        multiplies = torch.cpu._is_avx512_bf16_supported()
        settings = {"seeds": arguments.seeds, "guidance": arguments.guidance}
        write_json(arguments.json, {**machine(), "multiplies_bf16": multiplies, "settings": settings, "cases": cases})


if __name__ == "__main__":
    main()
