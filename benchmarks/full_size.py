"""The real commands at full size on a CPU: convert, inspect and generate, and whether they need the memory forecast.

    python -m benchmarks.full_size [--model 3b|7b|all] [--folder PATH] [--json PATH] [--small]

Makes random weights in a temporary folder inside `--folder`, which is deleted at the end, also after Ctrl-C: 30 GB for
the 3B, 26 GB for the 7B, one after the other. The 3B is a .pth in float32 as its authors publish theirs, with their
buffers; the 7B, a .safetensors in bfloat16. Each has a text encoder with flan-t5-xl's shapes (bfloat16) and a VAE in
float32 beside it. Random weights make no picture, but a sample takes what it takes with Apple's. `--small` has tiny
models of the same form, to try the benchmark.

Every command runs in a process of its own. "Own" is its peak of memory that isn't mapped from files (RssAnon), above
what Python and the libraries take before the first weight is read ("base"); "resident" counts everything (VmHWM). The
forecast is the planner's, which `generate` prints; that of a conversion, its largest weight as it is read and as it
is written. Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.convert_memory import AnonymousPeak, memory
from benchmarks.gpu import MODELS, SD_VAE, WAN22, constant, shrunk, spread, t5_settings
from benchmarks.report import machine, write_json
from starflow_core import cli
from starflow_core.cli import settings as cli_settings
from starflow_core.cli.progress import Meter
from starflow_core.errors import InputError
from starflow_core.jobs.planner import MemoryPlan
from starflow_core.model.config import FlowConfig
from starflow_core.training.demo.tokenizer import build_tokenizer
from starflow_core.weights.flow import expected_shapes
from starflow_core.weights.keys import Shapes, module_shapes
from starflow_core.weights.pickles import open_archive
from starflow_core.weights.tensorfiles import write_tensors
from starflow_core.weights.text import EMBEDDING_ALIAS
from starflow_core.weights.vae import METADATA_KEY

LARGE = 1 << 24  # numbers of a weight
# A few wide sweeps: each takes what it takes, and random weights have no answer to come near to.
SWEEPS = ("--preset", "fast", "--image-span", "64", "--first-span", "64", "--span", "64", "--max-sweeps", "3")
PROMPT = "a red circle on a white background"
SMALL_VAE = {
    "image": {"block_out_channels": [32] * 4, "layers_per_block": 1},
    "video": {"base_dim": 8, "decoder_base_dim": 8, "num_res_blocks": 1},
}
# Bytes that a conversion holds for each number of its largest weight: as it was read, and as it is written.
CONVERTING = {("pth", "bf16"): 4 + 2, ("pth", "int8"): 4 + 1, ("safetensors", "int8"): 2 + 1}


@dataclass(frozen=True)
class Model:
    """A model whose checkpoint is a file of this kind, the types it is converted to, and the options of a job."""

    name: str
    source: str
    types: tuple[str, ...]
    job: tuple[str, ...]
    needs: int  # bytes of disk


SIZES = {
    "3b": Model("starflow-3b", "pth", ("bf16", "int8"), ("--height", "128", "--width", "128"), 30 * 10**9),
    "7b": Model("starflow-v-7b", "safetensors", ("int8",), ("--height", "96", "--width", "96", "--frames", "5"),
                26 * 10**9),
}  # fmt: skip


# Files


class Pool:
    """Random weights, cut out of one long row of numbers, which is kept as large weights want it: to draw or scale
    each of them would take longer than the jobs."""

    def __init__(self, largest: int):
        self.draw, self.rows = torch.Generator().manual_seed(0), {}
        self.numbers = torch.randn(largest + largest // 8 + 1, generator=self.draw)

    def weight(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """A weight with the deviation of `gpu.spread`."""
        count, deviation = math.prod(shape), spread(name, shape)
        if not deviation:
            return torch.full(shape, constant(name), dtype=dtype)
        start = int(torch.randint(len(self.numbers) - count, (), generator=self.draw))
        if count < LARGE:
            return (self.numbers[start : start + count].view(shape) * deviation).to(dtype)
        if (deviation, dtype) not in self.rows:
            self.rows[deviation, dtype] = (self.numbers * deviation).to(dtype)
        return self.rows[deviation, dtype][start : start + count].view(shape)


def make_files(folder: Path, model: Model, small: bool) -> FlowConfig:
    """Checkpoint, text encoder and VAE in a folder."""
    from transformers import T5Config, T5EncoderModel

    config = shrunk(MODELS[model.name]) if small else MODELS[model.name]
    shapes, source = expected_shapes(config), folder / f"model.{model.source}"
    t5 = outline(T5EncoderModel, T5Config(**t5_settings(config.text_dim)))
    t5_shapes = {name: shape for name, shape in module_shapes(t5).items() if name != EMBEDDING_ALIAS}
    pool = Pool(max(largest(shapes), largest(t5_shapes)))
    if model.source == "pth":
        write_archive(source, shapes, buffers(config), pool)
    else:
        write_weights(source, shapes, torch.bfloat16, {}, pool)
    if small:
        source.with_suffix(".json").write_text(json.dumps(config.to_dict()))  # full-size ones are recognised
    (folder / "t5").mkdir()
    make_tokenizer(folder / "t5", t5.config.vocab_size)
    write_weights(folder / "t5" / "model.safetensors", t5_shapes, torch.bfloat16, {}, pool)
    make_vae(folder / "vae.safetensors", config.kind, small, pool)
    return config


def make_vae(path: Path, kind: str, small: bool, pool: Pool) -> None:
    from diffusers import AutoencoderKL, AutoencoderKLWan

    settings = (SD_VAE if kind == "image" else WAN22) | (SMALL_VAE[kind] if small else {})
    vae = outline(AutoencoderKL if kind == "image" else AutoencoderKLWan, **settings)
    write_weights(path, module_shapes(vae), torch.float32, {METADATA_KEY: json.dumps(settings)}, pool)


def outline(kind: type[nn.Module], *settings, **named) -> nn.Module:
    with torch.device("meta"):
        return kind(*settings, **named)


def write_weights(path: Path, shapes: Shapes, dtype: torch.dtype, metadata: dict[str, str], pool: Pool) -> None:
    """A safetensors file, a tensor at a time."""
    layout = {name: (shape, dtype) for name, shape in shapes.items()}
    write_tensors(path, layout, metadata, (pool.weight(*each, dtype) for each in shapes.items()))


def write_archive(path: Path, shapes: Shapes, more: Shapes, pool: Pool) -> None:
    """What torch.save writes of these, a tensor at a time; only the archive's checksums are missing."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.serialization import skip_data

    with FakeTensorMode(), skip_data(materialize_fake_tensors=True):
        torch.save({name: torch.empty(shape) for name, shape in (shapes | more).items()}, path)
    with open(path, "r+b") as file:
        for name, tensor in open_archive(path).items():
            file.seek(tensor.record.start)
            file.write(memoryview(pool.weight(name, tensor.shape).view(-1).numpy()).cast("B"))


def buffers(config: FlowConfig) -> Shapes:
    """What the authors' file holds besides the weights, which nothing reads."""
    positions = round(config.rope_length**2)
    rows = positions + config.prompt.tokens
    angles = {f"feat_rope.freqs_{part}": (rows, config.head_dim // 2) for part in ("cos", "sin")}
    return {"var": (positions, config.token_channels), **angles}


def make_tokenizer(folder: Path, rows: int) -> None:
    """The demo's, with pieces that no text has, up to an embedding of so many rows."""
    build_tokenizer(folder)
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    pieces = values["model"]["vocab"]
    pieces += [[f"\ue000{i}", -20.0] for i in range(len(pieces), rows)]
    path.write_text(json.dumps(values))


def largest(shapes: Shapes) -> int:
    return max(map(math.prod, shapes.values()))


# Commands


def steps(folder: Path, model: Model, shapes: Shapes) -> Iterator[tuple[str, list[str], int | None]]:
    """Name, arguments and, for a conversion, the forecast of each command. The source goes once it isn't needed."""
    source, parts = folder / f"model.{model.source}", ("--text-encoder", folder / "t5", "--vae")
    for dtype in model.types:
        need = CONVERTING[model.source, dtype] * largest(shapes)
        yield f"convert to {dtype}", ["convert", source, folder / f"{dtype}.safetensors", "--dtype", dtype], need
    source.unlink()
    output = folder / ("clip.mp4" if "--frames" in model.job else "picture.png")
    run = ("--device", "cpu", "--dtype", "bf16", "-o", output, *SWEEPS)
    for dtype in model.types:
        weights = folder / f"{dtype}.safetensors"
        yield f"inspect {dtype}", ["inspect", weights, *model.job], None
        command = ["generate", PROMPT, "--model", weights, *parts, folder / "vae.safetensors", *model.job, *run]
        yield f"generate, {dtype} weights", command, None
        output.unlink()


def measure(folder: Path, name: str, command: list, forecast: int | None) -> dict:
    """One command in a process of its own."""
    found, began = folder / "found.json", time.perf_counter()
    worker = [sys.executable, "-m", "benchmarks.full_size", "--run", found, *command]
    done = subprocess.run(list(map(str, worker)), cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{name} failed: {done.stderr.strip()}")
    row = {"step": name, "seconds": time.perf_counter() - began, **json.loads(found.read_text())}
    row["forecast_bytes"] = row["forecast_bytes"] or forecast
    row["own_bytes"] = max(row["phases"].values(), default=row["base_bytes"]) - row["base_bytes"]
    row["ratio"] = row["own_bytes"] / row["forecast_bytes"] if row["forecast_bytes"] else None
    return row


class Watch(AnonymousPeak):
    """The peak of anonymous memory in each phase of a command, named as its progress is."""

    def __init__(self):
        super().__init__()
        self.phase, self.phases, self.seconds, self.began = None, {}, {}, time.process_time()
        self.base, self.plan = 0, None

    def enter(self, phase: str) -> None:
        if phase != self.phase:
            self.note(time.process_time())
            self.phase = phase

    def note(self, now: float) -> None:
        """What the phase took until now."""
        if self.phase:
            self.phases[self.phase] = max(self.phases.get(self.phase, 0), self.peak, memory("RssAnon"))
            self.seconds[self.phase] = self.seconds.get(self.phase, 0) + now - self.began
        self.peak, self.began = 0, now

    def report(self) -> dict:
        self.note(time.process_time())
        need = self.plan.need if self.plan else None
        return {
            "cpu_seconds": time.process_time(),
            "base_bytes": self.base or memory("RssAnon"),
            "resident_bytes": memory("VmHWM"),
            "phases": self.phases,
            "phase_cpu_seconds": self.seconds,
            "forecast_bytes": need and need.total,
            "forecast_phases": need and need.phases,
            "plan": self.plan and str(self.plan),
        }


def run_watched(target: Path, command: list[str]) -> int:
    """A command in this process; what it took goes to a file."""
    watch, load = Watch(), cli_settings.Setup.load

    class Watched(Meter):
        def __enter__(self) -> Meter:  # just before the first weight is read
            watch.base = memory("RssAnon")
            watch.enter("load")
            return super().__enter__()

        def _show(self, key: str, done: int, total: int, phase: str = "", *more, **style) -> None:
            super()._show(key, done, total, phase, *more, **style)
            watch.enter(phase.strip() or key)

    def loaded(setup, meter: Meter, plan: MemoryPlan | None = None, *rest):
        watch.plan = plan
        pipeline = load(setup, meter, plan, *rest)
        watch.enter("text")
        return pipeline

    watch.start()
    with (
        patch("starflow_core.cli.generate.Meter", Watched),
        patch("starflow_core.cli.files.Meter", Watched),
        patch.object(cli_settings.Setup, "load", loaded),
    ):
        code = cli.main(command)
    target.write_text(json.dumps(watch.report()))
    return code


# Tables


def run_model(model: Model, folder: Path, small: bool) -> Iterable[dict]:
    free = shutil.disk_usage(folder).free
    if not small and free < model.needs:
        raise InputError(f"{folder} needs {model.needs / 1e9:.0f} GB, {free / 1e9:.0f} GB are free; give --folder")
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        config = make_files(scratch, model, small)
        for step in steps(scratch, model, expected_shapes(config)):
            yield {"model": model.name, **measure(scratch, *step)}


HEADER = "| model | command | forecast | own | own / forecast | base | resident | CPU seconds |\n" + "|---" * 8 + "|"


def line(row: dict) -> str:
    sizes = {name: _gigabytes(row[f"{name}_bytes"]) for name in ("forecast", "own", "base", "resident")}
    ratio = f"{row['ratio']:.2f}" if row["ratio"] else ""
    cells = [row["model"], row["step"], sizes["forecast"], sizes["own"], ratio, sizes["base"], sizes["resident"]]
    return f"| {' | '.join([*cells, format(row['cpu_seconds'], '.0f')])} |"


def _gigabytes(size: int | None) -> str:
    return f"{size / 1e9:.2f} GB" if size else ""


def run(options: argparse.Namespace) -> None:
    rows = []
    print(HEADER)
    for name in SIZES if options.model == "all" else (options.model,):
        for row in run_model(SIZES[name], options.folder, options.small):
            print(line(row), flush=True)
            rows.append(row)
            if options.json:
                write_json(options.json, {**machine(), "small": options.small, "rows": rows})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=(*SIZES, "all"), default="all")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the files are made")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--run", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.run:
        return run_watched(Path(options.run[0]), options.run[1:])
    return cli.exit_code_of(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
