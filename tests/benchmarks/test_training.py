"""Forecasts of training against what is counted on tensors without memory, at small sizes and one large."""

from __future__ import annotations

import pytest

from benchmarks import training
from starflow_core.training.data.buckets import Bucket
from starflow_core.training.forecast import forecast
from starflow_core.training.settings import Settings


@pytest.mark.parametrize("name", ["3B, LoRA", "3B, LoRA, not computed again"])
def test_forecasts_are_what_is_counted(name):
    case = training.CASES[name]
    settings = Settings(**case.settings)
    need = forecast(case.config, settings, training.torch.bfloat16, case.bucket)
    assert 1.0 <= need.total / training._counted(case, settings) <= 1.05
    assert need.total < 12 * training.GIB


def test_what_a_step_computes(monkeypatch):
    """Up to a forward pass more where activations are computed again."""
    monkeypatch.setattr(training, "ROUNDS", 1)
    again, kept = (
        training._cost("image", Settings(dtype="fp32", recompute=recompute))["flops"] for recompute in (True, False)
    )
    assert 1.2 < again / kept < 1.5


def test_what_a_forecast_follows():
    case = training.CASES["3B, LoRA"]

    def total(processes=1, bucket=case.bucket, **changes):
        settings = Settings(**case.settings | changes)
        return forecast(case.config, settings, training.torch.bfloat16, bucket, processes).total

    assert total(batch=8) > total(batch=4) > total()
    assert total(batch=8, micro_batch=1) == total()
    assert total(batch=8, processes=2) < 0.6 * total(batch=8)
    assert total(int8=True) < 0.65 * total()
    assert total(train="full", rank=16) > 8 * total()
    assert total(bucket=Bucket("1:1", 512, 512, 1)) > total()
