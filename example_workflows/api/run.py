"""Queue a workflow on a ComfyUI server, watch it, and save what it makes. Needs aiohttp, which ComfyUI has.

python run.py text_to_video.json --set "Text Encode.prompt=a blue ring moving up" --set Sampler.seed=7
python run.py text_to_video.json --list
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import uuid
from pathlib import Path
from typing import Any

try:
    import aiohttp
except ImportError:
    sys.exit("error: run.py needs aiohttp, which ComfyUI has; start it with ComfyUI's Python")


async def queue(server: str, prompt: dict[str, Any], folder: Path) -> list[Path]:
    """Run a prompt to its end; gives the saved files. Raises RuntimeError with the server's words."""
    await _started(server)
    client = uuid.uuid4().hex
    async with (
        aiohttp.ClientSession(f"http://{server}") as session,
        session.ws_connect(f"/ws?clientId={client}") as events,
    ):
        async with session.post("/prompt", json={"prompt": prompt, "client_id": client}) as answer:
            if answer.status != 200:
                raise RuntimeError(await _refused(answer))
            body = await answer.json()
        await _finished(events, body["prompt_id"])
        outputs = await _outputs(session, body["prompt_id"])
        files = [file for output in outputs.values() for file in output.get("images", []) if file["type"] == "output"]
        return [await _saved(session, file, folder) for file in files]


async def _refused(answer: aiohttp.ClientResponse) -> str:
    """The server's own words, whatever it answers in."""
    text = await answer.text()
    try:
        return refusal(json.loads(text))
    except (ValueError, AttributeError, KeyError, TypeError):  # not a ComfyUI, or one that says it otherwise
        return f"the server answered {answer.status}: {text[:500].strip()}"


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


def workflow(path: Path) -> dict[str, Any]:
    """The prompt in a file. Raises ValueError that says what is wrong with it."""
    try:
        prompt = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; give a workflow in API format") from None
    except ValueError:
        raise ValueError(f"{path} isn't JSON; give a workflow in API format") from None
    if isinstance(prompt, dict) and isinstance(prompt.get("nodes"), list):
        raise ValueError(f"{path} is in the page's format; open it in ComfyUI and save it with Export (API)")
    if not isinstance(prompt, dict) or not prompt or not all(map(_is_node, prompt.values())):
        raise ValueError(f"{path} isn't a workflow in API format; save one in ComfyUI with Export (API)")
    return prompt


def _is_node(node: Any) -> bool:
    return isinstance(node, dict) and "class_type" in node and isinstance(node.get("inputs"), dict)


def changed(prompt: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """The prompt with NODE.INPUT=VALUE put in. Raises ValueError for what can't be set."""
    for setting in settings:
        place, equals, text = setting.partition("=")
        if not equals or "." not in place:
            raise ValueError(f"--set {setting}: expected NODE.INPUT=VALUE, such as Sampler.seed=7")
        found = _inputs(prompt, place)
        if not found:
            raise ValueError(f"--set {setting}: the workflow has no input {place}; --list prints what there is")
        if len(found) > 1:
            numbers = ", ".join(node for node, _ in found)
            raise ValueError(f"--set {setting}: nodes {numbers} have that name; give a number instead")
        ((node, name),) = found
        inputs = prompt[node]["inputs"]
        value = _value(inputs[name], text)
        if isinstance(inputs[name], list) and not isinstance(value, list):
            raise ValueError(f"--set {setting}: {place} comes from node {inputs[name][0]}, so it can't be set")
        inputs[name] = value
    return prompt


def _inputs(prompt: dict[str, Any], place: str) -> list[tuple[str, str]]:
    """Number and input of the nodes that NODE.INPUT stands for; both halves may have dots of their own."""
    parts = place.split(".")
    splits = [(".".join(parts[:i]), ".".join(parts[i:])) for i in range(1, len(parts))]
    return [(key, name) for node, name in splits for key in named(prompt, node) if name in prompt[key]["inputs"]]


def named(prompt: dict[str, Any], name: str) -> list[str]:
    """The nodes that a number, a title or a class stands for; "STARFlow", spaces and capitals don't matter."""
    if name in prompt:
        return [name]
    return [key for key, node in prompt.items() if _plain(name) in {_plain(_title(node)), _plain(node["class_type"])}]


def _title(node: dict[str, Any]) -> str:
    return node.get("_meta", {}).get("title", node["class_type"])


def _plain(name: str) -> str:
    return name.lower().replace(" ", "").removeprefix("starflow")


def _value(old: Any, text: str) -> Any:
    """Text stays text; the rest is read as JSON, where it is."""
    if isinstance(old, str):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def listing(prompt: dict[str, Any]) -> str:
    """What can be set: nodes by number and title, their inputs with the values they have."""
    lines = []
    for key, node in prompt.items():
        free = {name: value for name, value in node["inputs"].items() if not isinstance(value, list)}
        if free:
            lines += [f"{key} {_title(node)}", *(f"  {name} = {json.dumps(v)}" for name, v in free.items())]
    return "\n".join(lines)


def refusal(body: dict[str, Any]) -> str:
    """A sentence for each reason why a server didn't take a prompt."""
    lines = []
    for key, node in (body.get("node_errors") or {}).items():
        for error in node["errors"]:
            lines.append(f"{node['class_type']} (node {key}): {_sentence(error)}")
    return "\n".join(lines) or _sentence(body.get("error") or {})


def _sentence(error: Any) -> str:
    if not isinstance(error, dict):
        return str(error)
    message, details = error.get("message", "refused"), error.get("details")
    return f"{message}: {details}" if details else message


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workflow", type=Path, help="a file of this folder, or one saved with Export (API)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NODE.INPUT=VALUE", dest="settings",
        help="NODE is a number, a title or a class, such as 6, Sampler or STARFlowSampler",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print what can be set, and run nothing")
    parser.add_argument("--server", default="127.0.0.1:8188")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder for the results")
    options = parser.parse_args()
    try:
        prompt = changed(workflow(options.workflow), options.settings)
        if options.list:
            print(listing(prompt))
            return
        for path in asyncio.run(queue(options.server, prompt, options.output)):
            print(path)
    except (RuntimeError, ValueError, OSError, aiohttp.ClientError) as error:
        sys.exit(f"error: {error or type(error).__name__}")
    except KeyboardInterrupt:
        sys.exit("stopped watching; the workflow keeps running on the server")


if __name__ == "__main__":
    main()
