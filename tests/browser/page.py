"""A workflow in ComfyUI's own page, in a headless browser."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

PLAYWRIGHT = os.environ.get("PLAYWRIGHT_DIR")  # a folder with node_modules/playwright-core
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
SCRIPT = Path(__file__).with_name("page.mjs")


def visit(
    port: int, workflow: Path, nodes: dict[str, Path] | None = None, graph: Path | None = None, run: bool = True,
    seconds: int = 300, modern: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Drop a workflow on the page of the server at `port`, run it, and take pictures of nodes by type.

    `modern` draws with Nodes 2.0. Gives what page.mjs saw: nodes, errors, outcome, the video's size, the seconds from
    Run to the end, and the nodes' boxes.
    """
    job = {
        "nodes": {kind: str(path) for kind, path in (nodes or {}).items()},
        "graph": graph and str(graph),
        "run": run,
        "seconds": seconds,
        "modern": modern,
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file)
        file.flush()
        command = ["node", str(SCRIPT), f"http://127.0.0.1:{port}", str(workflow), file.name]
        environment = {**os.environ, "PLAYWRIGHT_DIR": PLAYWRIGHT, "CHROMIUM": CHROMIUM}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds + 240)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])
