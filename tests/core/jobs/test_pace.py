"""About how long a job takes, as the last one like it did."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from starflow_core.jobs.memory import forecast
from starflow_core.jobs.pace import Pace, about
from starflow_core.jobs.planner import MemoryPlan
from starflow_core.jobs.tasks import PLAIN, Job, Means
from starflow_core.model.cache import CacheSettings
from starflow_core.model.config import STARFLOW_V_7B
from starflow_core.solve.solvers import PRESETS

JOB = Job(480, 848, frames=81, guidance=3.5)


def pace(job=JOB, device="cpu", dtype=torch.float32, means=PLAIN, others=()):
    return Pace(STARFLOW_V_7B, job, torch.device(device), dtype, means, others)


def test_a_job_takes_as_long_as_the_last_one():
    assert pace().estimate() is None
    pace().note(100)
    pace().note(50)
    assert pace().estimate() == pytest.approx(50)


@pytest.mark.parametrize("other", [
    {"job": replace(JOB, solver=PRESETS["exact"])},
    {"device": "meta"},
    {"others": (torch.device("cpu"),)},
    {"dtype": torch.bfloat16},
    {"means": Means(cache=CacheSettings(True))},
])  # fmt: skip
def test_what_is_another_pace(other):
    pace().note(50)
    assert pace(**other).estimate() is None


@pytest.mark.parametrize(("settings", "least", "most"), [
    ({"batch": 2}, 2, 2),
    ({"guidance": 0.0}, 0.5, 0.5),
    ({"seed": 3, "denoise": False}, 1, 1),
    ({"frames": 41}, 0.35, 0.52),  # fewer tokens, and fewer that each sees
    ({"frames": 161}, 1.9, 2.0),  # beyond the window
    ({"height": 240, "width": 416}, 0.15, 0.25),
])  # fmt: skip
def test_a_jobs_size_scales_it(settings, least, most):
    pace().note(100)
    assert least <= pace(replace(JOB, **settings)).estimate() / 100 <= most


@pytest.mark.parametrize("content", ["", "[1]", '{"a"', "[" * 10**5, "{}"])
def test_a_damaged_file_counts_as_none(cache_home, content):
    pace().note(1)
    (file,) = cache_home.rglob("*.json")
    file.write_text(content)
    assert pace().estimate() is None
    pace().note(2)
    assert pace().estimate() == pytest.approx(2)


def test_where_nothing_can_be_written_nothing_is_kept(cache_home, monkeypatch):
    (cache_home / "starflow").write_text("a file")
    pace().note(1)
    assert pace().estimate() is None


def test_plans_say_it():
    plan = MemoryPlan(PLAIN, forecast(STARFLOW_V_7B, JOB, torch.bfloat16), None)
    assert "Takes" not in str(plan.timed(pace()))
    pace().note(200)
    assert str(plan.timed(pace())).endswith("Takes about 3 min, going by the last such job here")


@pytest.mark.parametrize(("seconds", "words"), [(0.2, "1 s"), (119, "119 s"), (150, "2 min"), (10000, "3 h")])
def test_about(seconds, words):
    assert about(seconds) == f"about {words}"
