"""Several processes for tests, which share what they import."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess

import torch


def begun(target: Callable, count: int, *rest) -> list[BaseProcess]:
    """Processes that do what a target does with the `rest`, as if `torchrun` had started them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, target.__module__])
    processes = [context.Process(target=_act, args=(target, rank, count, port, *rest)) for rank in range(count)]
    for process in processes:
        process.start()
    return processes


def spread(target: Callable, count: int, *rest) -> None:
    """As `begun`, until all are done."""
    assert codes(begun(target, count, *rest)) == [0] * count


def codes(processes: list[BaseProcess], patience: float = 300) -> list[int | None]:
    """The exit codes once all are done."""
    for process in processes:
        process.join(patience)
    return [process.exitcode for process in processes]


def _act(target: Callable, rank: int, count: int, port: int, *rest) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    target(*rest)
