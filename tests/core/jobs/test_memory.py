"""Forecasts against the bytes that small jobs hold, counted."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from starflow_core.jobs.memory import forecast, forecast_encode
from starflow_core.jobs.tasks import Generation, Job, layout
from starflow_core.model.cache import Cache
from starflow_core.model.config import Denoiser
from tests.core import models

# What a forecast may be of the bytes counted. Never less, but for tables of angles, masks and the solver's vectors,
# which small models see and large ones don't; more, because a job that streams holds less than one that runs at
# once, or the other way round, and the forecast is for both.
LEAST, MOST = 0.95, 1.5


class Counted(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is open: those that are alive, and their peak.

    A cache is counted by itself.
    """

    def __init__(self):
        super().__init__()
        self.alive: dict[int, int] = {}  # bytes by storage
        self.now = self.peak = self.cache = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in known:
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _add(self, storage) -> None:
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.alive.pop(key)

    def set_cache_apart(self, cache: Cache) -> None:
        sizes = [cache.recent.untyped_storage()]
        for storage in sizes:
            self.now -= self.alive[storage._cdata]
            self.alive[storage._cdata] = 0
        self.cache = max(self.cache, sum(storage.nbytes() for storage in sizes))


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
    assert LEAST * counted.peak < need.activations < MOST * counted.peak
    assert need.weights == 4 * sum(parameter.numel() for parameter in flow.parameters())


@pytest.mark.parametrize(("kind", "frames"), [("image", 1), ("video", 17)])
def test_encoding_takes_what_was_forecast(counted, kind, frames):
    flow, job = wide_flow(kind), Job(256, 256, frames=frames)
    need = forecast_encode(flow.config, job, torch.float32)
    plan = layout(flow.config, job)
    latents, text = models.randn(1, plan.total, *plan.shape), models.text(flow)
    with torch.no_grad(), counted:
        flow.encode(latents, text)
    assert LEAST * counted.peak < need.activations < MOST * counted.peak
