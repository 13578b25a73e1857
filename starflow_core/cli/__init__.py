"""The commands. Results go to stdout; progress, warnings and errors to stderr."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from ..errors import StarflowError
from .arguments import parser

BAD_INPUT, INTERRUPTED = 2, 130  # exit codes; the second is a shell's for Ctrl-C
OUT_OF_MEMORY_ADVICE = (
    "out of memory; use fewer frames, a smaller size or batch, guidance 0, a 16-bit --dtype, or --tile for the VAE"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. Bad arguments raise argparse's SystemExit."""
    arguments = parser().parse_args(argv)
    try:
        # What a command needs takes seconds to import, and help needs none of it.
        module = importlib.import_module(f".{arguments.module}", __package__)
        getattr(module, arguments.command)(arguments)
    except StarflowError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        return _fail(f"the package {error.name} is missing; run pip install -r requirements.txt")
    except KeyboardInterrupt:
        print("interrupted; nothing unfinished was left behind", file=sys.stderr)
        return INTERRUPTED
    except (MemoryError, RuntimeError) as error:
        from ..jobs.memory import ran_out

        if not ran_out(error):
            raise
        return _fail(OUT_OF_MEMORY_ADVICE)
    return 0


def _fail(message: str) -> int:
    print("error:", message.replace("\n", " "), file=sys.stderr)
    return BAD_INPUT
