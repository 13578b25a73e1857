"""Some hundred mutated inputs; `python -m tests.fuzz` runs as many as it is told."""

from __future__ import annotations

import os

import pytest

from tests.fuzz.case import Case
from tests.fuzz.runner import BAD, OUTCOMES, SUBJECTS, run, table


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.skipif(os.name != "posix", reason="limits and signals of a POSIX system")
def test_bad_input_is_refused_in_words(subject):
    count = 4 if subject == "signals" else 100
    found = run(subject, seed=1, count=count)
    assert len(found) == count
    bad = [finding for finding in found if finding.outcome in BAD]
    assert not bad, "\n".join(f"--seed 1 --only {f.index}: {f.outcome}: {f.detail}" for f in bad) + "\n" + table(found)


def test_what_a_case_does_is_told_apart(monkeypatch):
    """After a traceback, a hang or a crash the rest of the stream goes on."""
    monkeypatch.setattr("tests.fuzz.runner.PATIENCE", 5)
    held = b"x" * (3 << 27)  # what this process holds is no case's
    found = run("test_fuzz", seed=0, count=10)
    assert [finding.outcome for finding in found] == [*OUTCOMES, "hang", "worked", "refused"], len(held)


LONGEST = 3
MOST = 1 << 27  # some machines take seconds to hand out a gigabyte


def cases(seed):
    """A stream that does each of what can become of a case."""
    import itertools
    import os
    import time

    from starflow_core.errors import InputError

    def refuse(folder):
        raise InputError("no")

    def fill(folder):
        return len(b"x" * (5 << 26))  # written, so that it is really there

    acts = [
        lambda folder: 0,
        refuse,
        lambda folder: 1 / 0,
        lambda folder: time.sleep(99),
        lambda folder: os._exit(3),
        fill,
        lambda folder: os.system("true"),
        lambda folder: sum(itertools.count()),
    ]
    return itertools.cycle(Case(str(i), act) for i, act in enumerate(acts))
