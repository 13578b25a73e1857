"""Forecasts against the bytes that small jobs hold, counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.meter import Meter
from starflow_core.jobs import memory
from starflow_core.jobs.build import default_job
from starflow_core.jobs.memory import forecast, forecast_encode
from starflow_core.jobs.tasks import Generation, Job, layout
from starflow_core.model.cache import Cache
from starflow_core.model.config import STARFLOW_3B, STARFLOW_V_7B, Denoiser
from starflow_core.model.placement import Placement
from starflow_core.solve.inverting import invert
from tests.core import models

# What a forecast may be of the bytes counted. Never less, but for tables of angles, masks and the solver's vectors,
# which small models see and large ones don't; more, because a job that streams holds less than one that runs at
# once, or the other way round, and the forecast is for both.
LEAST, MOST = 0.95, 1.5


class Counted(Meter):
    """Counts caches by themselves."""

    def __init__(self):
        super().__init__()
        self.cache = 0

    def set_cache_apart(self, cache: Cache) -> None:
        storage = cache.recent.untyped_storage()
        kind, size = self.alive[storage._cdata]
        self.now[kind] -= size
        self.alive[storage._cdata] = kind, 0
        self.cache = max(self.cache, storage.nbytes())


@pytest.fixture
def counted(monkeypatch):
    """Bytes that are made in it are counted, those of caches by themselves."""
    count, make = Counted(), Cache.__init__

    def init(self, *shape, **settings):
        make(self, *shape, **settings)
        count.set_cache_apart(self)

    monkeypatch.setattr(Cache, "__init__", init)
    return count


def wide_flow(kind):
    """Wide enough that a layer's hidden states outweigh the tables."""
    denoiser = Denoiser(192, 2, 3) if kind == "video" else None
    return models.flow(kind=kind, width=192, deep_width=240, denoiser=denoiser)


JOBS = {
    "score step": ("image", Job(128, 128, guidance=1.0)),
    "shallow blocks": ("image", Job(256, 256, guidance=0.0, denoise=False, batch=2)),
    "denoiser": ("video", Job(256, 256, frames=17, guidance=1.0)),
    "denoiser, batch": ("video", Job(128, 256, frames=17, guidance=0.0, batch=2)),
    "clip, no denoising": ("video", Job(256, 256, frames=17, guidance=2.0, denoise=False)),
    "sliding window": ("video", Job(256, 128, frames=41, guidance=2.0, denoise=False)),
    "sliding window, denoiser": ("video", Job(128, 128, frames=41, guidance=0.0)),
}


@pytest.mark.parametrize(("kind", "job"), JOBS.values(), ids=JOBS)
def test_sampling_takes_what_was_forecast(counted, kind, job):
    flow = wide_flow(kind)
    need = forecast(flow.config, job, torch.float32)
    text, uncond = models.text(flow), models.text(flow, seed=2)
    with torch.no_grad(), counted:
        Generation(flow, job, text, uncond if job.guidance else None).run()
    assert need.cache == counted.cache
    assert LEAST * counted.peak["cpu"] < need.activations < MOST * counted.peak["cpu"]
    assert need.weights == 4 * sum(parameter.numel() for parameter in flow.parameters())


@pytest.mark.parametrize(("kind", "frames"), [("image", 1), ("video", 17), ("video", 41)])
def test_encoding_takes_what_was_forecast(counted, kind, frames):
    flow, job = wide_flow(kind), Job(256, 256, frames=frames)
    need = forecast_encode(flow.config, job, torch.float32)
    plan = layout(flow.config, job)
    latents, text = models.randn(1, plan.total, *plan.shape), models.text(flow)
    with counted:
        invert(flow, latents, text)
    assert LEAST * counted.peak["cpu"] < need.activations < MOST * counted.peak["cpu"]


APART = Placement.over([torch.device("cpu", i) for i in range(3)], True)


@pytest.mark.parametrize("config", [STARFLOW_V_7B, STARFLOW_3B])
def test_what_each_of_several_devices_holds(config):
    """Both halves of guidance have the deep block's weights and half of the cache; all else is on the third device."""
    job = default_job(config, guidance=1.0)
    whole = memory.forecast(config, job, torch.bfloat16)
    first, second, third = memory.forecasts(config, job, torch.bfloat16, APART).values()
    assert first == second
    assert first.weights + third.weights == whole.weights
    assert first.weights > third.weights
    assert first.cache == whole.cache / 2
    assert third.cache == 0
    assert max(first.activations, third.activations) <= whole.activations
    together = memory.forecasts(config, job, torch.bfloat16, Placement.over(APART.deep, True))
    assert list(together.values()) == [first, memory.forecast(config, replace(job, guidance=0.0), torch.bfloat16)]


def test_without_guidance_the_deep_block_is_alone_on_its_device():
    job = default_job(STARFLOW_V_7B, guidance=0.0)
    whole = memory.forecast(STARFLOW_V_7B, job, torch.bfloat16)
    deep, others = memory.forecasts(
        STARFLOW_V_7B, job, torch.bfloat16, Placement.over(APART.deep, False)
    ).values()  # fmt: skip
    assert (deep.cache, others.cache) == (whole.cache, 0)
    assert deep.weights + others.weights == whole.weights
