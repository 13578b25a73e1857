"""The commands. Results go to stdout; progress, warnings and errors to stderr."""

from __future__ import annotations

import importlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ..errors import JobsFailed, StarflowError, ran_out
from .arguments import parser

# Exit codes; the last two are a shell's for SIGINT and SIGTERM.
BAD_INPUT, SOME_FAILED, INTERRUPTED, TERMINATED = 2, 3, 130, 143
SOON = 0.05  # seconds, until a finaliser is over
OUT_OF_MEMORY_ADVICE = (
    "out of memory; use fewer frames, a smaller size or batch, guidance 0, a 16-bit --dtype, or --tile for the VAE"
)


class Terminated(KeyboardInterrupt):
    """SIGTERM: the same as Ctrl-C, but for the exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. Bad arguments raise argparse's SystemExit."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may not be text
    arguments = parser().parse_args(argv)

    def act() -> None:
        # What a command needs takes seconds to import, and help needs none of it.
        module = importlib.import_module(f".{arguments.module}", __package__)
        getattr(module, arguments.command)(arguments)

    return exit_code_of(act)


def exit_code_of(act: Callable[[], object]) -> int:
    """Do what a command does, tell what goes wrong in a line, and return the exit code."""
    try:
        with _stoppable():
            act()
    except StarflowError as error:
        _fail(str(error))
        return SOME_FAILED if isinstance(error, JobsFailed) else BAD_INPUT
    except ModuleNotFoundError as error:
        return _fail(f"the package {error.name} is missing; run pip install -r requirements.txt")
    except KeyboardInterrupt as error:
        print("interrupted; no partial files were left", file=sys.stderr)
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        return _fail(OUT_OF_MEMORY_ADVICE)
    return 0


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM stops a command as Ctrl-C does, so that it cleans up.

    Either may arrive in a finaliser or a callback, where Python drops exceptions: it is sent again then.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would cut the clearing up short
        raise Terminated

    def dropped(unraisable) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            hook(unraisable)
            return
        kind = signal.SIGINT
        if issubclass(unraisable.exc_type, Terminated):
            kind = signal.SIGTERM
            signal.signal(kind, stop)
        told = threading.Event()
        threading.Thread(target=_interrupt, args=(kind, told), daemon=True).start()
        told.set()

    before, hook = signal.signal(signal.SIGTERM, stop), sys.unraisablehook
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, before)


def _interrupt(kind: signal.Signals, told: threading.Event) -> None:
    """Send the main thread a signal soon after it was `told`; one that also ends its sleep, where the system can."""
    told.wait()
    time.sleep(SOON)
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident, kind)
    else:
        signal.raise_signal(kind)


def _fail(message: str) -> int:
    print("error:", message.replace("\n", " "), file=sys.stderr)
    return BAD_INPUT
