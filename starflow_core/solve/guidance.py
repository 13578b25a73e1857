"""Guidance: the deep block's conditional and unconditional affine maps, combined."""

from __future__ import annotations

from torch import Tensor


def guided(a_c: Tensor, b_c: Tensor, a_u: Tensor, b_u: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Scale and shift under guidance (STARFlow, section 3.4). Weight 0 returns (a_c, b_c): it corresponds to CFG 1 in a
    diffusion sampler."""
    trust = (a_c / a_u).clamp(max=1).square()
    total = 1 + weight - weight * trust
    return a_c / total.sqrt(), ((1 + weight) * b_c - weight * trust * b_u) / total
