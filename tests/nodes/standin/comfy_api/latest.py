"""ComfyUI's node API: schemas with the same description as the host's `object_info`, and running a node."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any, ClassVar

NAMES = {"display_mode": "display", "dynamic_prompts": "dynamicPrompts", "force_input": "forceInput"}


class Input:
    io_type = "*"
    extra: ClassVar[dict[str, Any]] = {}

    def __init__(self, id: str, optional: bool = False, **options):
        self.id, self.optional = id, optional
        self.options = {**self.extra, **options}

    def get_io_type(self) -> str:
        return self.io_type

    def info(self) -> tuple[str, dict[str, Any]]:
        return self.get_io_type(), {NAMES.get(k, k): v for k, v in self.options.items() if v is not None}


@dataclass
class Output:
    display_name: str | None = None
    tooltip: str | None = None
    is_output_list: bool = False
    io_type: str = "*"


def custom(io_type: str, **extra):
    """A socket type with its Input and Output."""
    given = type("Input", (Input,), {"io_type": io_type, "extra": extra})
    return SimpleNamespace(Input=given, Output=lambda **options: Output(**options, io_type=io_type), io_type=io_type)


class Hidden(str, Enum):
    unique_id = "UNIQUE_ID"
    prompt = "PROMPT"
    extra_pnginfo = "EXTRA_PNGINFO"


class HiddenHolder(SimpleNamespace):
    """What a node is told of the graph it runs in; None for what its schema doesn't ask for."""

    @classmethod
    def from_dict(cls, given: dict[Hidden, Any]) -> HiddenHolder:
        return cls(**{hidden.name: given.get(hidden) for hidden in Hidden})


class FolderType(str, Enum):
    output = "output"
    temp = "temp"


@dataclass
class Schema:
    node_id: str
    display_name: str = ""
    category: str = ""
    description: str = ""
    inputs: list = field(default_factory=list)
    outputs: list = field(default_factory=list)
    hidden: list = field(default_factory=list)
    is_output_node: bool = False


class ComfyNode:
    @classmethod
    def GET_SCHEMA(cls) -> Schema:
        return cls.define_schema()

    @classmethod
    def GET_NODE_INFO_V1(cls) -> dict[str, Any]:
        schema = cls.define_schema()
        inputs: dict[str, dict] = {"required": {}}
        for given in schema.inputs:
            inputs.setdefault("optional" if given.optional else "required", {})[given.id] = given.info()
        for hidden in schema.hidden:
            inputs.setdefault("hidden", {})[hidden.name] = (hidden.value,)
        return {
            "input": inputs,
            "input_order": {group: list(names) for group, names in inputs.items()},
            "output": [o.io_type for o in schema.outputs],
            "output_is_list": [o.is_output_list for o in schema.outputs],
            "output_name": [o.display_name or o.io_type for o in schema.outputs],
            "output_tooltips": [o.tooltip for o in schema.outputs],
            "name": schema.node_id,
            "display_name": schema.display_name,
            "description": schema.description,
            "category": schema.category,
            "output_node": schema.is_output_node,
        }


class NodeOutput:
    def __init__(self, *args, ui=None):
        self.args, self.ui = args, ui


class ComfyExtension:
    pass


class SavedResult(dict):
    """A file in one of the host's folders, as the page asks for it."""

    def __init__(self, filename: str, subfolder: str, type: FolderType):
        super().__init__(filename=filename, subfolder=subfolder, type=type.value)


io = SimpleNamespace(
    ComfyNode=ComfyNode, Schema=Schema, NodeOutput=NodeOutput, Hidden=Hidden, HiddenHolder=HiddenHolder, Custom=custom,
    FolderType=FolderType,
    Boolean=custom("BOOLEAN"), Int=custom("INT"), Float=custom("FLOAT"),
    String=custom("STRING", multiline=False), Combo=custom("COMBO", multiselect=False),
    Image=custom("IMAGE"), Latent=custom("LATENT"), Conditioning=custom("CONDITIONING"), Vae=custom("VAE"),
    Video=custom("VIDEO"), Audio=custom("AUDIO"), Mask=custom("MASK"),
)  # fmt: skip
ui = SimpleNamespace(SavedResult=SavedResult)
