"""Attention in pieces is the attention to all of them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from starflow_core.model import attention
from starflow_core.model.attention import attend, merge
from tests.core import models


def case(before: int, slots: int, dtype=torch.float32):
    shapes = [(2, 3, slots, 24), (2, 3, before + slots, 24), (2, 3, before + slots, 24)]
    return [models.randn(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes)]


def dense(queries, keys, values):
    slots, length = queries.shape[2], keys.shape[2]
    mask = torch.ones(slots, length, dtype=torch.bool).tril(length - slots)
    return scaled_dot_product_attention(queries, keys, values, attn_mask=mask)


def in_pieces(queries, keys, values, piece: int):
    before = keys.shape[2] - queries.shape[2]
    for start in range(0, before, piece):
        now = slice(start, min(start + piece, before))
        yield attend(queries, keys[:, :, now], values[:, :, now])
    yield attend(queries, keys[:, :, before:], values[:, :, before:], causal=True)


@pytest.mark.parametrize(("before", "slots", "piece"), [(0, 5, 1), (1, 1, 4), (7, 4, 3), (40, 9, 16)])
@pytest.mark.parametrize("plain", [False, True], ids=["fused", "plain"])
def test_pieces_are_the_whole(monkeypatch, before, slots, piece, plain):
    if plain:
        monkeypatch.setattr("tests.core.model.test_attention.attend", without_kernel)
    queries, keys, values = case(before, slots)
    expected = dense(queries, keys, values)
    torch.testing.assert_close(merge(in_pieces(queries, keys, values, piece)), expected, atol=2e-6, rtol=2e-6)


def without_kernel(queries, keys, values, causal=False):
    return attention._plain(queries, keys, values, causal)


def test_pieces_of_very_different_weight():
    """Where all of the weight is in one piece, the others change nothing, and nothing overflows."""
    queries, keys, values = case(12, 3)
    keys[:, :, :6] *= 200
    torch.testing.assert_close(merge(in_pieces(queries, keys, values, 6)), dense(queries, keys, values))


def test_half_precision_rounds_once():
    """Merged in float32, then rounded: as near to the exact answer as one call of PyTorch's."""
    queries, keys, values = case(60, 5, torch.bfloat16)
    exact = dense(queries.double(), keys.double(), values.double())
    merged = merge(in_pieces(queries, keys, values, 16))
    assert merged.dtype == torch.bfloat16
    ours, theirs = (models.relative_error(x.double(), exact) for x in (merged, dense(queries, keys, values)))
    assert ours < 2 * theirs + 1e-6
