"""How fast the flow is inverted, at what error: autoregressive, plain block Jacobi, and ours.

    python -m benchmarks.solver [--model demo|demo-192|mid|all] [--seeds 5] [--guidance G] [--json PATH] [--quick]
    python -m benchmarks.solver --table benchmarks/results/solver-*.json

An error is the relative squared error of the final latents (flow space, before denoising) against the autoregressive
answer. All figures are geometric means over the seeds, whose samples are made one at a time. A threshold is not an
error: both Jacobi solvers run over a range of thresholds, and what each needs for one and the same error is
interpolated between these (log against log). The baseline has one threshold for all blocks, as the reference has;
ours keeps the ratio of its two tolerances. Ours has the spans of its presets; the baseline has its authors' chunk and
a range of others, the best of which is found from the same samples that are compared. The solvers take turns on one
thread, so that whatever else the machine does slows all of them; CPU seconds are less sensitive to it. Peak memory
(Linux only) is that of anonymous pages, sampled while a process of its own makes one sample. `--table` prints the
README's tables from such files.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.baseline import Baseline, sample_baseline
from benchmarks.comparison import AUTHORS_CHUNK, COSTS, Row, at_errors, case_text, compare, tables
from benchmarks.convert_memory import AnonymousPeak
from starflow_core.model.config import FlowConfig, PromptFormat
from starflow_core.model.flow import Flow, Grid
from starflow_core.model.latent import LatentFormat
from starflow_core.pipeline import load_pipeline
from starflow_core.solve import noise as noises
from starflow_core.solve.sampling import sample
from starflow_core.solve.solvers import AUTOREGRESSIVE, PRESETS, SolverSettings
from starflow_core.training.demo import clips

THRESHOLDS = (3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
RANGES = {"demo": (3e-1, 1e-5), "demo-192": (3e-1, 1e-4), "mid": (3e-2, 1e-4)}  # that reach the ERRORS
CHUNKS, QUICK_CHUNKS = (4, 8, 16, 24, 32, 48, 64, 96, 128), (16, 32, 64)  # of the baseline
SPANS = ("image_span", "first_span", "span")  # of ours
ERRORS = (2e-3, 1e-4)  # at which the solvers are compared
LEAST_ERROR = 1e-14  # below what float32 resolves; an error of zero has no logarithm
GAIN = 0.5  # of the output layers of the random model

Settings = SolverSettings | Baseline


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


def turns(thresholds: Sequence[float], chunks: Sequence[int], ratio: float | None) -> list[Settings]:
    """At each threshold the baseline with each chunk, then ours, whose shallow_tolerance / tolerance is `ratio` (None:
    that of "balanced")."""
    balanced = PRESETS["balanced"]
    ratio = ratio or balanced.shallow_tolerance / balanced.tolerance
    found = []
    for threshold in thresholds:
        found += [Baseline(chunk, threshold) for chunk in chunks]
        found.append(replace(balanced, tolerance=threshold, shallow_tolerance=threshold * ratio))
    return found


def run_case(
    flow: Flow,
    noise: Tensor,
    text: Tensor,
    uncond: Tensor | None,
    guidance: float,
    settings_list: Sequence[Settings],
    exact: Tensor | None = None,
) -> list[Row]:
    """One row for each of the settings.

    noise (S, T, C, H, W) and text (S, L, D) have one sample per seed, uncond is (1, L, D). `exact` is what
    `autoregressive` gives, where it is at hand.
    """
    if exact is None:
        exact, _ = autoregressive(flow, noise, text, uncond, guidance)
    figures = [[] for _ in settings_list]
    for i in range(len(noise)):
        for settings, found in zip(settings_list, figures, strict=True):
            latents, costs = timed(flow, noise[i : i + 1], text[i : i + 1], uncond, guidance, settings)
            found.append((relative_error(latents, exact[i : i + 1]), *costs))
    return [_row(settings, found) for settings, found in zip(settings_list, figures, strict=True)]


def autoregressive(
    flow: Flow, noise: Tensor, text: Tensor, uncond: Tensor | None, guidance: float
) -> tuple[Tensor, Row]:
    """The exact latents (S, T, C, H, W), and what they cost; arguments as in `run_case`."""
    samples = [
        timed(flow, noise[i : i + 1], text[i : i + 1], uncond, guidance, AUTOREGRESSIVE) for i in range(len(noise))
    ]
    exact = torch.cat([latents for latents, _ in samples])
    row = _row(AUTOREGRESSIVE, [(LEAST_ERROR, *costs) for _, costs in samples])
    return exact, replace(row, error=0.0)


@torch.no_grad()
def timed(flow: Flow, noise: Tensor, text: Tensor, uncond: Tensor | None, guidance: float, settings: Settings):
    """Latents by any of the solvers, and its `COSTS`."""
    wall, cpu = time.perf_counter(), time.process_time()
    if isinstance(settings, Baseline):
        latents, statistics = sample_baseline(flow, noise, text, uncond, guidance, settings)
    else:
        out = sample(flow, noise, text, uncond, guidance=guidance, settings=settings)
        latents, statistics = out.latents, out.statistics
    costs = vars(statistics) | {"cpu_seconds": time.process_time() - cpu, "seconds": time.perf_counter() - wall}
    return latents, [costs[name] for name in COSTS]


def relative_error(latents: Tensor, exact: Tensor) -> float:
    return max(float((latents - exact).square().sum() / exact.square().sum()), LEAST_ERROR)


def _row(settings: Settings, figures: list[tuple]) -> Row:
    means = [math.exp(sum(map(math.log, values)) / len(values)) for values in zip(*figures, strict=True)]
    if isinstance(settings, Baseline):
        return Row("baseline", {"chunk": settings.chunk}, settings.threshold, *means)
    if settings.method == "autoregressive":
        return Row("autoregressive", {}, 0.0, *means)
    return Row("ours", {name: getattr(settings, name) for name in SPANS}, settings.tolerance, *means)


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


def measure(case: Case, thresholds: Sequence[float], chunks: Sequence[int], ratio: float | None) -> dict:
    """All solvers on one case, ready for JSON."""
    inputs, grid = (case.flow, case.noise, case.text, case.uncond, case.guidance), case.flow.grid(case.noise)
    exact, reference = autoregressive(*inputs)
    rows = run_case(*inputs, [*turns(thresholds, distinct(chunks, grid), ratio), *PRESETS.values()], exact)
    rows, presets = rows[: -len(PRESETS)], rows[-len(PRESETS) :]
    equal = at_errors(rows, ERRORS)
    return {
        "model": case.model,
        "kind": case.kind,
        "tokens": [grid.frames, grid.height, grid.width],
        "autoregressive": asdict(reference),
        "presets": {name: asdict(row) for name, row in zip(PRESETS, presets, strict=True)},
        "rows": [asdict(row) for row in rows],
        "at_equal_error": [asdict(row) for row in equal],
        "comparisons": [asdict(comparison) for comparison in compare(equal, case.kind)],
    }


def distinct(chunks: Sequence[int], grid: Grid) -> list[int]:
    """Without the chunks that do the same as a smaller one, which holds all tokens already."""
    return [chunk for i, chunk in enumerate(chunks) if i == 0 or chunks[i - 1] < grid.frames * grid.frame_tokens]


def peak_memory(model: str, kind: str, guidance: float) -> dict[str, int]:
    """Peak of anonymous memory above the loaded model, in bytes, for one sample by each solver."""
    # With mapped allocations, freed memory goes back at once and can't hide what is needed later.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.solver", "--model", model, "--guidance", str(guidance), "--peak", kind]
    return {
        solver: int(subprocess.check_output([*command, solver], env=environment, cwd=Path(__file__).parents[1]))
        for solver in ("autoregressive", "baseline", "ours")
    }


def sample_for_peak(model: str, kind: str, solver: str, guidance: float) -> int:
    settings = {
        "autoregressive": AUTOREGRESSIVE,
        "baseline": Baseline(AUTHORS_CHUNK[kind]),
        "ours": PRESETS["balanced"],
    }
    torch.set_num_threads(1)
    case = CASES[model](kind, 1, guidance)
    monitor = AnonymousPeak()
    monitor.start()
    timed(case.flow, case.noise, case.text, case.uncond, guidance, settings[solver])
    return monitor.stop()


def machine() -> dict[str, str | int]:
    return {
        "device": f"cpu, {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_json(path: Path, report: dict) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(part, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=(*CASES, "all"), default="all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--ratio", type=float, help="shallow over deep tolerance of ours (default: balanced's)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--quick", action="store_true", help="two seeds, fewer chunks, no memory")
    parser.add_argument("--table", type=Path, nargs="+", metavar="JSON", help="only print the tables of these files")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.table:
        cases = [case for path in arguments.table for case in json.loads(path.read_text())["cases"]]
        print(tables(cases))
    elif arguments.peak:
        print(sample_for_peak(arguments.model, *arguments.peak, arguments.guidance))
    else:
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    seeds, chunks = (2, QUICK_CHUNKS) if arguments.quick else (arguments.seeds, CHUNKS)
    results = []
    for model in CASES if arguments.model == "all" else (arguments.model,):
        loosest, tightest = RANGES[model]
        thresholds = [threshold for threshold in THRESHOLDS if tightest <= threshold <= loosest]
        for kind in AUTHORS_CHUNK:
            result = measure(CASES[model](kind, seeds, arguments.guidance), thresholds, chunks, arguments.ratio)
            if sys.platform == "linux" and not arguments.quick:
                result["peak_bytes"] = peak_memory(model, kind, arguments.guidance)
            results.append(result)
            print(case_text(result), end="\n\n", flush=True)
    print(tables(results))
    if arguments.json:
        settings = {"seeds": seeds, "guidance": arguments.guidance, "ratio": arguments.ratio, "chunks": chunks}
        settings["presets"] = {name: asdict(preset) for name, preset in PRESETS.items()}
        write_json(arguments.json, {**machine(), "settings": settings, "cases": results})


if __name__ == "__main__":
    main()
