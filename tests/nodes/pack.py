"""Loads the pack as ComfyUI does: under a name of its own, with its root as a package.

With COMFYUI_PATH a real checkout stands behind it; without, `standin`: the part of a host that the nodes use.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parents[2]
COMFYUI = os.environ.get("COMFYUI_PATH")
NAME = "starflow_pack"
NODE_ID = "7"  # of every node that a test runs
_INPUTS = tempfile.TemporaryDirectory(prefix="starflow-inputs-")  # the host's own input folder is its user's


def load() -> dict[str, type]:
    """The pack's node classes by id."""
    _host()
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            NAME, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[NAME] = module
        spec.loader.exec_module(module)
    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(_nodes())}


def module(name: str) -> ModuleType:
    """One of the pack's modules, such as "nodes.host"."""
    return importlib.import_module(f"{NAME}.{name}")


def core_nodes() -> dict[str, type]:
    """Core's own node classes."""
    _host()
    import nodes

    return nodes.NODE_CLASS_MAPPINGS


def run(node: type, hidden: dict | None = None, **inputs):
    """What a node gives for these inputs, as the host runs it.

    Widgets have their defaults, as in the page. `hidden`, and the node's id, it gets as far as its schema asks.
    """
    from comfy_api.latest import io

    given, schema = {"unique_id": NODE_ID, **(hidden or {})}, node.GET_SCHEMA()
    told = io.HiddenHolder.from_dict({asked: given.get(asked.name) for asked in schema.hidden or []})
    clone = type(node.__name__, (node,), {"hidden": told})
    with torch.inference_mode():
        output = clone.execute(**{**_defaults(node), **inputs})
    assert len(output.args) == len(schema.outputs)
    return output


def complaints(prompt: dict, output: str) -> list[str]:
    """The inputs that a real host finds wrong in a prompt, on the way to an output's node."""
    import execution

    import nodes

    registered = nodes.NODE_CLASS_MAPPINGS
    registered |= load()
    validated: dict = {}
    asyncio.run(execution.validate_inputs("1", prompt, output, validated))
    return [error["extra_info"]["input_name"] for _, errors, _ in validated.values() for error in errors]


def _defaults(node: type) -> dict:
    groups = node.GET_NODE_INFO_V1()["input"]
    given = {**groups["required"], **groups.get("optional", {})}
    return {name: options["default"] for name, (_, options) in given.items() if "default" in options}


async def _nodes():
    extension = await sys.modules[NAME].comfy_entrypoint()
    return await extension.get_node_list()


def _host() -> None:
    where = COMFYUI or str(Path(__file__).parent / "standin")
    if where in sys.path:
        return
    # ComfyUI's own `nodes` and `utils` have to be found before the pack's folder of that name.
    sys.path[:] = [where, *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    sys.path.append(str(ROOT))
    if COMFYUI:
        import comfy.options

        arguments, sys.argv = sys.argv, ["main.py", "--cpu"]
        comfy.options.enable_args_parsing()
        import comfy.cli_args

        sys.argv = arguments
    import folder_paths

    folder_paths.set_input_directory(_INPUTS.name)
