"""Loads the pack as ComfyUI does: under a name of its own, with its root as a package.

With COMFYUI_PATH a real checkout stands behind it; without, a small stand-in that knows schemas only.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMFYUI = os.environ.get("COMFYUI_PATH")
NAME = "starflow_pack"


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


def core_nodes() -> dict[str, type]:
    """Core's own node classes (only with a checkout)."""
    _host()
    import nodes

    return nodes.NODE_CLASS_MAPPINGS


def run(node: type, **inputs):
    """What a node gives for these inputs, as the host runs it."""
    from comfy_api.latest import io

    clone = type(node.__name__, (node,), {})
    clone.hidden = io.HiddenHolder.from_dict(None) if hasattr(io.HiddenHolder, "from_dict") else None
    return clone.execute(**inputs)


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
