"""Queue a workflow on a ComfyUI server, watch it, and save what it makes. Needs aiohttp, which ComfyUI has.

python run.py text_to_video.json --set 5.prompt="a blue ring moving up" --set 6.seed=7 --server 127.0.0.1:8188
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import uuid
from pathlib import Path
from typing import Any

import aiohttp


async def queue(server: str, prompt: dict[str, Any], folder: Path) -> list[Path]:
    """Run a prompt to its end; gives the saved files. Raises RuntimeError with the server's words."""
    await _started(server)
    client = uuid.uuid4().hex
    async with (
        aiohttp.ClientSession(f"http://{server}") as session,
        session.ws_connect(f"/ws?clientId={client}") as events,
    ):
        async with session.post("/prompt", json={"prompt": prompt, "client_id": client}) as answer:
            body = await answer.json()
            if answer.status != 200:
                raise RuntimeError(json.dumps(body, indent=1))
        await _finished(events, body["prompt_id"])
        outputs = await _outputs(session, body["prompt_id"])
        files = [file for output in outputs.values() for file in output.get("images", []) if file["type"] == "output"]
        return [await _saved(session, file, folder) for file in files]


async def _finished(events: aiohttp.ClientWebSocketResponse, prompt_id: str) -> None:
    async for message in events:
        if message.type != aiohttp.WSMsgType.TEXT:
            continue
        event = json.loads(message.data)
        data = event["data"]
        if data.get("prompt_id") not in (None, prompt_id):
            continue
        if event["type"] == "progress":
            print(f"\rnode {data.get('node')}: {data['value']} of {data['max']}  ", end="", file=sys.stderr)
        elif event["type"] == "execution_error":
            raise RuntimeError(f"{data['node_type']}: {data['exception_message']}")
        elif event["type"] == "execution_interrupted":
            raise RuntimeError("cancelled on the server")
        elif event["type"] == "execution_success":
            print(file=sys.stderr)
            return
    raise RuntimeError("the server closed the connection")


async def _outputs(session: aiohttp.ClientSession, prompt_id: str) -> dict[str, Any]:
    for _ in range(100):
        async with session.get(f"/history/{prompt_id}") as answer:
            entry = (await answer.json()).get(prompt_id)
        if entry:  # it is written shortly after the last event
            return entry["outputs"]
        await asyncio.sleep(0.1)
    raise RuntimeError("the server has no record of the finished workflow")


async def _started(server: str, seconds: int = 60) -> None:
    """Wait for a server that is still starting. Raises RuntimeError if none answers."""
    async with aiohttp.ClientSession() as session:
        for _ in range(2 * seconds):
            try:
                async with session.get(f"http://{server}/system_stats"):
                    return
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.5)
    raise RuntimeError(f"no ComfyUI answers at {server}; start it, or give its address with --server")


async def _saved(session: aiohttp.ClientSession, file: dict[str, str], folder: Path) -> Path:
    async with session.get("/view", params=file) as answer:
        answer.raise_for_status()
        # A sequence of pictures comes in a folder of its own.
        path = folder / Path(file.get("subfolder", "")).name / Path(file["filename"]).name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        part.write_bytes(await answer.read())
        part.replace(path)
        return path


def changed(prompt: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """The prompt with NODE.INPUT=VALUE put in; numbers are read as numbers."""
    for setting in settings:
        place, _, text = setting.partition("=")
        node, _, name = place.partition(".")
        if name not in prompt.get(node, {}).get("inputs", {}):
            raise SystemExit(f"--set {setting}: the workflow has no input {place}")
        try:
            prompt[node]["inputs"][name] = json.loads(text)
        except ValueError:
            prompt[node]["inputs"][name] = text
    return prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workflow", type=Path, help="a file of this folder, or one saved with Export (API)")
    parser.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", dest="settings")
    parser.add_argument("--server", default="127.0.0.1:8188")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder for the results")
    options = parser.parse_args()
    prompt = changed(json.loads(options.workflow.read_text(encoding="utf-8")), options.settings)
    try:
        for path in asyncio.run(queue(options.server, prompt, options.output)):
            print(path)
    except (RuntimeError, aiohttp.ClientError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
