"""Runs mutated input in processes of their own, and counts what became of it.

    python -m tests.fuzz [SUBJECT ..] [--cases N] [--seed S] [--only I] [--jobs J]

Subjects are the modules beside this one that have `cases`; all without any. Prints a row for each class of input, and
exits with 1 if any case ended in a traceback, hung, crashed, took gigabytes or ran code. `--only I` runs one case
again, here.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from .runner import BAD, SUBJECTS, cases_of, run, table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", choices=[*SUBJECTS, []])
    parser.add_argument("--cases", type=int, default=1000, help="of each subject")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    subjects = options.subjects or list(SUBJECTS)
    if options.only is not None:
        case = cases_of(subjects[0], options.seed, options.only)
        with tempfile.TemporaryDirectory() as folder:
            print(case.name)
            case.run(Path(folder))
        return 0
    found = [f for subject in subjects for f in run(subject, options.seed, options.cases, options.jobs)]
    print(table(found))
    for finding in found:
        if finding.outcome in BAD:
            print(
                f"{finding.subject} --seed {options.seed} --only {finding.index}: {finding.outcome}: {finding.detail}"
            )
    return 1 if any(finding.outcome in BAD for finding in found) else 0


if __name__ == "__main__":
    sys.exit(main())
