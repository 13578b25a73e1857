"""What weights in 8 bit change: sample error, sweeps and bits per dimension.

    python -m benchmarks.int8 [--model demo|mid|all] [--seeds 5] [--guidance G] [--json PATH]

Each flow samples with float32 weights, with these rounded to bfloat16, and in 8 bit, all computing in float32; the demo
also with its text encoder in 8 bit, and, where the package comfy-kitchen is installed, with its `int8_linear`, which
rounds activations to 8 bit, too, each token by a scale of its own. An error is the relative squared error of the final
latents against those of float32 weights, solved autoregressively; bits per dimension are those of these latents. All
figures are means over the seeds; errors are geometric means. The file is written after each case.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from benchmarks.cases import CASES, Case, demo_case, relative_error, sampled
from benchmarks.report import machine, write_json
from starflow_core.model.flow import Flow
from starflow_core.model.int8 import Int8Linear
from starflow_core.solve.solvers import AUTOREGRESSIVE, PRESETS, SolverSettings
from starflow_core.weights.flow import load_flow, save_flow

SOLVERS = {name: PRESETS[name] for name in ("balanced", "exact")}
SWEEPS = ("deep_sweeps", "shallow_sweeps")
FLOAT = "float32"


@dataclass(frozen=True)
class Result:
    """One kind of weights: bits per dimension, and for each solver its error and sweeps."""

    weights: str
    bits_per_dim: float
    solvers: dict[str, dict[str, float]]


class ActivationsToo(Int8Linear):
    """comfy-kitchen's layer for the same weights."""

    def forward(self, inputs: Tensor) -> Tensor:
        layer = torch.ops.comfy_kitchen.int8_linear
        return layer(inputs.contiguous(), self.weight, self.weight_scale, self.bias, 0, False, 256)  # 0: float32


def variants(flow: Flow) -> Iterator[tuple[str, Flow]]:
    """The flow with each kind of weights."""
    yield FLOAT, flow
    with tempfile.TemporaryDirectory() as folder:
        whole, half = Path(folder) / "fp32.safetensors", Path(folder) / "bf16.safetensors"
        save_flow(flow, whole, "fp32")
        save_flow(flow, half, "bf16")
        yield "bfloat16", load_flow(half, torch.float32)
        yield "int8", load_flow(whole, torch.float32, quantise=True)
        if has_kitchen():
            yield "int8, activations too", load_flow(whole, torch.float32, quantise=True, int8_linear=ActivationsToo)


def has_kitchen() -> bool:
    try:
        import comfy_kitchen  # noqa: F401
    except ImportError:
        return False
    return True


def measure(model: str, *settings) -> dict:
    """All kinds of weights on one case, ready for JSON. `settings` are kind, seeds and guidance."""
    case = CASES[model](*settings)
    exact = torch.cat([latents for latents, _ in samples(case, case.flow, AUTOREGRESSIVE)])
    results = [result(name, case, flow, exact) for name, flow in variants(case.flow)]
    if model == "demo":
        whole = demo_case(*settings, quantise=True)
        results.append(result("int8, text encoder too", whole, whole.flow, exact))
    return {
        "model": case.model,
        "kind": case.kind,
        "tokens": list(vars(case.flow.grid(case.noise)).values()),
        "results": [asdict(found) for found in results],
    }


def result(weights: str, case: Case, flow: Flow, exact: Tensor) -> Result:
    solvers = {}
    for solver, settings in SOLVERS.items():
        found = samples(case, flow, settings)
        errors = [relative_error(latents, exact[i : i + 1]) for i, (latents, _) in enumerate(found)]
        sweeps = {name: mean(costs[name] for _, costs in found) for name in SWEEPS}
        solvers[solver] = {"error": math.exp(mean(map(math.log, errors))), **sweeps}
    with torch.no_grad():
        bits = flow.encode(exact, case.text).bits_per_dim
    return Result(weights, float(bits.mean()), solvers)


def samples(case: Case, flow: Flow, settings: SolverSettings) -> list[tuple[Tensor, dict[str, float]]]:
    """Latents and costs of each seed."""
    return [sampled(case, seed, settings, flow) for seed in range(len(case.noise))]


def text(found: dict) -> str:
    lines = [f"{found['model']}, {found['kind']}, tokens {found['tokens']}"]
    for row in found["results"]:
        lines.append(f"  {row['weights']:22} {row['bits_per_dim']:8.4f} bits per dimension")
        for solver, values in row["solvers"].items():
            sweeps = ", ".join(f"{values[name]:.1f} {name.replace('_', ' ')}" for name in SWEEPS)
            lines.append(f"    {solver:20} error {values['error']:.1e}, {sweeps}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("demo", "mid", "all"), default="all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = []
    for model in ("demo", "mid") if arguments.model == "all" else (arguments.model,):
        for kind in ("video", "image"):
            cases.append(measure(model, kind, arguments.seeds, arguments.guidance))
            print(text(cases[-1]), end="\n\n", flush=True)
            if arguments.json:
                settings = {"seeds": arguments.seeds, "guidance": arguments.guidance}
                write_json(arguments.json, {**machine(), "settings": settings, "cases": cases})


if __name__ == "__main__":
    main()
