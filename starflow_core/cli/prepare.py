"""`prepare`: what training will see, found, checked and encoded before it starts."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path

from ..errors import InputError
from ..media import check_writable
from ..model.placement import pick_device
from ..training.data import prepare as data
from ..training.data.cache import Cache
from ..training.data.encoders import Encoders
from ..training.options import settings_of
from ..training.train import texts_beside
from .progress import Meter


def prepare(args: Namespace) -> None:
    """Encode pictures, clips and captions into the cache, and tell what they are."""
    settings = settings_of(args)
    if args.preview:
        _check_preview(args.preview)
    device, encoders = pick_device(settings.device), Encoders.find(settings)
    cache = Cache(settings.cached)
    load_vae, load_text = partial(encoders.load_vae, device), partial(encoders.load_text, device)
    with Meter() as meter:
        dataset = data.prepare(
            settings,
            encoders.config,
            load_vae,
            load_text,
            cache,
            progress=meter.preparing,
            extra=partial(texts_beside, settings),
        )
        if args.preview:
            from ..training.data.preview import write_sheet

            write_sheet(Path(args.preview), dataset, load_vae(), meter.preparing)
    print("\n".join(dataset.report()))
    if args.preview:
        print(args.preview)


def _check_preview(path: str) -> None:
    if Path(path).suffix.lower() != ".png":
        raise InputError(f"{path}: a contact sheet is a picture; give a name that ends in .png")
    check_writable(path, 1)
