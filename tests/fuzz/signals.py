"""Commands that are stopped or killed at random moments: nothing half-written, and the next run is as if alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

from starflow_core.bundled import BUNDLED, FLOW_FILE
from starflow_core.cli import main
from starflow_core.media import write_video
from tests.core import models

from .case import Case

LONGEST = 300  # seconds of a case, ten times that by the clock; it starts a command up to three times
FORBIDDEN = ()

SIZE = ("--height", "32", "--width", "48", "--frames", "17", "--guidance", "0")
PROMPT = "a red circle moving right on a black background"
GENERATE = ("starflow_core", "generate", PROMPT, *SIZE)
COMMANDS = {
    "mp4": (*GENERATE, "-o", "{folder}/out.mp4"),
    "webm": (*GENERATE, "-o", "{folder}/out.webm"),
    "gif": (*GENERATE, "-o", "{folder}/out.gif"),
    "webp": (*GENERATE, "-o", "{folder}/out.webp"),
    "sequence": (*GENERATE, "-o", "{folder}/out/"),
    "sequence again": (*GENERATE, "--seed", "1", "-o", "{folder}/out/"),  # over that of "sequence"
    "several": (*GENERATE, "--batch", "2", "-o", "{folder}/out.mp4"),
    "resume": (*GENERATE, "--frames", "41", "--window", "3", "--keep", "1", "--resume", "-o", "{folder}/out.mp4"),
    "extend": (*GENERATE, "--video", "{source}", "--task", "extend", "-o", "{folder}/out.mp4"),
    "convert": ("starflow_core", "convert", str(BUNDLED / FLOW_FILE), "{folder}/out.safetensors", "--overwrite"),
    "encode": ("starflow_core", "encode", "{source}", "-o", "{folder}/out.safetensors"),
    "decode": ("starflow_core", "decode", "{noise}", "-o", "{folder}/out.mp4"),
    "fill": ("starflow_core", "fill", "{source}", PROMPT, *SIZE[:4], "--missing", "1-4", "-o", "{folder}/out.mp4"),
    "score": ("starflow_core", "score", "{source}"),
    "training": ("starflow_core.training", "--scale", "1e-9", "--work", "{folder}/work", "--output", "{folder}/out"),
}
BEFORE = {"sequence again": "sequence"}  # commands whose results are there already, and whose they are
PIECEWISE = ("several", "training")  # each of their files is whole, but the first may be there before the last
STATES = (".pt", ".distcp", ".metadata", "run.json")  # of training: their bytes name the process that wrote them
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}


def cases(seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    while True:
        name, kind = rng.choice(list(COMMANDS)), rng.choice(list(SIGNALS))
        yield Case(f"{kind.name}, {name}", partial(_stop, name, kind, rng.uniform(0.3, 1), rng.random() < 0.5))


@lru_cache
def _inputs() -> dict[str, Path]:
    """A clip of noise, and the noise that makes a clip."""
    folder = Path(tempfile.mkdtemp())
    inputs = {"source": folder / "source.mp4", "noise": folder / "noise.safetensors"}
    write_video(inputs["source"], models.randn(9, 3, 32, 48).clamp(-1, 1), 16)
    assert main(["encode", str(inputs["source"]), *SIZE[:4], "-o", str(inputs["noise"])]) == 0
    return inputs


@lru_cache
def _undisturbed(name: str) -> tuple[float, dict[str, bytes]]:
    """The seconds that a command takes, and the files that it leaves."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        assert _start(name, Path(folder)).wait() == 0
        return time.monotonic() - began, _files(Path(folder))


def _stop(name: str, kind: signal.Signals, moment: float, writing: bool, folder: Path) -> None:
    """At a share of the time that the command takes; or, if `writing`, of what is left when it begins to write."""
    took, expected = _undisturbed(name)
    before = _undisturbed(BEFORE[name])[1] if name in BEFORE else {}
    for path, data in before.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(data)
    process, began = _start(name, folder), time.monotonic()
    while writing and process.poll() is None and not _parts(folder):
        time.sleep(0.002)
    left = max(took - (time.monotonic() - began), 0.2)
    time.sleep(left * (moment - 0.3) if writing else took * moment)
    process.send_signal(kind)
    _, said = process.communicate()
    _check(name, kind, process.returncode, said, folder, before, expected)
    assert _start(name, folder).wait() == 0
    assert _files(folder) == expected, "another result"
    assert not _parts(folder), "parts stay"


def _check(name: str, kind: int, status: int, said: str, folder: Path, before: dict, expected: dict) -> None:
    """What a stopped command has said and left."""
    assert status in (0, SIGNALS[kind], -kind), status  # the last before it has begun
    assert "Traceback" not in said or status == -kind, said
    assert kind == signal.SIGKILL or not _parts(folder), _parts(folder)
    found = _files(folder)
    if name in PIECEWISE:
        assert found.items() <= expected.items(), "half-written"
    else:  # killed between two renames, an old folder has stepped aside
        aside = kind == signal.SIGKILL and not found and any(path.suffix == ".old" for path in _parts(folder))
        assert found in (before, expected) or aside, "half-written"
    assert status != 0 or found == expected, "incomplete"


def _start(name: str, folder: Path) -> subprocess.Popen:
    words = [word.format(folder=folder, **_inputs()) for word in COMMANDS[name]]
    # A shell has its background jobs ignore SIGINT, and what they start inherits that.
    return subprocess.Popen(
        [sys.executable, "-m", *words], env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def _parts(folder: Path) -> list[Path]:
    """What is being written, or was when it was killed."""
    return [path for path in folder.rglob("*") if path.suffix in (".part", ".old")]


def _files(folder: Path) -> dict[str, bytes]:
    """The finished files that a run leaves the same each time."""
    files = {
        path.relative_to(folder): path
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(STATES)
    }
    unfinished = (".part", ".old", ".unfinished.safetensors")
    return {
        name.as_posix(): path.read_bytes()
        for name, path in files.items()
        if not any(part.endswith(unfinished) for part in name.parts)
    }
