"""Blocks with a cache: rows together or apart, a prefix filled again, a cache handed in, parts on several devices."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from starflow_core.errors import InputError
from starflow_core.jobs.context import Context
from starflow_core.jobs.tasks import Generation, Job
from starflow_core.model.cache import Cache
from starflow_core.model.flow import Flow
from starflow_core.model.placement import Placement
from starflow_core.solve.runs import DeepRun
from starflow_core.solve.sampling import sample
from starflow_core.solve.solvers import AUTOREGRESSIVE
from starflow_core.weights.flow import load_flow, save_flow
from tests.core import models

CPU = torch.device("cpu")
APART = replace(Placement.on("cpu"), deep=(CPU, CPU))


def deep_run(flow, guidance=2.0, batch=2, **options):
    grid = flow.grid(models.randn(1, 3, 4, 2, 3))
    return DeepRun(flow, grid, models.text(flow, batch), models.text(flow, seed=8), guidance, **options)


def move(module, device):
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(torch.empty_like(weight, device=device)))


def evaluated(run, batch=2):
    tokens = models.randn(batch, 18, 4, seed=3)
    parts = [run(tokens[:, max(i - 1, 0) : i + 5], i) for i in (0, 6, 12)]
    return torch.cat([torch.cat(part, -1) for part in parts], 1)


def test_rows_apart_are_the_rows_together():
    flow = models.flow()
    together, apart = deep_run(flow), deep_run(flow, devices=APART.deep)
    assert [run.cache.shape.rows for run in together.runs] == [4]
    assert [run.cache.shape.rows for run in apart.runs] == [2, 2]
    torch.testing.assert_close(evaluated(apart), evaluated(together), atol=1e-5, rtol=1e-5)


def test_without_guidance_there_is_one_run():
    assert [run.cache.shape.rows for run in deep_run(models.flow(), 0.0, devices=APART.deep).runs] == [2]


@pytest.mark.parametrize("placement", [None, APART], ids=["together", "apart"])
def test_guidance_apart_samples_the_same(placement):
    flow = models.flow()
    noise, text, uncond = models.randn(2, 7, 4, 2, 3), models.text(flow, 2), models.text(flow, seed=8)
    options = {"guidance": 2.0, "settings": AUTOREGRESSIVE, "context": models.randn(2, 1, 4, 2, 3, seed=4)}
    expected = sample(flow, noise, text, uncond, **options).latents
    found = sample(flow, noise, text, uncond, placement=placement, **options).latents
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_prefix_can_be_filled_again():
    flow = models.flow()
    run, grid = deep_run(flow), flow.grid(models.randn(1, 3, 4, 2, 3))
    text, uncond = models.text(flow, 2, seed=11), models.text(flow, seed=12)
    before = evaluated(run)
    run.fill(text, uncond)
    after = evaluated(run)
    torch.testing.assert_close(after, evaluated(DeepRun(flow, grid, text, uncond, 2.0)))
    assert not torch.allclose(after, before)


def test_a_cache_is_handed_in():
    made = []

    def make_cache(*shape):
        made.append(Cache(*shape))
        return made[-1]

    flow = models.flow()
    run = deep_run(flow, make_cache=make_cache)
    evaluated(run)
    assert [r.cache for r in run.runs] == made
    assert made[0].recent.shape == (2, 2, 4, 3, 5 + 18, 24)  # keys and values, layers, rows, heads, slots, channels
    torch.testing.assert_close(evaluated(run), evaluated(deep_run(flow)))


def test_a_placement_has_one_or_two_devices_for_the_deep_block():
    with pytest.raises(InputError, match="3 devices"):
        replace(APART, deep=(CPU,) * 3)


@pytest.mark.parametrize("task", ["text", "extend"])
@pytest.mark.parametrize("streamed", [True, False])
def test_every_part_computes_on_its_device(monkeypatch, task, streamed):
    """Fake tensors have a device but no data, and an operation across two devices fails. "lazy" is a device type that
    every build of PyTorch knows and nothing here uses."""
    deep, shallow, denoiser = (torch.device("lazy", i) for i in range(3))
    placement = Placement((deep,), shallow, denoiser, CPU, CPU)
    monkeypatch.setattr(torch, "isfinite", lambda x: SimpleNamespace(all=lambda: True))
    monkeypatch.setattr("starflow_core.solve.sampling.require_finite", lambda *_: None)
    monkeypatch.setattr("starflow_core.model.flow.require_finite", lambda *_: None)
    monkeypatch.setattr("starflow_core.solve.denoising.require_finite", lambda *_: None)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        flow = Flow(models.config())
        for part, device in ((flow, shallow), (flow.deep, deep), (flow.learnable_self_denoiser, denoiser)):
            move(part, device)
        context = Context("extend", torch.randn(1, 4, 1, 1, 2)) if task == "extend" else None
        job = Job(16, 32, frames=9, guidance=1.0, context=context, solver=AUTOREGRESSIVE)
        run = Generation(flow, job, torch.randn(1, 5, 12), torch.randn(1, 5, 12), placement=placement)
        latents = list(run.stream())[-1].latents if streamed else run.run()
    assert latents.device == shallow


def test_guidance_is_not_split_over_devices_that_lack_the_weights():
    flow, placement = models.flow(), replace(APART, deep=(CPU, torch.device("meta")))
    noise, text = models.randn(1, 1, 4, 2, 3), models.text(flow)
    with pytest.raises(InputError, match="weights are on cpu alone, so guidance can't be split over cpu and meta"):
        sample(flow, noise, text, text, guidance=1.0, placement=placement)


def test_weights_of_the_deep_block_go_to_one_device(tmp_path):
    save_flow(models.flow(), tmp_path / "a.safetensors", "fp32")
    apart = replace(Placement.on("cpu"), deep=(CPU, torch.device("meta")))
    with pytest.raises(InputError, match="can't be loaded onto several devices yet"):
        load_flow(tmp_path / "a.safetensors", device=apart)
