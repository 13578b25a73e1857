"""Checkpoints: open, recognise, check, load, convert and save, one tensor at a time.

Tensors carry the reference's names. A model is a `.safetensors` file, a sharded one with its index,
or a `.pth` that holds nothing but tensors: no file is ever allowed to run code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import PRESETS, FlowConfig
from .control import Progress
from .errors import CheckpointError, InputError, NonFiniteError
from .flow import Flow

CONVERTER_VERSION = "1"  # raised when the files that `convert` writes change their meaning
CONFIG_KEY = "starflow_config"
APPLE_LICENSE = (
    "Apple Machine Learning Research Model is licensed under the "
    "Apple Machine Learning Research Model License Agreement."
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
READABLE = (*DTYPES.values(), torch.float64)
INDEX = ".safetensors.index.json"
PICKLES = (".pth", ".pt", ".ckpt", ".bin")
LARGEST_HEADER = 100_000_000  # bytes, the format's own limit
HASH_CHUNK = 1 << 22  # bytes

# Buffers of the reference that follow from the configuration.
IGNORED = re.compile(r"var|blocks\.\d+\.attn_mask|feat_rope\.freqs_(cos|sin)")
BLOCK = re.compile(r"blocks\.(\d{1,4})\.")
LAYER = re.compile(r"blocks\.(\d{1,4})\.attn_blocks\.(\d{1,4})\.")
DENOISER_LAYER = re.compile(r"learnable_self_denoiser\.attn_blocks\.(\d{1,4})\.")
# What people have lying in the same folders, the first match counts.
FOREIGN = (
    (("lora_", ".lora.", "hada_w1"), "a LoRA"),
    (("double_blocks.",), "a Flux-like diffusion model"),
    (("joint_blocks.",), "a Stable Diffusion 3 model"),
    (("model.diffusion_model.",), "a Stable Diffusion checkpoint"),
    (("decoder.upsamples.", "decoder.up_blocks.", "decoder.up."), "a VAE"),
    (("transformer_blocks.", "down_blocks.", ".self_attn.q."), "a diffusion model"),
    (("encoder.block.",), "a T5 text encoder"),
    (("text_model.encoder.",), "a CLIP text encoder"),
    (("model.layers.", "transformer.h."), "a language model"),
)

Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file. `dtype` is None for a type that isn't known here."""

    file: Path
    offset: int
    dtype: torch.dtype | None
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        # Plain reads rather than a mapping: the bytes land where they stay, and a file that is cut
        # or replaced meanwhile is an error, not a crash.
        data = torch.empty(math.prod(self.shape) * self.dtype.itemsize, dtype=torch.uint8, device="cpu")
        with _reading(self.file), open(self.file, "rb") as file:
            file.seek(self.offset)
            count = file.readinto(data.numpy())
        if count != data.numel():
            raise CheckpointError(f"{self.file} changed while it was read; load it again when it is complete")
        return data.view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Mapped:
    """A tensor of a memory-mapped pickle."""

    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self) -> Tensor:
        # A copy: pages of the file must not become weights, it may be overwritten while they live.
        return self.tensor.clone(memory_format=torch.contiguous_format)


class Checkpoint:
    """An opened file whose tensors are read one by one.

    `path` is the file or index, `files` what holds the tensors; `metadata`, `shapes` and `dtypes`
    are known without reading any tensor.
    """

    def __init__(self, path: Path, files: list[Path], tensors: dict[str, Stored | Mapped], metadata: dict[str, str]):
        if tensors and all(name.startswith("module.") for name in tensors):  # saved from a parallel wrapper
            tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
        self.path, self.files, self.metadata, self._tensors = path, files, metadata, tensors
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a `.safetensors`, an index of shards, a folder with one of these, or a `.pth`.

        Raises CheckpointError for a missing, truncated or corrupt file, and for a pickle that would
        have to run code, which isn't read any further.
        """
        path = Path(path)
        if path.is_dir():
            path = _find_in_folder(path)
        if not path.is_file():
            raise CheckpointError(f"no checkpoint at {path}")
        with _reading(path):
            if path.name.endswith(INDEX):
                return _open_shards(path)
            if path.suffix.lower() == ".safetensors":
                return _open_single(path)
            if path.suffix.lower() in PICKLES:
                return _open_pickle(path)
        raise CheckpointError(f"{path.name} is no .safetensors, {INDEX} or {', '.join(PICKLES)} file")

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU, in memory of its own."""
        return self._tensors[name].read()

    def nbytes(self, name: str) -> int:
        return math.prod(self.shapes[name]) * self.dtypes[name].itemsize

    @property
    def config_file(self) -> Path:
        """Where a configuration beside this checkpoint is looked for first."""
        name = self.path.name
        stem = name.removesuffix(INDEX) if name.endswith(INDEX) else self.path.stem
        return self.path.with_name(f"{stem}.json")


def find_config(checkpoint: Checkpoint) -> FlowConfig:
    """The configuration from the file's metadata, a JSON beside it, or the known models' shapes.

    Raises CheckpointError if the file is no STARFlow (says what it looks like), if a configuration
    contradicts the tensors, or if there is none.
    """
    structure = _structure(checkpoint)
    for where, text in _config_texts(checkpoint):
        config = _parse_config(text, where)
        if config:
            _check_structure(checkpoint, config, where)
            return config
    presets = [preset for preset in PRESETS.values() if not _differences(structure, preset)]
    if presets:
        return presets[0]
    raise CheckpointError(
        f"{checkpoint.path.name}: no known model has these shapes: {_text(structure)}. {_nearest(structure)}"
        f"For a model of your own put its configuration beside it, as {checkpoint.config_file.name}: "
        "JSON of FlowConfig.to_dict() or the reference's constructor arguments."
    )


def expected_shapes(config: FlowConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights of such a model."""
    return {name: tuple(tensor.shape) for name, tensor in Flow(config, device="meta").state_dict().items()}


def check_keys(checkpoint: Checkpoint, config: FlowConfig) -> dict[str, tuple[int, ...]]:
    """The weights' names and shapes, once the checkpoint has exactly these. Raises CheckpointError
    that names the first missing, unexpected, wrongly shaped and wrongly typed ones."""
    expected, shapes, dtypes = expected_shapes(config), checkpoint.shapes, checkpoint.dtypes
    problems = {
        "missing": [name for name in expected if name not in shapes],
        "unexpected": [name for name in shapes if name not in expected and not IGNORED.fullmatch(name)],
        "wrongly shaped": [
            f"{name} {shapes[name]} instead of {shape}"
            for name, shape in expected.items()
            if shapes.get(name, shape) != shape
        ],
        "of a type other than bf16, fp16 and fp32": [
            f"{name} {dtypes[name]}" for name in expected if name in dtypes and dtypes[name] not in READABLE
        ],
    }
    if not any(problems.values()):
        return expected
    parts = [
        f"{len(names)} {problem} ({', '.join(names[:5])}{', ..' if len(names) > 5 else ''})"
        for problem, names in problems.items()
        if names
    ]
    raise CheckpointError(
        f"{checkpoint.path.name} does not fit {config.name}: {'; '.join(parts)}. "
        "Get the file again, or correct its configuration."
    )


def load_flow(
    source: str | Path | Checkpoint,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    operations=torch.nn,
    config: FlowConfig | None = None,
    progress: Report | None = None,
) -> Flow:
    """A flow with a checkpoint's weights, frozen and in eval mode, never twice in memory.

    `dtype` None takes the type that most of the file is in. `progress` counts bytes of the file; it
    may raise to stop. Raises CheckpointError, InputError for an unusable type or device, and
    NonFiniteError naming the first tensor with NaN or infinity.
    """
    checkpoint, config, expected = _resolve(source, config)
    dtype = dtype or _main_dtype(checkpoint, expected)
    if dtype not in DTYPES.values():
        raise InputError(f"weights cannot be loaded as {dtype}; choose bfloat16, float16 or float32")
    _check_device(device, dtype)
    # Weights outlive the caller's inference mode: a score step or a fine-tune needs gradients later.
    with torch.inference_mode(False), torch.no_grad():
        flow = Flow(config, operations, dtype=dtype, device="meta")
        for name in _counted(checkpoint, expected, "load", progress):
            weight = _cast(checkpoint.tensor(name), dtype, name, checkpoint.path).to(device)
            module, _, attribute = name.rpartition(".")
            setattr(flow.get_submodule(module), attribute, nn.Parameter(weight, requires_grad=False))
    return flow.eval()


def convert(
    source: str | Path | Checkpoint,
    target: str | Path,
    dtype: str = "bf16",
    config: FlowConfig | None = None,
    overwrite: bool = False,
    progress: Report | None = None,
) -> None:
    """Write a checkpoint as one safetensors file in `dtype` ("bf16", "fp16" or "fp32").

    The metadata of the source is kept and gets the configuration (`starflow_config`), `source_name`,
    `source_sha256` (of shards: a JSON object of name and hash), `license` and `converter_version`.
    `progress` counts bytes in two phases, "hash" and "convert"; it may raise to stop. Nothing is
    left behind on an error. Raises CheckpointError, NonFiniteError, and InputError for a target that
    exists or cannot be written.
    """
    torch_dtype, target = _parse_dtype(dtype), Path(target)
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    _check_target(target, checkpoint, overwrite)
    checkpoint, config, expected = _resolve(checkpoint, config)
    _check_space(target, expected, torch_dtype)
    metadata = {
        **checkpoint.metadata,
        **_own_metadata(config),
        "source_name": checkpoint.path.name,
        "source_sha256": _hash(checkpoint.files, progress),
    }
    if CONFIG_KEY not in checkpoint.metadata:  # else the file says itself what its licence is
        metadata.setdefault("license", APPLE_LICENSE)
    names = _counted(checkpoint, expected, "convert", progress)
    data = (_bytes(_cast(checkpoint.tensor(name), torch_dtype, name, checkpoint.path)) for name in names)
    _write(target, _header(expected, torch_dtype, metadata), data)


def save_flow(flow: Flow, path: str | Path, dtype: str = "bf16", metadata: dict[str, str] | None = None) -> None:
    """Write a flow's weights and configuration; errors as in `save_tensors`.

    `metadata` is added to the file's; give `license` there.
    """
    save_tensors(flow.state_dict(), path, dtype, {**(metadata or {}), **_own_metadata(flow.config)})


def save_tensors(tensors: dict[str, Tensor], path: str | Path, dtype: str, metadata: dict[str, str]) -> None:
    """Write tensors as one safetensors file, in place of an earlier one if there is one.

    Raises InputError if the file cannot be written, NonFiniteError for NaN or infinity.
    """
    torch_dtype, path = _parse_dtype(dtype), Path(path)
    _check_target(path, None, overwrite=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    _check_space(path, shapes, torch_dtype)
    data = (_bytes(_cast(tensor.cpu(), torch_dtype, name, path)) for name, tensor in tensors.items())
    _write(path, _header(shapes, torch_dtype, metadata), data)


def quick_look(path: str | Path) -> str | None:
    """The name of the STARFlow in a safetensors file or index, None if it is something else.

    Reads headers only and never raises: made for file lists.
    """
    if not str(path).lower().endswith((".safetensors", INDEX)):
        return None
    try:
        checkpoint = Checkpoint.open(path)
        _structure(checkpoint)
        try:
            return find_config(checkpoint).name
        except CheckpointError:
            return "STARFlow without a configuration"
    except Exception:  # a list shows what it can
        return None


# Opening


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _find_in_folder(folder: Path) -> Path:
    found = sorted(folder.glob(f"*{INDEX}")) or sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    names = ", ".join(file.name for file in found[:5])
    raise CheckpointError(
        f"folder {folder} holds {f'several checkpoints ({names}): choose one' if found else 'no safetensors file'}"
    )


def _open_single(path: Path) -> Checkpoint:
    shard = re.search(r"-\d{5}-of-(\d{5})$", path.stem)
    if shard and int(shard[1]) > 1:
        raise CheckpointError(f"{path.name} is one of {int(shard[1])} shards; open their {INDEX} file")
    tensors, metadata = _read_header(path)
    return Checkpoint(path, [path], tensors, metadata)


def _open_shards(index: Path) -> Checkpoint:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{index.name} is no index of shards; get it again") from None
    if outside:
        raise CheckpointError(f"{index.name} names a file outside its folder, {outside[0]}; get it again")
    files = [index.parent / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{index.name} lacks {', '.join(missing[:5])}; get all of its {len(files)} shards")
    found, metadata = {}, {}
    for file in files:
        tensors, shard_metadata = _read_header(file)
        found[file.name] = tensors
        metadata.update(shard_metadata)
    lost = [f"{name} in {shard}" for name, shard in weight_map.items() if name not in found[shard]]
    if lost:
        raise CheckpointError(f"{index.name} lists tensors that aren't there: {', '.join(lost[:5])}; get it again")
    return Checkpoint(index, files, {name: found[shard][name] for name, shard in weight_map.items()}, metadata)


def _read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Tensors and metadata of a safetensors file, once its size agrees with its header."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            _check_pointer(path)
            wanted = f", its header alone has {length} bytes" if size >= 8 and length <= LARGEST_HEADER else ""
            raise CheckpointError(f"{path.name} is truncated or no safetensors file: found {size} bytes{wanted}")
        header = file.read(length)
    try:
        entries = json.loads(header)
        metadata = {str(key): str(value) for key, value in entries.pop("__metadata__", {}).items()}
        spans = sorted(tuple(entry["data_offsets"]) for entry in entries.values())
        tensors = {name: _parse_entry(path, 8 + length, entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"the header of {path.name} is corrupt; get the file again") from None
    end = 0
    for start, stop in spans:
        if start != end or stop < start:
            raise CheckpointError(f"the header of {path.name} is corrupt: its tensors overlap or leave gaps")
        end = stop
    if size != 8 + length + end:
        state = "truncated" if size < 8 + length + end else "corrupt"
        raise CheckpointError(f"{path.name} is {state}: expected {8 + length + end} bytes, found {size}; get it again")
    return tensors, metadata


def _parse_entry(path: Path, data: int, entry: dict[str, Any]) -> Stored:
    """One tensor of a header; ValueError, KeyError or TypeError if it makes no sense."""
    (start, stop), shape = entry["data_offsets"], tuple(entry["shape"])
    dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
    if not all(type(value) is int and value >= 0 for value in (start, stop, *shape)):
        raise ValueError(entry)
    if dtype and stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(entry)
    return Stored(path, data + start, dtype, shape)


def _open_pickle(path: Path) -> Checkpoint:
    _check_archive(path)
    try:
        with torch.inference_mode(False):
            content = torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"reading it would run {culprit[1]}" if culprit else "it holds more than tensors or is damaged"
        raise CheckpointError(
            f"{path.name} was refused, nothing of it was run: {reason}. If you trust its source, unpickle it "
            "in an environment of its own, save its state_dict with safetensors.torch.save_file, and use that file."
        ) from None
    except Exception as error:  # a damaged archive can fail anywhere in its reader
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{path.name} is corrupt ({reason}); get it again") from None
    if isinstance(content, dict):
        content = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)), content)
        tensors = {str(name): Mapped(value) for name, value in content.items() if isinstance(value, Tensor)}
        if tensors:
            return Checkpoint(path, [path], tensors, {})
    kind = (
        f"a dictionary of {', '.join(map(str, list(content)[:5]))}"
        if isinstance(content, dict)
        else f"a {type(content).__name__}"
    )
    raise CheckpointError(f"{path.name} holds no state_dict of tensors, but {kind}; save its state_dict alone")


def _check_archive(path: Path) -> None:
    """Raise CheckpointError unless the file is a whole archive as torch.save writes it."""
    with open(path, "rb") as file:
        archive = file.read(4) == b"PK\x03\x04"
    size = path.stat().st_size
    if archive and not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path.name} is truncated: found {size} bytes, and no end of the archive; get it again")
    if not archive:
        _check_pointer(path)
        raise CheckpointError(
            f"{path.name} ({size} bytes) is damaged, or a pickle from before PyTorch 1.6, which cannot be read "
            "piece by piece. If you trust its source, load it with torch.load in an environment of its own and "
            "save it again with torch.save or safetensors.torch.save_file."
        )


def _check_pointer(path: Path) -> None:
    """Raise CheckpointError for what a failed download leaves under the weights' name."""
    with open(path, "rb") as file:
        head = file.read(64).lstrip().lower()
    if head.startswith((b"version https://git-lfs", b"<!doctype", b"<html")):
        kind = "a web page" if head.startswith(b"<") else "a Git LFS pointer"
        raise CheckpointError(f"{path.name} is {kind}, not the weights; download the file itself")


# Recognising


def _config_texts(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Where a configuration may be, and its text."""
    for key in (CONFIG_KEY, "config"):
        if key in checkpoint.metadata:
            yield f"metadata {key} of {checkpoint.path.name}", checkpoint.metadata[key]
    for file in (checkpoint.config_file, checkpoint.path.with_name("config.json")):
        if file.is_file():
            with _reading(file):
                text = file.read_text(encoding="utf-8", errors="replace")
            yield file.name, text


def _parse_config(text: str, where: str) -> FlowConfig | None:
    """A configuration in our form or the reference's, None for JSON that is about something else."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from None
    if not isinstance(values, dict):
        return None
    try:
        if "layers_per_block" in values:
            return _from_reference(values)
        return FlowConfig.from_dict(values) if "schema" in values else None
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where} is incomplete or wrong: {type(error).__name__} {error}") from None


def _from_reference(values: dict[str, Any]) -> FlowConfig:
    """Constructor arguments say nothing of VAE and noise: these are the released model's of this kind."""
    config = FlowConfig.from_reference(values)
    for preset in PRESETS.values():
        if (preset.kind, preset.latent.channels) == (config.kind, config.latent.channels):
            config = replace(config, latent=preset.latent, noise_std=preset.noise_std, defaults=preset.defaults)
    given = {key: values[key] for key in ("noise_std", "rounding") if key in values}
    return replace(config, **given)


def _structure(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the shapes tell of the model, None where a tensor is missing. Raises CheckpointError if
    it is no STARFlow."""
    shapes = checkpoint.shapes
    blocks = sorted({int(match[1]) for name in shapes if (match := BLOCK.match(name))})
    layers = {match.groups() for name in shapes if (match := LAYER.match(name))}
    if not layers or not any(f"blocks.{block}.sos_embed" in shapes for block in blocks):
        raise CheckpointError(_foreign(checkpoint))
    counts = Counter(int(block) for block, _ in layers)
    denoiser = {match[1] for name in shapes if (match := DENOISER_LAYER.match(name))}

    def size(name: str, axis: int) -> int | None:
        shape = shapes.get(name, ())
        return shape[axis] if len(shape) > axis else None

    first, deep = f"blocks.{blocks[0]}", f"blocks.{blocks[-1]}"
    structure = {
        "layers per block": tuple(counts[block] for block in blocks),
        "shallow width": size(f"{first}.proj_in.weight", 0),
        "deep width": size(f"{deep}.proj_in.weight", 0),
        "channels per token": size(f"{first}.proj_in.weight", 1),
        "text width": size(f"{deep}.proj_txt.weight", 1),
        "layers of the denoiser": len(denoiser),
        "width of the denoiser": size("learnable_self_denoiser.proj_in.weight", 0),
    }
    if "var" in shapes:
        structure["rows of var (pt_seq_len^2)"] = size("var", 0)
    if "feat_rope.freqs_cos" in shapes:
        structure["rows of freqs_cos (pt_seq_len^2 + txt_size)"] = size("feat_rope.freqs_cos", 0)
    return structure


def _differences(structure: dict[str, Any], config: FlowConfig) -> dict[str, tuple[Any, Any]]:
    """What the file has and what the configuration wants, where these differ."""
    positions = round(config.rope_length**2)
    wanted = {
        "layers per block": config.layers,
        "shallow width": config.width,
        "deep width": config.deep_width,
        "channels per token": config.token_channels,
        "text width": config.text_dim,
        "layers of the denoiser": config.denoiser.layers if config.denoiser else 0,
        "width of the denoiser": config.denoiser.width if config.denoiser else None,
        "rows of var (pt_seq_len^2)": positions,
        "rows of freqs_cos (pt_seq_len^2 + txt_size)": positions + config.prompt.tokens,
    }
    return {what: (found, wanted[what]) for what, found in structure.items() if found != wanted[what]}


def _check_structure(checkpoint: Checkpoint, config: FlowConfig, where: str) -> None:
    differences = _differences(_structure(checkpoint), config)
    if differences:
        raise CheckpointError(
            f"{where} contradicts the tensors of {checkpoint.path.name}: {_comparison(differences)}. "
            "Give the configuration that belongs to this file."
        )


def _nearest(structure: dict[str, Any]) -> str:
    """A sentence about the known model that this one seems to be a part or a variant of."""
    for preset in PRESETS.values():
        differences = _differences(structure, preset)
        if not differences.keys() & {"shallow width", "channels per token"}:
            return f"It is not the whole {preset.name}: {_comparison(differences)}. "
    return ""


def _foreign(checkpoint: Checkpoint) -> str:
    names = list(checkpoint.shapes)
    kind = next((kind for marks, kind in FOREIGN if any(mark in name for name in names for mark in marks)), None)
    return (
        f"{checkpoint.path.name} is no STARFlow checkpoint: it looks like {kind or 'something else'} "
        f"({len(names)} tensors: {', '.join(names[:3])}{', ..' if len(names) > 3 else ''}). Expected tensors such as "
        "blocks.0.sos_embed and blocks.0.attn_blocks.0.attention.qkv.weight."
    )


def _text(structure: dict[str, Any]) -> str:
    return "; ".join(f"{what} {_value(value)}" for what, value in structure.items())


def _comparison(differences: dict[str, tuple[Any, Any]]) -> str:
    return "; ".join(
        f"{what} {_value(found)} instead of {_value(wanted)}" for what, (found, wanted) in differences.items()
    )


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else "none" if value is None else str(value)


# Reading, casting, writing


def _resolve(source, config: FlowConfig | None) -> tuple[Checkpoint, FlowConfig, dict[str, tuple[int, ...]]]:
    """The opened checkpoint, its configuration and its weights' shapes, all in agreement."""
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    if config:
        _check_structure(checkpoint, config, f"configuration {config.name}")
    else:
        config = find_config(checkpoint)
    return checkpoint, config, check_keys(checkpoint, config)


def _main_dtype(checkpoint: Checkpoint, names) -> torch.dtype:
    sizes = Counter()
    for name in names:
        sizes[checkpoint.dtypes[name]] += math.prod(checkpoint.shapes[name])
    dtype = sizes.most_common(1)[0][0]
    return torch.float32 if dtype == torch.float64 else dtype


def _parse_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise InputError(f"dtype {name!r}; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _check_device(device: str | torch.device, dtype: torch.dtype) -> None:
    try:
        torch.zeros(1, device=device, dtype=dtype)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"device {device} cannot be used with {dtype}: {reason}") from None


def _counted(checkpoint: Checkpoint, names, phase: str, progress: Report | None) -> Iterator[str]:
    """The names, one by one; reports the bytes of each when the next one is asked for."""
    done, total = 0, sum(checkpoint.nbytes(name) for name in names)
    for name in names:
        yield name
        done += checkpoint.nbytes(name)
        if progress:
            progress(Progress(phase, done, total))


def _cast(tensor: Tensor, dtype: torch.dtype, name: str, file: Path) -> Tensor:
    """`tensor` in `dtype`. Raises NonFiniteError for NaN or infinity, CheckpointError on overflow."""
    if not math.isfinite(_reach(tensor)):
        raise NonFiniteError(f"{name} of {file.name} has NaN or infinity; use an undamaged copy")
    cast = tensor.to(dtype)
    if not math.isfinite(_reach(cast)):
        raise CheckpointError(
            f"{name} of {file.name} reaches {_reach(tensor):.4g}, too large for {dtype}; use bf16 or fp32"
        )
    return cast


def _reach(tensor: Tensor) -> float:
    """The largest magnitude, NaN if there is one. Unlike isfinite it needs no memory."""
    low, high = torch.aminmax(tensor)
    return max(abs(low.item()), abs(high.item()))


def _own_metadata(config: FlowConfig) -> dict[str, str]:
    return {"format": "pt", "converter_version": CONVERTER_VERSION, CONFIG_KEY: json.dumps(config.to_dict())}


def _hash(files: list[Path], progress: Report | None) -> str:
    """SHA-256 of a file; of several a JSON object of name and hash."""
    done, total, hashes = 0, sum(file.stat().st_size for file in files), {}
    for path in files:
        digest = hashlib.sha256()
        with _reading(path), open(path, "rb") as file:
            while chunk := file.read(HASH_CHUNK):
                digest.update(chunk)
                done += len(chunk)
                if progress:
                    progress(Progress("hash", done, total))
        hashes[path.name] = digest.hexdigest()
    return json.dumps(hashes) if len(files) > 1 else hashes[files[0].name]


def _check_target(target: Path, source: Checkpoint | None, overwrite: bool) -> None:
    if target.suffix.lower() != ".safetensors":
        raise InputError(f"{target.name} does not end in .safetensors, the format that is written")
    if not target.parent.is_dir():
        raise InputError(f"folder {target.parent} does not exist; make it first")
    if target.is_dir():
        raise InputError(f"{target} is a folder; give the name of a file")
    if not target.exists():
        return
    if source and any(target.samefile(file) for file in source.files):
        raise InputError(f"{target} is the source itself; give another name")
    if not overwrite:
        raise InputError(f"{target} exists; give another name, or allow overwriting")


def _check_space(target: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    needed = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise InputError(f"{target} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; make room first")


def _write(path: Path, header: bytes, data: Iterator[memoryview]) -> None:
    """Write a safetensors file beside and rename it; one piece of data is in memory at a time."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(header)
            file.writelines(data)  # a loop here would keep each piece until the next one is made
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path} could not be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _header(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, metadata: dict[str, str]) -> bytes:
    type_name = next(name for name, known in SAFETENSORS_DTYPES.items() if known == dtype)
    entries, offset = {"__metadata__": metadata}, 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": type_name, "shape": shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
