"""The list of faults fits the code: each names one place, and tests that are there."""

from __future__ import annotations

import py_compile
from pathlib import Path

import pytest

from . import all_faults

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("fault", all_faults(), ids=lambda fault: fault.what)
def test_each_fault_has_its_place(fault, tmp_path):
    text = (ROOT / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.old) == 1
    assert fault.old != fault.new
    (tmp_path / "faulty.py").write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    py_compile.compile(str(tmp_path / "faulty.py"), doraise=True)
    for test in fault.tests.split():
        assert (ROOT / test.partition("::")[0]).exists()
