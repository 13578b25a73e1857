"""Weights in 8 bit: what rounding does, and that a layer which keeps them computes as one that expanded them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from starflow_core.model.int8 import Int8Linear, expand, quantise, replace_linear
from starflow_core.solve.sampling import sample
from starflow_core.solve.solvers import PRESETS
from starflow_core.weights.flow import load_flow, save_flow
from tests.core import models

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def layer(rows: int = 6, columns: int = 8, bias: bool = True) -> Int8Linear:
    made = Int8Linear(columns, rows, bias)
    made.weight.data, made.weight_scale.data = quantise(models.randn(rows, columns))
    if bias:
        made.bias.data = models.randn(rows, seed=1)
    return made


@pytest.fixture(scope="module")
def flows(tmp_path_factory):
    """The same flow with its weights kept in 8 bit, and expanded when it was loaded."""
    path = tmp_path_factory.mktemp("int8") / "flow.safetensors"
    save_flow(models.flow(), path, "int8")
    return load_flow(path, torch.float32), load_flow(path, torch.float32, int8_linear=None)


def test_each_row_is_rounded_to_multiples_of_its_own_scale():
    weight = models.randn(5, 40)
    weight[2] *= 1000
    weight[3] = 0
    values, scale = quantise(weight)
    assert (values.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (5, 1))
    assert (scale > 0).all()
    error = (expand(values, scale, torch.float32) - weight).abs()
    assert (error <= scale * 0.5001).all()
    assert not error[3].any()
    largest = values.float().abs().amax(1)
    assert largest.tolist() == [127, 127, 127, 0, 127]


def test_negative_weights_count_for_the_scale():
    _, scale = quantise(torch.tensor([[-254.0, 1.0], [1.0, 127.0]]))
    assert scale.tolist() == [[2.0], [1.0]]


@pytest.mark.parametrize("dtype", TYPES)
def test_products_are_rounded_once(dtype):
    values, scale = quantise(models.randn(9, 50))
    assert torch.equal(expand(values, scale, dtype), (values.float() * scale).to(dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_in_the_inputs_type(dtype, bias):
    made, inputs = layer(bias=bias), models.randn(3, 8, seed=2).to(dtype)
    if bias:
        made.bias.data = made.bias.data.to(dtype)
    expected = F.linear(inputs, expand(made.weight, made.weight_scale, dtype), made.bias)
    if dtype != torch.bfloat16:
        assert torch.equal(made(inputs), expected)
        return
    # On a CPU what comes out is scaled instead of the weight: rounded twice instead of once.
    weight, offset = expand(made.weight, made.weight_scale, torch.float64), made.bias.double() if bias else None
    exact = F.linear(inputs.double(), weight, offset)
    assert made(inputs).dtype == dtype
    assert models.relative_error(made(inputs), exact) < 3 * models.relative_error(expected, exact) < 1e-4


def test_gradients_reach_the_input_alone():
    made, inputs = layer(), models.randn(3, 8, seed=2).requires_grad_()
    made(inputs).sum().backward()
    expected = expand(made.weight, made.weight_scale, torch.float32).sum(0)
    torch.testing.assert_close(inputs.grad, expected.expand(3, -1))
    assert made.weight.grad is None
    assert made.weight_scale.grad is None


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_replaced_in_place(bias):
    module = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(3, 4, bias, device="meta", dtype=torch.float16)))
    replace_linear(module, "0.0")
    made = module[0][0]
    assert isinstance(made, Int8Linear)
    assert {name: (tuple(p.shape), p.dtype) for name, p in made.named_parameters()} == {
        "weight": ((4, 3), torch.int8),
        "weight_scale": ((4, 1), torch.float32),
        **({"bias": ((4,), torch.float16)} if bias else {}),
    }


def test_kept_and_expanded_weights_give_the_same_bits(flows):
    kept, expanded = flows
    assert isinstance(kept.deep.attn_blocks[0].attention.qkv, Int8Linear)
    assert isinstance(expanded.deep.attn_blocks[0].attention.qkv, torch.nn.Linear)
    noise, text = models.randn(2, 3, 4, 3, 3), models.text(kept, 2)
    first, second = (sample(flow, noise, text, settings=PRESETS["exact"]) for flow in flows)
    assert torch.equal(first.latents, second.latents)
    assert first.statistics.deep_sweeps == second.statistics.deep_sweeps
    assert torch.equal(kept.encode(noise, text).noise, expanded.encode(noise, text).noise)


def test_a_token_sees_nothing_later(flows):
    """A scale over all tokens' activations would let later ones change earlier ones."""
    flow = flows[0]
    x = models.randn(1, 3, 4, 3, 3)
    tokens, text, grid = flow.tokens(x).flatten(1, 2), models.text(flow), flow.grid(x)
    for token in (3, 14, 25):
        changed = tokens.clone()
        changed[:, token] *= 100
        for before, after in zip(
            flow.deep_affine(tokens, text, grid), flow.deep_affine(changed, text, grid), strict=True
        ):
            assert torch.equal(before[:, : token + 1], after[:, : token + 1])
            assert not torch.equal(before[:, token + 1 :], after[:, token + 1 :])


def test_jacobi_settles_as_with_other_weights(flows):
    """What would round activations would go on changing until the last sweep there can be."""
    kept, plain = flows[0], models.flow()
    noise, text = models.randn(2, 3, 4, 3, 3), models.text(kept, 2)
    sweeps = [sample(flow, noise, text, settings=PRESETS["exact"]).statistics.deep_sweeps for flow in (kept, plain)]
    assert abs(sweeps[0] - sweeps[1]) <= 1
