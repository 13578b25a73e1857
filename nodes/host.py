"""All that this pack needs of ComfyUI beyond `comfy_api`; no other file knows the host's internals.

The host rebinds some of these names after start-up, so they are looked up when called.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.cli_args
import comfy.lora
import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.utils
import folder_paths
import torch
from torch import Tensor, nn

from ..starflow_core.bundled import DEMO
from ..starflow_core.errors import InputError
from ..starflow_core.jobs import memory
from ..starflow_core.jobs.planner import Room
from ..starflow_core.model.compiled import keep_many_forms, require_compiler
from ..starflow_core.model.flow import Flow
from ..starflow_core.model.lora import Lora, added, attach
from ..starflow_core.model.placement import Placement
from ..starflow_core.parts import replacing
from ..starflow_core.weights.flow import has_int8, load_flow
from ..starflow_core.weights.lora import ALPHA, DOWN, PREFIX, UP

log = logging.getLogger("starflow")

OPERATIONS = comfy.ops.manual_cast  # layers whose weights the host may keep elsewhere
OUT_OF_MEMORY = management.OOM_EXCEPTION
BESIDE = "starflow_lora"  # the host's name for what is injected
EVALUATED = "diffusion_model.evaluate"  # what is compiled, where the host finds it
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


def devices() -> list[str]:
    """The names of all devices that can compute."""
    found = management.get_all_torch_devices() if hasattr(management, "get_all_torch_devices") else []
    if not found and torch.cuda.is_available():
        found = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return list(dict.fromkeys([*map(str, found), "cpu"]))


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


class _Found(nn.Module):
    """A flow where the host's LoRA code looks for it: as `diffusion_model`, with a configuration beside it.

    `source` is its checkpoint.
    """

    def __init__(self, flow: Flow, source: Path):
        super().__init__()
        self.diffusion_model, self.source = flow, source
        self.model_config = SimpleNamespace(unet_config={})


def flow_patcher(flow: Flow, source: Path):
    handle = patcher(_Found(flow, source), flow_device(), management.unet_offload_device())
    _put_beside(handle, {})
    return handle


def flow_of(handle) -> Flow:
    return handle.model.diffusion_model


def source_of(handle) -> Path:
    """The checkpoint of a flow."""
    return handle.model.source


def with_lora(handle, loras: dict[str, Lora]):
    """Another handle on a flow, with adapters of one strength by their layers' names, on top of those that it has.

    The host adds them to the weights. Beside weights in 8 bit, where its rounding would drown them, they compute for
    themselves. Raises InputError if the host leaves one out.
    """
    clone = handle.clone()
    if has_int8(flow_of(handle)):
        before = _beside(handle)
        names = dict.fromkeys([*before, *loras])
        _put_beside(clone, {n: [*before.get(n, []), *([loras[n]] if n in loras else [])] for n in names})
        return clone
    tensors = {
        f"{PREFIX}{name}.{part}": value
        for name, lora in loras.items()
        for part, value in ((DOWN, lora.lora_A.data), (UP, lora.lora_B.data), (ALPHA, torch.tensor(lora.alpha)))
    }
    patches = comfy.lora.load_lora(tensors, comfy.lora.model_lora_keys_unet(handle.model, {}))
    taken = set(clone.add_patches(patches, next(iter(loras.values())).strength))
    lost = [name for name in loras if f"{PREFIX}{name}.weight" not in taken]
    if lost:
        raise InputError(f"ComfyUI left out {len(lost)} of the LoRA's {len(loras)} layers ({lost[0]}, ..); update it")
    return clone


class _Beside:
    """Adapters that compute beside the host's layers while it has the flow at work.

    All of a handle are one, and each handle has one, be it empty: the host may forget a handle without taking off what
    it put on, so each begins with bare layers.
    """

    def __init__(self, loras: dict[str, list[Lora]]):
        self.loras = loras

    def inject(self, handle) -> None:
        self.eject(handle)
        for name, loras in self.loras.items():
            layer = flow_of(handle).get_submodule(name)
            layer.forward = partial(_with_adapters, layer, [lora.to(handle.load_device) for lora in loras])

    def eject(self, handle) -> None:
        for layer in flow_of(handle).modules():
            if getattr(vars(layer).get("forward"), "func", None) is _with_adapters:
                del layer.forward
        for loras in self.loras.values():
            for lora in loras:
                lora.to(handle.offload_device)


def _with_adapters(layer: nn.Module, loras: list[Lora], inputs: Tensor) -> Tensor:
    return added(type(layer).forward(layer, inputs), inputs, loras)


def _put_beside(handle, loras: dict[str, list[Lora]]) -> None:
    there = _Beside(loras)
    injection = comfy.patcher_extension.PatcherInjection(inject=there.inject, eject=there.eject)
    handle.set_injections(BESIDE, [injection])
    handle.is_injected = False  # a clone of one at work isn't so itself


def _beside(handle) -> dict[str, list[Lora]]:
    """The adapters beside a flow's layers."""
    found = handle.get_injections(BESIDE)
    return found[0].inject.__self__.loras if found else {}


def has_lora(handle) -> bool:
    """Whether anything was added to a flow's weights."""
    return bool(handle.patches or any(_beside(handle).values()))


def _beside_bytes(handle) -> int:
    return sum(weight.nbytes for loras in _beside(handle).values() for lora in loras for weight in lora.parameters())


def has_copy(handle, device: torch.device) -> bool:
    """Whether `copy_deep` has been here."""
    return _copied_as(handle) == getattr(handle.model, "copied", None) and device in flow_of(handle).copies


def copy_deep(handle, device: torch.device) -> None:
    """Have a second copy of the deep block on a device, with what was added to its weights, of which the host knows
    nothing. It is read from the flow's own file: what the host has may be in part elsewhere, or be paged."""
    flow = flow_of(handle)
    if has_copy(handle, device):
        return
    flow.copies = {}  # another one makes room first
    nowhere = torch.device("meta")
    place = Placement((device,), nowhere, nowhere, nowhere, nowhere)
    with torch.inference_mode(False), torch.no_grad():
        own = load_flow(source_of(handle), flow.compute_dtype, place, quantise=has_int8(flow))
        for name, weight in own.deep.named_parameters(f"{PREFIX}blocks.{own.deep.index}"):
            if name in handle.patches:
                if not weight.is_floating_point():
                    raise InputError(f"{name} is in 8 bit, where ComfyUI's own LoRAs are lost; use STARFlow Load LoRA")
                changed = comfy.lora.calculate_weight(handle.patches[name], weight.float(), name)
                weight.data = changed.to(weight)
        last = f"blocks.{own.deep.index}."
        for name, loras in _beside(handle).items():
            for lora in copy.deepcopy(loras) if name.startswith(last) else ():
                attach(own, {name: lora})
    flow.copies, handle.model.copied = {device: own.deep}, _copied_as(handle)


def _copied_as(handle) -> tuple:
    """What tells a copy from one with other additions."""
    return handle.patches_uuid, *(lora for loras in _beside(handle).values() for lora in loras)


def compiled(handle):
    """Another handle on a flow, for `compute` to run compiled. Raises InputError where there is no compiler."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    require_compiler(handle.load_device)
    keep_many_forms()
    clone = handle.clone()
    set_torch_compile_wrapper(clone, "inductor", fullgraph=True, keys=[EVALUATED])
    return clone


def compute(handle, act: Callable[[], Any], elsewhere: bool = False) -> Any:
    """What an act gives that evaluates a flow which has been loaded. The host has it compiled meanwhile if the handle
    is for that; not where weights aren't all there as they are, or a part of the flow is `elsewhere`."""
    wrappers = _compiling(handle)
    reason = _uncompiled(handle, elsewhere) if wrappers else None
    if reason:
        log.warning("STARFlow: the flow isn't compiled: %s", reason)
        wrappers = []
    return comfy.patcher_extension.WrapperExecutor.new_class_executor(act, handle.model, wrappers).execute()


def is_compiled(handle) -> bool:
    """Whether `compiled` has been here."""
    return bool(_compiling(handle))


def _compiling(handle) -> list[Callable]:
    return handle.get_wrappers(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "torch.compile")


def _uncompiled(handle, elsewhere: bool) -> str | None:
    """What keeps a flow from being compiled, if anything does."""
    if elsewhere:
        return "it is on two devices"
    if _is_dynamic(handle):
        return "ComfyUI pages its weights in and out; start it with --disable-dynamic-vram"
    if getattr(handle.model, "model_lowvram", False):
        return "not all of its weights are on the device"
    return "a LoRA computes beside weights in 8 bit" if any(_beside(handle).values()) else None


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
    device, weights, int8 = handle.load_device, handle.model_size(), has_int8(flow_of(handle))
    free = management.get_free_memory(device) - _beside_bytes(handle)
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


def interrupted() -> bool:
    """Whether the user has pressed Cancel; `check_interrupted` still raises then."""
    return management.processing_interrupted()


def unload() -> None:
    """Take all of the host's models off their devices."""
    management.unload_all_models()
    release()


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

    def bytes(self, progress) -> None:
        """Show how far a file is read. Raises the host's exception on Cancel."""
        check_interrupted()
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
    return [DEMO, *own_files(folder, usable)]


def own_files(folder: str, usable: Callable[[Path], bool]) -> list[str]:
    """The usable files of one of the host's model folders."""
    try:
        names = folder_paths.get_filename_list(folder)
    except KeyError:  # not registered: an exception here would drop the whole pack
        names = []
    return [name for name in names if (path := find(folder, name)) and usable(path)]


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
    with contextlib.suppress(KeyError):  # of a folder that isn't registered
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


def lora_folder(prefix: str) -> tuple[Path, str, int, str]:
    """As `output_folder`, in the first of the host's folders of LoRAs. Raises InputError where it has none."""
    try:
        root = folder_paths.get_folder_paths("loras")[0]
    except (KeyError, IndexError):
        raise InputError("this ComfyUI has no folder for LoRAs; make models/loras") from None
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, root)
    return Path(folder), name, counter, subfolder


def input_folder() -> Path:
    return Path(folder_paths.get_input_directory())


def training_folder() -> Path:
    """What is kept of training: data, encoded data, and what to go on from."""
    return Path(folder_paths.get_output_directory()) / "starflow_training"


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


def clip_frames(images: Tensor, otherwise: int | None = None) -> int:
    """Frames of each clip if a node of this pack noted it and no other node came in between; otherwise all, unless it
    says more."""
    return getattr(images, "starflow_clip_frames", len(images) if otherwise is None else otherwise)


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
