"""Peak memory of converting and loading a checkpoint of more than 1 GB.

    python -m benchmarks.convert_memory [--json PATH]

Makes a random fp32 checkpoint of a wide, shallow model in a temporary folder (about 5 GB with what is
converted from it, deleted afterwards) and runs every job in a process of its own. Two jobs are what we
could have instead: "save_file" converts through safetensors' own writer, "map" loads from a mapped file.

Linux only: the peak of anonymous memory (RssAnon) is sampled from /proc. The resident peak (VmHWM;
ru_maxrss would count the parent's) includes pages of mapped files, which the system takes back when it
needs them.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file

from starflow_core.model.config import Defaults, FlowConfig, PromptFormat
from starflow_core.model.latent import LatentFormat
from starflow_core.weights.flow import convert, expected_shapes, load_flow
from starflow_core.weights.tensorfiles import TensorFile

CONFIG = FlowConfig(
    name="memory benchmark",
    kind="image",
    latent=LatentFormat(4, 8),
    prompt=PromptFormat(16),
    layers=(1, 2),
    width=3072,
    deep_width=3072,
    text_dim=2048,
    rope_length=32,
    noise_std=0.3,
    defaults=Defaults(0.0, 256),
)
# job, source, target or type that is loaded
JOBS = (
    ("convert", "model.pth", "fp32"),
    ("convert", "model.pth", "bf16"),
    ("convert", "fp32.safetensors", "bf16"),
    ("convert", "fp32.safetensors", "int8"),
    ("save_file", "fp32.safetensors", "bf16"),
    ("load", "model.pth", "fp32"),
    ("load", "model.pth", "bf16"),
    ("load", "fp32.safetensors", "fp32"),
    ("load", "fp32.safetensors", "bf16"),
    ("load", "bf16.safetensors", "bf16"),
    ("map", "fp32.safetensors", "bf16"),
)
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MB = 1e6


class AnonymousPeak(threading.Thread):
    """Samples this process's anonymous memory, in bytes, until `stop`."""

    def __init__(self):
        super().__init__(daemon=True)
        self.start_bytes = self.peak = memory("RssAnon")
        self.running = True

    def run(self):
        while self.running:
            self.peak = max(self.peak, memory("RssAnon"))
            time.sleep(0.002)

    def stop(self) -> int:
        """The peak above what was there at the start."""
        self.running = False
        self.join()
        return self.peak - self.start_bytes


def memory(field: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status: this benchmark needs Linux 4.5 or newer")


def make_checkpoint(folder: Path) -> None:
    """Random weights in `model.pth`, through mapped files, so that they are never all in memory."""
    scratch = folder / "scratch"
    scratch.mkdir()
    weights = {}
    for index, (name, shape) in enumerate(expected_shapes(CONFIG).items()):
        flat = torch.from_file(str(scratch / str(index)), shared=True, size=math.prod(shape))
        weights[name] = flat.normal_(std=0.02).view(shape)
    torch.save(weights, folder / "model.pth")
    del weights, flat
    for file in scratch.iterdir():
        file.unlink()


def run_job(folder: Path, job: str, source: str, dtype: str) -> dict:
    """One job in this process: seconds and peaks in bytes."""
    monitor = AnonymousPeak()
    monitor.start()
    start = time.perf_counter()
    if job == "convert":
        convert(folder / source, folder / f"{dtype}.safetensors", dtype, CONFIG, overwrite=True)
    elif job == "save_file":
        checkpoint = TensorFile.open(folder / source)
        weights = {name: checkpoint.tensor(name).to(TYPES[dtype]) for name in checkpoint.tensors}
        save_file(weights, folder / "library.safetensors")
    elif job == "map":
        with safetensors.safe_open(folder / source, "pt") as file:
            weights = {name: file.get_tensor(name).to(TYPES[dtype]) for name in expected_shapes(CONFIG)}
    else:
        flow = load_flow(folder / source, TYPES[dtype], config=CONFIG)
        assert sum(weight.numel() for weight in flow.parameters()) == parameters()
    return {
        "seconds": time.perf_counter() - start,
        "anonymous_peak": monitor.stop(),
        "resident_peak": memory("VmHWM"),
    }


def parameters() -> int:
    return sum(math.prod(shape) for shape in expected_shapes(CONFIG).values())


def measure(folder: Path) -> list[dict]:
    rows = []
    for job, source, dtype in JOBS:
        command = [sys.executable, "-m", "benchmarks.convert_memory", "--run", str(folder), job, source, dtype]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        held = parameters() * TYPES[dtype].itemsize if job in ("load", "map") else 0
        sizes = {"source_bytes": (folder / source).stat().st_size, "model_bytes_held": held}
        rows.append({"job": job, "source": source, "dtype": dtype, **sizes, **json.loads(output)})
    return rows


def table(rows: list[dict]) -> str:
    lines = [
        f"{parameters() / 1e9:.3f} B parameters, largest tensor {largest_tensor() / MB:.0f} MB in fp32. "
        f"safetensors {safetensors.__version__}. Peaks in MB; 'held' is the model itself in the type loaded.",
        f"{'job':9} {'source':17} {'to':5} {'file':>6} {'held':>6} {'anonymous peak':>15} {'resident peak':>14}      s",
    ]
    for row in rows:
        sizes = (row["source_bytes"], row["model_bytes_held"], row["anonymous_peak"], row["resident_peak"])
        file, held, anonymous, resident = (round(size / MB) for size in sizes)
        lines.append(
            f"{row['job']:9} {row['source']:17} {row['dtype']:5} {file:6} {held:6} {anonymous:15} {resident:14} "
            f"{row['seconds']:6.1f}"
        )
    return "\n".join(lines)


def largest_tensor() -> int:
    return max(math.prod(shape) for shape in expected_shapes(CONFIG).values()) * 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures, in bytes and seconds, to this file")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        folder, job, source, dtype = arguments.run
        print(json.dumps(run_job(Path(folder), job, source, dtype)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder))
        rows = measure(Path(folder))
    print(table(rows))
    if arguments.json:
        figures = {"safetensors": safetensors.__version__, "parameters": parameters(), "rows": rows}
        arguments.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
