"""What workflows rely on: ids, inputs, their order and types. Runs with a stand-in where ComfyUI isn't."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from . import pack

SNAPSHOT = Path(__file__).parent / "object_info.json"
KEPT = (
    "name",
    "display_name",
    "category",
    "input",
    "input_order",
    "output",
    "output_is_list",
    "output_name",
    "output_node",
)
NODES = pack.load()
io = importlib.import_module("comfy_api.latest").io  # the host's, once the pack has found it


def described(node: type) -> dict:
    """A node as workflows see it: what a machine's model folders hold is left out."""
    info = json.loads(json.dumps({key: node.GET_NODE_INFO_V1()[key] for key in KEPT}))
    for group in ("required", "optional"):
        for name, (_, options) in info["input"].get(group, {}).items():
            if name in ("model_name", "encoder_name", "vae_name"):
                options["options"] = options["options"][:1]
            if name == "lora_name" and "options" in options:
                options["options"] = []
            options.pop("tooltip", None)
    return info


def test_nothing_that_workflows_rely_on_has_changed():
    found = {name: described(node) for name, node in sorted(NODES.items())}
    if os.environ.get("UPDATE_SNAPSHOT"):
        SNAPSHOT.write_text(json.dumps(found, indent=1) + "\n")
    recorded = json.loads(SNAPSHOT.read_text())
    assert found == recorded, "run with UPDATE_SNAPSHOT=1 only where inputs were added last, and optional"


@pytest.mark.parametrize("name", NODES)
def test_node_is_documented(name):
    info = NODES[name].GET_NODE_INFO_V1()
    assert info["category"] == "STARFlow"
    assert info["description"]
    for group in ("required", "optional"):
        for given, (_, options) in info["input"].get(group, {}).items():
            assert options.get("tooltip"), f"{given} has no tooltip"


@pytest.mark.skipif("search_aliases" not in io.Schema.__dataclass_fields__, reason="this host searches names alone")
def test_a_normalizing_flow_is_found():
    found = {name for name, node in NODES.items() if "normalizing flow" in (node.GET_SCHEMA().search_aliases or [])}
    assert {"STARFlowLoadModel", "STARFlowEmptyLatent", "STARFlowTextEncode", "STARFlowVAEDecode"} <= found


@pytest.mark.parametrize("name", NODES)
def test_lists_are_checked_alike_on_all_hosts(name):
    """ComfyUI 0.3.64 checks no list of a V3 node itself."""
    node = NODES[name]
    for group in ("required", "optional"):
        for given, (kind, _) in node.GET_NODE_INFO_V1()["input"].get(group, {}).items():
            if kind == "COMBO":
                message = node.validate_inputs(**{given: "no such thing"})
                assert isinstance(message, str), f"{given} takes anything"
                assert "no such thing" in message
    if "validate_inputs" in vars(node):
        assert node.validate_inputs() is True


@pytest.mark.parametrize("name", ["transformers", "diffusers", "imageio", "av"])
def test_a_missing_package_takes_its_nodes_away_and_says_so(name):
    """Other nodes stay: an exception while the list is made would drop the whole pack."""
    code = f"import sys; sys.modules[{name!r}] = None; from tests.nodes import pack; print(*pack.load())"
    environment = {**os.environ, "PYTHONPATH": str(pack.ROOT)}
    environment.pop("COMFYUI_PATH", None)  # a host needs some of these packages itself
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    left = set(done.stdout.split())
    assert 5 <= len(left) < len(NODES)
    assert f"the package {name} is missing. Install the pack's requirements.txt" in done.stderr


def test_manager_finds_the_nodes_in_the_source():
    """ComfyUI Manager reads the source: a direct base and a literal id in io.Schema."""
    found = set()
    for file in (pack.ROOT / "nodes").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "io.ComfyNode" for base in node.bases):
                calls = [n for n in ast.walk(node) if isinstance(n, ast.Call) and ast.unparse(n.func) == "io.Schema"]
                found |= {k.value.value for call in calls for k in call.keywords if k.arg == "node_id"}
    assert found == set(NODES)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_translations_have_every_name_and_no_other(language):
    texts = json.loads((pack.ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(texts) == set(NODES)
    for name, node in NODES.items():
        info = node.GET_NODE_INFO_V1()
        inputs = [given for group in ("required", "optional") for given in info["input"].get(group, {})]
        assert set(texts[name]["inputs"]) == set(inputs)
        assert set(texts[name].get("outputs", {})) == {str(i) for i in range(len(info["output"]))}
        assert texts[name]["display_name"]
        assert texts[name]["description"]


def test_english_says_what_the_nodes_say():
    """The page shows these instead of the nodes' own; UPDATE_SNAPSHOT=1 copies them."""
    path = pack.ROOT / "locales" / "en" / "nodeDefs.json"
    texts = json.loads(path.read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(texts))
    for name, node in NODES.items():
        info, text = node.GET_NODE_INFO_V1(), wanted[name]
        text |= {"display_name": info["display_name"], "description": info["description"]}
        for group in ("required", "optional"):
            for given, (_, options) in info["input"].get(group, {}).items():
                text["inputs"][given]["tooltip"] = options["tooltip"]
        for index, tip in enumerate(info["output_tooltips"]):
            text["outputs"][str(index)]["tooltip"] = tip
    if os.environ.get("UPDATE_SNAPSHOT"):
        path.write_text(json.dumps(wanted, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        texts = wanted
    assert texts == wanted


@pytest.mark.parametrize(("language", "mark"), [("en", "({}: "), ("zh", "（{}：")])
def test_a_number_that_stands_for_a_default_says_so_on_the_node(language, mark):
    """Those that the tooltips explain; seed, denoise and guidance's 0 are what they say."""
    texts = json.loads((pack.ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    named = set()
    for name, node in NODES.items():
        for group in node.GET_NODE_INFO_V1()["input"].values():
            for given, (kind, *options) in group.items():
                if kind in ("INT", "FLOAT") and options[0]["default"] in (0, -1) and given != "seed":
                    assert mark.format(int(options[0]["default"])) in texts[name]["inputs"][given]["name"]
                    named.add(given)
    assert {"width", "frames", "guidance", "keep", "tile_size", "clip_frames"} <= named


def test_what_the_registry_leaves_out_is_at_the_top():
    """A pattern without a slash in front would take folders of that name away everywhere."""
    lines = (pack.ROOT / ".comfyignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert "/tests/" in patterns
    needed = {"nodes", "starflow_core", "web", "locales", "example_workflows", "subgraphs"}
    assert all(line.startswith("/") and line.strip("/") not in needed for line in patterns)


@pytest.mark.parametrize("name", NODES)
def test_help_page_has_a_picture(name):
    page = (pack.ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert f"![in use]({name}.webp)" in page
    assert (pack.ROOT / "web" / "docs" / f"{name}.webp").is_file()


@pytest.mark.parametrize("name", NODES)
def test_help_page_explains_every_input(name):
    page = (pack.ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    table = page.partition("## Inputs")[2].partition("## Outputs")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")][1:]
    explained = {cell.strip().replace(" ", "_").lower() for row in rows for cell in row.split(",")} - {"---"}
    info = NODES[name].GET_NODE_INFO_V1()
    assert explained == {given for group in ("required", "optional") for given in info["input"].get(group, {})}


@pytest.mark.parametrize("name", NODES)
def test_chinese_help_says_as_much(name):
    docs = pack.ROOT / "web" / "docs"
    english, chinese = (path.read_text(encoding="utf-8") for path in (docs / f"{name}.md", docs / name / "zh.md"))
    assert _outline(chinese) == _outline(english)
    texts = json.loads((pack.ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))[name]
    assert chinese.startswith(f"# {texts['display_name']}\n")
    inputs, outputs = (_first_cells(table) for table in chinese.split("\n## ")[1:3])
    assert inputs == {given["name"].partition("（")[0] for given in texts["inputs"].values()}
    assert outputs == {made["name"] for made in texts["outputs"].values()}


def _outline(page: str) -> dict:
    """What a translation keeps: headings, rows and list items by number, code and pictures as they are."""
    lines = page.splitlines()
    return {
        "headings": [line.split()[0] for line in lines if line.startswith("#")],
        "rows": [line.count("|") for line in lines if line.startswith("|")],
        "items": sum(line.startswith("- ") for line in lines),
        "code": sorted(re.findall(r"`[^`]+`", page)),
        "pictures": re.findall(r"!\[.*\]\((.+)\)", page),
    }


def _first_cells(table: str) -> set[str]:
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")][2:]
    return {cell.strip() for row in rows for cell in row.split("、")}
