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
from starflow_core.media import write_video
from tests.core import models

from .case import Case

LONGEST = 300  # seconds of a case, which starts a command up to three times

SIZE = ("--height", "32", "--width", "48", "--frames", "17", "--guidance", "0")
PROMPT = "a red circle moving right on a black background"
COMMANDS = {
    "mp4": ("generate", PROMPT, *SIZE, "-o", "{folder}/out.mp4"),
    "gif": ("generate", PROMPT, *SIZE, "-o", "{folder}/out.gif"),
    "webp": ("generate", PROMPT, *SIZE, "-o", "{folder}/out.webp"),
    "sequence": ("generate", PROMPT, *SIZE, "-o", "{folder}/out/"),
    "extend": ("generate", PROMPT, *SIZE, "--video", "{source}", "--task", "extend", "-o", "{folder}/out.mp4"),
    "convert": ("convert", str(BUNDLED / FLOW_FILE), "{folder}/out.safetensors", "--overwrite"),
    "encode": ("encode", "{source}", "-o", "{folder}/out.safetensors"),
}
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}


def cases(seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    while True:
        name, kind = rng.choice(list(COMMANDS)), rng.choice(list(SIGNALS))
        yield Case(f"{kind.name}, {name}", partial(_stop, name, kind, rng.uniform(0.4, 1)))


@lru_cache
def _source() -> Path:
    """A clip of noise."""
    path = Path(tempfile.mkdtemp()) / "source.mp4"
    write_video(path, models.randn(9, 3, 32, 48).clamp(-1, 1), 16)
    return path


@lru_cache
def _undisturbed(name: str) -> tuple[float, dict[str, bytes]]:
    """The seconds that a command takes, and the files that it leaves."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        assert _start(name, Path(folder)).wait() == 0
        return time.monotonic() - began, _files(Path(folder))


def _stop(name: str, kind: signal.Signals, moment: float, folder: Path) -> None:
    took, expected = _undisturbed(name)
    process = _start(name, folder)
    time.sleep(took * moment)
    process.send_signal(kind)
    _, said = process.communicate()
    done, left = process.returncode == 0, _files(folder)
    assert done or process.returncode in (SIGNALS[kind], -kind), process.returncode  # the latter before it has begun
    assert "Traceback" not in said or process.returncode == -kind, said
    parts = {path for path in left if ".part" in path}
    assert kind == signal.SIGKILL or not parts, parts
    whole = {path: data for path, data in left.items() if path not in parts}
    assert whole == expected or not (done or whole), "half-written"
    assert _start(name, folder).wait() == 0
    assert _files(folder) == expected, "another result"


def _start(name: str, folder: Path) -> subprocess.Popen:
    words = [word.format(folder=folder, source=_source()) for word in COMMANDS[name]]
    # A shell has its background jobs ignore SIGINT, and what they start inherits that.
    return subprocess.Popen(
        [sys.executable, "-m", "starflow_core", *words], env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
