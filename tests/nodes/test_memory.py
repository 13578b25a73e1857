"""How the sampler is fitted to the host's memory, what STARFlow Memory fixes, and what the host is asked for."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from starflow_core.jobs.memory import forecast
from starflow_core.jobs.planner import MemoryPlan
from starflow_core.jobs.tasks import PLAIN
from starflow_core.solve.solvers import PRESETS
from tests.core.models import relative_error

from . import pack
from .steps import SMALL, run

host, sampling, options = (pack.module(f"nodes.{name}") for name in ("host", "sampling", "options"))
planner = pack.module("starflow_core.jobs.planner")  # the pack's own, whose values differ from the tests' core's
CARD = torch.device("cuda", 1)


@pytest.fixture(scope="module")
def latent(demo):
    """4 latent frames of 6 tokens."""
    return demo.empty(**SMALL, frames=13)


@pytest.fixture(scope="module")
def conditioned(demo, latent):
    return demo.encode(latent)[:2]


@pytest.fixture
def runs(monkeypatch):
    """The generations that the sampler starts."""
    generation, runs = sampling.Generation, []
    monkeypatch.setattr(
        sampling, "Generation", lambda *given, **more: runs.append(generation(*given, **more)) or runs[-1]
    )
    return runs


@pytest.fixture
def room(monkeypatch):
    """Changes what the host says that there is."""

    def change(**numbers):
        found = host.room
        monkeypatch.setattr(host, "room", lambda handle: replace(found(handle), **numbers))

    return change


def needed(demo, core, **job):
    """Forecast of the fixture's job, all on the device at once."""
    need = forecast(core.config, core.job(height=32, width=48, frames=13, **job), torch.float32)
    return replace(need, weights=demo.model.model_size())


def fixed(**inputs):
    return run("STARFlowMemory", **inputs)[0]


def test_the_node_says_what_is_fixed():
    assert fixed() == options.Options()
    wanted = {"budget": 1_500_000_000, "cache": "int8", "offload_cache": "no", "span": 7}
    assert vars(fixed(**{**wanted, "budget": 1.5}).memory) == wanted


def test_options_are_an_optional_input_of_the_sampler():
    info = pack.load()["STARFlowSampler"].GET_NODE_INFO_V1()
    assert info["input"]["optional"]["options"][0] == "STARFLOW_OPTIONS"


def test_the_plan_is_said_and_memory_asked_for_before_anything_runs(demo, core, conditioned, latent, told):
    report = demo.sampler(*conditioned, latent, guidance=2.0)[1]
    need = needed(demo, core, guidance=2.0)
    assert told.loads == [(demo.model, need.total - need.weights, False)]
    plan = str(MemoryPlan(PLAIN, need, None))
    assert plan.startswith("weights in full; keys and values in full. Needs ")
    assert told.texts[0] == plan
    assert report.splitlines()[3] == f"memory: {plan}"


def test_memory_that_is_not_there_is_refused_before_any_work(monkeypatch, demo, conditioned, latent, told):
    import comfy.model_management as management

    monkeypatch.setattr(management, "get_free_memory", lambda *_, **__: 1000)
    with pytest.raises(Exception, match=r"this job needs at least .* are free on cpu; use a smaller size"):
        demo.sampler(*conditioned, latent)
    assert not told.steps
    assert not told.loads


def test_a_budget_is_kept_and_the_nearest_job_named(demo, core, latent, told):
    positive, negative, _ = demo.encode(latent)
    many = demo.empty(**SMALL, frames=13, batch_size=64)
    budget = round(needed(demo, core, batch=8).total / 0.97)
    with pytest.raises(
        Exception, match=r"this job needs at least .*, but \d+\.\d MB are free on cpu; a batch of \d+ fits"
    ):
        demo.sampler(positive, negative, many, options=fixed(budget=budget / 1e9))
    assert not told.steps


def test_an_8_bit_cache_is_used_where_the_full_one_does_not_fit(monkeypatch, demo, conditioned, latent, runs):
    """The forecast is made up: of so small a job's cache, nothing is ever settled."""
    monkeypatch.setattr(options.memory, "forecast", lambda config, job, dtype, means: planner.Forecast(
        0, 10**6 if means.cache.quantised else 2 * 10**6, 0))  # fmt: skip
    budget = round((demo.model.model_size() + 1.5e6) / 0.97)
    report = demo.sampler(*conditioned, latent, options=options.Options(planner.HostedOptions(budget)))[1]
    assert runs[0].means.cache.quantised
    assert "keys and values in 8 bit. Needs" in report


def test_what_is_fixed_reaches_the_run(demo, conditioned, latent, runs, made):
    result, report, _ = demo.sampler(*conditioned, latent, options=fixed(cache="int8", span=3))
    assert runs[0].means.cache.quantised
    assert runs[0].job.solver.span == 3
    assert "memory: weights in full; keys and values in 8 bit. Needs" in report
    wanted = made(frames=13, solver=PRESETS["balanced"].with_numbers(span=3))
    assert relative_error(result["samples"], wanted) < 1e-2
    demo.sampler(*conditioned, latent, settings=run("STARFlowJacobiSettings", span=5)[0], options=fixed(cache="full"))
    assert not runs[1].means.cache.quantised
    assert runs[1].job.solver.span == 5


def test_on_a_cpu_the_cache_is_in_main_memory_anyway(demo, conditioned, latent):
    with pytest.raises(Exception, match="offload_cache is 'yes', but everything is in main memory on a CPU; choose"):
        demo.sampler(*conditioned, latent, options=fixed(offload_cache="yes"))


def test_a_cpu_has_what_is_free_and_the_weights_that_are_there(monkeypatch, demo):
    import comfy.model_management as management

    monkeypatch.setattr(management, "get_free_memory", lambda device: 5000)
    weights = demo.model.model_size()
    assert vars(host.room(demo.model)) == vars(planner.Room(torch.device("cpu"), 5000 + weights, weights))


class Card:
    """A patcher of the demo's on a card that the host only tells of."""

    load_device, size, loaded = CARD, 300, 0

    def __init__(self, demo, device=CARD, loaded=0):
        self.model, self.load_device, self.loaded = demo.model.model, device, loaded

    def model_size(self) -> int:
        return self.size

    def loaded_size(self) -> int:
        return self.loaded

    def get_injections(self, key):
        return None


@pytest.fixture
def on_a_card(monkeypatch):
    """1000 bytes are free, 50 reserved, 250 taken by models that can go, and others are elsewhere."""
    import comfy.model_management as management

    def set_up(demo, state="NORMAL_VRAM", ratio=0.0, **handle):
        flow = Card(demo, loaded=50)
        loaded = [flow, Card(demo, loaded=200), None, Card(demo, torch.device("cpu"), 10**6)]
        for name, value in {"get_free_memory": lambda device: 1000, "extra_reserved_memory": lambda: 50,
                            "loaded_models": lambda: loaded, "vram_state": SimpleNamespace(name=state),
                            "lowvram_available": True, "MIN_WEIGHT_MEMORY_RATIO": ratio}.items():  # fmt: skip
            monkeypatch.setattr(management, name, value)
        vars(flow).update(handle)
        return flow

    return set_up


def test_on_a_card_other_models_make_room(demo, on_a_card):
    found = host.room(on_a_card(demo))
    assert vars(found) == vars(planner.Room(CARD, 1000 + 250 - 50, 300, streamed=(False, True)))
    assert host.room(on_a_card(demo, ratio=0.4)).kept == 500  # of what is free for all, before the reserve
    assert host.room(on_a_card(demo, ratio=0.4, is_dynamic=lambda: True)).kept == 0


@pytest.mark.parametrize(
    ("state", "streamed"),
    [("NO_VRAM", (True,)), ("LOW_VRAM", (False, True)), ("HIGH_VRAM", (False,)), ("SHARED", (False,))],
)
def test_weights_wait_in_main_memory_only_where_the_host_lets_them(demo, on_a_card, state, streamed):
    assert host.room(on_a_card(demo, state)).streamed == streamed


def test_weights_in_8_bit_are_seen(demo):
    (model,) = run("STARFlowLoadModel", weight_type="int8")
    assert host.room(model).int8 == (host.int8_linear(torch.float32) is not None)
    assert not host.room(demo.model).int8


def test_weights_that_wait_in_main_memory_want_larger_spans(demo, core, room):
    """And the host is asked for all that the budget leaves out."""
    room(device=CARD, streamed=(True,), free=10**10)
    open_job = core.job(height=32, width=48, frames=13)
    own = replace(open_job, solver=open_job.solver.with_numbers(span=7))
    streamed = planner.STREAMED_SPAN
    for job, fixed_span, span in ((open_job, None, streamed), (open_job, 9, 9), (own, None, 7), (own, 9, 9)):
        given = planner.HostedOptions(span=fixed_span)
        chosen, plan, _ = options.fitted(demo.model, job, options.Options(given))
        assert chosen.solver.span == span
        assert plan.means == planner.Means(streamed=True, cache=planner.CacheSettings(quantised=True))
    limited = options.Options(planner.HostedOptions(budget=10**9))
    _, plan, work = options.fitted(demo.model, job, limited)
    assert work == plan.need.total - plan.need.weights + 9 * 10**9
