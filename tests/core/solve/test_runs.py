"""Blocks with a cache: rows together or apart, a prefix filled again, a cache handed in, parts on several devices."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from starflow_core.control import Control
from starflow_core.errors import Cancelled, InputError
from starflow_core.jobs.context import Context
from starflow_core.jobs.tasks import Generation, Job
from starflow_core.model.cache import RESIDENT, Cache, CacheSettings
from starflow_core.model.flow import Flow
from starflow_core.model.lora import adapt, attach, detach
from starflow_core.model.placement import Placement
from starflow_core.solve.runs import DeepRun
from starflow_core.solve.sampling import Sampler, sample
from starflow_core.solve.solvers import AUTOREGRESSIVE, PRESETS
from starflow_core.weights.flow import load_flow, save_flow
from tests.core import models

CPU = torch.device("cpu")
APART = replace(Placement.on("cpu"), deep=(CPU, CPU))
CPU_0 = torch.device("cpu", 0)  # the same, by another name: it stands for another device
TWO = Placement.over([CPU, CPU_0], True)
BEHIND = Placement.over([CPU, CPU_0], False)
THREE = Placement.over([CPU, CPU_0, torch.device("cpu", 1)], True)


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
    monkeypatch.setattr("starflow_core.solve.sampling.ahead", lambda items, stop: items)  # another thread is real
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


def test_a_second_device_has_a_copy_of_the_deep_block(tmp_path):
    save_flow(models.flow(), tmp_path / "a.safetensors", "fp32")
    flow = load_flow(tmp_path / "a.safetensors", device=TWO)
    copied = flow.deep_on(CPU_0)
    assert copied is not flow.deep
    assert flow.deep_on(CPU) is flow.deep
    assert torch.equal(copied.proj_in.weight, flow.deep.proj_in.weight)
    assert copied.proj_in.weight.data_ptr() != flow.deep.proj_in.weight.data_ptr()
    assert not any("copies" in name for name in flow.state_dict())


def test_copies_have_what_the_deep_block_has(tmp_path):
    """A LoRA that comes later, or is taken off."""
    flow = models.flow()
    flow.copy_deep([CPU_0])
    loras = adapt(flow, 2, 2.0, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    for lora in loras.values():
        torch.nn.init.normal_(lora.lora_B, std=0.2, generator=generator)
    detach(flow)
    attach(flow, loras)
    flow.requires_grad_(False).copy_deep(flow.copies)
    noise, text = models.randn(1, 2, 4, 2, 3), models.text(flow)
    options = {"uncond": models.text(flow, seed=8), "guidance": 2.0, "settings": PRESETS["exact"]}
    for _ in range(2):
        wanted = sample(flow, noise, text, **options).latents
        found = sample(flow, noise, text, placement=TWO, **options).latents
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        detach(flow)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("cache", [RESIDENT, CacheSettings(quantised=True)])
def test_two_devices_give_what_one_gives(streamed, cache):
    """Over windows, a context and a batch; the shallow blocks behind the deep block on a third."""
    flow = models.flow()
    flow.copy_deep([CPU_0])
    noise, text, uncond = models.randn(2, 7, 4, 2, 3), models.text(flow, 2), models.text(flow, seed=8)
    options = {"guidance": 2.0, "settings": PRESETS["exact"], "window": 4, "keep": 2, "cache": cache}
    options["context"] = models.randn(2, 1, 4, 2, 3, seed=4)
    one = Sampler(flow, noise, text, uncond, **options)
    two = Sampler(flow, noise, text, uncond, placement=THREE, **options)
    found, wanted = (torch.cat(list(s.stream()), 1) if streamed else s.sample().latents for s in (two, one))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert two.statistics.deep_sweeps == one.statistics.deep_sweeps


@pytest.mark.parametrize("where", [0, 1])
def test_what_goes_wrong_on_either_device_is_raised(monkeypatch, where):
    flow, calls = models.flow(), []
    run = deep_run(flow, 2.0, devices=APART.deep)

    def broken(*_, **__):
        raise RuntimeError("the card is gone")

    monkeypatch.setattr(run.runs[1 - where], "block", lambda *args, **_: (time.sleep(0.2), calls.append(1), args[0])[2])
    monkeypatch.setattr(run.runs[where], "block", broken)
    with pytest.raises(RuntimeError, match="the card is gone"):
        run(models.randn(2, 3, flow.deep.channels), 1)
    assert calls == [1]  # the other one has ended


@pytest.mark.parametrize("inference", [True, False])
def test_a_thread_has_the_modes_of_its_caller(inference):
    with torch.inference_mode(inference), torch.no_grad():
        runs = deep_run(models.flow(), 2.0, devices=APART.deep)
        modes = runs._together(lambda run, index: (torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
    assert modes == [(inference, False)] * 2


def test_the_deep_block_goes_on_while_frames_are_used():
    """On a device of its own: the next frame is there before it is asked for."""
    flow, seen = models.flow(), []
    control = Control(lambda progress: seen.append(progress.settled) if progress.phase == "deep" else None)
    options = {"settings": PRESETS["exact"], "control": control}
    frames = Sampler(flow, models.randn(1, 5, 4, 2, 3), models.text(flow), placement=BEHIND, **options).stream()
    next(frames)
    began = time.monotonic()
    while 30 not in seen:
        time.sleep(0.01)
        assert time.monotonic() - began < 60
    assert len(list(frames)) == 4


def test_what_is_kept_ends_with_what_is_finished():
    """However far the deep block is ahead: from there a job goes on to the same clip, to the bit."""
    flow, options = models.flow(), {"settings": PRESETS["exact"], "window": 3, "keep": 1, "placement": BEHIND}
    noise, text = models.randn(1, 7, 4, 2, 3), models.text(flow)
    sampler = Sampler(flow, noise, text, **options)
    frames = sampler.stream()
    made = [next(frames) for _ in range(3)]
    began = time.monotonic()
    while sampler.settled.tokens.shape[1] < 7:
        time.sleep(0.01)
        assert time.monotonic() - began < 60
    kept = sampler.finished
    assert kept.tokens.shape[1] == kept.latents.shape[1] == 3
    assert sampler.ends_window(3)
    wanted = torch.cat([*made, *frames], 1)
    found = torch.cat(list(Sampler(flow, noise, text, settled=kept, **options).stream()), 1)
    assert torch.equal(found, wanted)


def test_frames_can_be_asked_for_again():
    flow = models.flow()
    sampler = Sampler(flow, models.randn(1, 5, 4, 2, 3), models.text(flow), placement=BEHIND, settings=AUTOREGRESSIVE)
    frames = sampler.stream()
    next(frames)
    frames.close()
    assert torch.cat(list(sampler.stream()), 1).shape[1] == 5


def test_who_wants_no_more_frames_stops_the_deep_block():
    flow, seen = models.flow(), []
    control = Control(lambda progress: (time.sleep(0.02), seen.append(progress.settled)))
    frames = Sampler(
        flow, models.randn(1, 5, 4, 2, 3), models.text(flow), placement=BEHIND, settings=AUTOREGRESSIVE, control=control
    ).stream()
    next(frames)
    frames.close()
    count = len(seen)
    time.sleep(0.2)
    assert len(seen) == count
    assert max(seen) < 30


def test_cancelling_reaches_a_deep_block_that_is_ahead():
    flow, seen = models.flow(), []
    control = Control(seen.append, lambda: len(seen) > 5)
    frames = Sampler(flow, models.randn(1, 5, 4, 2, 3), models.text(flow), placement=BEHIND, control=control).stream()
    with pytest.raises(Cancelled):
        list(frames)


def test_parts_over_devices():
    a, b, c = (torch.device("cuda", i) for i in range(3))
    assert Placement.over([a], True) == Placement.on(a)
    assert Placement.over([a, b], True) == Placement((a, b), b, b, b, b)
    assert Placement.over([a, b], False) == Placement((a,), b, b, b, b)
    assert Placement.over([a, b, c], True) == Placement((a, b), c, c, c, c)
    assert Placement.over([a, b, c], True).devices == (a, b, c)
    with pytest.raises(InputError, match="3 devices, but without guidance 2 are used"):
        Placement.over([a, b, c], False)
