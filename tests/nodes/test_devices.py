"""STARFlow Devices: guidance's halves on two devices, of which the second is the CPU under another name."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.core.models import relative_error

from . import pack
from .steps import SMALL, run

host, options, sampling = (pack.module(f"nodes.{name}") for name in ("host", "options", "sampling"))
errors = pack.module("starflow_core.errors")
SECOND = torch.device("cpu", 0)


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setattr(host, "devices", lambda: ["cpu", "cpu:0"])


@pytest.fixture
def placements(monkeypatch):
    """Where the sampler's generations compute."""
    generation, found = sampling.Generation, []
    monkeypatch.setattr(
        sampling, "Generation", lambda *given, **more: found.append(more["placement"]) or generation(*given, **more)
    )
    return found


def sampled(demo, model=None, guidance=1.5, **more):
    latent = demo.empty(**SMALL, frames=9)
    exact = run("STARFlowJacobiSettings", preset="exact")[0]
    positive, negative = demo.encode(latent)[:2]
    return run(
        "STARFlowSampler", model=model or demo.model, positive=positive, negative=negative, latent=latent, seed=3,
        guidance=guidance, settings=exact, **more,
    )[0]["samples"]  # fmt: skip


def test_the_halves_of_guidance_are_on_two_devices(demo, two, placements):
    wanted = sampled(demo)
    fixed = run("STARFlowMemory", cache="full")[0]
    found = sampled(demo, options=run("STARFlowDevices", second="cpu:0", options=fixed)[0])
    assert relative_error(found, wanted) < 1e-8
    assert [placement.deep for placement in placements] == [(torch.device("cpu"),), (torch.device("cpu"), SECOND)]
    assert list(demo.flow.copies) == [SECOND]
    assert demo.flow.deep_on(SECOND) is not demo.flow.deep


def test_without_guidance_or_a_device_all_is_on_one(demo, two, placements):
    sampled(demo, guidance=0.0, options=run("STARFlowDevices", second="cpu:0")[0])
    sampled(demo, options=run("STARFlowDevices", second="cpu")[0])  # the host's own
    sampled(demo, options=run("STARFlowDevices")[0])
    assert [len(placement.deep) for placement in placements] == [1, 1, 1]
    assert demo.flow.copies == {}  # the second device is free again


def test_a_copy_is_kept_until_a_lora_changes(demo, two, tmp_path, monkeypatch):
    both = run("STARFlowDevices", second="cpu:0")[0]
    sampled(demo, options=both)
    first = demo.flow.copies[SECOND]
    sampled(demo, options=both)
    assert demo.flow.copies[SECOND] is first
    changed = lora_of(demo)
    wanted = sampled(demo, changed)
    assert relative_error(wanted, sampled(demo)) > 1e-4
    assert relative_error(sampled(demo, changed, options=both), wanted) < 1e-8
    assert demo.flow.copies[SECOND] is not first
    assert relative_error(sampled(demo, options=both), sampled(demo)) < 1e-8


def lora_of(demo):
    """The model with a LoRA on all blocks."""
    adapt = pack.module("starflow_core.model.lora").adapt
    loras = adapt(copy.deepcopy(demo.flow), 2, 2.0, blocks="all", generator=torch.Generator().manual_seed(1))
    for lora in loras.values():
        with torch.no_grad():
            lora.lora_B.normal_(0, 0.02, generator=torch.Generator().manual_seed(2))
    return host.with_lora(demo.model, loras)


def test_a_second_device_that_is_too_small_is_named(demo, two, monkeypatch):
    memory = pack.module("starflow_core.jobs.memory")
    free = memory.free
    monkeypatch.setattr(memory, "free", lambda device: 1000 if device == SECOND else free(device))
    demo.flow.copies = {}
    with pytest.raises(errors.OutOfMemoryForecast, match=r"guidance's second half needs about .* are free on cpu:0"):
        sampled(demo, options=run("STARFlowDevices", second="cpu:0")[0])


def test_devices_that_are_not_there_are_refused(two):
    refusal = pack.load()["STARFlowDevices"].validate_inputs
    assert refusal() is True
    assert refusal("cpu:0") is True
    assert "second is 'cuda:7', which isn't there; this machine has none, cpu, cpu:0" in refusal("cuda:7")
