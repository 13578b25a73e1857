"""The benchmark of the real commands at full size, on tiny models of the same form."""

from __future__ import annotations

import json

from benchmarks import full_size


def test_commands_run_and_nothing_is_left(tmp_path, capsys):
    report = tmp_path / "report.json"
    folder = tmp_path / "scratch"
    folder.mkdir()
    assert full_size.main(["--small", "--model", "3b", "--folder", str(folder), "--json", str(report)]) == 0
    assert not list(folder.iterdir())
    rows = {row["step"]: row for row in json.loads(report.read_text())["rows"]}
    assert list(rows) == [
        "convert to bf16", "convert to int8",
        "inspect bf16", "generate, bf16 weights", "inspect int8", "generate, int8 weights",
    ]  # fmt: skip
    shown = capsys.readouterr().out
    for name, row in rows.items():
        assert f"| {name} |" in shown
        assert row["cpu_seconds"] > 0
        assert row["resident_bytes"] > row["base_bytes"] > 0
    assert {"hash", "convert"} <= rows["convert to int8"]["phases"].keys()
    picture = rows["generate, int8 weights"]
    assert {"load", "text", "deep", "shallow", "denoise"} <= picture["phases"].keys()
    assert picture["forecast_bytes"] == max(picture["forecast_phases"].values())
    assert "weights in 8 bit" in picture["plan"]


def test_nothing_is_left_after_an_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(full_size, "steps", lambda *_: [("fail", ["inspect", "nothing.pth"], None)])
    assert full_size.main(["--small", "--model", "7b", "--folder", str(tmp_path)]) == 2
    assert not list(tmp_path.iterdir())
    assert "fail failed: error: no checkpoint at nothing.pth" in capsys.readouterr().err
