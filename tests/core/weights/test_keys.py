"""The check of a file's tensors against those that a module expects."""

from __future__ import annotations

import re

import pytest
import torch

from starflow_core.errors import CheckpointError
from starflow_core.weights.keys import check_tensors, loading_dtype, module_shapes
from starflow_core.weights.tensorfiles import StoredTensor

EXPECTED = {f"layers.{i}.weight": (4, i + 1) for i in range(7)}


def stored(shapes=EXPECTED, **dtypes) -> dict[str, StoredTensor]:
    """Tensors that are never read, float32 unless `dtypes` has another for the layer."""
    return {
        name: StoredTensor(shape, dtypes.get("layer" + name.split(".")[1], torch.float32), read=None)
        for name, shape in shapes.items()
    }


def complaint(tensors: dict[str, StoredTensor]) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_tensors(tensors, EXPECTED, "a.safetensors", "the model", "Do better.")
    return str(caught.value)


def test_what_fits_passes():
    types = {"layer0": torch.bfloat16, "layer1": torch.float16, "layer2": torch.float64}
    check_tensors(stored(**types), EXPECTED, "a.safetensors", "the model", "Do better.")


def test_every_kind_of_problem_is_counted_and_named():
    tensors = stored(layer6=torch.int8, layer5=None, layer4=torch.float8_e4m3fn)
    tensors["extra"] = tensors.pop("layers.0.weight")
    tensors["layers.1.weight"] = StoredTensor((2, 4), torch.float32, read=None)
    assert complaint(tensors) == (
        "a.safetensors does not fit the model: 1 missing (layers.0.weight); 1 unexpected (extra); "
        "1 wrongly shaped (layers.1.weight (2, 4) instead of (4, 2)); "
        "3 quantised or of a type other than bf16, fp16 and fp32 (layers.4.weight torch.float8_e4m3fn, "
        "layers.5.weight of an unknown type, layers.6.weight torch.int8). Do better."
    )


@pytest.mark.parametrize("count", [5, 6])
def test_the_first_five_names_are_given(count):
    names = list(EXPECTED)[:count]
    more = ", .." if count > 5 else ""
    message = complaint({name: t for name, t in stored().items() if name not in names})
    assert re.search(rf"{count} missing \((.*)\)\.", message)[1] == ", ".join(names[:5]) + more


def test_shapes_of_a_module_are_those_of_its_state():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    assert module_shapes(module) == {name: tuple(value.shape) for name, value in module.state_dict().items()}
    assert module_shapes(module)["0.weight"] == (3, 2)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_types_are_kept_but_float64(stored):
    assert loading_dtype(stored) == stored
    assert loading_dtype(torch.float64) == torch.float32
