"""Forecasts against the bytes that small jobs hold, counted."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from starflow_core.model.cache import Cache

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
        sizes = [tensor.untyped_storage() for tensor in (cache.keys, cache.values)]
        for storage in sizes:
            self.now -= self.alive[storage._cdata]
            self.alive[storage._cdata] = 0
        self.cache = max(self.cache, sum(storage.nbytes() for storage in sizes))
