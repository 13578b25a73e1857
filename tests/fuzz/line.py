"""Commands whose words are wrong."""

from __future__ import annotations

import contextlib
import io
import os
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from starflow_core.cli import main
from starflow_core.errors import InputError

from .case import Case

BASE = {
    "generate": ["a red circle", "--height", "32", "--width", "48", "--frames", "5", "--guidance", "0", "-o", "a.mp4"],
    "image": ["a ring", "--height", "32", "--width", "32", "--frames", "1", "-o", "a.png"],
    "inspect": ["--frames", "9", "--batch", "2", "--guidance", "1"],
    "convert": ["missing.pth", "a.safetensors"],
    "encode": ["missing.mp4", "-o", "a.safetensors"],
}
OPTIONS = (
    "--frames", "--fps", "--guidance", "--seed", "--batch", "--window", "--keep", "--size", "--aspect", "--height",
    "--width", "--quality", "--span", "--tolerance", "--max-sweeps", "--dtype", "--device", "--image", "--video",
)  # fmt: skip
VALUES = (
    "", "0", "-1", "1", "2", "7", "17", "4097", "99999", "1e309", "-1e309", "nan", "inf", "1e-300", "0x10", "1_000",
    "9" * 20, "9" * 400, "1/0", "16:9", "1:0", "-0", "x", " ", "\udce9", "a\0b", "a" * 300, "a" * 5000, "../", ".", "/",
    "/dev/null", "/proc/self/mem", "red " * 50_000, "--", "-", "%d.png", "%05d.png", "a.txt", "a.gif", "a.webp", "a/",
    "a.mp4/b.mp4", "e\u0301.mp4", "\U0001f642.png",
)  # fmt: skip


QUICK = tuple(value for value in VALUES if value not in ("4097", "99999"))  # the others make minutes of honest work
LONGEST = 60  # seconds of a case: some words make a prompt of each of the others


def cases(seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    while True:
        name = rng.choice(list(BASE))
        words = list(BASE[name])
        for _ in range(rng.randint(1, 2)):
            place = rng.randrange(len(words))
            action = rng.random()
            if action < 0.5:
                words[place] = rng.choice(VALUES)
            elif action < 0.9:
                option = rng.choice(OPTIONS)
                words += [option, rng.choice(QUICK if option == "--frames" else VALUES)]
            else:
                del words[place]
            words = words or [""]
        yield Case(f"words of {name}", partial(_run, "generate" if name == "image" else name, words))


def _run(command: str, words: list[str], folder: Path) -> None:
    """What it says has to be one line, and without an error nothing unfinished may be there."""
    said = io.StringIO()
    os.chdir(folder)
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main([command, *words])
        except SystemExit as stop:  # argparse
            code = stop.code
    assert code in (0, 2), (code, said.getvalue())
    assert "Traceback" not in said.getvalue()
    left = [path.name for path in folder.rglob("*") if path.name.endswith((".part", ".old"))]
    assert not left, left
    if code:
        raise InputError(said.getvalue()[-200:])
