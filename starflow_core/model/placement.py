"""Where the parts of a job are."""

from __future__ import annotations

import torch

from ..errors import InputError


def default_dtype(device: torch.device) -> torch.dtype:
    """The type that the network runs in where nobody says otherwise."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def pick_device(name: str | None = None) -> torch.device:
    """The named device, or the best there is. Raises InputError for one that isn't there."""
    found = ["cpu"]
    if torch.cuda.is_available():
        found = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + found
    if torch.backends.mps.is_available():
        found = ["mps", *found]
    if name is None:
        return torch.device(found[0])
    if name not in found and f"{name}:0" not in found:
        raise InputError(f"device {name!r} isn't there; this machine has {', '.join(found)}")
    return torch.device(name)
