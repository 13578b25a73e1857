"""`batch`: a result for each row of a file, on one device or many."""

from __future__ import annotations

import json
import os
import time
from argparse import Namespace
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import torch

from ...errors import InputError, JobsFailed
from ...parts import replacing
from ...processes import placed
from ...training.processes import Processes
from ..progress import warn
from .folders import Folder, folder_of
from .rows import Models, Row, check_row, naming, read_rows
from .workers import Outcome, Worker

FAILED = "failed.jsonl"


def batch(args: Namespace) -> None:
    """Check all rows, then make those that aren't there yet; under `torchrun` each process its share of them."""
    began = time.monotonic()
    processes, device = _placed(args)
    folder, models = folder_of(args.folder), Models()
    rows = read_rows(args.jobs, Namespace(**{**vars(args), "device": str(device)}), folder, models)
    left = [row for row in rows if not folder.has(row.name)]
    for row in left:
        with naming(args.jobs, row.line):
            check_row(row, folder.path(row.name), models, here=not args.ray)
    outcomes = _made_by_ray(left, args, folder) if args.ray else _made_here(rows, left, args, processes, device, folder)
    outcomes = processes.gathered(outcomes)
    if processes.leads:
        report(rows, outcomes, folder, began)


def report(rows: list[Row], outcomes: list[Outcome], folder: Folder, began: float) -> None:
    """Say how many rows were made, and list those that failed. Raises JobsFailed if any did."""
    errors = {outcome.line: outcome.error for outcome in outcomes if outcome.error}
    failed = [{"line": row.line, "row": row.fields, "error": errors[row.line]} for row in rows if row.line in errors]
    made, there = len(outcomes) - len(failed), len(rows) - len(outcomes)
    print(f"{made} made, {there} were there, {len(failed)} failed; {time.monotonic() - began:.1f} s")
    if not failed:
        folder.discard(FAILED)
        return
    text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in failed)
    with folder.making(FAILED) as path, replacing(path) as part:
        Path(part).write_text(text, encoding="utf-8")
    raise JobsFailed(
        f"{len(failed)} of {len(rows)} rows failed; {folder}/{FAILED} lists them, and the same command tries them again"
    )


def _placed(args: Namespace) -> tuple[Processes, torch.device]:
    """Which of how many processes this is, and its device. Raises InputError for options that don't go together."""
    if args.retries < 0:
        raise InputError(f"--retries is {args.retries}; the minimum is 0")
    if args.workers and not args.ray:
        raise InputError("--workers is for --ray; torchrun has --nproc-per-node")
    rank, count, device = placed("cpu" if args.ray else args.device)
    if args.ray and count > 1:
        raise InputError("--ray starts its own workers; run the command once, without torchrun")
    return Processes(rank, count), device


def _made_here(
    rows: list[Row], left: list[Row], args: Namespace, processes: Processes, device: torch.device, folder: Folder
) -> list[Outcome]:
    """This process's share, counted among all rows: what is left changes while others work."""
    lines = {row.line for row in rows[processes.rank :: processes.count]}
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes.count))
    worker = Worker(args.folder, device, args.retries, here, quiet=processes.count > 1)
    return _told((worker(row) for row in left if row.line in lines), folder)


def _made_by_ray(left: list[Row], args: Namespace, folder: Folder) -> list[Outcome]:
    from .actors import made

    try:
        return _told(made(left, args), folder) if left else []
    except KeyboardInterrupt:
        for row in left:
            folder.clear(row.name)
        raise


def _told(outcomes: Generator[Outcome], folder: Folder) -> list[Outcome]:
    """All outcomes, each told when it comes."""
    found = []
    with closing(outcomes):
        for outcome in outcomes:
            if outcome.error:
                warn(f"line {outcome.line}, {outcome.name}: {outcome.error}")
            else:
                print(f"{folder}/{outcome.name}", flush=True)
            found.append(outcome)
    return found
