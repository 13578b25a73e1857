"""Files with weights in 8 bit: written, read, refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from starflow_core.errors import CheckpointError, NonFiniteError
from starflow_core.model.flow import Flow
from starflow_core.model.int8 import Int8Linear, expand, quantise
from starflow_core.weights import int8
from starflow_core.weights.flow import (
    QUANTISED,
    convert,
    expected_shapes,
    has_int8,
    in_int8,
    load_flow,
    quick_look,
    resolve,
    save_flow,
    weight_bytes,
)
from starflow_core.weights.tensorfiles import TensorFile

from ..weightfiles import CONFIG, METADATA, random_weights, write_pickle, write_safetensors, write_shards

LAYER = "blocks.2.attn_blocks.1.attention.qkv"
BF16 = {name: value.bfloat16() for name, value in random_weights().items()}
LINEAR = {name for name in random_weights() if QUANTISED.fullmatch(name)}


@pytest.fixture
def source(tmp_path):
    return write_safetensors(tmp_path / "a.safetensors", BF16)


@pytest.fixture
def converted(tmp_path, source):
    target = tmp_path / "int8.safetensors"
    convert(source, target, "int8")
    return target


def assert_same(found: Flow, expected: Flow) -> None:
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(found[name].dtype == expected[name].dtype for name in expected)


def damaged(path, **changes):
    """The file with other tensors in a layer, by their last names; None takes one away."""
    tensors = load_file(path)
    for part, value in changes.items():
        name = f"{LAYER}.{part}"
        tensors = {n: t for n, t in tensors.items() if n != name} | ({} if value is None else {name: value})
    save_file(tensors, path, METADATA)
    return path


def marked(**values) -> torch.Tensor:
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


# Which weights


def test_the_linear_layers_of_transformer_layers_are_in_8_bit():
    kinds = {name.rpartition("attn_blocks.")[2].partition(".")[2] for name in LINEAR}
    assert kinds == {"attention.qkv.weight", "attention.proj.weight", "mlp.main.0.weight", "mlp.main.2.weight"}
    assert len(LINEAR) == 4 * (sum(CONFIG.layers) + CONFIG.denoiser.layers)
    others = random_weights().keys() - LINEAR
    assert all(random_weights()[name].ndim != 2 or "proj_" in name for name in others)


# Writing


@pytest.mark.parametrize("kind", ["safetensors", "pth", "shards"])
def test_a_conversion_has_three_tensors_for_each_layer(tmp_path, kind):
    if kind == "shards":
        path = write_shards(tmp_path)
    else:
        path = tmp_path / f"b.{kind}"
        write_safetensors(path) if kind == "safetensors" else write_pickle(path)
    convert(path, tmp_path / "int8.safetensors", "int8", CONFIG)
    with safe_open(tmp_path / "int8.safetensors", "pt") as file:
        assert len(list(file.keys())) == len(random_weights()) + 2 * len(LINEAR)
        for name, weight in random_weights().items():
            if name not in LINEAR:
                assert torch.equal(file.get_tensor(name), weight.bfloat16())
                continue
            layer = name.removesuffix(".weight")
            values, scale = quantise(weight)
            assert torch.equal(file.get_tensor(name), values)
            assert torch.equal(file.get_tensor(f"{layer}.weight_scale"), scale)
            description = json.loads(bytes(file.get_tensor(f"{layer}.comfy_quant").tolist()))
            assert description == {"format": "int8_tensorwise", "full_precision_matrix_mult": True}
        metadata = file.metadata()
    assert metadata["source_name"] == path.name
    assert {"source_sha256", "starflow_config", "converter_version"} <= metadata.keys()


def test_tensors_are_aligned(converted):
    content = converted.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    sizes = {"F32": 4, "BF16": 2, "I8": 1, "U8": 1}
    for name, entry in header.items():
        assert name == "__metadata__" or entry["data_offsets"][0] % sizes[entry["dtype"]] == 0


def test_converting_twice_gives_the_same_bytes(tmp_path, source, converted):
    convert(source, tmp_path / "again.safetensors", "int8")
    assert (tmp_path / "again.safetensors").read_bytes() == converted.read_bytes()


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_8_bit_is_expanded_for_other_types(tmp_path, converted, name):
    convert(converted, tmp_path / "b.safetensors", name)
    found, kept = load_flow(tmp_path / "b.safetensors"), load_flow(converted, torch.float32)
    assert not in_int8(TensorFile.open(tmp_path / "b.safetensors"))
    layer = kept.get_submodule(LAYER)
    expected = expand(layer.weight, layer.weight_scale, found.compute_dtype)
    assert torch.equal(found.get_parameter(f"{LAYER}.weight"), expected)


def test_8_bit_stays_as_it_is(tmp_path, converted):
    """Also where no value is the largest there can be, so that rounding once more would give others."""
    damaged(converted, weight=torch.ones(120, 40, dtype=torch.int8))
    convert(converted, tmp_path / "b.safetensors", "int8")
    before, after = load_file(converted), load_file(tmp_path / "b.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(load_flow(converted).get_submodule(LAYER).weight, before[f"{LAYER}.weight"])


def test_saving_a_flow(tmp_path, source, converted):
    """From weights of either kind, into either kind."""
    kept = load_flow(converted)
    for flow in (kept, load_flow(source)):
        save_flow(flow, tmp_path / "b.safetensors", "int8", {"license": "none"})
        assert_same(load_flow(tmp_path / "b.safetensors"), kept)
        assert TensorFile.open(tmp_path / "b.safetensors").metadata["license"] == "none"
    save_flow(kept, tmp_path / "c.safetensors", "fp32")
    assert_same(load_flow(tmp_path / "c.safetensors"), load_flow(converted, torch.float32, int8_linear=None))


# Loading


def test_quantising_at_load_is_loading_the_conversion(source, converted):
    kept = load_flow(converted)
    assert kept.compute_dtype == torch.bfloat16
    assert_same(load_flow(source, quantise=True), kept)
    layers = {name for name, layer in kept.named_modules() if isinstance(layer, Int8Linear)}
    assert layers == {name.removesuffix(".weight") for name in LINEAR}
    assert not any(weight.requires_grad for weight in kept.parameters())
    assert not kept.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_type_asked_for_is_that_of_the_others(converted, dtype):
    flow = load_flow(converted, dtype)
    assert flow.compute_dtype == dtype
    others = {name: weight.dtype for name, weight in flow.named_parameters() if not name.endswith("weight_scale")}
    assert {kind for name, kind in others.items() if name not in LINEAR} == {dtype}
    assert {others[name] for name in LINEAR} == {torch.int8}


def test_a_flow_says_whether_it_keeps_weights_in_8_bit(source, converted):
    assert has_int8(load_flow(converted))
    assert not has_int8(load_flow(converted, int8_linear=None))
    assert not has_int8(load_flow(source))


def test_a_host_brings_its_own_layer(converted):
    class Layer(Int8Linear):
        pass

    assert isinstance(load_flow(converted, int8_linear=Layer).get_submodule(LAYER), Layer)


def test_without_a_layer_nothing_stays_in_8_bit(source, converted):
    flow = load_flow(converted, torch.float32, int8_linear=None)
    assert {weight.dtype for weight in flow.parameters()} == {torch.float32}
    whole = load_flow(source, quantise=True, int8_linear=None)
    assert torch.equal(whole.get_parameter(f"{LAYER}.weight"), BF16[f"{LAYER}.weight"])


def test_a_gradient_goes_through_what_was_loaded_in_inference_mode(converted):
    with torch.inference_mode():
        flow = load_flow(converted, torch.float32)
    latents = torch.randn(1, 1, 3, 2, 2, requires_grad=True)
    flow.loss(latents, torch.randn(1, 4, 6)).sum().backward()
    assert torch.isfinite(latents.grad).all()


def test_nan_is_found_while_quantising(tmp_path):
    path = write_safetensors(tmp_path / "b.safetensors", BF16 | {f"{LAYER}.weight": torch.full((120, 40), math.nan)})
    for use in (lambda: load_flow(path, quantise=True), lambda: convert(path, tmp_path / "c.safetensors", "int8")):
        with pytest.raises(NonFiniteError, match=rf"{LAYER}\.weight of b\.safetensors has NaN"):
            use()


# What is known without reading


def test_recognised_by_the_header(converted, source):
    assert quick_look(converted) == "tiny"
    assert in_int8(TensorFile.open(converted))
    assert not in_int8(TensorFile.open(source))
    checkpoint, _, shapes = resolve(converted)
    assert shapes == expected_shapes(CONFIG)
    assert {name for name in shapes if checkpoint.dtypes[name] == torch.int8} == LINEAR


def test_bytes(converted, source):
    for path, eight in ((converted, True), (source, False)):
        for dtype in (torch.bfloat16, torch.float32):
            flow = load_flow(path, dtype)
            assert weight_bytes(CONFIG, dtype, eight) == sum(weight.nbytes for weight in flow.parameters())


# Damage


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"weight_scale": None}, "has no weight_scale"),
        ({"comfy_quant": None}, "has no comfy_quant"),
        ({"weight": None, "weight_scale": None}, "has no weight and no weight_scale"),
        ({"weight": torch.ones(120, 40)}, r"has a weight of torch.float32 \(120, 40\), not of int8"),
        ({"weight_scale": torch.ones(())}, r"has scales of torch.float32 \(\), not one float32 for each of 120 rows"),
        ({"weight_scale": torch.ones(40, 1)}, r"has scales of torch.float32 \(40, 1\)"),
        ({"weight_scale": torch.ones(120, 1).half()}, r"has scales of torch.float16 \(120, 1\)"),
        ({"comfy_quant": marked(format="float8_e4m3fn")}, "is in the format 'float8_e4m3fn'; only int8_tensorwise"),
        ({"comfy_quant": marked(format=None)}, "is in the format None"),
        ({"comfy_quant": marked(format="int8_tensorwise", convrot=True)}, r"is in a variant .*\(convrot\)"),
        (
            {"comfy_quant": marked(format="int8_tensorwise", params={"convrot": True})},
            r"is in a variant of int8_tensorwise \(params\) that can't be read",
        ),
        ({"comfy_quant": torch.tensor([1, 2, 3], dtype=torch.uint8)}, "has a comfy_quant that isn't a JSON object"),
        ({"comfy_quant": torch.tensor(list(b"[1]"), dtype=torch.uint8)}, "has a comfy_quant that isn't a JSON object"),
        ({"comfy_quant": torch.ones(3)}, "has a comfy_quant that isn't a JSON object"),
    ],
)
def test_layers_that_cannot_be_read(tmp_path, converted, changes, problem):
    path = damaged(converted, **changes)
    message = rf"^{LAYER} of int8\.safetensors, a layer in 8 bit, {problem}.*\. Download the file again, or convert"
    for use in (load_flow, resolve, lambda p: convert(p, tmp_path / "c.safetensors")):
        with pytest.raises(CheckpointError, match=message):
            use(path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0])
def test_impossible_scales(tmp_path, converted, value):
    scale = torch.ones(120, 1)
    scale[7] = value
    path = damaged(converted, weight_scale=scale)
    for use in (load_flow, lambda p: convert(p, tmp_path / "c.safetensors")):
        with pytest.raises(CheckpointError, match=rf"{LAYER}\.weight_scale of int8\.safetensors has NaN, infinity or"):
            use(path)
    assert not (tmp_path / "c.safetensors").exists()


def test_a_layer_of_the_wrong_size(converted):
    path = damaged(converted, weight=torch.ones(8, 40, dtype=torch.int8), weight_scale=torch.ones(8, 1))
    with pytest.raises(CheckpointError, match=rf"1 wrongly shaped \({LAYER}\.weight \(8, 40\) instead of \(120, 40\)"):
        load_flow(path)


def test_layers_that_are_never_in_8_bit(tmp_path):
    name = "blocks.0.proj_in.weight"
    values, scale = quantise(random_weights()[name])
    weights = random_weights() | {name: values, "blocks.0.proj_in.weight_scale": scale}
    path = write_safetensors(tmp_path / "b.safetensors", weights)
    with pytest.raises(CheckpointError, match=r"1 unexpected .*proj_in\.weight_scale\); 1 quantised or of a type"):
        load_flow(path)


def test_the_mark_is_read_by_anyone():
    """Spaces after a JSON object change nothing."""
    assert json.loads(int8.MARK_BYTES)["format"] == "int8_tensorwise"
    assert len(int8.MARK_BYTES) % 8 == 0
