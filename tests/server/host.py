"""A headless ComfyUI with this pack in it, spoken to as any client would."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

from tests.nodes.pack import COMFYUI, ROOT

PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)  # of the environment that ComfyUI runs in
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", "outputs", "runs", "tests", ".*_cache")


class Refused(Exception):
    """The server answered 400; `text` is what a user reads, `body` what the page gets."""

    def __init__(self, body: dict[str, Any]):
        self.body, self.text = body, json.dumps(body)
        super().__init__(self.text)


class Failed(Exception):
    """A node raised; the message is what a user reads."""


class Server:
    """Started once for all tests; its folders are temporary."""

    def __init__(self, *arguments: str):
        self.base = Path(tempfile.mkdtemp(prefix="starflow-host-"))
        for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
            (self.base / name).mkdir()
        shutil.copytree(ROOT, self.base / "custom_nodes" / "starflow", ignore=LEFT_OUT)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = self.base / "server.log"
        command = [
            PYTHON, "main.py", "--cpu", "--port", str(self.port), "--disable-auto-launch",
            "--base-directory", str(self.base), "--database-url", f"sqlite:///{self.base}/user/comfyui.db", *arguments,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command,
            cwd=COMFYUI,
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        )
        self._wait()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        shutil.rmtree(self.base, ignore_errors=True)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise Refused(json.loads(error.read())) from None
        return json.loads(text) if text else None

    def queue(self, prompt: dict[str, Any]) -> str:
        return self.post("/prompt", {"prompt": prompt, "client_id": uuid.uuid4().hex})["prompt_id"]

    def wait(self, prompt_id: str, seconds: float = 900) -> dict[str, Any]:
        """The history entry of a finished prompt. Raises Failed with a node's message."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                for kind, data in entry["status"]["messages"]:
                    if kind == "execution_error":
                        raise Failed(data["exception_message"])
                return entry
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.2)
        raise TimeoutError(f"not finished after {seconds} s:\n{self.log.read_text()[-3000:]}")

    def run(self, prompt: dict[str, Any]) -> dict[str, Any]:
        return self.wait(self.queue(prompt))

    def files(self, entry: dict[str, Any], node: str | None = None) -> list[Path]:
        """Saved files of a finished prompt, of one node or of all."""
        outputs = [entry["outputs"][node]] if node else entry["outputs"].values()
        return [
            self.base / file["type"] / file["subfolder"] / file["filename"]
            for output in outputs
            for file in output.get("images", [])
        ]

    def memory(self) -> int:
        """Bytes that the server holds."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("the server is gone")

    def _wait(self) -> None:
        for _ in range(600):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.5)
        raise TimeoutError(self.log.read_text()[-3000:])


def cached(entry: dict[str, Any]) -> set[str]:
    """Nodes that a run took from its cache."""
    return {node for kind, data in entry["status"]["messages"] if kind == "execution_cached" for node in data["nodes"]}


def example(name: str, **changes: Any) -> dict[str, Any]:
    """An API workflow; `changes` are inputs by name, put in wherever a node has them as a value."""
    prompt = json.loads((ROOT / "example_workflows" / "api" / f"{name}.json").read_text())
    for node in prompt.values():
        for key, value in changes.items():
            if key in node["inputs"] and not isinstance(node["inputs"][key], list):
                node["inputs"][key] = value
    return prompt


def only(prompt: dict[str, Any], kind: str) -> str:
    """The one node of a type."""
    (found,) = (node for node, value in prompt.items() if value["class_type"] == kind)
    return found
