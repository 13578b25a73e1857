"""Folders to train in, and what an earlier run has left there."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError


def make_folder(path: Path) -> None:
    """Raises InputError where there can't be a folder to write to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} can't be a folder to write to ({reason}); choose another") from None


def load_state(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What an earlier run has saved. Raises InputError for a file that holds something else."""
    try:
        return dict(torch.load(path, map_location=device, weights_only=True))
    except Exception as error:  # a damaged archive can fail anywhere in its readers
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise InputError(f"{path} is damaged ({reason}); remove it, and its stage starts over") from None
