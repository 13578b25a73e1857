"""Flow, text encoder and VAE from the host's model folders, or the bundled demo."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from comfy_api.latest import io

from ..starflow_core.bundled import BUNDLED, DEMO, FLOW_FILE, TEXT_FILE, VAE_FILE
from ..starflow_core.errors import CheckpointError
from ..starflow_core.weights import FLOAT_TYPES, INT8, WEIGHT_TYPES
from ..starflow_core.weights.tensorfiles import DTYPES, PICKLES, TensorFile
from . import host
from .types import CATEGORY, SEARCH, ModelType, TextEncoderType

log = logging.getLogger("starflow")

Usable = Callable[[Path], bool]
WEIGHT_TYPE_TIP = (
    "Data type of the weights and the computation. auto: bf16 if the graphics card supports it, otherwise fp16; "
    "fp32 on a CPU."
)
INT8_TIP = " int8: the large weights in 8 bit, half the memory of bf16; computes as auto does."


@dataclass(frozen=True)
class LoadedText:
    """A text encoder, the host's handle on its weights, and its file or folder."""

    encoder: object
    patcher: object
    source: Path


class Options(list):
    """An input's type as core's older nodes give it; newer hosts look types up in a dictionary."""

    __hash__ = object.__hash__


class WeightType(io.Combo.Input):
    """Checked by every host: 0.3.64 checks a list only where it is the type, and validate_inputs would blame this
    widget for a wrong file, too."""

    def __init__(self, types: tuple[str, ...] = WEIGHT_TYPES):
        self.types = ["auto", *types]
        tip = WEIGHT_TYPE_TIP + (INT8_TIP if INT8 in types else "")
        super().__init__("weight_type", options=self.types, default="auto", tooltip=tip)

    def get_io_type(self) -> Options:
        return Options(self.types)


class STARFlowLoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STARFlowLoadModel",
            display_name="STARFlow Load Model",
            category=CATEGORY,
            **SEARCH,
            description="Loads a normalizing flow: a STARFlow or STARFlow-V checkpoint, or the small demo model that "
            "comes with this pack.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=[*host.files("diffusion_models", _is_flow), *host.folders("diffusion_models", _is_sharded)],
                    default=DEMO,
                    tooltip="Checkpoints in models/diffusion_models (.safetensors, Apple's .pth, or a folder of "
                    "shards), and the bundled demo.",
                ),
                WeightType(),
            ],
            outputs=[ModelType.Output(display_name="model", tooltip="The flow; ComfyUI manages its memory.")],
        )

    @classmethod
    def validate_inputs(cls, model_name: str = DEMO) -> bool | str:
        wrong = _check("model", "diffusion_models", model_name, _is_flow, _is_sharded)
        return wrong or _damage("diffusion_models", model_name) or True

    @classmethod
    def execute(cls, model_name: str, weight_type: str) -> io.NodeOutput:
        from ..starflow_core.weights.flow import in_int8, load_flow

        checkpoint = TensorFile.open(_path("diffusion_models", model_name, FLOW_FILE))
        dtype, quantise = _dtype(weight_type, host.flow_device()), weight_type == INT8
        int8_linear = host.int8_linear(dtype)
        if int8_linear is None and (quantise or in_int8(checkpoint)):
            log.warning("STARFlow: this ComfyUI can't keep weights in 8 bit; %s is loaded in %s", model_name, dtype)
        flow = load_flow(
            checkpoint,
            dtype=dtype,
            operations=host.OPERATIONS,
            progress=_progress(),
            quantise=quantise,
            int8_linear=int8_linear,
        )
        return io.NodeOutput(host.flow_patcher(flow, checkpoint.path))


class STARFlowLoadTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STARFlowLoadTextEncoder",
            display_name="STARFlow Load Text Encoder",
            category=CATEGORY,
            **SEARCH,
            description="Loads the T5 encoder that goes with the model: flan-t5-xl for Apple's checkpoints, or the "
            "demo's own.",
            inputs=[
                io.Combo.Input(
                    "encoder_name",
                    options=[*host.files("text_encoders", _is_weights), *host.folders("text_encoders", _is_t5_folder)],
                    default=DEMO,
                    tooltip="A file or folder in models/text_encoders, or the demo's encoder. A single file uses the "
                    "tokenizer next to it, or else ComfyUI's own T5 tokenizer.",
                ),
                WeightType(),
            ],
            outputs=[TextEncoderType.Output(display_name="text_encoder", tooltip="For STARFlow Text Encode.")],
        )

    @classmethod
    def validate_inputs(cls, encoder_name: str = DEMO) -> bool | str:
        return _check("text encoder", "text_encoders", encoder_name, _is_weights, _is_t5_folder) or True

    @classmethod
    def execute(cls, encoder_name: str, weight_type: str) -> io.NodeOutput:
        from ..starflow_core.weights.text import load_text_encoder

        path = _path("text_encoders", encoder_name, TEXT_FILE)
        dtype, quantise = _dtype(weight_type, host.text_device()), weight_type == INT8
        encoder = load_text_encoder(path, host.tokenizer_for(path), dtype=dtype, quantise=quantise)
        return io.NodeOutput(LoadedText(encoder, host.text_patcher(encoder.model), path))


class STARFlowLoadVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STARFlowLoadVAE",
            display_name="STARFlow Load VAE",
            category=CATEGORY,
            **SEARCH,
            description="Loads the VAE that goes with the model: Wan 2.2's for video, Stable Diffusion 1.x's for "
            "images, or the demo's own. ComfyUI's encode and decode nodes accept it, too.",
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=host.files("vae", _is_weights),
                    default=DEMO,
                    tooltip="Files in models/vae, and the demo's VAE.",
                ),
                WeightType(FLOAT_TYPES),
            ],
            outputs=[io.Vae.Output(display_name="vae", tooltip="For this pack's nodes and ComfyUI's own.")],
        )

    @classmethod
    def validate_inputs(cls, vae_name: str = DEMO) -> bool | str:
        return _check("VAE", "vae", vae_name, _is_weights) or True

    @classmethod
    def execute(cls, vae_name: str, weight_type: str) -> io.NodeOutput:
        from ..starflow_core.weights.vae import load_vae
        from .vae import HostVAE

        dtype, path = _dtype(weight_type, host.vae_device()), _path("vae", vae_name, VAE_FILE)
        return io.NodeOutput(HostVAE(load_vae(path, dtype=dtype), path))


NODES = [STARFlowLoadModel, STARFlowLoadTextEncoder, STARFlowLoadVAE]


def _is_weights(path: Path) -> bool:
    return path.suffix.lower() in (".safetensors", *PICKLES)


def _is_flow(path: Path) -> bool:
    """For a safetensors file the header is read; a pickle is inspected only when it is loaded."""
    if path.suffix.lower() in PICKLES:
        return True
    stat = path.stat()
    return _looks_like_flow(str(path), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4096)
def _looks_like_flow(path: str, modified: int, size: int) -> bool:
    """Whether this version of a file is a STARFlow; cached, since lists are made often and headers rarely change."""
    from ..starflow_core.weights.flow import quick_look

    return quick_look(path) is not None


def _is_sharded(path: Path) -> bool:
    return any(_is_flow(index) for index in path.glob("*.safetensors.index.json"))


def _is_t5_folder(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.json", "text_encoder/config.json"))


def _path(folder: str, name: str, bundled: str) -> Path:
    return BUNDLED / bundled if name == DEMO else host.find(folder, name)


def _check(what: str, folder: str, name: str, is_file: Usable, is_folder: Usable = lambda path: False) -> str | None:
    """What is wrong with a chosen file or folder; ComfyUI 0.3.64 doesn't check lists itself."""
    path = host.find(folder, name) if isinstance(name, str) and name != DEMO else None
    if name == DEMO or (path and (is_folder(path) if path.is_dir() else is_file(path))):
        return None
    problem = f"in models/{folder} is not a {what}" if path else f"is not in models/{folder}"
    return f"{name!r} {problem}; put a {what} there and refresh, or choose {DEMO!r}"


def _damage(folder: str, name: str) -> str | None:
    """What is wrong with a chosen safetensors file that can't be read."""
    path = None if name == DEMO else host.find(folder, name)
    if path is None or path.suffix.lower() != ".safetensors":
        return None
    try:
        TensorFile.open(path)
    except CheckpointError as error:
        return str(error)
    return None


def _dtype(name: str, device):
    """The type to compute in."""
    return DTYPES.get(name) or host.best_dtype(device)


def _progress():
    return host.NodeProgress(None).bytes
