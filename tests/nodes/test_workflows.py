"""The example files: written by tests/nodes/workflows.py, and as the page would save them."""

from __future__ import annotations

import json

import pytest

from . import pack, workflows

NAMES = list(workflows.EXAMPLES)
ALL = [*NAMES, *workflows.REAL_WEIGHTS]


@pytest.mark.parametrize("name", ALL)
def test_files_are_up_to_date(name):
    for path, text in workflows.texts(name).items():
        assert path.read_text(encoding="utf-8") == text, "run python -m tests.nodes.workflows"


@pytest.mark.parametrize("make", workflows.BLUEPRINTS)
def test_blueprint_is_up_to_date(make):
    path, text = make()
    assert path.read_text(encoding="utf-8") == text, "run python -m tests.nodes.workflows"


def test_there_are_no_others():
    files = {path.stem for path in workflows.FOLDER.glob("*.json")}
    assert files == set(ALL) == {path.stem for path in (workflows.FOLDER / "api").glob("*.json")}
    made = {make()[0] for make in workflows.BLUEPRINTS}
    assert made == set((workflows.ROOT / "subgraphs").glob("*.json"))


@pytest.mark.parametrize("name", ALL)
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
    boxes = [_box(node) for node in page["nodes"]]
    for i, (x, y, w, h) in enumerate(boxes):
        for x2, y2, w2, h2 in boxes[:i]:
            assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y


@pytest.mark.parametrize("name", ALL)
def test_every_node_but_the_note_is_in_one_group(name):
    page = json.loads((workflows.FOLDER / f"{name}.json").read_text())
    for node in page["nodes"]:
        x, y, w, h = _box(node)
        frames = [group["bounding"] for group in page["groups"]]
        around = [(a, b) for a, b, c, d in frames if a < x and b < y and x + w < a + c and y + h < b + d]
        assert len(around) == (node["type"] != "MarkdownNote")


@pytest.mark.parametrize("name", ALL)
def test_no_link_runs_behind_a_node(name):
    """Each goes from one column to the next, or by points above all nodes and then down between two columns."""
    page = json.loads((workflows.FOLDER / f"{name}.json").read_text())
    nodes = {node["id"]: node for node in page["nodes"]}
    points = {point["id"]: point for point in page["extra"].get("reroutes", [])}
    last = {link["id"]: link["parentId"] for link in page["extra"].get("linkExtensions", [])}
    top = min(_box(node)[1] for node in page["nodes"])
    for link, source, _, target, _, _ in page["links"]:
        x, _, w, _ = _box(nodes[source])
        places, id = [_box(nodes[target])[0]], last.get(link)
        while id:
            assert link in points[id]["linkIds"]
            px, py = points[id]["pos"]
            assert py < top or not any(box[0] <= px <= box[0] + box[2] for box in map(_box, page["nodes"]))
            places.insert(0, points[id]["pos"][0])
            id = points[id].get("parentId")
        assert 0 < places[0] - (x + w) <= workflows.GAP
        assert len(places) == 1 or 0 < places[-1] - places[-2] < workflows.GAP


def _box(node: dict) -> tuple:
    """Place and size, with the title."""
    (x, y), (w, h) = node["pos"], node["size"]
    return x, y - workflows.TITLE, w, h + workflows.TITLE


def test_examples_that_load_a_file_find_it():
    named = set()
    for name in ALL:
        for node in json.loads((workflows.FOLDER / "api" / f"{name}.json").read_text()).values():
            if node["class_type"] in ("LoadImage", "LoadVideo"):
                named |= set(node["inputs"].values())
    assert named == {path.name for path in (workflows.FOLDER / "inputs").iterdir()}


def test_inputs_are_put_where_the_host_looks(monkeypatch, tmp_path, caplog):
    import folder_paths

    files = sorted(path.name for path in (workflows.FOLDER / "inputs").iterdir())
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    (tmp_path / files[0]).write_bytes(b"the user's own")
    pack.load()
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert (tmp_path / files[0]).read_bytes() == b"the user's own"
    assert (tmp_path / files[1]).read_bytes() == (workflows.FOLDER / "inputs" / files[1]).read_bytes()
    assert not caplog.records
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path / files[0] / "no folder"))
    assert pack.load()
    assert f"the example input {files[0]} could not be copied" in caplog.text


@pytest.mark.parametrize("name", workflows.REAL_WEIGHTS)
def test_the_page_can_offer_every_file_that_is_missing(name):
    """It looks for files named in a node's `models` among the node's values, and takes only some hubs and endings."""
    page = json.loads((workflows.FOLDER / f"{name}.json").read_text())
    loaders = [node for node in page["nodes"] if node["type"].startswith("STARFlowLoad")]
    assert len(loaders) == 3
    for node in loaders:
        (model,) = node["properties"]["models"]
        assert model["name"] == node["widgets_values"][0]
        assert model["url"].startswith("https://huggingface.co/")
        assert model["url"].endswith((".safetensors", ".pth"))  # older pages show a .pth, but don't fetch it
        assert model["name"].rpartition(".")[2] == model["url"].rpartition(".")[2]
    assert {node["properties"]["models"][0]["directory"] for node in loaders} == {
        "diffusion_models", "text_encoders", "vae",
    }  # fmt: skip
