"""The type that a model runs in by default."""

from __future__ import annotations

import pytest
import torch

from starflow_core.model import placement
from starflow_core.model.config import STARFLOW_3B, STARFLOW_V_7B
from starflow_core.model.placement import default_dtype
from tests.core import models

CPU, CARD = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("config", [STARFLOW_3B, STARFLOW_V_7B], ids=["3B", "7B"])
def test_large_models_take_bfloat16_where_the_cpu_multiplies_in_it(monkeypatch, config):
    monkeypatch.setattr(placement, "_multiplies_bfloat16", lambda: True)
    assert default_dtype(CPU, config) == torch.bfloat16
    monkeypatch.setattr(placement, "_multiplies_bfloat16", lambda: False)
    assert default_dtype(CPU, config) == torch.float32


def test_small_models_stay_in_float32_on_a_cpu(monkeypatch):
    monkeypatch.setattr(placement, "_multiplies_bfloat16", lambda: True)
    assert default_dtype(CPU, models.config()) == torch.float32
    assert default_dtype(CARD, models.config()) == torch.bfloat16


def test_an_older_pytorch_cannot_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert default_dtype(CPU, STARFLOW_3B) == torch.float32
