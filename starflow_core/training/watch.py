"""What a run tells: TensorBoard files, and a file of figures with a line for each step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

FIGURES = "figures.jsonl"


class Watch:
    """Writes the figures of steps to a folder. A run that goes on from a state replaces what came after it."""

    def __init__(self, folder: Path, log: Callable[[str], None], opened: ExitStack):
        self.folder, self.log, self.opened = folder, log, opened
        self.file = self.board = None

    def note(self, step: int, figures: dict[str, float]) -> None:
        """Figures of a step; steps come in order."""
        if self.file is None:
            self._open(step)
        self.file.write(json.dumps({"step": step, **{name: float(f"{x:.7g}") for name, x in figures.items()}}) + "\n")
        self.file.flush()
        for name, value in figures.items() if self.board else ():
            self.board.add_scalar(name.replace(" ", "_"), value, step)

    def _open(self, first: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / FIGURES
        kept = _before(path, first)
        self.file = self.opened.enter_context(open(path, "w", encoding="utf-8"))
        self.file.writelines(kept)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.log("no TensorBoard files: the package tensorboard is missing")
            return
        self.board = SummaryWriter(self.folder, purge_step=first)
        self.opened.callback(self.board.close)


@contextmanager
def watching(folder: Path, log: Callable[[str], None]) -> Iterator[Watch]:
    """A watch whose files are closed at the end. Without the package tensorboard it says so, and does without."""
    with ExitStack() as opened:
        yield Watch(folder, log, opened)


def _before(path: Path, first: int) -> list[str]:
    """The lines of earlier steps that another run has written; a line that was cut off is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] < first]
