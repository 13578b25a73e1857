"""The processes that `torchrun` has started: how they join, each with a device of its own, and how they part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from .errors import InputError, StarflowError
from .model.placement import pick_device

LEAST = (2, 7)  # PyTorch's version
PATIENCE = timedelta(days=20)  # for others, which may have more to do. In ms, 24 days are too many for gloo


def started() -> int:
    """How many processes there are, of which this is one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def placed(device: str | None) -> tuple[int, int, torch.device]:
    """This process's number, how many there are, and its device. They aren't joined."""
    count = started()
    if count > 1 and "RANK" not in os.environ:
        raise InputError("WORLD_SIZE is set but RANK isn't; start several processes by torchrun, or unset it for one")
    chosen = own_device(device) if count > 1 else pick_device(device)
    if count > 1 and chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return int(os.environ["RANK"]) if count > 1 else 0, count, chosen


@contextmanager
def joined(device: str | None) -> Iterator[tuple[int, int, torch.device]]:
    """Join the others; gives this process's number, how many there are, and its device."""
    rank, count, chosen = placed(device)
    if count == 1:
        yield rank, count, chosen
        return
    if tuple(map(int, torch.__version__.split(".")[:2])) < LEAST:
        raise InputError(
            f"several processes need PyTorch {'.'.join(map(str, LEAST))} or newer, not {torch.__version__}"
        )
    # What is said and saved goes over gloo, also where the weights go over another.
    backend = (
        "gloo"
        if chosen.type == "cpu"
        else f"cpu:gloo,{chosen.type}:{torch.distributed.get_default_backend_for_device(chosen)}"
    )
    torch.distributed.init_process_group(backend, timeout=PATIENCE)
    try:
        yield rank, count, chosen
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def telling() -> Iterator[None]:
    """Of several processes the one that fails tells why; the others only that they are alone."""
    try:
        yield
    except RuntimeError as error:
        if started() == 1 or not any(word in str(error) for word in ("gloo", "Connection", "NCCL")):
            raise
        raise StarflowError("another process has stopped; it says why") from None


def own_device(device: str | None) -> torch.device:
    """Of this machine's devices of the named kind, or the best kind there is, the process's own."""
    kind = pick_device(device)
    if kind.type == "cpu":
        return kind
    local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.get_device_module(kind).device_count()
    if local >= there:
        raise InputError(f"process {local} has no device: there are {there} of {kind.type}; start as many processes")
    return torch.device(kind.type, local)
