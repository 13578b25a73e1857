"""The benchmark of full-size models runs every job, at small size on the CPU."""

from __future__ import annotations

import json

from benchmarks import gpu


def test_every_job_runs_and_is_recorded(tmp_path, capsys):
    gpu.main(["--small", "--device", "cpu", "--sweeps", "2", "--json", str(tmp_path / "gpu.json")])
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert set(report["jobs"]) == set(gpu.WORKS)
    for name, job in report["jobs"].items():
        assert f"\n{name} " in shown
        assert job["seconds"] > 0
        assert job["evaluations"] >= (16 if job["frames"] == 1 else 5 * 16)
        assert job["tflops"] > 0
    assert 0 < report["jobs"]["clip"]["first"] < report["jobs"]["clip"]["seconds"]
    assert report["jobs"]["baseline"]["evaluations"] == 2 * 5 * 16
