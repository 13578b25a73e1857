"""What a computation holds, moves and computes, counted operation by operation; on fake tensors at no cost."""

from __future__ import annotations

import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Meter(TorchDispatchMode):
    """While it is open: bytes that are alive by device type, and their peak; bytes that cross between devices; floating
    point operations of matrix products and attention; calls of operations. `mark` begins a new peak."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple[str, int]] = {}  # device type and bytes by storage
        self.now, self.peak = Counter(), Counter()
        self.moved = self.flops = self.calls = 0

    def mark(self) -> None:
        self.peak = Counter(self.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.calls += 1
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        known = {x.untyped_storage()._cdata for x in given}
        for tensor in made:
            if tensor.untyped_storage()._cdata not in known:
                self._add(tensor)
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **kwargs, out_val=out)
        if func._overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source, target = given[-1], made[0]
            if source.device.type != target.device.type:
                self.moved += source.nbytes
        return out

    def _add(self, tensor: torch.Tensor) -> None:
        storage, kind = tensor.untyped_storage(), tensor.device.type
        if storage._cdata not in self.alive:
            self.alive[storage._cdata] = kind, storage.nbytes()
            self.now[kind] += storage.nbytes()
            self.peak[kind] = max(self.peak[kind], self.now[kind])
            weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, key: int) -> None:
        kind, size = self.alive.pop(key)
        self.now[kind] -= size
