"""Every example in ComfyUI's page: dropped, run, shown. Needs COMFYUI_PATH, PLAYWRIGHT_DIR and a Chromium."""

from __future__ import annotations

import json
from shutil import which

import pytest

from tests.nodes.pack import COMFYUI
from tests.nodes.workflows import BLUEPRINTS, EXAMPLES, FOLDER, REAL_WEIGHTS
from tests.server.host import Server

from .page import CHROMIUM, PLAYWRIGHT, visit

pytestmark = pytest.mark.skipif(
    not (COMFYUI and PLAYWRIGHT and CHROMIUM and which("node")),
    reason="COMFYUI_PATH names no ComfyUI checkout, PLAYWRIGHT_DIR no playwright-core, or node or Chromium is missing",
)


@pytest.fixture(scope="module")
def server():
    running = Server()
    yield running
    running.stop()


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_is_dropped_run_and_shown(server, name):
    file = FOLDER / f"{name}.json"
    seen = visit(server.port, file)
    assert seen["errors"] == []
    assert seen["nodes"] == len(json.loads(file.read_text())["nodes"])
    assert seen["outcome"] == "success"
    assert seen["seconds"] < 120
    assert seen["video"] == (None if name == "text_to_image" else [96, 96])


@pytest.mark.parametrize("name", REAL_WEIGHTS)
def test_example_for_real_weights_opens(server, name):
    seen = visit(server.port, FOLDER / f"{name}.json", run=False)
    # The page may say that the files aren't there, and ask the hub how large they are; nothing else may be wrong.
    said = ("starflow_3B_t2i_256x256.pth", "fetching file size")
    assert [e for e in seen["errors"] if not any(words in e for words in said)] == []


@pytest.mark.parametrize("make", BLUEPRINTS)
def test_blueprint_opens(server, make):
    path, _ = make()
    seen = visit(server.port, path, run=False)
    assert seen["errors"] == []
    assert seen["nodes"] == 1
