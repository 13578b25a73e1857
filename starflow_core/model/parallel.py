"""One clip by several processes: guidance's halves on some each, and within a half the deep block's heads.

Of each layer a process has some of the heads, with their keys and values, and some of the MLP's hidden units: rows of
the layer's first products and columns of its second ones, whose partial results are summed (tensor parallelism). The
leader has all other parts of the model, too. What goes between processes goes over PyTorch's own collectives.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ..errors import InputError

if TYPE_CHECKING:
    from .config import FlowConfig

T = TypeVar("T")

GUIDANCE, TENSOR = "guidance", "tensor"
LEADER = 0
# The linear layers that are shared out: by rows, where kinds (queries, keys, values) are stacked, or by columns.
ROWS, COLUMNS = {"attention.qkv": 3, "mlp.main.0": 1}, ("attention.proj", "mlp.main.2")
SHARED = re.compile(rf"blocks\.(\d+)\.attn_blocks\.\d+\.({'|'.join(map(re.escape, (*ROWS, *COLUMNS)))})")


@dataclass(frozen=True)
class Mesh:
    """How many processes there are: for guidance 1, or 2 with a half each; times those that share out the heads."""

    guidance: int = 1
    tensor: int = 1

    @classmethod
    def of(cls, names: str, count: int) -> Mesh:
        """The mesh of so many processes over the named axes. Raises InputError where they don't fill it."""
        axes = names.split(",")
        if count < 2:
            raise InputError(f"--parallel {names} is for several processes; start them by torchrun --nproc-per-node N")
        halves = 2 if GUIDANCE in axes else 1
        if count % halves or (TENSOR not in axes and count > halves):
            wanted = "an even number of" if TENSOR in axes else "2"
            raise InputError(f"--parallel {names} takes {wanted} processes, not {count}: guidance has two halves")
        return cls(halves, count // halves)

    @property
    def count(self) -> int:
        return self.guidance * self.tensor

    def check(self, config: FlowConfig, guidance: float) -> None:
        """Raise InputError unless a model's heads can be shared out so, and a job has guidance if its halves are."""
        heads = config.deep_width // config.head_dim
        if heads % self.tensor:
            possible = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise InputError(
                f"{config.name} has {heads} heads in its deep block, which {self.tensor} processes can't share out "
                f"equally; start {possible} for them"
            )
        if self.guidance > 1 and not guidance:
            raise InputError(f"guidance is 0, so that there are no halves; leave {GUIDANCE} out of --parallel")

    def __str__(self) -> str:
        axes = {"guidance": self.guidance, "heads": self.tensor}
        return ", ".join(f"{name} over {size} processes" for name, size in axes.items() if size > 1)


ONE = Mesh()  # process


@dataclass(frozen=True)
class Team:
    """This process, by its `rank`, among those that compute a clip. Unless it has joined others it is alone, and none
    of this does anything. The groups are those along each axis of the mesh."""

    mesh: Mesh = ONE
    rank: int = LEADER
    halves: torch.distributed.ProcessGroup | None = None
    shares: torch.distributed.ProcessGroup | None = None

    @classmethod
    def join(cls, mesh: Mesh, device: torch.device) -> Team:
        """With the others of PyTorch's process group, all of which have to call this."""
        from torch.distributed.device_mesh import init_device_mesh

        found = init_device_mesh(device.type, (mesh.guidance, mesh.tensor), mesh_dim_names=(GUIDANCE, TENSOR))
        return cls(mesh, found.get_rank(), found.get_group(GUIDANCE), found.get_group(TENSOR))

    @property
    def leads(self) -> bool:
        """Whether this process has all of the model, and is the one that decides, writes and speaks."""
        return self.rank == LEADER

    @property
    def half(self) -> int:
        """Which half of guidance is computed here: 0 is the conditional one."""
        return self.rank // self.mesh.tensor

    @property
    def share(self) -> int:
        """Which share of the heads."""
        return self.rank % self.mesh.tensor

    def ranges(self, size: int, stacked: int = 1) -> list[slice]:
        """This process's share of `size` rows or columns, of each of the `stacked` kinds in turn."""
        kind, share = size // stacked, size // stacked // self.mesh.tensor
        starts = [index * kind + self.share * share for index in range(stacked)]
        return [slice(start, start + share) for start in starts]

    def sum(self, partial: Tensor) -> Tensor:
        """What all shares give together. `partial` is used up."""
        if self.mesh.tensor > 1:
            torch.distributed.all_reduce(partial, group=self.shares)
        return partial

    def gather(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and shifts (rows, n, c) of both halves, the conditional one's rows first."""
        if self.mesh.guidance == 1:
            return a, b
        own = torch.stack((a, b))
        both = [torch.empty_like(own) for _ in range(self.mesh.guidance)]
        torch.distributed.all_gather(both, own, group=self.halves)
        a, b = torch.cat(both, 1)
        return a, b

    def agree(self, leading: int, known: int, residual: float) -> tuple[int, int, float]:
        """The leader's counts of tokens to commit and of those that something is known of, and its residual: rounding
        must not part the processes."""
        if self.mesh.count == 1:
            return leading, known, residual
        decision = torch.tensor([leading, known, residual], dtype=torch.float64)
        torch.distributed.broadcast(decision, LEADER)
        leading, known, residual = decision.tolist()
        return int(leading), int(known), residual

    def tell(self, value: T | None) -> T:
        """What the leader says; all ask at the same time. Tensors in it are on the CPU."""
        if self.mesh.count == 1:
            return value
        told = [value]
        torch.distributed.broadcast_object_list(told, LEADER)
        return told[0]


ALONE = Team()


def shared_axis(name: str, config: FlowConfig) -> tuple[int, int] | None:
    """Along which axis the tensor of this name is shared out, and how many kinds are stacked there; None for one that
    each process has whole."""
    layer, _, part = name.rpartition(".")
    match = SHARED.fullmatch(layer)
    if not match or int(match[1]) != len(config.layers) - 1:
        return None
    if match[2] in ROWS:
        return (0, ROWS[match[2]]) if part in ("weight", "weight_scale", "bias") else None
    return (1, 1) if part == "weight" else None


def is_added_once(name: str, config: FlowConfig) -> bool:
    """Whether this is the bias of a second product, of which the sum over all shares has one."""
    return name.endswith(".bias") and shared_axis(f"{name.removesuffix('bias')}weight", config) == (1, 1)
