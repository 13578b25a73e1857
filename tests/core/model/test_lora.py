"""Differences beside a flow's linear layers: what they add, what they leave, what becomes of them."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn

from starflow_core.errors import InputError
from starflow_core.model.flow import Flow
from starflow_core.model.int8 import expand, quantise
from starflow_core.model.lora import ALL, AdaptedLinear, Lora, adapt, attach, detach, linear_names, merge
from starflow_core.model.placement import Placement
from starflow_core.weights.flow import has_int8, load_flow, save_flow
from starflow_core.weights.streaming import stream_layers
from tests.core import models
from tests.core.models import randn, relative_error


def filled(flow: Flow, rank: int = 2, size: float = 0.3, blocks=ALL, seed: int = 5, **options) -> dict[str, Lora]:
    """Adapters on a flow that change what it does."""
    loras = adapt(flow, rank, 2.0 * rank, blocks=blocks, generator=torch.Generator().manual_seed(seed), **options)
    for number, lora in enumerate(loras.values()):
        lora.lora_B.data = size * randn(*lora.lora_B.shape, seed=seed + number)
    return loras


def encoded(flow: Flow, latents, seed: int = 1):
    return flow(latents, models.text(flow, len(latents), seed=seed)).noise.detach()


def by_hand(flow: Flow, loras: dict[str, Lora]) -> Flow:
    """The flow with the products added to its weights."""
    result = copy.deepcopy(flow)
    for name, lora in loras.items():
        product = lora.lora_B.detach().double() @ lora.lora_A.detach().double()
        weight = result.get_submodule(name).weight
        weight.data = (weight.double() + lora.strength * lora.alpha / len(lora.lora_A) * product).to(weight.dtype)
    return result


@pytest.mark.parametrize("seed", range(8))
def test_the_same_as_changed_weights(seed):
    """On flows of random shape, beside the weights and merged into them."""
    flow, latents = models.random_case(seed)
    bare = copy.deepcopy(flow)
    rng = random.Random(seed)
    loras = filled(flow, rng.randint(1, 5), blocks=rng.choice(("all", "deep", [0])))
    for lora in loras.values():
        lora.strength = rng.choice((1.0, 0.5, -2.0))
    exact = encoded(by_hand(bare, loras), latents)
    assert relative_error(encoded(flow, latents), exact) < 1e-9
    assert relative_error(encoded(bare, latents), exact) > 1e-4
    merge(flow)
    assert relative_error(encoded(flow, latents), exact) < 1e-9
    assert flow.state_dict().keys() == bare.state_dict().keys()


def test_fresh_ones_change_nothing_and_are_all_that_learns():
    flow = models.flow().requires_grad_()
    latents = randn(1, 2, 4, 3, 3)
    before = encoded(flow, latents)
    loras = adapt(flow, 3, 6.0)
    assert torch.equal(encoded(flow, latents), before)
    trained = {name for name, weight in flow.named_parameters() if weight.requires_grad}
    assert trained == {f"{name}.adapters.0.lora_{part}" for name in loras for part in "AB"}
    flow.loss(latents, models.text(flow)).sum().backward()
    assert all(lora.lora_B.grad.abs().sum() > 0 for lora in loras.values())
    assert {lora.scale for lora in loras.values()} == {2.0}


def test_fresh_ones_begin_as_linear_layers_do():
    lora = Lora.fresh(50, 200, 40, 1.0, generator=torch.Generator().manual_seed(0))
    bound = nn.Linear(50, 40).weight.detach().abs().max().item()
    assert lora.lora_A.abs().max().item() == pytest.approx(50**-0.5, rel=0.01) == pytest.approx(bound, rel=0.01)
    assert torch.equal(lora.lora_B, torch.zeros(200, 40))
    again = Lora.fresh(50, 200, 40, 1.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(lora.lora_A, again.lora_A)


def test_strength_0_leaves_the_layers_bare():
    flow = models.flow()
    loras = {name: Lora(lora.lora_A, lora.lora_B, 1.0, strength=0.0) for name, lora in filled(models.flow()).items()}
    attach(flow, loras)
    assert not any(isinstance(layer, AdaptedLinear) for layer in flow.modules())


def test_several_add_up_and_come_off():
    flow, latents = models.flow(), randn(1, 2, 4, 3, 3)
    bare = encoded(flow, latents)
    first, second = filled(flow, 1), filled(flow, 2, blocks="deep", seed=50)
    exact = encoded(by_hand(by_hand(models.flow(), first), second), latents)
    assert relative_error(encoded(flow, latents), exact) < 1e-9
    detach(flow)
    assert torch.equal(encoded(flow, latents), bare)
    assert flow.state_dict().keys() == models.flow().state_dict().keys()


def test_dropout_only_while_training():
    flow, latents = models.flow(), randn(1, 2, 4, 3, 3)
    filled(flow, dropout=0.5)
    still = encoded(flow, latents)
    assert torch.equal(encoded(flow, latents), still)
    flow.train()
    assert relative_error(encoded(flow, latents), still) > 1e-6


@pytest.mark.parametrize("coarse", ["bfloat16", "int8"])
def test_small_differences_survive_coarse_weights(coarse):
    """What rounding the changed weights would lose is computed to the input's precision."""
    weight, inputs = randn(64, 64), randn(16, 64)
    lora = Lora(randn(2, 64, seed=1), 1e-4 * randn(64, 2, seed=2), 2.0).requires_grad_(False)

    def rounded(weight):
        return expand(*quantise(weight), torch.float32) if coarse == "int8" else weight.bfloat16().float()

    base = nn.Linear(64, 64, bias=False).requires_grad_(False)
    base.weight.data = rounded(weight)
    exact = lora.scale * inputs @ lora.lora_A.T @ lora.lora_B.T
    assert relative_error(AdaptedLinear(base, [lora])(inputs) - base(inputs), exact) < 1e-5
    assert relative_error(lora(inputs.bfloat16()).float(), exact) < 1e-4
    assert relative_error(rounded(weight + lora.delta()) - rounded(weight), lora.delta()) > 1


@pytest.mark.parametrize("first", ["attached", "streamed"])
def test_streamed_layers(first):
    """Weights that are brought in layer by layer, be the adapters there before or not."""
    flow, latents = models.flow(), randn(1, 2, 4, 3, 3)
    exact = copy.deepcopy(flow)
    for each, streams in ((exact, False), (flow, True)):
        if streams and first == "streamed":
            stream_layers(each, Placement.on("cpu"))
        filled(each)
        if streams and first == "attached":
            stream_layers(each, Placement.on("cpu"))
    assert torch.equal(encoded(flow, latents), encoded(exact, latents))


def test_names_of_the_weights_stay(tmp_path):
    """Whoever looks for a weight by its name finds that of the layer: a flow with adapters saves as its base."""
    flow = models.flow()
    save_flow(flow, tmp_path / "bare.safetensors", "int8")
    filled(flow)
    save_flow(flow, tmp_path / "adapted.safetensors", "int8")
    assert (tmp_path / "bare.safetensors").read_bytes() == (tmp_path / "adapted.safetensors").read_bytes()
    eight = load_flow(tmp_path / "bare.safetensors")
    filled(eight)
    assert (has_int8(eight), has_int8(flow)) == (True, False)
    save_flow(eight, tmp_path / "again.safetensors", "int8")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "bare.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"blocks\.0\..*qkv is in 8 bit.*original"):
        merge(eight)
    assert any(isinstance(layer, AdaptedLinear) for layer in eight.modules())


def test_which_layers():
    flow = models.flow(layers=(1, 2, 2))
    assert linear_names(flow) == linear_names(flow, [2])
    assert len(linear_names(flow)) == 8
    assert len(linear_names(flow, "all")) == 20
    assert linear_names(flow, iter([1, 1]))[0] == "blocks.1.attn_blocks.0.attention.qkv"
    assert all(isinstance(flow.get_submodule(name), nn.Linear) for name in linear_names(flow, "all"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"blocks": [0, 3]}, "no block 3; this flow has the blocks 0 to 2"),
        ({"blocks": [-1]}, "no block -1"),
        ({"blocks": "shallow"}, "blocks is 'shallow': expected deep, all, or numbers"),
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0.0}, "alpha is 0"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"dropout": 1.0}, "dropout is 1"),
    ],
)
def test_settings_that_cannot_work(settings, words):
    with pytest.raises(InputError, match=words):
        adapt(models.flow(), **{"rank": 2, "alpha": 1.0, **settings})


def test_layers_that_do_not_fit():
    flow, name = models.flow(), "blocks.2.attn_blocks.0.attention.qkv"
    with pytest.raises(InputError, match=r"has no layer blocks\.2\.proj_in that can be adapted"):
        attach(flow, {"blocks.2.proj_in": Lora(randn(2, 4), randn(72, 2), 1.0)})
    with pytest.raises(InputError, match=r"A \(2, 70\) and B \(216, 2\); the layer has 72 inputs and 216 outputs"):
        attach(flow, {name: Lora(randn(2, 70), randn(216, 2), 1.0)})
    with pytest.raises(InputError, match="72 inputs"):
        attach(flow, {name: Lora(randn(2, 72), randn(216, 3), 1.0)})
