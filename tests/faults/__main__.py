"""Puts faults into a copy of the project, one at a time, and runs the tests that should find them.

    python -m tests.faults [WORD ..] [--all-tests] [--jobs N]

Takes the faults whose file or description holds one of the words (all without any), sees that their tests pass without
them, prints what became of each, and exits with 1 if one survives. `--all-tests` runs the whole suite against each, not
only the tests named with it.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import Fault, all_faults

ROOT = Path(__file__).parents[2]
LONGEST = 900  # seconds for the tests of one fault


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--all-tests", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    faults = [fault for fault in all_faults() if not options.words or _chosen(fault, options.words)]
    if not faults:
        parser.error(f"no fault has {' or '.join(options.words)} in its file or description")
    survivors = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        copies = [_copy(Path(folder) / str(i)) for i in range(options.jobs)]
        for tests in {"" if options.all_tests else fault.tests for fault in faults}:
            if _run_tests(copies[0], tests) != 0:
                raise SystemExit(f"these fail without any fault: {tests or 'all tests'}")
        outcomes = pool.map(lambda fault: _try(fault, copies, options.all_tests), faults)
        for fault, outcome in zip(faults, outcomes, strict=True):
            print(f"{outcome:9} {fault.file}: {fault.what}", flush=True)
            if outcome != "found":
                survivors.append(fault)
    print(f"{len(faults) - len(survivors)} of {len(faults)} faults found")
    return 1 if survivors else 0


def _copy(folder: Path) -> Path:
    """The files that git tracks or would, as they are now."""
    listed = subprocess.check_output(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, text=True)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def _try(fault: Fault, copies: list[Path], all_tests: bool) -> str:
    """ "found", "SURVIVED", or "stale" where the file doesn't read as the fault expects."""
    copy = copies.pop()
    path = copy / fault.file
    text = path.read_text(encoding="utf-8")
    try:
        if text.count(fault.old) != 1:
            return "stale"
        path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        status = _run_tests(copy, "" if all_tests else fault.tests)
        return {0: "SURVIVED", 1: "found", 2: "found"}.get(status, "no tests")
    except subprocess.TimeoutExpired:
        return "found"  # a run that hangs is noticed, too
    finally:
        path.write_text(text, encoding="utf-8")
        copies.append(copy)


def _run_tests(copy: Path, tests: str) -> int:
    """Pytest's exit status; all tests if none are named, but for those of the list of faults itself."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    chosen = tests.split() or ["--ignore=tests/faults"]
    return subprocess.run([*command, *chosen], cwd=copy, capture_output=True, timeout=LONGEST, check=False).returncode


def _chosen(fault: Fault, words: list[str]) -> bool:
    return any(word in f"{fault.file} {fault.what}" for word in words)


if __name__ == "__main__":
    sys.exit(main())
