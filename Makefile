# make demo: a first clip. make test: what CI runs. Both set up .venv on their first run.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: install demo test lint

install: $(READY)

# Rebuilt whenever the requirements change; otherwise there is nothing to do.
$(READY): requirements.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

demo: install
	$(BIN)/python -m starflow_core generate "a red circle moving right on a black background" --output outputs/demo.mp4

# A process for each core, with one thread each: most tests are too small to share their work.
test: install lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
