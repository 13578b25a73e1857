"""`train`: teach a model something, from a folder of pictures or clips."""

from __future__ import annotations

from argparse import Namespace

from ..errors import InputError
from ..training.options import settings_of
from ..training.settings import Settings, example
from .progress import Meter


def train(args: Namespace) -> None:
    """Train, or go on where the same command has stopped; under `torchrun` with all its processes."""
    if args.example:
        print(example(), end="")
        return
    settings = settings_of(args)
    if not settings.data:
        raise InputError("nothing to learn from; give --data FOLDER, with pictures or clips and captions")
    _train(settings, args.dry_run)


def _train(settings: Settings, dry_run: bool) -> None:
    from ..processes import joined, telling
    from ..training import train as training
    from ..training.forecast import forecasts
    from ..training.processes import Processes

    with joined(settings.device) as (rank, count, device), Meter() as meter:
        processes = Processes(rank, count)

        def log(line: str) -> None:
            if processes.leads:
                meter.close()
                print(line, flush=True)

        sources = training.find_sources(settings)
        training.check(settings, sources.config)
        if dry_run:
            for line in forecasts(
                settings, sources.config, training.dtype_of(settings, device, sources.config), processes.count
            ):
                log(line)
            return
        progress = meter.preparing if processes.leads else None
        with telling():
            log(str(training.train(settings, sources, device, processes, log, progress=progress)))
