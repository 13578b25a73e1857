"""The pack's nodes, one file a topic. `host` is the only one that knows the host's internals."""

import logging
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from comfy_api.latest import ComfyExtension, io

from . import host

INPUTS = Path(__file__).parents[1] / "example_workflows" / "inputs"
TOPICS = (
    "loaders", "latent", "conditioning", "noise", "sampling", "options", "contexts", "likelihood", "edits", "fill",
    "video", "lora", "training",
)  # fmt: skip
NEEDS = {  # packages that only these nodes need; they are imported when the nodes run
    "STARFlowLoadTextEncoder": ("transformers",),
    "STARFlowLoadVAE": ("diffusers",),
    "STARFlowVideoCombine": ("imageio", "av"),
    "STARFlowTrainLoRA": ("transformers", "diffusers", "imageio", "av"),
}


class STARFlowExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes; where an optional package is missing, those that need it are left out."""
        host.offer_inputs(INPUTS)
        nodes = []
        for topic in TOPICS:
            try:
                nodes += import_module(f".{topic}", __name__).NODES
            except ImportError as error:
                _warn(f"{topic} nodes", error.name or error)
        return [node for node in nodes if _can_run(node.__name__)]


def _can_run(name: str) -> bool:
    missing = [package for package in NEEDS.get(name, ()) if not _is_there(package)]
    for package in missing:
        _warn(name, package)
    return not missing


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # where sys.modules holds None in its place
        return False


def _warn(what: str, package) -> None:
    logging.getLogger("starflow").warning(
        "STARFlow: %s unavailable: the package %s is missing. Install the pack's requirements.txt", what, package
    )
