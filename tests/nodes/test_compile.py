"""STARFlow Compile: the host compiles what a sweep computes, and only where it can be. No compiler is needed here: what
would be compiled runs as it is, and is counted."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.core.models import relative_error

from . import pack
from .steps import SMALL, Loaded, run
from .test_devices import lora_of

host, evaluated = pack.module("nodes.host"), pack.module("starflow_core.model.compiled").evaluate
errors = pack.module("starflow_core.errors")


@pytest.fixture
def calls(monkeypatch):
    """What PyTorch is asked to compile, and each call of it."""
    made, calls = torch.compile, []

    def compile(model, **settings):
        assert settings.pop("backend") == "inductor"
        assert model is evaluated
        graph = made(model, backend="eager", **settings)
        return lambda *inputs: calls.append(settings["fullgraph"]) or graph(*inputs)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(host, "require_compiler", lambda device: None)
    torch._dynamo.reset()
    return calls


@pytest.fixture
def logged(monkeypatch):
    lines = []
    monkeypatch.setattr(host.log, "warning", lambda text, *values: lines.append(text % values))
    return lines


def sampled(demo, model=None, **more):
    latent = demo.empty(**SMALL, frames=9)
    positive, negative = demo.encode(latent)[:2]
    return run(
        "STARFlowSampler", model=model or demo.model, positive=positive, negative=negative, latent=latent, seed=3,
        guidance=1.5, settings=run("STARFlowJacobiSettings", preset="exact")[0], **more,
    )[0]["samples"]  # fmt: skip


def test_the_host_compiles_sweeps(demo, calls, logged):
    wanted = sampled(demo)
    assert not calls
    model = run("STARFlowCompile", model=demo.model)[0]
    assert relative_error(sampled(demo, model), wanted) < 1e-8
    assert calls
    assert all(calls)
    assert not logged
    assert not demo.flow.compiled  # only while it is at work
    count = len(calls)
    sampled(demo)
    assert len(calls) == count


def test_with_a_lora_of_the_hosts(demo, calls, logged):
    changed = lora_of(demo)
    wanted = sampled(demo, changed)
    assert relative_error(sampled(demo, run("STARFlowCompile", model=changed)[0]), wanted) < 1e-8
    assert calls
    assert not logged


def test_with_weights_in_8_bit(calls, logged):
    loaded = replace(Loaded.of(), model=run("STARFlowLoadModel", weight_type="int8")[0])
    wanted = sampled(loaded)
    assert relative_error(sampled(loaded, run("STARFlowCompile", model=loaded.model)[0]), wanted) < 1e-8
    assert calls
    assert not [line for line in logged if "compiled" in line]


@pytest.mark.parametrize("why", ["in part", "paged", "two devices"])
def test_where_weights_are_elsewhere_it_is_left_out(demo, calls, logged, monkeypatch, why):
    model, wanted, more = run("STARFlowCompile", model=demo.model)[0], sampled(demo), {}
    if why == "in part":
        monkeypatch.setattr(model.model, "model_lowvram", True, raising=False)
        monkeypatch.setattr(host, "load", lambda *given, **more: None)  # which would bring all of them
    elif why == "paged":
        monkeypatch.setattr(host, "_is_dynamic", lambda handle: handle is model)
    else:
        monkeypatch.setattr(host, "devices", lambda: ["cpu", "cpu:0"])
        more = {"options": run("STARFlowDevices", second="cpu:0")[0]}
    assert relative_error(sampled(demo, model, **more), wanted) < 1e-8
    assert not calls
    assert len([line for line in logged if "isn't compiled" in line]) == 1


def test_beside_a_lora_in_8_bit_it_is_left_out(demo, calls, logged):
    model = run("STARFlowCompile", model=demo.model)[0]
    host._put_beside(model, {"blocks.0.attn_blocks.0.mlp.main.0": [SimpleNamespace(to=lambda device: None)]})
    assert host.compute(model, lambda: 3) == 3
    assert "8 bit" in logged[0]


def test_a_missing_compiler_is_said_when_the_node_runs(demo, monkeypatch):
    monkeypatch.setenv("CXX", "nothing-like-it")
    with pytest.raises(errors.InputError, match="compiler nothing-like-it"):
        run("STARFlowCompile", model=demo.model)
