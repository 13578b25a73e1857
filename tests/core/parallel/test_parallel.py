"""One clip by several processes is the clip by one."""

from __future__ import annotations

import json

import pytest

from starflow_core.weights.flow import save_flow
from tests.core import models
from tests.core.parallel.cases import CASES, compared
from tests.core.spread import spread

HEADS = {2: 4, 3: 6}  # of the deep block, by the shares that they make
# Halves and shares, and what is made so: everything by two shares, of the others what may differ.
SOME = ("text", "extend", "windows after a context, batch", "prompts that change", "weights in 8 bit")
GROUPS = {
    (1, 2): tuple(CASES),
    (2, 1): (*SOME, "autoregressive"),
    (1, 3): (*SOME, "adapters"),
    (2, 2): ("windows", "adapters on 8 bit"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By halves and shares; each group of processes begins when it is first asked for."""
    results = {}

    def of(halves: int, shares: int) -> dict:
        if (halves, shares) not in results:
            folder = tmp_path_factory.mktemp("group")
            heads = HEADS.get(shares, 4)
            save_flow(models.flow(deep_width=24 * heads), folder / "flow.safetensors", "fp32")
            names = GROUPS[halves, shares]
            spread(compared, halves * shares, folder, folder / "flow.safetensors", halves, shares, names)
            results[halves, shares] = json.loads((folder / "found.json").read_text())
        return results[halves, shares]

    return of


@pytest.mark.parametrize(("halves", "shares", "name"), [(*group, name) for group in GROUPS for name in GROUPS[group]])
def test_several_processes_make_what_one_makes(found, halves, shares, name):
    case = found(halves, shares)[name]
    assert case["error"] < 1e-10  # squared
    assert case["sweeps"][0] == pytest.approx(case["sweeps"][1], abs=1)  # rounding differs
