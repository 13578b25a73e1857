"""Cases in processes of their own, within limits of time and memory."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path

from .case import Case

MODULES = Path(__file__).parent.glob("*.py")
SUBJECTS = tuple(sorted(path.stem for path in MODULES if "\ndef cases(seed: int" in path.read_text(encoding="utf-8")))
OUTCOMES = ("worked", "refused", "traceback", "hang", "crash", "memory", "executed")
BAD = OUTCOMES[2:]
LONGEST = 20  # seconds of computing that a case may take, unless its module has a LONGEST of its own
PATIENCE = 10  # as many times as long by the clock: the machine may be busy
START = 120  # seconds of the first in a process, which loads libraries
MOST = 1 << 30  # bytes that a case may take, unless its module has a MOST of its own
# What Python tells of that no case may do, unless its module has a FORBIDDEN of its own.
FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect")


@dataclass(frozen=True)
class Finding:
    """What became of the case `index` of a subject's stream."""

    subject: str
    index: int
    name: str
    outcome: str
    detail: str = ""


def cases_of(subject: str, seed: int, index: int) -> Case:
    """One case of a stream."""
    return next(itertools.islice(import_module(f"tests.fuzz.{subject}").cases(seed), index, None))


def run(subject: str, seed: int, count: int, jobs: int = 1) -> list[Finding]:
    """The first `count` cases of a subject, every `jobs`-th in the same process."""
    with ThreadPoolExecutor(jobs) as pool:
        parts = pool.map(lambda first: _run(subject, seed, range(first, count, jobs)), range(jobs))
        return sorted((f for part in parts for f in part), key=lambda finding: finding.index)


def table(found: list[Finding]) -> str:
    """A row for each class."""
    counts = Counter((f.name, f.outcome) for f in found)
    rows = [["input", "cases", *OUTCOMES], ["---"] * (2 + len(OUTCOMES))]
    for name in [*sorted({f.name for f in found}), "all"]:
        numbers = [sum(n for (k, o), n in counts.items() if o == out and name in (k, "all")) for out in OUTCOMES]
        rows.append([name, str(sum(numbers)), *map(str, numbers)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _run(subject: str, seed: int, indices: range) -> list[Finding]:
    found, left = [], list(indices)
    while left:
        found += _until_it_breaks(subject, seed, left)
        left = list(indices)[len(found) :]
    return found


def _until_it_breaks(subject: str, seed: int, indices: list[int]) -> list[Finding]:
    """Findings of the indices in order, up to the first whose process had to be given up."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(subject, seed, indices, there))
    process.start()
    there.close()
    longest = getattr(import_module(f"tests.fuzz.{subject}"), "LONGEST", LONGEST)
    found, limit, name = [], max(START, PATIENCE * longest), "?"
    try:
        for index in indices:
            try:
                name = here.recv() if here.poll(limit) else None
                if name is None or not here.poll(limit):
                    return [*found, Finding(subject, index, name or "?", "hang", f"more than {limit} s")]
                outcome, detail = here.recv()
            except EOFError:
                process.join()
                if process.exitcode == -signal.SIGPROF:
                    return [*found, Finding(subject, index, name, "hang", f"more than {longest} s of computing")]
                return [*found, Finding(subject, index, name, "crash", f"exit status {process.exitcode}")]
            found.append(Finding(subject, index, name, outcome, detail))
            limit = PATIENCE * longest
            if outcome == "memory":
                return found
        return found
    finally:
        process.kill()
        process.join()
        here.close()


def _work(subject: str, seed: int, indices: list[int], pipe: Connection) -> None:
    """In the process: runs the cases, and says what each is before and what became of it after."""
    import torch

    from starflow_core.errors import StarflowError

    torch.set_num_threads(1)
    home, module, executed = os.getcwd(), import_module(f"tests.fuzz.{subject}"), []
    forbidden, longest = getattr(module, "FORBIDDEN", FORBIDDEN), getattr(module, "LONGEST", LONGEST)
    most = getattr(module, "MOST", MOST)
    sys.addaudithook(lambda event, _: executed.append(event) if event in forbidden else None)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    stream = enumerate(module.cases(seed))
    with tempfile.TemporaryDirectory() as top:
        for index in indices:
            case = next(case for i, case in stream if i == index)
            folder = Path(top) / str(index)
            folder.mkdir()
            pipe.send(case.name)
            before = _peak()
            executed.clear()
            signal.setitimer(signal.ITIMER_PROF, longest)  # ends the process
            try:
                case.run(folder)
                outcome = ("worked", "")
            except StarflowError as error:
                outcome = ("refused", str(error))
            except MemoryError:
                outcome = ("memory", "MemoryError")
            except Exception:
                outcome = ("traceback", traceback.format_exc(limit=-3).strip().replace("\n", " | "))
            signal.setitimer(signal.ITIMER_PROF, 0)
            if _peak() - before > most:
                outcome = ("memory", f"{(_peak() - before) / 1e9:.1f} GB")
            if executed:
                outcome = ("executed", ", ".join(executed))
            pipe.send(outcome)
            os.chdir(home)
            shutil.rmtree(folder, ignore_errors=True)


def _peak() -> int:
    """The most memory that this process has had, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # the other figure begins at what the process that started this one had
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
