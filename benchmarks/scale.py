"""Many jobs over several workers: nothing half-written when they are killed, memory that stays flat, throughput.

    python -m benchmarks.scale [--parts killed many throughput cards] [--engine ray|torchrun ..] [--jobs N] [--kills 10]
                               [--workers 1 2] [--seed S] [--json PATH]

Runs `python -m starflow_core batch` on small jobs of the bundled demo: clips of 5 frames of 64 x 64. Linux only.

killed: of two workers one is killed (SIGKILL) at each of ten random moments. Ray starts it again; after torchrun the
command is run again, as its users would. In the end every row has its file, which can be read, and nothing else is
there.
many: 1,000 jobs on two workers. The memory of each (RssAnon) over the rows that are made, and the pixels of twenty
clips against what `generate` writes with the same seed.
throughput: jobs a minute, from the first file to the last, for each number of workers.
cards: one clip on one, two and eight cards, by arithmetic: no card has seen it. What each holds, what it reads in a
sweep of the deep block, and what it sends and receives.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from statistics import mean

import torch

from benchmarks.dryrun import SPAN, image, video
from benchmarks.report import machine, write_json
from starflow_core.cli import main as starflow
from starflow_core.jobs import memory
from starflow_core.jobs.tasks import Means
from starflow_core.media import read_video
from starflow_core.model.config import STARFLOW_3B, STARFLOW_V_7B
from starflow_core.model.parallel import Mesh
from starflow_core.model.placement import Placement

SMALL = {"frames": 5, "size": 64, "preset": "fast"}
SHAPES = ("circle", "square", "triangle", "ring")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
JOBS = {"killed": 60, "many": 1000, "throughput": 60}
ENGINES = {
    "torchrun": lambda workers: (("torch.distributed.run", "--nproc-per-node", str(workers), "-m"), ()),
    "ray": lambda workers: ((), ("--ray", "local", "--workers", str(workers))),
}
NAMES = {"torchrun": b"starflow_core\0batch\0", "ray": b"ray::"}  # in the command line of a worker
COMPARED, EVERY, KEPT = 20, 0.5, 50  # clips; seconds between looks; samples of memory in the report


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=[*JOBS, "cards"], default=[*JOBS, "cards"])
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--jobs", type=int, help=f"in each part (default: {JOBS})")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="of throughput (default: 1 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    found = defaultdict(list)
    if "cards" in options.parts:
        for row in cards():
            found["cards"].append(row)
            print("cards:", ", ".join(f"{name} {_shown(value)}" for name, value in row.items()))
    for part in options.parts:
        for engine in options.engine if part in JOBS else ():
            jobs = options.jobs or JOBS[part]
            for row in PARTS[part](engine, jobs, options):
                found[part].append({"engine": engine, **row})
                told = ", ".join(f"{name} {_shown(value)}" for name, value in row.items())
                print(f"{part}, {engine}: {told}", flush=True)
    if options.json:
        write_json(options.json, {**machine(), "seed": options.seed, **found})


class Batch:
    """A batch in a folder of its own, run as often as it takes."""

    def __init__(self, folder: Path, engine: str, jobs: int, workers: int):
        self.engine, self.out, self.said = engine, folder / "out", folder / "said.txt"
        self.rows = [
            {"prompt": f"a {COLOURS[i % 8]} {SHAPES[i % 4]}", "seed": i, "output": f"{i:05}.mp4", **SMALL}
            for i in range(jobs)
        ]
        (folder / "jobs.jsonl").write_text("\n".join(map(json.dumps, self.rows)))
        before, after = ENGINES[engine](workers)
        command = ["-m", *before, "starflow_core", "batch", str(folder / "jobs.jsonl"), "-o", str(self.out)]
        self.command = [sys.executable, *command, *after, "--device", "cpu"]

    def start(self) -> subprocess.Popen:
        """With workers of one thread each."""
        with open(self.said, "wb") as said:
            settings = {**os.environ, "OMP_NUM_THREADS": "1"}
            return subprocess.Popen(self.command, env=settings, stdout=said, stderr=subprocess.STDOUT)

    def run(self, look: Callable[[subprocess.Popen], None]) -> int:
        """Run it to its end, with a `look` at it again and again; gives the exit status."""
        process = self.start()
        try:
            while process.poll() is None:
                look(process)
                time.sleep(EVERY)
        finally:
            process.terminate()
            process.wait()
        return process.returncode

    def must_run(self, look: Callable[[subprocess.Popen], None] = lambda process: None) -> None:
        """The same, to a good end; otherwise shows what it said."""
        if status := self.run(look):
            raise SystemExit(f"{self.said.read_text(errors='replace')}\nexit status {status}")

    def workers(self, process: subprocess.Popen) -> list[int]:
        """Processes that make rows: they have loaded what that takes."""
        return [pid for pid in descendants(process.pid) if NAMES[self.engine] in read(pid, "cmdline") and computes(pid)]

    def made(self) -> list[Path]:
        return sorted(self.out.glob("*.mp4"))


def killed(engine: str, jobs: int, options: argparse.Namespace) -> Iterator[dict]:
    """Kills workers until there were enough kills, in as many batches as that takes."""
    rng, kills, batches, starts = random.Random(options.seed), [], 0, 0

    def kill(process: subprocess.Popen) -> None:
        workers = batch.workers(process)
        if len(kills) < options.kills and workers and rng.random() < EVERY / 2:
            time.sleep(rng.uniform(0, EVERY))  # not only where a look falls
            with suppress(ProcessLookupError):  # it was done
                os.kill(rng.choice(workers), signal.SIGKILL)
                kills.append(len(batch.made()))

    while len(kills) < options.kills:
        batches += 1
        with tempfile.TemporaryDirectory() as folder:
            batch = Batch(Path(folder), engine, jobs, 2)
            status = 1
            while status:
                starts += 1
                status = batch.run(kill)
            check_whole(batch)
    yield {"kills": len(kills), "made before": kills, "batches": batches, "starts": starts, "rows": jobs * batches}


def many(engine: str, jobs: int, options: argparse.Namespace) -> Iterator[dict]:
    """Memory and pixels of many jobs."""
    memory = defaultdict(list)

    def look(process: subprocess.Popen) -> None:
        done = len(batch.made())
        for pid in batch.workers(process):
            memory[pid].append((done, resident(pid)))

    with tempfile.TemporaryDirectory() as folder:
        batch = Batch(Path(folder), engine, jobs, 2)
        batch.must_run(look)
        check_whole(batch)
        rng = random.Random(options.seed)
        worst = max(difference(batch, row) for row in rng.sample(batch.rows, min(COMPARED, jobs)))
    for samples in memory.values():
        early, late = ([size for done, size in samples if at(done)] for at in tenths(jobs))
        yield {
            "samples": len(samples),
            "MB in the second tenth": mean(early) / 1e6 if early else None,
            "MB in the last tenth": mean(late) / 1e6 if late else None,
            "largest difference of pixels": worst,
            "memory": samples[:: -(-len(samples) // KEPT)],
        }


def throughput(engine: str, jobs: int, options: argparse.Namespace) -> Iterator[dict]:
    """Jobs a minute by the number of workers."""
    for workers in options.workers:
        with tempfile.TemporaryDirectory() as folder:
            batch = Batch(Path(folder), engine, jobs, workers)
            began = time.time()
            batch.must_run()
            check_whole(batch)
            times = sorted(path.stat().st_mtime for path in batch.made())
        rate = 60 * (jobs - 1) / (times[-1] - times[0])
        yield {"workers": workers, "jobs a minute": rate, "seconds to the first": times[0] - began}


PARTS = {"killed": killed, "many": many, "throughput": throughput}


def cards() -> Iterator[dict]:
    """GB of the fullest card, and by sweep: GB that each reads (the deep block's weights, and keys and values as they
    are on average, half filled), MB that the heads' shares sum, and kB that guidance's halves exchange."""
    two = Placement.over([torch.device("cuda", index) for index in range(2)], True)
    for name, config, job in (
        ("7B, 81 frames 480 x 848", STARFLOW_V_7B, video()),
        ("3B, 256 x 256", STARFLOW_3B, image()),
    ):
        span, width, channels = SPAN, config.deep_width, config.token_channels
        for count, mesh in ((1, Mesh()), (2, Mesh(2)), (8, Mesh(2, 4))):
            means = Means(mesh=mesh)
            needs = (
                memory.forecasts(config, job, torch.bfloat16, two).values() if count == 2
                else [memory.forecast(config, job, torch.bfloat16, means)]
            )  # fmt: skip
            rows = 2 // mesh.guidance
            deep = memory.forecast(config, job, torch.bfloat16, means, ("deep",))
            summed = 2 * config.layers[-1] * rows * span * width * 2 if mesh.tensor > 1 else 0
            yield {
                "job": name, "cards": count, "largest_GB": max(need.total for need in needs) / 1e9,
                "read_GB": (deep.weights + deep.cache / 2) / 1e9, "summed_MB": summed / 1e6,
                "exchanged_kB": 2 * span * channels * 4 / 1e3 if mesh.guidance > 1 else 0.0,
            }  # fmt: skip


def check_whole(batch: Batch) -> None:
    """Every row has its file, which can be read to its end, and nothing else is there."""
    assert sorted(os.listdir(batch.out)) == [row["output"] for row in batch.rows]
    for path in batch.made():
        assert len(read_video(path).pixels) == SMALL["frames"], path


def difference(batch: Batch, row: dict) -> float:
    """The largest difference of pixels between a row's file and what `generate` writes."""
    path = batch.out / f"alone-{row['output']}"
    settings = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    words = [row["prompt"], "--seed", str(row["seed"]), *settings, "--device", "cpu", "-o", str(path)]
    assert starflow(["generate", *words]) == 0
    return float((read_video(path).pixels - read_video(batch.out / row["output"]).pixels).abs().max())


def tenths(jobs: int) -> tuple[Callable[[int], bool], Callable[[int], bool]]:
    """Whether so many rows are within the second tenth of all, and within the last."""
    return (lambda done: 0.1 * jobs <= done < 0.2 * jobs), (lambda done: 0.9 * jobs <= done)


# Processes


def descendants(pid: int) -> list[int]:
    """What a process has started, and what that has."""
    children = [int(child) for child in read(pid, f"task/{pid}/children").split()]
    return children + [each for child in children for each in descendants(child)]


def computes(pid: int) -> bool:
    return b"libtorch" in read(pid, "maps")


def resident(pid: int) -> int:
    """Bytes of memory that isn't mapped from files."""
    lines = dict(line.split(b":", 1) for line in read(pid, "status").splitlines() if b":" in line)
    return int(lines.get(b"RssAnon", b"0").split()[0]) * 1024


def read(pid: int, name: str) -> bytes:
    """A file of the system's on a process; empty where that is gone."""
    try:
        return Path("/proc", str(pid), name).read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _shown(value) -> str:
    if isinstance(value, list):
        return f"({len(value)})"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
