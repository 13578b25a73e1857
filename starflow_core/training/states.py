"""What a run resumes from: sharded checkpoints, written while training goes on.

A state is a folder `NAME-STEP`, written as `NAME-STEP.part` and renamed when it is whole, so that a half-written one is
never read. It holds tensors alone, and `run.json`, which says whose they are. It is loaded by any number of processes.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter

from ..errors import InputError
from ..parts import remove, replacing
from .processes import Processes

KEPT = 2  # states: the last, and the one before
RUN = "run.json"
FAILURES = (Exception, CheckpointException)  # the library's own isn't one of the others
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # from a thread, whenever there is one process alone
# What the description of a state's tensors is made of; a pickle with anything else in it isn't read.
HARMLESS = re.compile(
    r"torch\.distributed\.checkpoint\.(metadata|filesystem)\.\w+|torch\.serialization\._get_layout|"
    r"torch\.(Size|float\d+|bfloat16|u?int\d+|bool)|pathlib(\._local)?\.\w*Path"
)


class States:
    """The states of one stage of a run, in a folder."""

    def __init__(self, folder: Path, name: str, processes: Processes):
        self.folder, self.name, self.processes = Path(folder), name, processes
        self.writing: tuple[Future, int] | None = None
        self.group = processes.group()  # writing goes on beside training, and has to have its messages apart

    def begin(self, run: dict[str, Any]) -> int:
        """Clear what killed processes left; the step of the last state, or 0. Raises InputError for a state of another
        run."""
        if self.processes.leads:
            self.folder.mkdir(parents=True, exist_ok=True)
            for part in self.folder.glob(f"{self.name}-*.part"):
                remove(part)
        self.processes.wait()
        done = self._steps()
        if not done:
            return 0
        found = self._run_of(done[-1])
        if found != run:
            told = _differences(found, run)
            raise InputError(f"{self._path(done[-1])} belongs to a run with {told}; use another folder, or remove it")
        return done[-1]

    def names(self, done: int) -> dict[str, torch.Size]:
        """The tensors of a state and their shapes."""
        found = _Reader(self._path(done)).read_metadata().state_dict_metadata
        return {name: entry.size for name, entry in found.items()}

    def load(self, done: int, tensors: dict[str, Tensor]) -> None:
        """Read into these tensors, sharded or not. Raises InputError for a damaged state."""
        path = self._path(done)
        try:
            checkpoint.load(dict(tensors), storage_reader=_Reader(path))
        except InputError:
            raise
        except FAILURES as error:  # a damaged archive can fail anywhere in its readers
            raise _damaged(path, error) from None

    def save(self, tensors: dict[str, Tensor], run: dict[str, Any], done: int) -> None:
        """Copy the tensors and write them while training goes on. Raises InputError if the last ones could not be
        written; the state before them stays."""
        self.finish()
        writing = checkpoint.async_save(
            dict(tensors), storage_writer=FileSystemWriter(self._part(done)), process_group=self.group
        )
        self.run, self.writing = run, (writing, done)

    def finish(self) -> None:
        """Wait until what is being written is whole. Raises as `save`."""
        if self.writing is None:
            return
        (writing, done), self.writing = self.writing, None
        try:
            writing.result()
        except FAILURES as error:
            raise self._unwritten(done, error) from None
        self.processes.wait()
        if self.processes.leads:
            try:
                self._publish(done)
            except OSError as error:
                raise self._unwritten(done, error) from None
        self.processes.wait()

    @contextmanager
    def written(self) -> Iterator[None]:
        """Whatever happens inside, what is being written becomes whole; but for where other processes may be gone."""
        try:
            yield
        except BaseException:
            if self.processes.count == 1:
                with suppress(InputError):
                    self.finish()
            raise
        self.finish()

    def finish_if_written(self) -> None:
        """Take note of a state that has been written meanwhile. All processes have to ask at the same time."""
        if self.writing and self.processes.mean({"written": float(self.writing[0].done())})["written"] == 1:
            self.finish()

    def _publish(self, done: int) -> None:
        part = self._part(done)
        with replacing(part / RUN) as file:
            file.write_text(json.dumps(self.run, indent=1), encoding="utf-8")
        shutil.rmtree(self._path(done), ignore_errors=True)
        part.rename(self._path(done))
        for old in self._steps()[:-KEPT]:
            remove(self._path(old))

    def _unwritten(self, done: int, error: BaseException) -> InputError:
        remove(self._part(done))
        kept = self._steps()
        last = f"the last good one is of step {kept[-1]}" if kept else "there is none yet"
        return InputError(f"the state of step {done} can't be written to {self.folder} ({_reason(error)}); {last}")

    def _run_of(self, done: int) -> dict[str, Any]:
        file = self._path(done) / RUN
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _damaged(self._path(done), error) from None

    def _steps(self) -> list[int]:
        """Of the states that are whole, in order."""
        matches = (re.fullmatch(rf"{re.escape(self.name)}-(\d+)", path.name) for path in self.folder.glob("*"))
        return sorted(int(match[1]) for match in matches if match)

    def _path(self, done: int) -> Path:
        return self.folder / f"{self.name}-{done:07d}"

    def _part(self, done: int) -> Path:
        path = self._path(done)
        return path.with_name(f"{path.name}.part")


class _Reader(FileSystemReader):
    """Reads the description of a state's tensors without running what a pickle may hold."""

    def read_metadata(self, *args, **kwargs):
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                found = _Harmless(file).load()
        except Exception as error:
            raise _damaged(path.parent, error) from None
        found.storage_meta.load_id = self.load_id
        return found


class _Harmless(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if not HARMLESS.fullmatch(f"{module}.{name}"):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no state does")
        return super().find_class(module, name)


def _damaged(path: Path, error: BaseException) -> InputError:
    return InputError(f"{path} is damaged ({_reason(error)}); remove it, and the run goes on from the state before")


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error, _ = next(iter(error.failures.values()))
    while error.__cause__ or error.__context__:  # what the library wraps
        error = error.__cause__ or error.__context__
    return getattr(error, "strerror", None) or str(error).partition("\n")[0][:200] or type(error).__name__


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    return ", ".join(f"{name} {found.get(name)!r} (this one: {wanted.get(name)!r})" for name in names)
