"""Trains the demo model: `python -m starflow_core.training --help`."""

import sys

from ..cli import exit_code_of
from .demo.recipe import main

if __name__ == "__main__":
    sys.exit(exit_code_of(main))
