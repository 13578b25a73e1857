"""Weights in 8 bit in files: three tensors for each layer, as ComfyUI's `int8_tensorwise` has them.

`X.weight` is int8, `X.weight_scale` (rows, 1) float32, and `X.comfy_quant` the bytes of a JSON object that names the
format.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..model.int8 import expand, quantise
from ..model.schema import shown
from .keys import Shapes, loading_dtype
from .tensorfiles import Layout, StoredTensor, TensorFile, cast

WEIGHT, SCALE, MARK = ".weight", ".weight_scale", ".comfy_quant"
FORMAT = "int8_tensorwise"
# Weights are to be expanded, activations never quantised. Spaces round it up: what follows has to be aligned.
MARK_BYTES = json.dumps({"format": FORMAT, "full_precision_matrix_mult": True}).encode().ljust(72)
VARIANTS = ("convrot", "params")  # of the format, which change what the values mean
REMEDY = "Download the file again, or convert the model's original once more."


def mark() -> Tensor:
    """What says of a layer how its weight is stored."""
    return torch.tensor(list(MARK_BYTES), dtype=torch.uint8)


def joined(file: TensorFile, kept: re.Pattern[str]) -> TensorFile:
    """The file with one tensor for each 8-bit weight whose name is in `kept`.

    Raises CheckpointError for a layer that is incomplete, wrongly shaped, or of another format.
    """
    layers = dict.fromkeys(_layers(file.tensors, kept))
    if not layers:
        return file
    parts = {layer + part for layer in layers for part in (SCALE, MARK)}
    tensors = {name: tensor for name, tensor in file.tensors.items() if name not in parts}
    return replace(file, tensors=tensors | {layer + WEIGHT: _join(file, layer) for layer in layers})


def _layers(tensors: Mapping[str, StoredTensor], kept: re.Pattern[str]) -> Iterator[str]:
    """The layers of which a file has anything in 8 bit."""
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if kept.fullmatch(layer + WEIGHT) and (f".{part}" in (SCALE, MARK) or tensor.dtype == torch.int8):
            yield layer


def _join(file: TensorFile, layer: str) -> StoredTensor:
    weight, scale, description = (file.tensors.get(layer + part) for part in (WEIGHT, SCALE, MARK))
    absent = [part[1:] for part in (WEIGHT, SCALE, MARK) if layer + part not in file.tensors]
    if absent:
        problem = f"has no {' and no '.join(absent)}"
    elif weight.dtype != torch.int8 or len(weight.shape) != 2:
        problem = f"has a weight of {weight.dtype} {weight.shape}, not of int8 with two axes"
    elif scale.dtype != torch.float32 or scale.shape != (weight.shape[0], 1):
        problem = f"has scales of {scale.dtype} {scale.shape}, not one float32 for each of {weight.shape[0]} rows"
    else:
        problem = _other_format(description)
    if problem:
        raise CheckpointError(f"{layer} of {file.path.name}, a layer in 8 bit, {problem}. {REMEDY}")
    return paired(weight, partial(_read, weight, scale, layer, file.path.name))


def _other_format(description: StoredTensor) -> str | None:
    """What keeps a layer from being read, by its `comfy_quant`."""
    size = math.prod(description.shape)
    try:
        if description.dtype != torch.uint8 or size > 4096:
            raise ValueError
        values = json.loads(bytes(description.read().view(-1).tolist()))
        found = values.get("format")
    except (ValueError, AttributeError, RecursionError):
        return "has a comfy_quant that isn't a JSON object"
    if found != FORMAT:
        return f"is in the format {shown(found)}; only {FORMAT} can be read"
    variant = next((name for name in VARIANTS if values.get(name)), None)
    return variant and f"is in a variant of {FORMAT} ({variant}) that can't be read"


def _read(weight: StoredTensor, scale: StoredTensor, layer: str, file: str) -> tuple[Tensor, Tensor]:
    scales = scale.read()
    if not (scales.isfinite() & (scales > 0)).all():
        raise CheckpointError(f"{layer}{SCALE} of {file} has NaN, infinity or scales that aren't above 0. {REMEDY}")
    return weight.read(), scales


def paired(weight: StoredTensor, read: Callable[[], tuple[Tensor, Tensor]]) -> StoredTensor:
    """A weight in 8 bit of which `read` gives values and scales."""
    return replace(weight, int8=read, read=lambda: expand(*read(), torch.float32), part=None)


def int8_weight(file: TensorFile, name: str) -> tuple[Tensor, Tensor]:
    """Values and scales of a weight: those of the file, or made from it. Errors as in `cast`."""
    stored = file.tensors[name]
    return stored.int8() if stored.int8 else quantise(cast(stored.read(), loading_dtype(stored.dtype), name, file.path))


def put(module: nn.Module, name: str, weight: Tensor, scale: Tensor) -> None:
    """Give a weight to a layer made for it, ours or a host's, by the names it has in files."""
    layer = module.get_submodule(name.removesuffix(WEIGHT))
    state = {"weight": weight, "weight_scale": scale, "comfy_quant": mark()}
    layer.load_state_dict(state, strict=False, assign=True)  # not strict: the bias comes by itself


def layout(shapes: Shapes, dtype: torch.dtype, quantised: re.Pattern[str] | None) -> Layout:
    """The tensors of a file in their order: those in 8 bit first, where their scales are aligned, the others in
    `dtype`."""
    eight = [name for name in shapes if quantised and quantised.fullmatch(name)]
    found: Layout = {}
    for name in eight:
        layer, shape = name.removesuffix(WEIGHT), shapes[name]
        found[name] = (shape, torch.int8)
        found[layer + SCALE] = ((shape[0], 1), torch.float32)
        found[layer + MARK] = ((len(MARK_BYTES),), torch.uint8)
    return found | {name: (shape, dtype) for name, shape in shapes.items() if name not in found}


def weight_bytes(shapes: Shapes, dtype: torch.dtype, quantised: re.Pattern[str] | None) -> int:
    """Memory that weights of these shapes take, those that match `quantised` in 8 bit, the others in `dtype`."""
    tensors = layout(shapes, dtype, quantised).items()
    return sum(math.prod(shape) * kind.itemsize for name, (shape, kind) in tensors if not name.endswith(MARK))
