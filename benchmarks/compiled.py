"""What compiling brings on this machine: time against uncompiled sampling, and the time of the compiler.

    python -m benchmarks.compiled [--models demo mid] [--seeds 3] [--guidance G] [--device NAME] [--json PATH]

Each flow samples as it is and compiled in turn, with one thread, in the balanced preset, after one sample of each that
doesn't count; a ratio is the compiled cost divided by the other. The first compiled sample, for which graphs are made,
is told apart: with nothing kept on disk, and once more with what PyTorch has kept there. The error is the relative
squared error of the compiled latents against the others, in the exact preset. Figures are geometric means over the
seeds.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean
from tempfile import TemporaryDirectory

import torch

from benchmarks.cases import CASES, Case, mid_case, relative_error, sampled
from benchmarks.report import machine, write_json
from starflow_core.model.placement import pick_device
from starflow_core.solve.solvers import PRESETS

MODELS = {"demo": CASES["demo"], "mid": mid_case}


def measure(case: Case, device: torch.device) -> dict:
    """Both ways on one case, ready for JSON."""
    from torch._dynamo.utils import counters

    case = replace(case, noise=case.noise.to(device), text=case.text.to(device), uncond=case.uncond.to(device),
                   flow=case.flow.to(device))  # fmt: skip
    fast = copy.deepcopy(case.flow)
    fast.compile()
    firsts = []
    with TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # nothing is kept from before
        for _ in range(2):
            torch._dynamo.reset()
            counters.clear()
            began = time.perf_counter()
            sampled(case, 0, PRESETS["balanced"], fast)
            firsts.append(time.perf_counter() - began)
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    sampled(case, 0, PRESETS["balanced"])
    exact = [
        [sampled(case, i, PRESETS["exact"], flow)[0] for flow in (case.flow, fast)] for i in range(len(case.noise))
    ]
    costs = [
        [sampled(case, i, PRESETS["balanced"], flow)[1] for flow in (case.flow, fast)] for i in range(len(case.noise))
    ]
    ratios = {
        f"{name}_ratio": geometric_mean(fast[name] / slow[name] for slow, fast in costs)
        for name in ("cpu_seconds", "seconds")
    }
    return {
        "model": case.model,
        "kind": case.kind,
        "tokens": list(vars(case.flow.grid(case.noise)).values()),
        "graphs": graphs,
        "breaks": breaks,
        "first_seconds": firsts[0],
        "first_seconds_again": firsts[1],
        "seconds": geometric_mean(slow["seconds"] for slow, _ in costs),
        **ratios,
        "error": geometric_mean(relative_error(b, a) for a, b in exact),
    }


def text(found: dict) -> str:
    first, again = (f"{found[name]:.0f} s" for name in ("first_seconds", "first_seconds_again"))
    return (
        f"{found['model']}, {found['kind']}: CPU seconds {found['cpu_seconds_ratio']:.2f}, seconds "
        f"{found['seconds_ratio']:.2f} of {found['seconds']:.1f} s; {found['graphs']} graphs, {found['breaks']} "
        f"breaks, the first sample takes {first}, another process's {again}; error {found['error']:.0e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = []
    for model in arguments.models:
        for kind in ("image", "video"):
            case = MODELS[model](kind, arguments.seeds, arguments.guidance)
            cases.append(measure(case, pick_device(arguments.device)))
            print(text(cases[-1]), flush=True)
    if arguments.json:
        settings = {"seeds": arguments.seeds, "guidance": arguments.guidance}
        write_json(arguments.json, {**machine(), "settings": settings, "cases": cases})


if __name__ == "__main__":
    main()
