"""Commands whose words are wrong."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import tempfile
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

from starflow_core.bundled import BUNDLED, FLOW_FILE
from starflow_core.cli import main
from starflow_core.cli.arguments import parser
from starflow_core.errors import InputError
from starflow_core.media import write_video
from tests.core import models

from .case import Case

SMALL = ("--height", "32", "--width", "48")
# What stands in braces is a good file, see `_files`.
BASE = {
    "generate": ("generate", "a red circle", *SMALL, "--frames", "5", "--guidance", "0", "-o", "a.mp4"),
    "generate a picture": ("generate", "a ring", *SMALL, "--frames", "1", "-o", "a.png"),
    "generate from frames": ("generate", "a ring", *SMALL, "--frames", "5", "--image", "{picture}", "-o", "a.gif"),
    "generate from a clip": ("generate", "a ring", "--video", "{clip}", "--task", "edit", *SMALL, "-o", "full/"),
    "inspect": ("inspect", "--frames", "9", "--batch", "2", "--guidance", "1"),
    "inspect a file": ("inspect", "{clip}", "--json"),
    "convert": ("convert", "{flow}", "a.safetensors", "--dtype", "fp16"),
    "encode": ("encode", "{clip}", *SMALL, "--prompt", "a ring", "-o", "a.safetensors"),
    "decode": ("decode", "{noise}", "--preset", "fast", "--quality", "50", "-o", "a.webm"),
    "fill": (
        "fill",
        "{clip}",
        "a ring",
        *SMALL,
        "--frames",
        "5",
        "--missing",
        "1-4",
        "--particles",
        "2",
        "-o",
        "a.gif",
    ),
    "score": ("score", "{clip}", *SMALL, "--frames", "5", "--json"),
    "score a choice": ("score", "{clip}", *SMALL, "--frames", "5", "--map", "a.gif", "--choose", "a ring", "a square"),
}
# Values that an option takes; numbers where it isn't here.
GOOD = {
    "--fps": ("7", "23.976", "30000/1001"), "--aspect": ("16:9", "1:1"), "--size": ("40", "48"), "--height": ("32",),
    "--width": ("48",), "--dtype": ("bf16", "fp16", "fp32"), "--device": ("cpu",), "--negative": ("a square",),
    "--prompt": ("a square",), "--image": ("{picture}",), "--last-image": ("{picture}",), "--video": ("{clip}",),
    "--task": ("edit", "extend"), "--preset": ("fast", "exact"), "--solver": ("autoregressive",), "--tile": ("4", "8"),
    "--model": ("{flow}",), "-o": ("a.gif", "a.png", "full/", "b.safetensors", "dangling.mp4", "linked/"),
    "--mask": ("{picture}",), "--outpaint": ("0,16,16,0",), "--missing": ("1-4",),
    "--map": ("a.png", "a.webp", "full/", "dangling.mp4"), "--choose": ("a ring", "a square"), "--best-of": ("2", "3"),
    "--output": ("a.webp", "frames/%05d.jpg", "full.safetensors", "dangling.safetensors"),
}  # fmt: skip
NUMBERS = ("0", "1", "2", "5", "9", "17", "0.5")
WRONG = (
    "", "-1", "4097", "99999", "1e309", "-1e309", "nan", "inf", "1e-300", "0x10", "1_000", "9" * 20, "9" * 400, "1/0",
    "1:0", "-0", "x", " ", "\udce9", "a\0b", "a" * 300, "a" * 5000, "../", ".", "/", "/dev/null", "/proc/self/mem",
    "red " * 50_000, "--", "-", "%d.png", "%05d.png", "a.txt", "a.gif", "a.webp", "a/", "a.mp4/b.mp4", "e\u0301.mp4",
    "\U0001f642.png", "{clip}", "{picture}", "{noise}", "{flow}", "dangling.mp4", "dangling.safetensors", "linked/",
    "linked.mp4", "linked.safetensors", "full/", "full.safetensors", "edit", "extend",
)  # fmt: skip
LONG = dict.fromkeys(("--frames", "--batch", "--best-of", "--particles"), ("4097", "99999"))  # minutes of honest work
LONGEST = 120  # seconds of a case: behind "--" each of the other words is a prompt of a clip


def cases(seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    while True:
        name = rng.choice(list(BASE))
        command, *words = BASE[name]
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(words))
            action = rng.random()
            if action < 0.2:
                words[place] = rng.choice(WRONG)
            elif action < 0.95:
                words += _option(rng, command)
            else:
                del words[place]
            words = words or [""]
        yield Case(name, partial(_run, command, words))


def _option(rng: random.Random, command: str) -> list[str]:
    """One of the command's options, mostly with a value that it takes."""
    action = rng.choice([action for action in _options(command) if action.option_strings])
    option = rng.choice(action.option_strings)
    if action.nargs == 0:
        return [option]
    value = rng.choice(GOOD.get(option, NUMBERS) if rng.random() < 0.6 else WRONG)
    return [option, "2" if value in LONG.get(option, ()) else value]


@lru_cache
def _options(command: str) -> list[argparse.Action]:
    commands = next(action for action in parser()._actions if action.dest == "command")
    return commands.choices[command]._actions


@lru_cache
def _files() -> dict[str, str]:
    """A picture, a clip, its noise and a flow, made once."""
    folder = Path(tempfile.mkdtemp())
    files = {
        f"{{{name.partition('.')[0]}}}": str(folder / name) for name in ("picture.png", "clip.mp4", "noise.safetensors")
    }
    pixels = models.randn(5, 3, 32, 48).clamp(-1, 1)
    write_video(files["{picture}"], pixels[:1], 0)
    write_video(files["{clip}"], pixels, 16)
    assert main(["encode", files["{clip}"], *SMALL, "-o", files["{noise}"]]) == 0
    return {**files, "{flow}": str(BUNDLED / FLOW_FILE)}


def _furnish(folder: Path) -> dict[Path, str]:
    """Puts links and finished results where outputs may go; gives the links and where they lead."""
    for kind in ("dangling", "linked"):
        for suffix in ("", ".mp4", ".safetensors"):
            (folder / f"{kind}{suffix}").symlink_to(folder / ("missing" if kind == "dangling" else "full"))
    (folder / "full.safetensors").write_bytes(b"kept")
    write_video(folder / "full/", models.randn(2, 3, 32, 48).clamp(-1, 1), 16)
    return {path: os.readlink(path) for path in folder.iterdir() if path.is_symlink()}


def _run(command: str, words: list[str], folder: Path) -> None:
    """What it says has to be one line, nothing unfinished may be left, and links stay links."""
    words, links, said = [_files().get(word, word) for word in words], _furnish(folder), io.StringIO()
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
    assert {path: os.readlink(path) for path in links} == links
    if code:
        assert len(list((folder / "full").iterdir())) == 3, "a refused command has changed what was there"
        raise InputError(said.getvalue()[-200:])
