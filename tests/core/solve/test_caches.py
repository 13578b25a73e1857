"""Settled keys and values in 8 bit and in main memory."""

from __future__ import annotations

import pytest
import torch

from starflow_core.model import cache as caches
from starflow_core.model.cache import RESIDENT, Cache, CacheSettings, CacheShape, Store, quantised
from starflow_core.solve.sampling import sample
from starflow_core.solve.solvers import AUTOREGRESSIVE, PRESETS
from tests.core import models

INT8, AWAY, BOTH = CacheSettings(quantised=True), CacheSettings(offloaded=True), CacheSettings(True, True)
KINDS = {"8 bit": INT8, "main memory": AWAY, "8 bit in main memory": BOTH}
JOBS = {
    "clip": {"frames": 5},
    "guidance": {"frames": 4, "guidance": 2.0},
    "batch": {"frames": 4, "batch": 2},
    "context": {"frames": 5, "given": 2},
    "windows": {"frames": 8, "window": 4, "keep": 3, "guidance": 1.0},
}


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """So that small clips have several groups and pieces, neither of which ends with a frame."""
    monkeypatch.setattr(caches, "GROUP", 8)
    monkeypatch.setattr(caches, "PIECE", 11)
    monkeypatch.setattr("starflow_core.solve.solvers.ABSORBED", 7)


def sampled(flow, settings, cache, frames, batch=1, given=0, guidance=0.0, **window):
    noise = models.randn(batch, frames, 4, 3, 4)
    context = models.randn(batch, given, 4, 3, 4, seed=5) if given else None
    text, uncond = models.text(flow, batch), models.text(flow, seed=9)
    options = {"settings": settings, "cache": cache, "context": context, "guidance": guidance, **window}
    return sample(flow, noise, text, uncond, **options).latents


@pytest.mark.parametrize("cache", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_jacobi_is_autoregressive_decoding(cache, job):
    flow = models.flow()
    exact = sampled(flow, AUTOREGRESSIVE, cache, **job)
    for settings in (PRESETS["exact"], PRESETS["exact"].with_numbers(span=5, first_span=21)):
        assert models.relative_error(sampled(flow, settings, cache, **job), exact) < 1e-6


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_main_memory_changes_nothing(job):
    flow = models.flow()
    away, here = (sampled(flow, AUTOREGRESSIVE, cache, **job) for cache in (AWAY, RESIDENT))
    torch.testing.assert_close(away, here, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_8_bit_is_near(job):
    flow = models.flow()
    error = models.relative_error(*(sampled(flow, AUTOREGRESSIVE, cache, **job) for cache in (INT8, RESIDENT)))
    assert 0 < error < 2e-2


@pytest.mark.parametrize("preset", ["balanced", "exact"])
def test_a_slot_is_quantised_once(monkeypatch, preset):
    """Rounding that moved with every sweep would keep tokens from settling."""
    places, put = [], Store.put

    def noted(self, layer, start, both):
        places.extend((layer, slot) for slot in range(start, start + both.shape[-2]))
        put(self, layer, start, both)

    monkeypatch.setattr(Store, "put", noted)
    sampled(models.flow(), PRESETS[preset], INT8, frames=5)
    assert len(places) == len(set(places))
    assert {slot for _, slot in places} == set(range(5 + 56))  # the prefix and whole groups of 60 tokens


def test_8_bit_takes_few_more_sweeps():
    flow, sweeps = models.flow(), []
    for cache in (RESIDENT, INT8):
        noise = models.randn(1, 6, 4, 3, 4)
        run = sample(flow, noise, models.text(flow), settings=PRESETS["balanced"], cache=cache)
        sweeps.append(run.statistics.deep_sweeps)
    assert sweeps[1] <= sweeps[0] + 72 / caches.GROUP  # a group's end is waited for


def test_rows_keep_their_size():
    """Each row has a scale of its own: a large one costs small ones nothing."""
    x = torch.cat((models.randn(1, 4, 8), 1e6 * models.randn(1, 4, 8, seed=1), torch.zeros(1, 1, 8)), 1)
    values, scales = quantised(x)
    assert values.dtype == torch.int8
    error = (values * scales.float() - x).abs().amax(-1)
    assert (error <= x.abs().amax(-1) * (0.5 / 127 + 2**-8)).all()


@pytest.mark.parametrize("cache", [RESIDENT, *KINDS.values()], ids=["resident", *KINDS])
def test_bytes_are_what_a_cache_holds(cache):
    shape = CacheShape(layers=2, rows=2, heads=3, slots=70, head_dim=24, prefix=5, widest=20)
    made = Cache(shape, torch.bfloat16, torch.device("cpu"), cache)
    here, away = [made.recent], []
    if cache.in_groups:
        stored = [made.store.data, *([] if made.store.scales is None else [made.store.scales])]
        (away if cache.offloaded else here).extend(stored)
        here.append(made.store.buffer)
    extra = 0
    if cache == BOTH:  # what arrives before it is expanded
        data, scales = made.store.data[:, 0, ..., : caches.PIECE, :], made.store.scales[:, 0, ..., : caches.PIECE, :]
        extra = data.numel() + scales.numel() * 2
    assert shape.bytes(cache, 2) == (sum(x.nbytes for x in here), sum(x.nbytes for x in away))
    assert shape.moving(cache) == extra


def test_going_back_into_a_settled_group_is_a_mistake():
    made = Cache(CacheShape(1, 1, 1, 64, 24, 0, 20), torch.float32, torch.device("cpu"), INT8)
    made.at(0), made.at(20)
    made.at(8)
    with pytest.raises(AssertionError, match="slot 3"):
        made.at(3)
