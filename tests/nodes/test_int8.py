"""Weights in 8 bit in the host: in its own layers where it has them, expanded where it has none."""

from __future__ import annotations

import logging

import pytest
import torch

from starflow_core import load_flow
from starflow_core.bundled import BUNDLED, FLOW_FILE
from starflow_core.model.int8 import quantise
from starflow_core.weights import int8
from starflow_core.weights.flow import convert
from tests.core import models

from . import pack
from .steps import DEMO, Loaded, run

host = pack.module("nodes.host")
CPU = torch.device("cpu")
KEEPS = host.int8_linear(torch.float32) is not None
keeps = pytest.mark.skipif(not KEEPS, reason="this host has no layers for weights in 8 bit")
LAYER = "blocks.2.attn_blocks.0.attention.qkv"


@pytest.fixture
def loaded():
    """The host's handle on the demo in 8 bit."""
    return run("STARFlowLoadModel", weight_type="int8")[0]


@pytest.fixture(scope="module")
def expected():
    """The core's own."""
    return load_flow(BUNDLED / FLOW_FILE, torch.float32, quantise=KEEPS)


def encoded(flow) -> torch.Tensor:
    """A clip's noise and log-determinants: with the deep block and the shallow ones, all layers but the denoiser's."""
    clip, text = models.randn(1, 3, flow.config.latent.channels, 4, 4), models.text(flow)
    with torch.no_grad():
        encoding = flow.encode(clip, text)
    return torch.cat([part.flatten() for part in (encoding.noise, *encoding.logdets)])


def test_the_flow_is_the_cores(loaded, expected):
    assert torch.equal(encoded(host.flow_of(loaded)), encoded(expected))


def test_a_file_in_8_bit(model_folders, expected):
    path = model_folders / "diffusion_models" / "int8.safetensors"
    convert(BUNDLED / FLOW_FILE, path, "int8")
    (found,) = run("STARFlowLoadModel", model_name="int8.safetensors")
    kept = load_flow(path, torch.float32)
    assert torch.equal(encoded(host.flow_of(found)), encoded(kept))
    assert {weight.dtype for weight in found.model.parameters()} == {torch.float32}


@pytest.mark.skipif(KEEPS, reason="this host has layers for weights in 8 bit")
def test_what_cannot_stay_in_8_bit_is_expanded_and_said(model_folders, caplog):
    path = model_folders / "diffusion_models" / "int8.safetensors"
    convert(BUNDLED / FLOW_FILE, path, "int8")
    for inputs in ({"weight_type": "int8"}, {"model_name": "int8.safetensors", "weight_type": "bf16"}):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "starflow"):
            (found,) = run("STARFlowLoadModel", **inputs)
        name, dtype = inputs.get("model_name", DEMO), host.flow_of(found).compute_dtype
        message = f"STARFlow: this ComfyUI can't keep weights in 8 bit; {name} is loaded in {dtype}"
        assert [record.getMessage() for record in caplog.records] == [message]
        assert isinstance(host.flow_of(found).get_submodule(LAYER), host.OPERATIONS.Linear)
    with caplog.at_level(logging.WARNING, "starflow"):
        caplog.clear()
        run("STARFlowLoadModel")
    assert not caplog.records


def test_text_encoders_stay_in_8_bit_everywhere(demo):
    (encoder,) = run("STARFlowLoadTextEncoder", weight_type="int8")
    kept = pack.module("starflow_core.model.int8").Int8Linear
    assert any(isinstance(layer, kept) for layer in encoder.patcher.model.modules())
    both = Loaded(demo.model, encoder, demo.vae)
    positive = both.encode(demo.empty())[0][0][0]
    exact = demo.encode(demo.empty())[0][0][0]
    assert models.relative_error(positive, exact) < 1e-2


@keeps
def test_the_host_knows_what_the_weights_take(loaded, demo):
    assert loaded.model_size() < 0.3 * demo.model.model_size()
    assert hasattr(host.flow_of(loaded).get_submodule(LAYER), "comfy_cast_weights")


@keeps
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_never_rounded(full, dtype):
    """The host's own product of a weight in 8 bit rounds its input, whatever the file says."""
    made, inputs = host.int8_linear(dtype)(8, 6), models.randn(3, 4, 8).to(dtype)
    weight, scale = quantise(models.randn(6, 8))
    int8.put(torch.nn.ModuleDict({"a": made}), "a.weight", weight, scale)
    made.bias = torch.nn.Parameter(models.randn(6, seed=1).to(dtype))
    made._full_precision_mm = full
    reference = torch.nn.functional.linear(inputs, int8.expand(weight, scale, dtype), made.bias)
    assert torch.equal(made(inputs), reference)
    made.weight_function = [lambda weight: weight + 1]
    assert not torch.equal(made(inputs), reference)
    made.weight_function = []
    gradient = torch.autograd.grad(made(inputs.requires_grad_()).sum(), inputs)[0]
    torch.testing.assert_close(gradient[0, 0], int8.expand(weight, scale, dtype).sum(0))


@keeps
def test_a_token_sees_nothing_later(loaded):
    flow = host.flow_of(loaded)
    tokens = flow.tokens(models.randn(1, 3, flow.config.latent.channels, 3, 3)).flatten(1, 2)
    text, grid = models.text(flow), flow.grid(models.randn(1, 3, flow.config.latent.channels, 3, 3))
    changed = tokens.clone()
    changed[:, 14] *= 100
    with torch.no_grad():
        both = zip(flow.deep_affine(tokens, text, grid), flow.deep_affine(changed, text, grid), strict=True)
    for before, after in both:
        assert torch.equal(before[:, :15], after[:, :15])
        assert not torch.equal(before[:, 15:], after[:, 15:])


@keeps
def test_partial_loads_change_nothing(loaded):
    whole, flow = encoded(host.flow_of(loaded)), host.flow_of(loaded)
    for load in (
        lambda: loaded.load(CPU, lowvram_model_memory=500_000),
        lambda: loaded.partially_load(CPU, 1_000_000),
        lambda: loaded.partially_unload(CPU, 1_000_000),
        lambda: loaded.load(CPU, full_load=True),
        lambda: loaded.detach(),
    ):
        load()
        assert torch.equal(encoded(flow), whole)


@keeps
def test_patches_are_applied_to_expanded_weights(loaded, tmp_path):
    """As a LoRA's are: while a layer computes if its weight is elsewhere, else once, when the result is rounded."""
    flow, before = host.flow_of(loaded), encoded(host.flow_of(loaded))
    convert(BUNDLED / FLOW_FILE, tmp_path / "int8.safetensors", "int8")
    patched = load_flow(tmp_path / "int8.safetensors", torch.float32, int8_linear=None)
    weight = patched.get_parameter(f"{LAYER}.weight")
    patch = 0.02 * models.randn(*weight.shape)
    weight.add_(patch)
    wanted = encoded(patched)
    assert models.relative_error(before, wanted) > 1e-4
    for memory, error in ((1, 1e-9), (10**9, 2e-4)):
        handle = loaded.clone()
        handle.add_patches({f"diffusion_model.{LAYER}.weight": ("diff", (patch,))}, 1.0)
        handle.load(CPU, lowvram_model_memory=memory)
        assert models.relative_error(encoded(flow), wanted) < error
        handle.detach()
    assert torch.equal(encoded(flow), before)
