"""The planner: full-size jobs on cards of many sizes, what users fix, and that every means gives the same result."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.dryrun import CUDA, GIB, DryJob, image, planned, video
from starflow_core.errors import InputError, OutOfMemoryForecast
from starflow_core.jobs import memory, planner
from starflow_core.jobs.memory import Forecast
from starflow_core.jobs.planner import (
    AUTO,
    STREAMED_SPAN,
    HostedOptions,
    MemoryOptions,
    MemoryPlan,
    Room,
    choose,
    choose_hosted,
    spread,
)
from starflow_core.jobs.tasks import PLAIN, Generation, Job, Means
from starflow_core.model.cache import CacheSettings
from starflow_core.model.config import STARFLOW_3B, STARFLOW_V_7B
from starflow_core.model.placement import Placement
from starflow_core.solve.solvers import FEW_EVALUATIONS, FEW_SWEEPS, PRESETS
from starflow_core.weights.streaming import stream_layers
from tests.core import models

CPU = torch.device("cpu")
INT8_CACHE = CacheSettings(quantised=True)

# By the card's GiB, with everything in it: CUDA's own half gigabyte, VAE and text encoder.
CARDS = {
    48: PLAIN,
    32: Means(cache=INT8_CACHE, in_turn=True),
    24: Means(True, cache=INT8_CACHE, in_turn=True),
    16: Means(True, streamed=True, cache=INT8_CACHE, in_turn=True),
    12: Means(True, streamed=True, cache=CacheSettings(True, True)),
}


@pytest.mark.parametrize(("size", "means"), CARDS.items(), ids=[f"{size} GiB" for size in CARDS])
def test_five_seconds_of_the_7b_on_cards_of_many_sizes(size, means):
    plan = planned(DryJob(STARFLOW_V_7B, video(), size))
    assert plan.means == means
    assert plan.need.total + CUDA <= size * GIB


@pytest.mark.parametrize(("size", "denoise"), [(8, True), (6, False)])
def test_an_image_of_the_3b_on_small_cards(size, denoise):
    plan = planned(DryJob(STARFLOW_3B, image(denoise=denoise), size))
    assert plan.need.total + CUDA <= size * GIB
    assert plan.means.int8
    assert not plan.means.streamed


def test_a_card_that_is_too_small_is_told_what_fits():
    with pytest.raises(OutOfMemoryForecast, match=r"at least .* but 5\.9 GB are free on lazy:0; use a smaller size"):
        planned(DryJob(STARFLOW_V_7B, video(), 6))


def by_means(**sizes):
    """A forecast by what each means takes off 100 bytes."""

    def forecast(job: Job, means: Means) -> Forecast:
        saved = 40 * means.int8 + 20 * means.cache.quantised + 10 * means.in_turn + 25 * means.streamed
        saved += 3 * means.cache.offloaded
        return Forecast(job.batch * 100 - saved, 0, 0, **sizes)

    return forecast


JOB = Job(32, 32, frames=9)


@pytest.mark.parametrize(
    ("budget", "means"),
    [
        (None, PLAIN), (104, PLAIN), (93, Means(in_turn=True)), (83, Means(cache=INT8_CACHE)),
        (73, Means(cache=INT8_CACHE, in_turn=True)), (62, Means(True)), (42, Means(True, cache=INT8_CACHE)),
        (31, Means(True, cache=INT8_CACHE, in_turn=True)), (16, Means(True, True, INT8_CACHE)),
        (4, Means(True, True, CacheSettings(True, True), True)),
    ],
)  # fmt: skip
def test_the_fastest_means_that_fit_are_chosen(budget, means):
    assert choose(JOB, torch.device("lazy"), MemoryOptions(budget), (False, True), by_means()).means == means


def test_what_counts_as_free_can_be_told():
    lazy = torch.device("lazy")
    for size, means in ((104, PLAIN), (83, Means(cache=INT8_CACHE))):
        options = MemoryOptions(200), (False, True), by_means()
        assert choose(JOB, lazy, *options, free={CPU: None, lazy: size}).means == means


def test_what_a_user_fixes_is_kept():
    def means(**options):
        weights = options.pop("weights", (False, True))
        return choose(JOB, torch.device("lazy"), MemoryOptions(**options), weights, by_means()).means

    assert means(cache="int8") == Means(cache=INT8_CACHE)
    assert means(offload="weights") == Means(True, streamed=True)
    assert means(offload="all").cache.offloaded
    assert means(weights=(False,), budget=83, cache="full", offload="weights") == Means(streamed=True)
    assert means(weights=(True,)) == Means(True)
    with pytest.raises(OutOfMemoryForecast):
        means(budget=50, cache="full", offload="none", weights=(False,))


def test_impossible_options_are_refused():
    for options in ({"cache": "int4"}, {"offload": "disk"}, {"budget": 0}):
        with pytest.raises(InputError, match=next(iter(options))):
            MemoryOptions(**options)
    with pytest.raises(InputError, match="the device is the CPU"):
        choose(JOB, CPU, MemoryOptions(offload="weights"), (False,), by_means())


def test_the_text_encoder_moves_where_it_alone_does_not_fit():
    plan = choose(JOB, torch.device("lazy"), MemoryOptions(104), (False,), by_means(text=30))
    assert plan.text_away
    assert plan.need.total == 100
    assert plan.need.host == 30
    assert "text encoder on the CPU" in str(plan)
    assert not choose(JOB, torch.device("lazy"), MemoryOptions(140), (False,), by_means(text=30)).text_away


def test_the_nearest_batch_is_named():
    with pytest.raises(OutOfMemoryForecast, match="a batch of 2 fits"):
        choose(replace(JOB, batch=4), CPU, MemoryOptions(215), (False,), by_means())


def test_the_nearest_length_is_named():
    def by_frames(job, means):
        return Forecast(job.frames, 0, 0)

    with pytest.raises(OutOfMemoryForecast, match=r"but 0 kB .*; 21 frames fit"):
        choose(replace(JOB, frames=33), CPU, MemoryOptions(24), (False,), by_frames)


def test_without_accelerate_nothing_is_streamed(monkeypatch):
    monkeypatch.setattr(planner, "find_spec", lambda name: None)
    card = torch.device("lazy")
    with pytest.raises(InputError, match="pip install accelerate"):
        choose(JOB, card, MemoryOptions(offload="all"), (False,), by_means())
    with pytest.raises(OutOfMemoryForecast, match="install accelerate"):
        choose(JOB, card, MemoryOptions(16), (False, True), by_means())


HOST = Room(torch.device("lazy"), 10**6, 70, streamed=(False, True))  # weights of 70 bytes, which it can move


def test_main_memory_is_asked_for_what_moves_there(monkeypatch):
    card = torch.device("lazy")

    def forecast(job: Job, means: Means) -> Forecast:
        return Forecast(40 if means.streamed else 100, 10, 0, host=60 * job.batch if means.streamed else 0)

    free = {"lazy": 60, "cpu": 100}
    monkeypatch.setattr(planner, "can_stream", lambda: True)
    monkeypatch.setattr(planner.memory, "free", lambda device: free[device.type])
    assert choose(JOB, card, MemoryOptions(), (False,), forecast).means.streamed
    free["cpu"] = 55
    with pytest.raises(OutOfMemoryForecast, match="needs at least 0 kB, but 0 kB are free on cpu; use a smaller size"):
        choose(JOB, card, MemoryOptions(), (False,), forecast)
    free["cpu"] = 100
    with pytest.raises(OutOfMemoryForecast, match="are free on cpu; a batch of 1 fits"):
        choose(replace(JOB, batch=2), card, MemoryOptions(), (False,), forecast)
    free["lazy"] = 40
    with pytest.raises(OutOfMemoryForecast, match="are free on lazy"):
        choose(JOB, card, MemoryOptions(), (False,), forecast)


def test_what_a_job_falls_back_to():
    def fallbacks(device="lazy", **options):
        plan = choose(JOB, torch.device(device), MemoryOptions(**options), (False,), by_means())
        assert all(replace(other, cache=plan.means.cache) == plan.means for other in plan.fallbacks)
        return [other.cache for other in plan.fallbacks]

    away = CacheSettings(True, True)
    assert fallbacks(offload="none") == [INT8_CACHE]
    assert fallbacks("cpu") == [INT8_CACHE]
    assert fallbacks(offload="weights") == [INT8_CACHE]
    assert fallbacks(offload="all") == []
    assert fallbacks(cache="full", offload="none") == []
    assert fallbacks(offload="weights", cache="int8") == []
    room = replace(HOST, free=10**6, weights=1)
    plan = choose_hosted(JOB, room, HostedOptions(), by_cache)
    assert [other.cache for other in plan.fallbacks] == [INT8_CACHE, away]


def test_fallbacks_take_less_and_less_and_leave_weights_alone():
    away, full_away = CacheSettings(True, True), CacheSettings(False, True)
    caches = (INT8_CACHE, away, full_away)
    others = [*(Means(cache=cache) for cache in caches), *(Means(True, cache=cache) for cache in caches)]
    assert planner._fallbacks(PLAIN, others) == (Means(cache=INT8_CACHE), Means(cache=away))
    assert planner._fallbacks(PLAIN, others[3:]) == ()


def by_cache(job: Job, means: Means) -> Forecast:
    """100 bytes of work, less where means save some, and 10 bytes of weights at the least."""
    saved = 40 * means.cache.quantised + 10 * means.in_turn + 30 * means.cache.offloaded
    return Forecast(10 if means.streamed else 1000, job.batch * 100 - saved, 0)


def hosted(room=HOST, job=JOB, **options):
    return choose_hosted(job, room, HostedOptions(**options), by_cache)


@pytest.mark.parametrize(
    ("budget", "means"),
    [
        (None, PLAIN), (176, PLAIN), (166, Means(in_turn=True)), (135, Means(cache=INT8_CACHE)),
        (75, Means(streamed=True, cache=INT8_CACHE)), (65, Means(streamed=True, cache=INT8_CACHE, in_turn=True)),
        (42, Means(streamed=True, cache=CacheSettings(True, True))),
    ],
)  # fmt: skip
def test_a_host_moves_weights_before_the_cache_does(budget, means):
    plan = hosted(budget=budget)
    assert plan.means == means
    assert plan.need.weights == (10 if means.streamed else 70)


def test_what_a_user_fixes_in_a_host_is_kept():
    assert hosted(cache="int8").means == Means(cache=INT8_CACHE)
    assert hosted(offload_cache="yes").means == Means(cache=CacheSettings(True, True))
    assert hosted(cache="full", budget=120).means == Means(streamed=True)
    assert hosted(cache="full", offload_cache="yes").means == Means(cache=CacheSettings(False, True))
    with pytest.raises(OutOfMemoryForecast, match="at least 0 kB, but 0 kB are free on lazy"):
        hosted(offload_cache="no", budget=42)
    assert hosted(replace(HOST, int8=True)).means == Means(True)
    for options in ({"cache": "int4"}, {"offload_cache": "disk"}, {"budget": 0}):
        with pytest.raises(InputError, match=next(iter(options))):
            HostedOptions(**options)


def test_a_host_does_what_it_can():
    with pytest.raises(OutOfMemoryForecast):
        hosted(replace(HOST, streamed=(False,)), budget=75, offload_cache="no")
    assert hosted(replace(HOST, streamed=(True,))).means == Means(streamed=True, cache=INT8_CACHE)
    assert hosted(replace(HOST, kept=50, streamed=(True,))).need.weights == 50
    assert hosted(replace(HOST, kept=500, streamed=(True,))).need.weights == 70


def test_on_a_hosts_cpu_nothing_moves(monkeypatch):
    """And accelerate, which a host has no need of, isn't asked for."""
    monkeypatch.setattr(planner, "find_spec", lambda name: None)
    room = Room(CPU, 100, 70)
    with pytest.raises(OutOfMemoryForecast, match=r"use a smaller size, guidance 0, or another device$"):
        hosted(room)
    with pytest.raises(InputError, match="offload_cache is 'yes', but everything is in main memory on a CPU"):
        hosted(room, offload_cache="yes")


def test_a_host_leaves_room_for_work_and_beyond_a_budget():
    assert HOST.work(hosted(budget=176)) == 100
    assert HOST.work(hosted()) == 100
    assert HOST.work(hosted(budget=75)) == 60 + 10**6 - 75


def test_a_span_that_is_fixed_is_the_jobs():
    assert HostedOptions(span=7).spanned(JOB).solver == JOB.solver.with_numbers(span=7)
    assert HostedOptions().spanned(JOB) == JOB


def test_a_batch_that_given_frames_rule_out_is_not_named():
    def strict(job: Job, means: Means) -> Forecast:
        if job.batch == 2:
            raise InputError("a context of 3 for a batch of 2")
        return Forecast(100 * job.batch, 0, 0)

    with pytest.raises(OutOfMemoryForecast, match="a batch of 1 fits"):
        choose(replace(JOB, batch=3), CPU, MemoryOptions(215), (False,), strict)


def test_streamed_weights_want_larger_spans():
    plan = choose(JOB, torch.device("lazy"), MemoryOptions(offload="weights"), (False,), by_means())
    assert plan.fitted(JOB, CPU).solver == JOB.solver.spanned(STREAMED_SPAN)
    own = replace(JOB, solver=JOB.solver.with_numbers(image_span=1, first_span=2, span=3))
    assert plan.fitted(own, CPU).solver == own.solver


def test_spans_suit_the_device_and_the_rows():
    plan, card = MemoryPlan(Means(), Forecast(0, 0, 0), None), torch.device("cuda")
    guided = replace(JOB, guidance=2.0)
    cases = (
        (CPU, JOB, FEW_EVALUATIONS),
        (card, replace(guided, batch=1), FEW_SWEEPS),
        (card, replace(guided, batch=2), FEW_EVALUATIONS),
        (card, replace(JOB, batch=2, guidance=0.0), FEW_SWEEPS),
    )
    for device, job, span in cases:
        solver = plan.fitted(job, device).solver
        assert (solver.image_span, solver.first_span, solver.span) == (span,) * 3


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("denoise", [True, False])
def test_means_change_when_things_happen_but_no_result(kind, denoise):
    """In turn, and with weights brought in layer by layer (here from main memory to main memory)."""
    size = {"frames": 9} if kind == "video" else {}
    job = Job(32, 48, guidance=1.0, denoise=denoise, solver=PRESETS["exact"], **size)
    latents = []
    for means in (PLAIN, Means(in_turn=True), Means(streamed=True)):
        flow = models.flow(kind=kind)
        if means.streamed:
            stream_layers(flow, Placement.on(CPU))
        with torch.no_grad():
            pieces = list(Generation(flow, job, models.text(flow), models.text(flow, seed=3), means=means).stream())
        latents.append(torch.cat([piece.latents for piece in pieces if piece.final], 2))
        if means.in_turn:
            first_final = [piece.final for piece in pieces].index(True)
            assert sum(piece.latents.shape[2] for piece in pieces[:first_final]) == latents[0].shape[2]
    torch.testing.assert_close(latents[1], latents[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(latents[2], latents[0])


# Several devices


def spread_by(rooms: dict[str, int], monkeypatch, options: MemoryOptions = AUTO, weights=(False, True)):
    """A plan for devices with so much room, where a job takes 100 of each, or 40 less with weights in 8 bit and 20 less
    with such a cache."""
    there = {torch.device(name): size for name, size in rooms.items()}
    monkeypatch.setattr(memory, "free", there.get)

    def forecasts(job: Job, means: Means):
        size = 100 - 40 * means.int8 - 20 * means.cache.quantised
        return {device: Forecast(size, 0, 0) for device in there}

    return spread(Job(16, 16), options, weights, forecasts)


@pytest.mark.parametrize(
    ("rooms", "means"),
    [
        ({"cuda:0": 104, "cuda:1": 200}, PLAIN),
        ({"cuda:0": 200, "cuda:1": 85}, Means(cache=INT8_CACHE)),
        ({"cuda:0": 62, "cpu": 200}, Means(True)),
        ({"cuda:0": 42, "cuda:1": 62}, Means(True, cache=INT8_CACHE)),
    ],
)
def test_the_smallest_of_several_devices_decides(rooms, means, monkeypatch):
    plan = spread_by(rooms, monkeypatch)
    assert plan.means == means
    assert list(plan.spread) == [torch.device(name) for name in rooms]
    assert plan.free == next(iter(rooms.values()))
    assert all(f" on {name}" in str(plan) for name in rooms)


def test_the_device_that_is_too_small_is_named(monkeypatch):
    with pytest.raises(OutOfMemoryForecast, match="at least 0 kB on cuda:1, but 0 kB are free there"):
        spread_by({"cuda:0": 200, "cuda:1": 39}, monkeypatch)
    with pytest.raises(OutOfMemoryForecast, match="on cuda:0"):
        spread_by({"cuda:0": 200, "cuda:1": 200}, monkeypatch, MemoryOptions(budget=30))


def test_what_is_fixed_for_several_devices(monkeypatch):
    rooms = {"cuda:0": 200, "cuda:1": 200}
    assert spread_by(rooms, monkeypatch, MemoryOptions(cache="int8")).means == Means(cache=INT8_CACHE)
    assert spread_by(rooms, monkeypatch, weights=(True,)).means == Means(True)
    with pytest.raises(InputError, match="offload is 'weights', but several devices are given"):
        spread_by(rooms, monkeypatch, MemoryOptions(offload="weights"))
