"""run.py: what it reads, sets, lists and says; tests/server runs it against a server."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest

from . import pack

FOLDER = pack.ROOT / "example_workflows" / "api"


@pytest.fixture(scope="module")
def script():
    """The module; what it needs of aiohttp where that isn't installed."""
    spec = importlib.util.spec_from_file_location("starflow_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("aiohttp") is None:
            patch.setitem(sys.modules, "aiohttp", SimpleNamespace(ClientError=ConnectionError))
        spec.loader.exec_module(module)
    return module


def main(script, monkeypatch, *arguments) -> str:
    """What it ends with."""
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        script.main()
    return end.value.code


def prompt() -> dict:
    return json.loads((FOLDER / "text_to_video.json").read_text())


@pytest.mark.parametrize(
    ("place", "node", "name"),
    [("6.seed", "6", "seed"), ("Sampler.seed", "6", "seed"), ("STARFlow Sampler.seed", "6", "seed"),
     ("starflowsampler.seed", "6", "seed"), ("My v1.5 sampler.seed", "6", "seed"), ("6.a.b", "6", "a.b")],
)  # fmt: skip
def test_nodes_have_a_number_a_title_and_a_class(script, place, node, name):
    given = prompt()
    given["6"]["inputs"]["a.b"] = 0
    if "v1.5" in place:
        given["6"]["_meta"]["title"] = "My v1.5 sampler"
    assert script.changed(given, [f"{place}=7"])[node]["inputs"][name] == 7


def test_text_stays_text_and_the_rest_is_json(script):
    given = script.changed(
        prompt(), ["5.prompt=7", "6.denoise=false", "6.guidance=2.5", '6.latent=["4", 1]', "6.seed=x"]
    )
    assert given["5"]["inputs"]["prompt"] == "7"
    assert given["6"]["inputs"]["denoise"] is False
    assert given["6"]["inputs"]["guidance"] == 2.5
    assert given["6"]["inputs"]["latent"] == ["4", 1]
    assert given["6"]["inputs"]["seed"] == "x"  # the server says what it thinks of that
    assert script.changed(prompt(), ["5.prompt=a=b"])["5"]["inputs"]["prompt"] == "a=b"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed=1", "--set seed=1: expected NODE.INPUT=VALUE, such as Sampler.seed=7"),
        ("6.seed", "--set 6.seed: expected NODE.INPUT=VALUE, such as Sampler.seed=7"),
        ("6.nothing=1", "--set 6.nothing=1: the workflow has no input 6.nothing; --list prints what there is"),
        ("66.seed=1", "--set 66.seed=1: the workflow has no input 66.seed; --list prints what there is"),
        ("Sampler.model=1", "--set Sampler.model=1: Sampler.model comes from node 1, so it can't be set"),
    ],
)
def test_what_cannot_be_set_is_said(script, monkeypatch, setting, message):
    assert main(script, monkeypatch, FOLDER / "text_to_video.json", "--set", setting) == f"error: {message}"


def test_a_name_of_several_nodes_is_refused(script, monkeypatch):
    said = main(script, monkeypatch, FOLDER / "convergence_study.json", "--set", "Sampler.window=1")
    assert said == "error: --set Sampler.window=1: nodes 7, 11, 17 have that name; give a number instead"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory; give a workflow in API format"),
        ("{", "isn't JSON; give a workflow in API format"),
        ('{"nodes": [], "links": []}', "is in the page's format; open it in ComfyUI and save it with Export (API)"),
        ("[]", "isn't a workflow in API format; save one in ComfyUI with Export (API)"),
        ("{}", "isn't a workflow in API format; save one in ComfyUI with Export (API)"),
        ('{"1": 2}', "isn't a workflow in API format; save one in ComfyUI with Export (API)"),
    ],
)
def test_files_that_are_no_workflow_are_refused_in_words(script, monkeypatch, tmp_path, text, message):
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    said = main(script, monkeypatch, path)
    assert said.startswith(f"error: {path}")
    assert said.endswith(message)


def test_the_list_says_what_can_be_set(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", str(FOLDER / "text_to_video.json"), "--set", "6.seed=7", "--list"])
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert "6 STARFlow Sampler" in lines
    assert "  seed = 7" in lines
    assert not any(line.startswith("  model =") for line in lines)


def test_a_servers_reasons_are_sentences(script):
    error = {"message": "Value 0 smaller than min of 1", "details": "quality"}
    body = {
        "error": {"message": "Prompt outputs failed validation", "details": ""},
        "node_errors": {"8": {"class_type": "STARFlowVideoCombine", "errors": [error]}},
    }
    assert script.refusal(body) == "STARFlowVideoCombine (node 8): Value 0 smaller than min of 1: quality"
    missing = {"error": {"message": "Node 'X' not found", "details": "Node ID '#1'"}, "node_errors": []}
    assert script.refusal(missing) == "Node 'X' not found: Node ID '#1'"
    assert script.refusal({"error": "no prompt"}) == "no prompt"
