"""A batch's rows shared out by Ray Data, among one actor for each GPU. Nothing else here knows Ray."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from types import ModuleType

from ...errors import InputError, StarflowError
from ...model.placement import pick_device
from .rows import Row
from .workers import Outcome, Worker

MOST_BLOCKS = 10_000  # a row each, if there are no more: what a killed actor has in hand is made again

# Read when Ray starts a cluster: nothing is reported to its makers, and workers are no nicer than the command is.
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}


class Actor:
    """A worker in a process of Ray's, which gives it a GPU of its own where there are any."""

    def __init__(self, folder: str, device: str | None, retries: int, workers: int, home: str):
        with suppress(OSError):  # another machine may lack it, and needs it for relative paths alone
            os.chdir(home)
        self._worker = Worker(folder, pick_device(device), retries, workers)

    def __call__(self, item: dict) -> dict:
        return asdict(self._worker(pickle.loads(item["row"])))


def made(rows: list[Row], args: Namespace) -> Iterator[Outcome]:
    """Outcomes as they come. Ray starts an actor that dies again, and gives it the rows that it had."""
    ray = _imported()
    with _cluster(ray, args.ray):
        gpus = 0 if args.device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
        workers = min(args.workers or gpus or 1, len(rows))
        items = [{"row": pickle.dumps(row)} for row in rows]
        outcomes = ray.data.from_items(items, override_num_blocks=min(len(items), MOST_BLOCKS)).map(
            Actor,
            fn_constructor_args=(args.folder, args.device, args.retries, -(-workers // len(ray.nodes())), os.getcwd()),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_gpus=1 if gpus else None,
        )
        for outcome in outcomes.iter_rows():
            yield Outcome(**outcome)


def _imported() -> ModuleType:
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray.data
    except ModuleNotFoundError as error:
        raise InputError(f"--ray needs Ray, of which {error.name} is missing: pip install 'ray[data]'") from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


@contextmanager
def _cluster(ray: ModuleType, address: str) -> Iterator[None]:
    """Joined while it is open; a local one is started for that."""
    stop = signal.getsignal(signal.SIGTERM)
    try:
        options = {"include_dashboard": False} if address == "local" else {}
        ray.init(address, logging_level=logging.ERROR, **options)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, stop)  # Ray's own would leave without clearing up
        yield
    except (ConnectionError, ray.exceptions.RayError) as error:
        raise StarflowError(f"Ray at {address}: {str(error).strip().splitlines()[0]}") from error
    finally:
        ray.shutdown()
