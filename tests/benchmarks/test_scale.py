"""The benchmark of batches: kills, memory, throughput; a small version of each, on the bundled demo."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import scale

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def measured(tmp_path):
    def call(*words):
        scale.main([*words, "--json", str(tmp_path / "scale.json")])
        return json.loads((tmp_path / "scale.json").read_text())

    return call


def test_a_worker_of_ray_is_killed(measured):
    pytest.importorskip("ray")
    (row,) = measured("--parts", "killed", "--engine", "ray", "--jobs", "6", "--kills", "1")["killed"]
    assert (row["kills"], row["starts"]) == (1, row["batches"])


def test_a_process_of_torchrun_is_killed(measured):
    (row,) = measured("--parts", "killed", "--engine", "torchrun", "--jobs", "6", "--kills", "1")["killed"]
    assert row["starts"] == row["batches"] + 1


def test_memory_and_pixels(measured):
    found = measured("--parts", "many", "--engine", "torchrun", "--jobs", "4")["many"]
    assert len(found) == 2
    assert all(row["largest difference of pixels"] == 0 and row["samples"] for row in found)
