"""The transformer layer that all blocks and the denoiser share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .parallel import ALONE, Team
from .rope import Rotary

# (queries, keys, values), each (rows, heads, slots, head_dim) -> (rows, heads, slots, head_dim)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# Hidden states (rows, slots, width), and how many slots attention was computed for; the hidden states of these slots.
Residual = Callable[[Tensor, int], Tensor]


class Attention(nn.Module):
    def __init__(self, width: int, head_dim: int, operations, shares: int = 1, **factory):
        super().__init__()
        self.head_dim = head_dim
        self.norm = operations.LayerNorm(width, eps=1e-5, **factory)
        self.qkv = operations.Linear(width, 3 * width // shares, **factory)
        self.proj = operations.Linear(width // shares, width, **factory)

    def project(self, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values: each (rows, heads, slots, head_dim)."""
        qkv = self.qkv(self.norm(hidden)).unflatten(-1, (3, -1, self.head_dim))
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)
        return rotary.rotate(queries), rotary.rotate(keys), values

    def output(self, attended: Tensor) -> Tensor:
        return self.proj(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, operations, shares: int = 1, **factory):
        super().__init__()
        inner = 4 * width // shares
        self.norm = operations.LayerNorm(width, eps=1e-5, **factory)
        self.main = nn.Sequential(
            operations.Linear(width, inner, **factory), nn.GELU(), operations.Linear(inner, width, **factory)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return self.main(self.norm(hidden))


class Layer(nn.Module):
    """x + Attention(LN x), then x + MLP(LN x). Hidden states are (rows, slots, width).

    All computation goes through `forward`, so that hooks on modules (sharding, offloading) see every use. With a `team`
    of several it has this process's share of the heads and of the MLP's hidden units; what the shares give is summed.
    """

    def __init__(self, width: int, head_dim: int, operations, team: Team = ALONE, **factory):
        super().__init__()
        self.team = team
        self.attention = Attention(width, head_dim, operations, team.mesh.tensor, **factory)
        self.mlp = MLP(width, operations, team.mesh.tensor, **factory)

    def forward(self, hidden: Tensor, rotary: Rotary, attend: Attend, residual: Residual | None = None) -> Tensor:
        """`residual` returns the hidden states that go with `attend`'s result, for a pipeline that delays them."""
        attended = attend(*self.attention.project(hidden, rotary))
        hidden = residual(hidden, attended.shape[2]) if residual else hidden
        hidden = hidden + self.team.sum(self.attention.output(attended))
        return hidden + self.team.sum(self.mlp(hidden))


class FinalNorm(nn.Module):
    """RMSNorm with gain 1 + weight, computed in float32 and returned in the input's type."""

    def __init__(self, width: int, **factory):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, **factory))

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.float()
        # A bare parameter isn't moved when the host loads a model in part.
        gain = 1 + self.weight.to(x)
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain).to(hidden.dtype)


def causal(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention over a whole sequence: each slot sees itself and the slots before it."""
    if queries.requires_grad and queries.device.type == "cpu" and queries.dtype != torch.float32:
        # PyTorch's half-precision gradient is up to ten times slower than float32 on short sequences.
        with torch.autocast("cpu", enabled=False):
            return causal(queries.float(), keys.float(), values.float()).to(queries.dtype)
    return scaled_dot_product_attention(queries, keys, values, is_causal=True)
