"""The example files: written by tests/nodes/workflows.py, and as the page would save them."""

from __future__ import annotations

import json

import pytest

from . import workflows

NAMES = list(workflows.EXAMPLES)
ALL = [*NAMES, *workflows.REAL_WEIGHTS]


@pytest.mark.parametrize("name", ALL)
def test_files_are_up_to_date(name):
    for path, text in workflows.texts(name).items():
        assert path.read_text(encoding="utf-8") == text, "run python -m tests.nodes.workflows"


def test_blueprint_is_up_to_date():
    path, text = workflows.blueprint()
    assert path.read_text(encoding="utf-8") == text, "run python -m tests.nodes.workflows"


def test_there_are_no_others():
    files = {path.stem for path in workflows.FOLDER.glob("*.json")}
    assert files == set(ALL) == {path.stem for path in (workflows.FOLDER / "api").glob("*.json")}


@pytest.mark.parametrize("name", NAMES)
def test_the_template_browser_has_a_picture(name):
    from PIL import Image

    with Image.open(workflows.FOLDER / f"{name}.jpg") as picture:
        assert min(picture.size) >= 256


@pytest.mark.parametrize("name", ALL)
def test_every_link_has_the_type_of_both_ends(name):
    page = json.loads((workflows.FOLDER / f"{name}.json").read_text())
    nodes = {node["id"]: node for node in page["nodes"]}
    for link, source, output, target, slot, kind in page["links"]:
        out, into = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert out["type"] == kind
        assert into["type"] in (kind, "*")
        assert link in out["links"]
        assert into["link"] == link


@pytest.mark.parametrize("name", NAMES)
def test_every_needed_input_has_a_value_that_is_allowed(name):
    prompt = json.loads((workflows.FOLDER / "api" / f"{name}.json").read_text())
    for node in prompt.values():
        info = workflows.INFO.get(node["class_type"])
        if info is None:
            continue
        for given, (kind, options) in info["input"]["required"].items():
            value = node["inputs"][given]
            if kind == "COMBO":
                assert value in options["options"]
            elif kind in ("INT", "FLOAT"):
                assert options["min"] <= value <= options["max"]


@pytest.mark.parametrize("name", ALL)
def test_nodes_do_not_overlap(name):
    page = json.loads((workflows.FOLDER / f"{name}.json").read_text())
    boxes = [(*node["pos"], *node["size"]) for node in page["nodes"]]
    for i, (x, y, w, h) in enumerate(boxes):
        for x2, y2, w2, h2 in boxes[:i]:
            assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y
