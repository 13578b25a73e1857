"""Unfinished files: which are left alone, and which are cleared away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from starflow_core import parts
from starflow_core.parts import clear_stale, part_of, real, replacing


@pytest.fixture
def gone(monkeypatch):
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def made_by(process: int, target: Path, monkeypatch, kind: str = "part") -> Path:
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: process)
        part = part_of(target, kind)
    part.write_text(kind)
    return part


@pytest.mark.skipif(os.name != "posix", reason="elsewhere nobody can tell whether a process is alive")
def test_parts_of_processes_that_are_gone_are_removed(tmp_path, monkeypatch, gone):
    target = tmp_path / "a [1].mp4"
    stale = made_by(gone, target, monkeypatch)
    folder = part_of(target)
    folder.mkdir()
    kept = [made_by(os.getpid(), target, monkeypatch), made_by(os.getppid(), target, monkeypatch), folder]
    kept += [made_by(gone, tmp_path / "b.mp4", monkeypatch), tmp_path / "a [1].mp4.part"]
    kept[-1].write_text("somebody else's")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(parts, "_machine", lambda: "00000000")
        kept.append(made_by(gone, target, monkeypatch))
    clear_stale(target)
    assert not stale.exists()
    assert sorted(tmp_path.iterdir()) == sorted(kept)


@pytest.mark.skipif(os.name != "posix", reason="elsewhere nobody can tell whether a process is alive")
def test_what_stepped_aside_comes_back(tmp_path, monkeypatch, gone):
    """A process that was killed between two renames leaves the old sequence under another name."""
    target = tmp_path / "frames"
    made_by(gone, target, monkeypatch, "old")
    clear_stale(target)
    assert target.read_text() == "old"
    made_by(gone, target, monkeypatch, "old")
    clear_stale(target)
    assert [path.name for path in tmp_path.iterdir()] == ["frames"]


def test_links_are_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "a.mp4")
    assert real(tmp_path / "link") == (tmp_path / "folder" / "a.mp4").resolve()
    assert real("nul\0.mp4") == Path.cwd() / "nul\0.mp4"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with replacing(path) as part:
        part.write_text("old")
    with pytest.raises(UnicodeEncodeError), replacing(path) as part:
        part.write_text("new \udc80", encoding="utf-8")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
