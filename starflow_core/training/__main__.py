"""Trains the demo model: `python -m starflow_core.training --help`."""

from .demo.recipe import main

if __name__ == "__main__":
    main()
