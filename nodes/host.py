"""All that this pack needs of ComfyUI beyond `comfy_api`; no other file knows the host's internals.

The host rebinds some of these names after start-up, so they are looked up when called.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.cli_args
import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import folder_paths
import torch
from torch import Tensor, nn

from ..starflow_core.bundled import DEMO
from ..starflow_core.jobs import memory
from ..starflow_core.jobs.planner import Room
from ..starflow_core.parts import replacing
from ..starflow_core.weights.flow import has_int8

log = logging.getLogger("starflow")

OPERATIONS = comfy.ops.manual_cast  # layers whose weights the host may keep elsewhere
OUT_OF_MEMORY = management.OOM_EXCEPTION
PREVIEW_SIDE = 1024  # at most; the page labels a preview with the size that it gets


def flow_device() -> torch.device:
    """Where the host computes."""
    return management.get_torch_device()


def text_device() -> torch.device:
    return management.text_encoder_device()


def vae_device() -> torch.device:
    return management.vae_device()


def result_device() -> torch.device:
    """Where latents and images wait between nodes."""
    return management.intermediate_device()


def best_dtype(device: torch.device) -> torch.dtype:
    """The type a network runs in on a device by default."""
    if management.is_device_cpu(device):
        return torch.float32
    if management.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if management.should_use_fp16(device) else torch.float32


def int8_linear(dtype: torch.dtype) -> type[nn.Module] | None:
    """The host's layer for weights in 8 bit, which it can keep elsewhere; None where it has none, as 0.3.64."""
    if not hasattr(comfy.ops, "mixed_precision_ops"):
        return None
    from comfy import quant_ops

    if "int8_tensorwise" not in quant_ops.QUANT_ALGOS or quant_ops.get_layout_class("TensorWiseINT8Layout") is None:
        return None
    base = comfy.ops.mixed_precision_ops(compute_dtype=dtype).Linear

    class Int8Linear(base):
        def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None):
            # Not on meta: weights are loaded to where a layer was made. Nothing but the bias has memory before.
            super().__init__(in_features, out_features, bias, dtype=dtype)

        def _forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            # A product with a quantised weight would quantise the input, whatever the file says.
            if isinstance(weight, quant_ops.QuantizedTensor):
                weight = weight.dequantize()
            return nn.functional.linear(input, weight, bias)

    return Int8Linear


def patcher(module: nn.Module, device: torch.device, offload: torch.device):
    """The host's handle on a module: it decides where the weights are."""
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    if hasattr(management, "archive_model_dtypes"):
        management.archive_model_dtypes(module)
    return kind(module, load_device=device, offload_device=offload)


def flow_patcher(flow: nn.Module):
    return patcher(flow, flow_device(), management.unet_offload_device())


class _Kept(nn.Module):
    """A library's model as the host's: the host sets `device`, which such models have as a property."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module


def text_patcher(model: nn.Module):
    return patcher(_Kept(model), text_device(), management.text_encoder_offload_device())


def vae_patcher(module: nn.Module):
    return patcher(_Kept(module), vae_device(), management.vae_offload_device())


def room(handle) -> Room:
    """What the host can give a flow's job: on a card also what other models take, since they make room."""
    device, weights, int8 = handle.load_device, handle.model_size(), has_int8(handle.model)
    free = management.get_free_memory(device)
    if management.is_device_cpu(device):
        return Room(device, free + weights, weights, int8)
    loaded = [other for other in management.loaded_models() if other is not None and other.load_device == device]
    free += sum(other.loaded_size() for other in loaded)
    kept = 0 if _is_dynamic(handle) else int(free * management.MIN_WEIGHT_MEMORY_RATIO)
    free -= int(management.extra_reserved_memory())
    return Room(device, free, weights, int8, _streamed(), kept)


def _is_dynamic(handle) -> bool:
    """Whether the host pages single weights in and out while a model computes."""
    return hasattr(handle, "is_dynamic") and handle.is_dynamic()


def _streamed() -> tuple[bool, ...]:
    """Whether a model may compute on a card with weights that are in main memory, the preferred first."""
    if management.vram_state.name == "NO_VRAM":
        return (True,)
    moves = management.lowvram_available and management.vram_state.name in ("LOW_VRAM", "NORMAL_VRAM")
    return (False, True) if moves else (False,)


def load(handle, work: int, what: str, whole: bool = False) -> None:
    """Bring a patcher's weights to its device, with `work` bytes left free for `what` it will do.

    `whole` is for a library's layers, which can't compute with weights that are elsewhere. Raises OutOfMemoryForecast
    before any work if main memory is too small; for a card, the host makes room by offloading.
    """
    # The host runs nodes in inference mode; weights moved in it could take part in no gradient, as the
    # score step needs one.
    with torch.inference_mode(False), torch.no_grad():
        management.load_models_gpu([handle], memory_required=work, force_full_load=whole)
    if management.is_device_cpu(handle.load_device):
        memory.require(work, torch.device("cpu"), what)


def check_interrupted() -> None:
    """Raise the host's exception if the user has pressed Cancel."""
    management.throw_exception_if_processing_interrupted()


def release() -> None:
    """Give freed device memory back to other programs."""
    management.soft_empty_cache()


class NodeProgress:
    """The node's progress bar, its preview picture and its line of text."""

    def __init__(self, node_id: str | None):
        self.node_id = node_id
        self.bar = comfy.utils.ProgressBar(1, node_id)

    def update(self, step: int, total: int, picture: Tensor | None = None) -> None:
        """`picture` (H, W, 3) in 0..1. Raises the host's exception on Cancel."""
        preview = None if picture is None else ("JPEG", _pil(picture), min(max(picture.shape[:2]), PREVIEW_SIDE))
        self.bar.update_absolute(step, total, preview)

    def follow(self, progress) -> None:
        """Show how far the deep block is, of what the core reports. Raises the host's exception on Cancel, in every
        phase."""
        check_interrupted()
        if progress.phase == "deep":
            self.update(progress.step, progress.total)

    def say(self, text: str) -> None:
        show(text, self.node_id)


def show(text: str, node_id: str | None) -> None:
    """A line of text on the node in the page."""
    module = sys.modules.get("server")  # not there when a node is called from a script
    server = module and getattr(module.PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)


def _pil(picture: Tensor):
    from PIL import Image

    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().cpu().numpy())


def rgb_factors(channels: int) -> tuple[list, list]:
    """The host's own factors (channels x 3, bias) from a VAE's normalised latents to a rough picture."""
    import comfy.latent_formats as formats

    found = {4: formats.SD15, 48: formats.Wan22}.get(channels)
    if found is None:
        return [], []
    known = found()
    return known.latent_rgb_factors, getattr(known, "latent_rgb_factors_bias", None) or [0.0] * 3


def files(folder: str, usable: Callable[[Path], bool]) -> list[str]:
    """The bundled demo, then the usable files of one of the host's model folders."""
    try:
        names = folder_paths.get_filename_list(folder)
    except KeyError:  # not registered: an exception here would drop the whole pack
        names = []
    return [DEMO, *(name for name in names if (path := find(folder, name)) and usable(path))]


def folders(folder: str, usable: Callable[[Path], bool]) -> list[str]:
    """Folders, one level deep, in one of the host's model folders."""
    try:
        roots = folder_paths.get_folder_paths(folder)
    except KeyError:
        return []
    found = set()
    for root in map(Path, roots):
        with contextlib.suppress(OSError):  # not there, or not readable
            found |= {path.name for path in root.iterdir() if path.is_dir() and usable(path)}
    return sorted(found)


def find(folder: str, name: str) -> Path | None:
    """Where a file or folder of that name is."""
    path = folder_paths.get_full_path(folder, name)
    if path is not None:
        return Path(path)
    for root in folder_paths.get_folder_paths(folder):
        if name and (Path(root) / name).is_dir():
            return Path(root) / name
    return None


def tokenizer_for(encoder: Path) -> Path | None:
    """The T5 tokenizer that every host has on disk, where an encoder has none of its own beside it."""
    from ..starflow_core.weights.text import TOKENIZER_FILES

    folder = encoder if encoder.is_dir() else encoder.parent
    places = (folder, folder / "tokenizer", folder.parent / "tokenizer")
    if any((place / name).is_file() for place in places for name in TOKENIZER_FILES):
        return None
    found = Path(comfy.utils.__file__).parent / "text_encoders" / "t5_tokenizer"
    return found if found.is_dir() else None


def output_folder(prefix: str, height: int, width: int, kept: bool = True) -> tuple[Path, str, int, str]:
    """Where results go: folder, file name, the next free number, and the folder below `output`, or below `temp` for
    what isn't kept."""
    root = folder_paths.get_output_directory() if kept else folder_paths.get_temp_directory()
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, root, width, height)
    return Path(folder), name, counter, subfolder


def workflow_metadata(hidden: Any) -> dict[str, Any]:
    """Prompt and workflow of the running graph, unless the user told the host to keep them out of files."""
    if comfy.cli_args.args.disable_metadata:
        return {}
    found = {**(hidden.extra_pnginfo or {}), **({"prompt": hidden.prompt} if hidden.prompt else {})}
    # The host notes NaN in a prompt for nodes that always run; JSON has none.
    clean = json.loads(json.dumps(found), parse_constant=lambda _: None)
    return {key: value for key, value in clean.items() if re.fullmatch("[a-z][a-z0-9_]*", key)}


def mark_clips(images: Tensor, frames: int) -> Tensor:
    """Note on a batch of images how many frames each clip has, since IMAGE has no field for it."""
    images.starflow_clip_frames = frames
    return images


def clip_frames(images: Tensor) -> int:
    """Frames of each clip if a node of this pack noted it and no other node came in between; otherwise all."""
    return getattr(images, "starflow_clip_frames", len(images))


def video(images: Tensor, rate, audio: dict | None = None) -> Any:
    """The host's VIDEO of frames (F, H, W, 3) and its AUDIO."""
    from comfy_api.input_impl import VideoFromComponents
    from comfy_api.util import VideoComponents

    return VideoFromComponents(VideoComponents(images=images, audio=audio, frame_rate=rate))


def offer_inputs(folder: Path) -> None:
    """Put the examples' pictures and clips into the host's input folder, where Load Image and Load Video look."""
    inputs = Path(folder_paths.get_input_directory())
    for file in folder.iterdir():
        target = inputs / file.name
        if target.exists():
            continue
        try:
            with replacing(target) as part:
                shutil.copyfile(file, part)
        except OSError as error:  # a folder that isn't ours to write to
            log.warning("STARFlow: the example input %s could not be copied to %s: %s", file.name, inputs, error)
