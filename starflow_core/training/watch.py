"""What a run tells: TensorBoard files, and a file of figures with a line for each step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..parts import replacing

FIGURES = "figures.jsonl"


class Watch:
    """Writes the figures of steps to a folder. A run that goes on from a state replaces what came after it."""

    def __init__(self, folder: Path, log: Callable[[str], None]):
        self.path, self.log = folder / FIGURES, log
        self.begun, self.board = False, None

    def note(self, step: int, figures: dict[str, float]) -> None:
        """Figures of a step; steps come in order."""
        if not self.begun:
            self._begin(step)
        line = json.dumps({"step": step, **{name: float(f"{value:.7g}") for name, value in figures.items()}})
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        for name, value in figures.items() if self.board else ():
            self.board.add_scalar(name.replace(" ", "_"), value, step)

    def _begin(self, first: int) -> None:
        self.begun = True
        kept = "".join(_before(self.path, first))
        with replacing(self.path) as part:
            part.write_text(kept, encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.log("no TensorBoard files: the package tensorboard is missing")
            return
        self.board = SummaryWriter(self.path.parent, purge_step=first)


@contextmanager
def watching(folder: Path, log: Callable[[str], None]) -> Iterator[Watch]:
    """A watch whose files are closed at the end. Without the package tensorboard it says so, and does without."""
    watch = Watch(folder, log)
    try:
        yield watch
    finally:
        if watch.board:
            watch.board.close()


def _before(path: Path, first: int) -> list[str]:
    """The lines of earlier steps that another run has written."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if -1 < _step_of(line) < first]


def _step_of(line: str) -> int:
    """-1 for a line that was cut off or damaged."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else -1
    except (ValueError, TypeError, KeyError):
        return -1
