"""The pack's nodes, one file a topic. `host` is the only one that knows the host's internals."""

import logging
from importlib import import_module

from comfy_api.latest import ComfyExtension, io

TOPICS = ("loaders", "latent", "conditioning", "sampling", "contexts", "video")


class STARFlowExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes; where an optional package is missing, those that need it are left out."""
        nodes = []
        for topic in TOPICS:
            try:
                nodes += import_module(f".{topic}", __name__).NODES
            except ImportError as error:
                logging.getLogger("starflow").warning(
                    "STARFlow: no %s nodes (%s). Install the pack's requirements.txt", topic, error
                )
        return nodes
