"""Attention over a sequence in pieces, merged by their log-sum-exp.

What lies before the queries is seen by all of them and needs no mask; only the slots that belong to the queries are
causal. So no mask over a whole cache is ever made, and a cache may hold its pieces in different forms and places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import softplus

Part = tuple[Tensor, Tensor]  # attention (rows, heads, n, head_dim), and log-sum-exp (rows, heads, n) in float32
Kernel = Callable[[Tensor, Tensor, Tensor, bool], Part]  # as `attend`


def attend(queries: Tensor, keys: Tensor, values: Tensor, causal: bool = False) -> Part:
    """Attention of queries (rows, heads, n, head_dim) to one piece of keys and values (rows, heads, m, head_dim).

    With `causal` the piece is the queries' own slots, n = m, and each sees itself and the slots before it.
    """
    return kernel(queries.device, queries.dtype, queries.shape[-1])(queries, keys, values, causal)


@lru_cache
def kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel:
    """`attend` for one kind of tensors. PyTorch's public function keeps the log-sum-exp to itself, so the fused kernels
    behind it are called where there are any."""
    if device.type == "cpu":
        return _on_cpu
    if device.type == "cuda":
        return _flash if _fits_flash(torch.empty(1, 1, 8, head_dim, dtype=dtype, device=device)) else _efficient
    return _plain


def merge(parts: Iterable[Part]) -> Tensor:
    """The attention to all pieces together, in their type; each is taken in before the next is asked for."""
    parts = iter(parts)
    out, total = next(parts)
    dtype = out.dtype
    for piece, logsumexp in parts:
        more = logsumexp - total
        out = out.float().lerp(piece.float(), more.sigmoid().unsqueeze(-1))
        total = total + softplus(more)
    return out.to(dtype)


def _fits_flash(x: Tensor) -> bool:
    from torch.backends.cuda import SDPAParams, can_use_flash_attention

    return can_use_flash_attention(SDPAParams(x, x, x, None, 0.0, False, False))


def _on_cpu(queries: Tensor, keys: Tensor, values: Tensor, causal: bool) -> Part:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(queries, keys, values, is_causal=causal)


def _flash(queries: Tensor, keys: Tensor, values: Tensor, causal: bool) -> Part:
    return torch.ops.aten._scaled_dot_product_flash_attention(queries, keys, values, is_causal=causal)[:2]


def _efficient(queries: Tensor, keys: Tensor, values: Tensor, causal: bool) -> Part:
    out, logsumexp, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        queries, keys, values, None, compute_log_sumexp=True, is_causal=causal
    )
    return out, logsumexp[..., : queries.shape[2]]  # padded to the kernel's tiles


def _plain(queries: Tensor, keys: Tensor, values: Tensor, causal: bool) -> Part:
    """For devices without a fused kernel that tells its log-sum-exp."""
    scores = (queries @ keys.transpose(-1, -2)).float() * queries.shape[-1] ** -0.5
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    logsumexp = scores.logsumexp(-1)
    return (scores - logsumexp.unsqueeze(-1)).exp().to(values.dtype) @ values, logsumexp
