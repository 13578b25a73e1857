"""The check of a file's tensors against those that a module expects."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..errors import CheckpointError
from .tensorfiles import DTYPES, StoredTensor

READABLE = (*DTYPES.values(), torch.float64)
LISTED = 5  # names in a message, of each kind of problem

Shapes = dict[str, tuple[int, ...]]


def module_shapes(module: nn.Module) -> Shapes:
    """Names and shapes of a module's weights."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def count_numbers(names: Iterable[str], pattern: str) -> int:
    """How many different numbers the names have in the group of `pattern`, matched from their start."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})


def check_tensors(tensors: Mapping[str, StoredTensor], expected: Shapes, file: str, model: str, remedy: str) -> None:
    """Raise CheckpointError unless a file has exactly the `expected` tensors, of a type that can be loaded.

    The message says that `file` does not fit `model`, names the first missing, unexpected, wrongly shaped
    and wrongly typed tensors, and ends with `remedy`.
    """
    known = [name for name in expected if name in tensors]
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "wrongly shaped": [
            f"{name} {tensors[name].shape} instead of {expected[name]}"
            for name in known
            if tensors[name].shape != expected[name]
        ],
        "quantised or of a type other than bf16, fp16 and fp32": [
            f"{name} {tensors[name].dtype or 'of an unknown type'}"
            for name in known
            if tensors[name].dtype not in READABLE and not tensors[name].int8
        ],
    }
    parts = [
        f"{len(names)} {problem} ({', '.join(names[:LISTED])}{', ..' if len(names) > LISTED else ''})"
        for problem, names in problems.items()
        if names
    ]
    if parts:
        raise CheckpointError(f"{file} does not fit {model}: {'; '.join(parts)}. {remedy}")


def loading_dtype(stored: torch.dtype) -> torch.dtype:
    """The type in which weights are loaded unless one is asked for: their own, but float32 for float64."""
    return torch.float32 if stored == torch.float64 else stored
