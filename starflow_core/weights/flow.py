"""Checkpoints of flows: recognise, check, load, convert and save them.

Tensors have the reference's names; `tensorfiles` opens and writes the files.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..control import Progress
from ..errors import CheckpointError, InputError
from ..model.config import KNOWN_MODELS, FlowConfig
from ..model.flow import Flow
from ..model.int8 import Int8Linear, replace_linear
from ..model.parallel import ALONE, ONE, Mesh, Team
from ..model.placement import PARTS, Placement
from ..model.schema import read_json
from . import INT8, WEIGHT_TYPES, int8
from .keys import Shapes, check_tensors, loading_dtype, module_shapes
from .shares import own_columns, own_rows
from .tensorfiles import (
    DTYPES,
    INDEX,
    Layout,
    Report,
    StoredTensor,
    TensorFile,
    cast,
    check_space,
    check_target,
    hash_files,
    parse_dtype,
    reading_errors,
    shards_of,
    write_tensors,
)

CONVERTER_VERSION = "1"  # raised when the files that `convert` writes change their meaning
CONFIG_KEY = "starflow_config"
SOURCE_KEYS = SOURCE_NAME, SOURCE_HASH = "source_name", "source_sha256"
ORIGIN_HASH = "origin_sha256"  # of what a source was converted from itself
APPLE_LICENSE = (
    "Apple Machine Learning Research Model is licensed under the "
    "Apple Machine Learning Research Model License Agreement."
)

# Buffers of the reference, which follow from the configuration.
IGNORED = re.compile(r"var|blocks\.\d+\.attn_mask|feat_rope\.freqs_(cos|sin)")
BLOCK = re.compile(r"blocks\.(\d{1,4})\.")
LAYER = re.compile(r"blocks\.(\d{1,4})\.attn_blocks\.(\d{1,4})\.")
DENOISER = "learnable_self_denoiser."
DENOISER_LAYER = re.compile(r"learnable_self_denoiser\.attn_blocks\.(\d{1,4})\.")
# What may be in 8 bit: nearly all weights, but neither the first nor the last layer of a block.
QUANTISED = re.compile(r".*\battn_blocks\.\d+\.(attention\.(qkv|proj)|mlp\.main\.[02])\.weight")
# Other models that are kept in the same folders; the first match counts.
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


def find_config(checkpoint: TensorFile) -> FlowConfig:
    """The configuration from the file's metadata, a JSON beside it, or the known models' shapes.

    Raises CheckpointError if the file isn't a STARFlow (and says what it looks like), if a configuration
    contradicts the tensors, or if none is found.
    """
    structure = _structure(checkpoint)
    for where, text in _config_texts(checkpoint):
        config = _parse_flow_config(text, where)
        if config:
            _check_structure(checkpoint, config, where)
            return config
    presets = [preset for preset in KNOWN_MODELS.values() if not _differences(structure, preset)]
    if presets:
        return presets[0]
    raise CheckpointError(
        f"{checkpoint.path.name}: no known model has these shapes: {_listing(structure)}. {_nearest(structure)}"
        f"For a model of your own put its configuration beside it, as {config_file(checkpoint).name}: "
        "JSON of FlowConfig.to_dict() or the reference's constructor arguments."
    )


def config_file(checkpoint: TensorFile) -> Path:
    """The file beside this checkpoint in which its configuration is looked for first."""
    name = checkpoint.path.name
    stem = name.removesuffix(INDEX) if name.endswith(INDEX) else checkpoint.path.stem
    return checkpoint.path.with_name(f"{stem}.json")


def expected_shapes(config: FlowConfig, mesh: Mesh = ONE) -> Shapes:
    """Names and shapes of the model's weights; of the deep block's, what each process of a mesh has."""
    return module_shapes(Flow(config, device="meta", team=Team(mesh)))


def check_keys(checkpoint: TensorFile, config: FlowConfig) -> Shapes:
    """The model's `expected_shapes`. Raises CheckpointError unless the checkpoint has exactly these."""
    expected = expected_shapes(config)
    weights = {name: tensor for name, tensor in checkpoint.tensors.items() if not IGNORED.fullmatch(name)}
    remedy = "Download the file again, or correct its configuration."
    check_tensors(weights, expected, checkpoint.path.name, config.name, remedy)
    return expected


@lru_cache
def weight_bytes(
    config: FlowConfig, dtype: torch.dtype, in_int8: bool = False, parts: tuple[str, ...] = PARTS, mesh: Mesh = ONE
) -> int:  # fmt: skip
    """Memory that the weights of some of a flow's parts take in `dtype`, or with the large ones in 8 bit; of the deep
    block what each process of a mesh has."""
    shapes = expected_shapes(config, mesh)
    return int8.weight_bytes(
        {name: shape for name, shape in shapes.items() if part_of(name, config) in parts}, dtype,
        QUANTISED if in_int8 else None,
    )  # fmt: skip


def in_int8(checkpoint: TensorFile) -> bool:
    """Whether a checkpoint has weights in 8 bit."""
    return any(QUANTISED.fullmatch(name) and kind == torch.int8 for name, kind in checkpoint.dtypes.items())


def has_int8(flow: Flow) -> bool:
    """Whether a loaded flow keeps weights in 8 bit, in layers of ours or of a host."""
    return any(name.endswith(int8.SCALE) for name in flow.state_dict())


def load_flow(
    source: str | Path | TensorFile,
    dtype: torch.dtype | None = None,
    device: str | torch.device | Placement = "cpu",
    operations=torch.nn,
    config: FlowConfig | None = None,
    progress: Report | None = None,
    quantise: bool = False,
    int8_linear: type[nn.Module] | None = Int8Linear,
    team: Team = ALONE,
) -> Flow:
    """A flow with a checkpoint's weights, frozen and in eval mode, never twice in memory.

    `device` may be a `Placement`, for parts on different devices. With `dtype` None the type is that of most
    weights that aren't in 8 bit. `quantise` brings the large weights to 8 bit while they are loaded; those that are in
    8 bit stay so. Their layers are made by `int8_linear`, a host's or ours; with None no weight is kept in 8 bit.
    `progress` counts bytes of the file; it may raise to stop. A process of a `team` has its share of the deep block;
    parts whose device is meta aren't read. Raises CheckpointError, InputError for an unusable type or device, and
    NonFiniteError naming the first tensor with NaN or infinity.
    """
    file = source if isinstance(source, TensorFile) else TensorFile.open(source)
    checkpoint, config, expected = resolve(file, config)
    placement = device if isinstance(device, Placement) else Placement.on(device)
    dtype = dtype or _main_dtype(checkpoint, expected)
    if dtype not in DTYPES.values():
        raise InputError(f"weights cannot be loaded as {dtype}; choose bfloat16, float16 or float32")
    for part in {*placement.deep, placement.shallow, placement.denoiser}:
        _check_device(part, dtype)
    if team.mesh.tensor > 1:
        checkpoint = int8.joined(own_rows(file, config, team), QUANTISED)
    names = [name for name in expected if _device_of(name, config, placement).type != "meta"]
    kept = {name for name in names if int8_linear and _stays_int8(checkpoint.tensors[name], name, quantise)}
    # Weights outlive the caller's inference mode: a score step or a fine-tune needs gradients later.
    with torch.inference_mode(False), torch.no_grad():
        flow = Flow(config, operations, dtype=dtype, device="meta", team=team)
        for name in kept:
            replace_linear(flow, name.removesuffix(int8.WEIGHT), int8_linear)
        for name in _counted(checkpoint, names, "load", progress):
            home = _device_of(name, config, placement)
            if name in kept:
                values, scale = int8.int8_weight(checkpoint, name)
                int8.put(flow, name, own_columns(values, name, config, team).to(home), scale.to(home))
            else:
                weight = own_columns(checkpoint.tensor(name), name, config, team)
                weight = cast(weight, dtype, name, checkpoint.path).to(home)
                module, _, attribute = name.rpartition(".")
                setattr(flow.get_submodule(module), attribute, nn.Parameter(weight, requires_grad=False))
    flow.eval()
    flow.copy_deep(placement.deep)
    return flow


def convert(
    source: str | Path | TensorFile,
    target: str | Path,
    dtype: str = "bf16",
    config: FlowConfig | None = None,
    overwrite: bool = False,
    progress: Report | None = None,
) -> None:
    """Write a checkpoint as one safetensors file in `dtype`: "bf16", "fp16", "fp32" or "int8".

    "int8" is for the large weights, all others are in bf16 then. Weights that are in 8 bit already are kept for it, and
    expanded for the other types. One tensor is in memory at a time. The source's metadata is kept; added are the
    configuration (`starflow_config`), `source_name`, `source_sha256` (for shards a JSON object of names and hashes),
    `origin_sha256` where the source was converted itself, `license` and `converter_version`. `progress` counts bytes
    in two phases, "hash" and "convert"; it may raise to stop. Nothing is left behind on an error. Raises
    CheckpointError, NonFiniteError, and InputError for a target that exists or cannot be written.
    """
    parse_dtype(dtype, WEIGHT_TYPES)
    target = Path(target)
    checkpoint = source if isinstance(source, TensorFile) else TensorFile.open(source)
    check_target(target, checkpoint, overwrite)
    checkpoint, config, _ = resolve(checkpoint, config)
    check_space(target, file_layout(config, dtype))
    before = checkpoint.metadata.get(ORIGIN_HASH, checkpoint.metadata.get(SOURCE_HASH))
    metadata = {
        **checkpoint.metadata,
        SOURCE_NAME: checkpoint.path.name,
        SOURCE_HASH: hash_files(checkpoint.files, progress),
        **({ORIGIN_HASH: before} if before else {}),
    }
    write(checkpoint, config, target, dtype, metadata, "convert", progress)


def write(
    checkpoint: TensorFile, config: FlowConfig, target: str | Path, dtype: str, metadata: dict[str, str], phase: str,
    progress: Report | None = None,
) -> None:  # fmt: skip
    """Write an opened and checked checkpoint, for which there is room, as `convert` does; `phase` is the progress's
    name for it."""
    layout = file_layout(config, dtype)
    metadata = {**metadata, **_own_metadata(config)}
    if CONFIG_KEY not in checkpoint.metadata:  # else the file itself states its licence
        metadata.setdefault("license", APPLE_LICENSE)
    names = _counted(checkpoint, [name for name in layout if name in checkpoint.tensors], phase, progress)
    # safetensors gives a file's metadata in an order of its own, another one each time.
    write_tensors(Path(target), layout, dict(sorted(metadata.items())), _written(checkpoint, names, dtype))


def file_layout(config: FlowConfig, dtype: str) -> Layout:
    """The tensors of a file that `convert` writes."""
    return _layout(expected_shapes(config), dtype)


def save_flow(flow: Flow, path: str | Path, dtype: str = "bf16", metadata: dict[str, str] | None = None) -> None:
    """Write a flow's weights and configuration over an earlier file; `dtype` as in `convert`.

    `metadata` is added to the file's own; state the `license` there. Raises InputError if the file cannot be written,
    NonFiniteError for NaN or infinity, CheckpointError on overflow. Nothing is left behind on an error.
    """
    parse_dtype(dtype, WEIGHT_TYPES)
    path, expected = Path(path), expected_shapes(flow.config)
    check_target(path, None, overwrite=True)
    layout = _layout(expected, dtype)
    check_space(path, layout)
    held = TensorFile(path, [path], _held(flow, expected), {})
    metadata = {**(metadata or {}), **_own_metadata(flow.config)}
    write_tensors(path, layout, metadata, _written(held, [name for name in layout if name in expected], dtype))


def quick_look(path: str | Path) -> str | None:
    """The name of the STARFlow in a safetensors file or index, or None if it is something else.

    For lists of files: reads headers only and never raises. A truncated or damaged file is listed, whatever it
    was meant to be: whoever chooses it is told what is wrong, and nobody looks for it in vain.
    """
    if not str(path).lower().endswith((".safetensors", INDEX)) or not os.path.isfile(path):
        return None
    try:
        checkpoint = TensorFile.open(path)
    except CheckpointError:
        return "damaged file" if shards_of(Path(path)) == 1 else None
    try:
        _structure(checkpoint)
        try:
            return find_config(checkpoint).name
        except CheckpointError:
            return "STARFlow without a configuration"
    except Exception:  # a list shows what it can
        return None


# Recognising


def _config_texts(checkpoint: TensorFile) -> Iterator[tuple[str, str]]:
    """Every place that may hold a configuration, with its text."""
    for key in (CONFIG_KEY, "config"):
        if key in checkpoint.metadata:
            yield f"metadata {key} of {checkpoint.path.name}", checkpoint.metadata[key]
    for file in (config_file(checkpoint), checkpoint.path.with_name("config.json")):
        if os.path.isfile(file):
            with reading_errors(file):
                text = file.read_text(encoding="utf-8", errors="replace")
            yield file.name, text


def _parse_flow_config(text: str, where: str) -> FlowConfig | None:
    """A configuration in our form or the reference's, or None for JSON about something else."""
    values = read_json(text, where)
    if not isinstance(values, dict):
        return None
    try:
        if "layers_per_block" in values:
            return _from_reference(values)
        return FlowConfig.from_dict(values) if "schema" in values else None
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None


def _from_reference(values: dict[str, Any]) -> FlowConfig:
    """Constructor arguments say nothing about VAE and noise: these are taken from the released model of the kind."""
    config = FlowConfig.from_reference(values)
    for preset in KNOWN_MODELS.values():
        if (preset.kind, preset.latent.channels) == (config.kind, config.latent.channels):
            told = {name: getattr(preset, name) for name in ("latent", "noise_std", "defaults", "tasks")}
            config = replace(config, **told)
    given = {key: values[key] for key in ("noise_std", "rounding") if key in values}
    return replace(config, **given)


def _structure(checkpoint: TensorFile) -> dict[str, Any]:
    """What the shapes say about the model, None where a tensor is missing. Raises CheckpointError if
    it isn't one."""
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
    """What the file has and what the configuration says, where they differ."""
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


def _check_structure(checkpoint: TensorFile, config: FlowConfig, where: str) -> None:
    differences = _differences(_structure(checkpoint), config)
    if differences:
        raise CheckpointError(
            f"{where} contradicts the tensors of {checkpoint.path.name}: {_comparison(differences)}. "
            "Give the configuration that belongs to this file."
        )


def _nearest(structure: dict[str, Any]) -> str:
    """A sentence that compares the file with the known model of which it seems to be a part or a variant."""
    for preset in KNOWN_MODELS.values():
        differences = _differences(structure, preset)
        if not differences.keys() & {"shallow width", "channels per token"}:
            return f"It is not the whole {preset.name}: {_comparison(differences)}. "
    return ""


def _foreign(checkpoint: TensorFile) -> str:
    names = list(checkpoint.shapes)
    kind = next((kind for marks, kind in FOREIGN if any(mark in name for name in names for mark in marks)), None)
    return (
        f"{checkpoint.path.name} isn't a STARFlow checkpoint: it looks like {kind or 'something else'} "
        f"({len(names)} tensors: {', '.join(names[:3])}{', ..' if len(names) > 3 else ''}). Expected tensors such as "
        "blocks.0.sos_embed and blocks.0.attn_blocks.0.attention.qkv.weight."
    )


def _listing(structure: dict[str, Any]) -> str:
    return "; ".join(f"{what} {_value(value)}" for what, value in structure.items())


def _comparison(differences: dict[str, tuple[Any, Any]]) -> str:
    return "; ".join(
        f"{what} {_value(found)} instead of {_value(wanted)}" for what, (found, wanted) in differences.items()
    )


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else "none" if value is None else str(value)


# Loading and converting


def resolve(source, config: FlowConfig | None = None) -> tuple[TensorFile, FlowConfig, Shapes]:
    """The opened checkpoint, its configuration and its weights' shapes, all in agreement. Weights in 8 bit are one
    tensor each."""
    checkpoint = source if isinstance(source, TensorFile) else TensorFile.open(source)
    if config:
        _check_structure(checkpoint, config, f"configuration {config.name}")
    else:
        config = find_config(checkpoint)
    checkpoint = int8.joined(checkpoint, QUANTISED)
    return checkpoint, config, check_keys(checkpoint, config)


def _main_dtype(checkpoint: TensorFile, names) -> torch.dtype:
    sizes = Counter()
    for name in names:
        if not checkpoint.tensors[name].int8:
            sizes[checkpoint.dtypes[name]] += math.prod(checkpoint.shapes[name])
    return loading_dtype(sizes.most_common(1)[0][0])


def _stays_int8(stored: StoredTensor, name: str, quantise: bool) -> bool:
    return stored.int8 is not None or (quantise and QUANTISED.fullmatch(name) is not None)


def _layout(shapes: Shapes, dtype: str) -> Layout:
    return int8.layout(shapes, parse_dtype(dtype, WEIGHT_TYPES), QUANTISED if dtype == INT8 else None)


def _written(source: TensorFile, names: Iterable[str], dtype: str) -> Iterator[Tensor]:
    """The tensors of `_layout`, made from weights of these names."""
    other = parse_dtype(dtype, WEIGHT_TYPES)
    for name in names:
        if dtype == INT8 and QUANTISED.fullmatch(name):
            yield from (*int8.int8_weight(source, name), int8.mark())
        else:
            yield cast(source.tensor(name), other, name, source.path)


def _held(flow: Flow, names: Iterable[str]) -> dict[str, StoredTensor]:
    """A flow's weights as those of a file."""
    found = {}
    for name in names:
        weight = flow.get_parameter(name).detach()
        found[name] = StoredTensor(tuple(weight.shape), weight.dtype, weight.cpu)
        if weight.dtype == torch.int8:
            scale = flow.get_parameter(name.removesuffix(int8.WEIGHT) + int8.SCALE).detach()
            found[name] = int8.paired(found[name], lambda weight=weight, scale=scale: (weight.cpu(), scale.cpu()))
    return found


def part_of(name: str, config: FlowConfig) -> str:
    """Which of a flow's `PARTS` a weight of that name is of."""
    if name.startswith(DENOISER):
        return "denoiser"
    return "deep" if name.startswith(f"blocks.{len(config.layers) - 1}.") else "shallow"


def _device_of(name: str, config: FlowConfig, placement: Placement) -> torch.device:
    """Where a weight of that name belongs."""
    part = part_of(name, config)
    return placement.deep[0] if part == "deep" else getattr(placement, part)


def _check_device(device: str | torch.device, dtype: torch.dtype) -> None:
    try:
        torch.zeros(1, device=device, dtype=dtype)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"device {device} cannot be used with {dtype}: {reason}") from None


def _counted(checkpoint: TensorFile, names, phase: str, progress: Report | None) -> Iterator[str]:
    """The names; reports the bytes of each one when the next is asked for."""
    done, total = 0, sum(checkpoint.nbytes(name) for name in names)
    for name in names:
        yield name
        done += checkpoint.nbytes(name)
        if progress:
            progress(Progress(phase, done, total))


def _own_metadata(config: FlowConfig) -> dict[str, str]:
    return {"format": "pt", "converter_version": CONVERTER_VERSION, CONFIG_KEY: json.dumps(config.to_dict())}
