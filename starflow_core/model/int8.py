"""Weights in 8 bit: int8 values with one float32 scale for each output row, expanded whenever they are used.

Only weights are rounded, never activations: Jacobi sweeps the same tokens again and again, and a rounding that moves
with them would keep it from settling (benchmarks/int8.py). So a token depends on the tokens before it and no others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LARGEST = 127  # of a weight's magnitude; -128 is left out, so that rows are symmetric
PIECE = 1 << 22  # numbers that are divided at once, so that a large weight isn't in memory twice
LEAST_SCALE = 1e-30  # of a row of zeros


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (rows, columns) as int8, and the scales (rows, 1) in float32 that its rows are multiples of."""
    # Two passes, since aminmax by row takes five times as long.
    reach = torch.maximum(weight.amax(1, keepdim=True), -weight.amin(1, keepdim=True))
    scale = (reach.float() / LARGEST).clamp_(min=LEAST_SCALE)
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    rows = max(1, PIECE // weight.shape[1])
    for part, by, into in zip(weight.split(rows), scale.split(rows), values.split(rows), strict=True):
        into.copy_((part / by).round_())
    return values, scale


def expand(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that int8 values and scales stand for, each product rounded to `dtype` once."""
    # All 16-bit types hold an int8 exactly; the product in place is made in float32, without a copy on a card.
    return weight.to(dtype).mul_(scale)


class Int8Linear(nn.Module):
    """A linear layer that keeps its weight in int8 and computes in the input's type.

    `weight` (out, in) is int8, `weight_scale` (out, 1) float32, `bias` of the input's type or None. A gradient goes
    through to the input; the weight has none.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        weight = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(out_features, 1, dtype=torch.float32, device=device), False)
        empty = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", empty)

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.dtype == torch.bfloat16 and inputs.device.type == "cpu":
            # There a product of two types takes copies of both in float32: scaling what comes out takes a fifth of the
            # time and of the memory.
            out = F.linear(inputs, self.weight.to(inputs.dtype)) * self.weight_scale.T
            return (out if self.bias is None else out.add_(self.bias)).to(inputs.dtype)
        return F.linear(inputs, expand(self.weight, self.weight_scale, inputs.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def replace_linear(module: nn.Module, name: str, kind=Int8Linear) -> None:
    """Put a layer for int8 weights, of `kind`, in place of the linear layer of that name, which was made on meta."""
    parent, _, attribute = name.rpartition(".")
    old = module.get_submodule(name)
    new = kind(old.in_features, old.out_features, old.bias is not None, device="meta", dtype=old.weight.dtype)
    setattr(module.get_submodule(parent), attribute, new)
