"""The processes that train together: under `torchrun` several, otherwise one; see `starflow_core.processes`.

Each step has one batch, of which every process takes equally many rows; so all make the same calls of layers, which
sharded weights need. Where the rows don't go round, some are taken twice and count once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.flow import Flow
from ..processes import PATIENCE


@dataclass(frozen=True)
class Share:
    """A process's part of a batch: rows, and what each counts for in the mean over the batch."""

    rows: list[int]
    weights: list[float]

    def pieces(self, size: int | None) -> Iterator[Share]:
        """The same in pieces of at most `size` rows."""
        size = size or len(self.rows)
        for first in range(0, len(self.rows), size):
            part = slice(first, first + size)
            yield Share(self.rows[part], self.weights[part])


@dataclass(frozen=True)
class Processes:
    """This process's number, and how many there are."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def share(self, batch: int) -> Share:
        """Of the mean over all processes, each row of a batch has 1 / batch."""
        each = -(-batch // self.count)
        rows = range(self.rank * each, (self.rank + 1) * each)
        return Share([row % batch for row in rows], [self.count / batch if row < batch else 0.0 for row in rows])

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean over the processes; all give the same names."""
        if self.count == 1:
            return values
        total = torch.tensor(list(values.values()), dtype=torch.float64)
        torch.distributed.all_reduce(total)
        return dict(zip(values, (total / self.count).tolist(), strict=True))

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Of the parameters that every process has whole; sharding has averaged the others."""
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is not None and not is_sharded(parameter):
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= self.count

    def group(self):
        """Another group of all processes, for messages over gloo beside the others; None for one process."""
        return torch.distributed.new_group(backend="gloo") if self.count > 1 else None

    def gathered(self, found: list) -> list:
        """What each process that isn't joined has found, one after the other. All wait for the last, however long."""
        if self.count == 1:
            return found
        torch.distributed.init_process_group("gloo", timeout=PATIENCE)
        try:
            parts = [None] * self.count
            torch.distributed.all_gather_object(parts, found)
        finally:
            torch.distributed.destroy_process_group()
        return [each for part in parts for each in part]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()


def shard(flow: Flow, dtype: torch.dtype) -> None:
    """Spread a flow's weights over all processes (FSDP2), layer by layer; products are in `dtype`."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Latents stay float32: blocks bring what they read to the compute type themselves.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # The scales of weights in 8 bit stay whole and in float32: rounded they would make other weights.
    scales = {weight for name, weight in flow.named_parameters() if name.endswith("weight_scale")}
    nets = [*flow.blocks, *([flow.learnable_self_denoiser] if flow.config.denoiser else [])]
    for net in nets:
        for layer in net.attn_blocks:
            fully_shard(layer, mp_policy=policy, ignored_params=scales)
        fully_shard(net, mp_policy=policy, ignored_params=scales)
    fully_shard(flow, mp_policy=policy, ignored_params=scales)


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every process has to ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor
