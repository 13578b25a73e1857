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


def test_more_cards_hold_and_read_less(measured):
    rows = measured("--parts", "cards")["cards"]
    for first in (0, 3):
        one, two, eight = rows[first : first + 3]
        assert [row["cards"] for row in (one, two, eight)] == [1, 2, 8]
        for name in ("largest_GB", "read_GB"):
            assert one[name] > two[name] > eight[name]
        assert (one["exchanged_kB"], two["summed_MB"]) == (0, 0)
        assert two["exchanged_kB"] == eight["exchanged_kB"] > 0
        assert eight["summed_MB"] > 0
