"""LoRA on a flow."""

from __future__ import annotations

import contextlib
from functools import lru_cache
from pathlib import Path

from comfy_api.latest import io

from ..starflow_core.errors import CheckpointError
from ..starflow_core.weights.lora import LoraFile, quick_look
from ..starflow_core.weights.tensorfiles import TensorFile
from . import host
from .types import CATEGORY, SEARCH, ModelType

FOLDER = "loras"
STRONGEST = 10.0


class STARFlowLoadLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STARFlowLoadLoRA",
            display_name="STARFlow Load LoRA",
            category=CATEGORY,
            **SEARCH,
            description="Adds a LoRA to the model: what was trained on a few pictures or clips of something new. "
            "Several go in a row.",
            inputs=[
                ModelType.Input("model", tooltip="From STARFlow Load Model, or from another LoRA."),
                io.Combo.Input(
                    "lora_name",
                    options=host.own_files(FOLDER, _is_lora),
                    tooltip="STARFlow LoRAs in models/loras; those of other models aren't listed.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-STRONGEST,
                    max=STRONGEST,
                    step=0.01,
                    tooltip="How strongly it counts. 0 leaves the model as it is; below 0 it works the other way.",
                ),
            ],
            outputs=[ModelType.Output(display_name="model", tooltip="For Text Encode, the sampler, or another LoRA.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None) -> bool | str:
        return True if lora_name is None else _problem(lora_name) or True

    @classmethod
    def execute(cls, model, lora_name: str, strength: float) -> io.NodeOutput:
        if not strength:
            return io.NodeOutput(model)
        found = LoraFile.open(host.find(FOLDER, lora_name))
        found.check(host.flow_of(model).config)
        loras = found.load(strength)
        if doubt := _doubt(found, host.source_of(model)):
            host.log.warning("STARFlow: %s", doubt)
            host.show(doubt, cls.hidden.unique_id)
        return io.NodeOutput(host.with_lora(model, loras))


NODES = [STARFlowLoadLoRA]


def _problem(name: str) -> str | None:
    """What is wrong with a chosen file."""
    path = host.find(FOLDER, name) if isinstance(name, str) else None
    if path is None:
        return f"{name!r} is not in models/{FOLDER}; put a STARFlow LoRA there and refresh"
    try:
        LoraFile.open(path)
    except CheckpointError as error:
        return str(error)
    return None


def _doubt(found: LoraFile, source: Path) -> str | None:
    """A warning of a LoRA of other weights; hashing a checkpoint that isn't converted may take a while."""
    bar = host.NodeProgress(None)
    with contextlib.suppress(CheckpointError):  # the checkpoint isn't there any more
        return found.doubt(TensorFile.open(source), bar.bytes)
    return None


def _is_lora(path: Path) -> bool:
    stat = path.stat()
    return _looks_like_lora(str(path), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4096)
def _looks_like_lora(path: str, modified: int, size: int) -> bool:
    """Whether this version of a file is one; cached, since lists are made often and headers rarely change."""
    return quick_look(path)
