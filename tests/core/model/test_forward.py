"""Everything computes in a module's forward, so that hooks on modules (sharding, offloading, LoRA) see every use."""

from __future__ import annotations

import pytest
import torch

from starflow_core.model.denoiser import DenoiserNet
from starflow_core.model.flow import Block
from starflow_core.model.transformer import Layer
from starflow_core.solve.denoising import denoise, score_denoise
from starflow_core.solve.sampling import sample
from starflow_core.solve.solvers import AUTOREGRESSIVE, PRESETS
from tests.core import models

USES = {
    "encode": lambda flow, x, text: flow.encode(x, text).noise,
    "loss": lambda flow, x, text: flow.loss(x, text),
    "jacobi": lambda flow, x, text: sample(flow, x, text, text.flip(1), guidance=1.0).latents,
    "autoregressive": lambda flow, x, text: sample(flow, x, text, settings=AUTOREGRESSIVE).latents,
    "context": lambda flow, x, text: sample(flow, x, text, context=x[:, :1], settings=PRESETS["exact"]).latents,
    "denoise": lambda flow, x, text: denoise(flow, x, text),
    "score": lambda flow, x, text: score_denoise(flow, x, text),
}


def only_in_forward(module) -> None:
    """Take the module's weights away but for the time of its forward, and of the gradient through it."""
    kept = [weight.detach().clone() for weight in module.parameters()]

    def lend(*_):
        for weight, values in zip(module.parameters(), kept, strict=True):
            weight.data.copy_(values)

    def take(*_):
        for weight in module.parameters():
            weight.data.fill_(float("nan"))

    take()
    module.register_forward_pre_hook(lend)
    module.register_forward_hook(take)
    module.register_full_backward_pre_hook(lend)
    module.register_full_backward_hook(take)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("kind", "count"), [(Layer, 6), (Block, 3), (DenoiserNet, 1)])
def test_weights_are_used_in_the_forward_of_their_module_alone(kind, count, use):
    x, flow = models.randn(2, 7, 4, 2, 3), models.flow()
    expected = USES[use](flow, x, models.text(flow, 2))
    modules = [module for module in flow.modules() if isinstance(module, kind)]
    assert len(modules) == count
    for module in modules:
        only_in_forward(module)
    torch.testing.assert_close(USES[use](flow, x, models.text(flow, 2)), expected)


@pytest.mark.parametrize("use", ["encode", "loss", "score"])
def test_the_flow_as_a_whole_computes_in_its_forward(use):
    x, flow = models.randn(2, 3, 4, 2, 3), models.flow()
    calls = []
    flow.register_forward_hook(lambda *_: calls.append("flow"))
    for block in flow.blocks:
        assert isinstance(block, Block)
        block.register_forward_hook(lambda block, *_: calls.append(block.index))
    USES[use](flow, x, models.text(flow, 2))
    once = [0, 1, 2, "flow"]
    assert calls == (once * 2 if use == "score" else once)  # the score step takes one sample at a time
