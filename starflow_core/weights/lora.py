"""Files of LoRA: recognise, check, load, save them, and merge them into checkpoints.

Each adapted layer of a flow has three tensors, by names that ComfyUI's own code reads:
`diffusion_model.<layer>.lora_A.weight` (rank, in), `.lora_B.weight` (out, rank) and `.alpha`. The metadata say which
model it was trained on.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, InputError
from ..model.config import FlowConfig
from ..model.lora import Lora, merged
from . import WEIGHT_TYPES, flow
from .int8 import WEIGHT
from .keys import LISTED, READABLE
from .tensorfiles import (
    Report,
    StoredTensor,
    TensorFile,
    cast,
    check_space,
    check_target,
    hash_files,
    parse_dtype,
    shards_of,
    write_tensors,
)

PREFIX = "diffusion_model."
DOWN, UP, ALPHA = "lora_A.weight", "lora_B.weight", "alpha"
PARTS = {DOWN: DOWN, UP: UP, ALPHA: ALPHA, "lora_down.weight": DOWN, "lora_up.weight": UP}
NAME = re.compile(rf"(?:diffusion_model\.)?(.+?)\.({'|'.join(map(re.escape, PARTS))})")
LAYER = re.compile(r"blocks\.\d{1,4}\.attn_blocks\.\d{1,4}\..+")  # of a flow
OF_ADAPTERS = re.compile(r"lora_|\.lora\.|hada_w|lokr_w")  # in names of LoRAs and their kin, of whatever model
BASE_HASH, BASE_NAME = "base_sha256", "base_name"
EXAMPLE = "diffusion_model.blocks.5.attn_blocks.0.attention.qkv.lora_A.weight"

LoraPath = str | Path | tuple[str | Path, float]  # of a file, with or without its strength

_hashes: dict[tuple, str] = {}  # of files as they were


def save_lora(
    loras: Mapping[str, Lora], path: str | Path, config: FlowConfig, metadata: Mapping[str, str], dtype: str = "fp32"
) -> None:
    """Write adapters by their layers' names, over an earlier file, for a flow of that configuration.

    `metadata` are added: those of `base_metadata`, and as may be `settings` (JSON), `trigger_words`, `license`.
    Strengths aren't kept. Raises InputError if the file cannot be written, NonFiniteError for NaN or infinity,
    CheckpointError on overflow. Nothing is left behind on an error.
    """
    path, kind = Path(path), parse_dtype(dtype)
    check_target(path, None, overwrite=True)
    alphas = {f"{PREFIX}{name}.{ALPHA}": torch.tensor(float(lora.alpha)) for name, lora in loras.items()}
    factors = {
        f"{PREFIX}{name}.{part}": cast(value.detach().cpu(), kind, f"{name}.{part}", path)
        for name, lora in loras.items()
        for part, value in ((DOWN, lora.lora_A), (UP, lora.lora_B))
    }
    tensors = alphas | factors  # float32 first, where it is aligned
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    check_space(path, layout)
    values = {**metadata, "format": "pt", flow.CONFIG_KEY: json.dumps(config.to_dict())}
    write_tensors(path, layout, dict(sorted(values.items())), tensors.values())


def base_metadata(checkpoint: TensorFile, progress: Report | None = None) -> dict[str, str]:
    """What a LoRA's metadata say of the model that it was trained on; hashing it may take a while."""
    name = checkpoint.metadata.get("source_name", checkpoint.path.name)
    return {BASE_NAME: name, BASE_HASH: base_hash(checkpoint, progress)}


def base_hash(checkpoint: TensorFile, progress: Report | None = None) -> str:
    """What a model has in common with its conversions: the hash of the file that they were made from.

    A file that doesn't say is hashed, once in a process; `progress` counts its bytes as phase "hash".
    """
    for key in (flow.ORIGIN_HASH, flow.SOURCE_HASH):
        if key in checkpoint.metadata:
            return checkpoint.metadata[key]
    stats = [(path, path.stat()) for path in checkpoint.files]
    version = tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in stats)
    if version not in _hashes:
        _hashes[version] = hash_files(checkpoint.files, progress)
    return _hashes[version]


def quick_look(path: str | Path) -> bool:
    """Whether a safetensors file is a STARFlow's LoRA.

    For lists of files: reads the header only and never raises. A damaged file is listed, as by
    `weights.flow.quick_look`.
    """
    if Path(path).suffix.lower() != ".safetensors" or not os.path.isfile(path):
        return False
    try:
        return _is_lora(TensorFile.open(path))
    except CheckpointError:
        return shards_of(Path(path)) == 1


@dataclass(frozen=True)
class LoraFile:
    """An opened LoRA, of which only the header was read. `parts` are the tensors of each layer."""

    file: TensorFile
    parts: dict[str, dict[str, StoredTensor]]

    @classmethod
    def open(cls, path: str | Path) -> LoraFile:
        """Raises CheckpointError for a file that can't be read, isn't a STARFlow's LoRA, or isn't a complete one."""
        if not os.path.exists(path):
            raise CheckpointError(f"no LoRA at {path}; check the path")
        file = TensorFile.open(path)
        if not _is_lora(file):
            raise CheckpointError(_foreign(file))
        parts, others = _sorted(file)
        _check_complete(file, parts, others)
        return cls(file, parts)

    @property
    def name(self) -> str:
        return self.file.path.name

    @property
    def metadata(self) -> dict[str, str]:
        return self.file.metadata

    @property
    def ranks(self) -> dict[str, int]:
        """Of each layer."""
        return {layer: parts[DOWN].shape[0] for layer, parts in self.parts.items()}

    @property
    def nbytes(self) -> int:
        """Memory that it takes beside a flow, in float32."""
        return 4 * sum(math.prod(parts[part].shape) for parts in self.parts.values() for part in (DOWN, UP))

    @property
    def config(self) -> FlowConfig | None:
        """Of the model that it was trained on, where it says so."""
        try:
            return FlowConfig.from_dict(json.loads(self.metadata[flow.CONFIG_KEY]))
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError, CheckpointError):
            return None

    @property
    def made_for(self) -> str:
        """The same in words."""
        names = [self.config.name] if self.config else []
        names += [f"({self.metadata[BASE_NAME]})"] if BASE_NAME in self.metadata else []
        return f"it was trained on {' '.join(names)}" if names else "it doesn't say on which model it was trained"

    def check(self, config: FlowConfig) -> None:
        """Raise CheckpointError unless each layer is one of a flow of that configuration, and has its shape."""
        shapes, absent, wrong = linear_shapes(config), [], []
        for layer, parts in self.parts.items():
            found = parts[UP].shape[0], parts[DOWN].shape[1]
            if layer not in shapes:
                absent.append(layer)
            elif found != shapes[layer]:
                wrong.append(f"{layer} {found} instead of {shapes[layer]}")
        problems = {"aren't there": absent, "have another shape": wrong}
        if absent or wrong:
            raise CheckpointError(
                f"{self.name} doesn't fit {config.name}: of its {len(self.parts)} layers {_listing(problems)}. Use it "
                f"with its own model: {self.made_for}"
            )

    def doubt(self, checkpoint: TensorFile, progress: Report | None = None) -> str | None:
        """A warning unless it was trained on this checkpoint, or on one with the same origin; hashing as `base_hash`
        does."""
        known = self.metadata.get(BASE_HASH)
        if known is None:
            return f"{self.name} doesn't say of which weights it is; with others than its own it may not do what it did"
        if known != base_hash(checkpoint, progress):
            return (
                f"{self.name} is of other weights than {checkpoint.path.name}, and may not do there what it did: "
                f"{self.made_for}"
            )
        return None

    def load(self, strength: float = 1.0) -> dict[str, Lora]:
        """Frozen adapters by their layers' names, in float32 on the CPU.

        Raises InputError for a strength that isn't finite, NonFiniteError naming the first tensor with NaN or infinity.
        """
        check_strength(strength)
        with torch.inference_mode(False):  # a score step or a fine-tune needs gradients later
            return {layer: self._layer(layer, strength).requires_grad_(False) for layer in self.parts}

    def _layer(self, layer: str, strength: float) -> Lora:
        values = {
            part: cast(stored.read(), torch.float32, f"{layer}.{part}", self.file.path)
            for part, stored in self.parts[layer].items()
        }
        alpha = values[ALPHA].item() if ALPHA in values else len(values[DOWN])
        return Lora(values[DOWN], values[UP], alpha, strength=strength)


@dataclass(frozen=True)
class Chosen:
    """A LoRA, and how strongly it shall count."""

    file: LoraFile
    strength: float = 1.0

    @classmethod
    def open(cls, lora: LoraPath) -> Chosen:
        """Errors as `LoraFile.open`; InputError for a strength that isn't finite."""
        path, strength = lora if isinstance(lora, tuple) else (lora, 1.0)
        check_strength(strength)
        return cls(LoraFile.open(path), strength)

    def __str__(self) -> str:
        return f"{self.file.name}:{self.strength:g}"

    def load(self) -> dict[str, Lora]:
        return self.file.load(self.strength)


def check_strength(strength: float) -> None:
    """Raise InputError unless it is a finite number."""
    if not math.isfinite(strength):
        raise InputError(f"the strength of a LoRA is {strength}; give a finite number, such as 1")


def linear_shapes(config: FlowConfig) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the layers that a flow's LoRA may have."""
    return {
        name.removesuffix(WEIGHT): shape
        for name, shape in flow.expected_shapes(config).items()
        if flow.QUANTISED.fullmatch(name) and not name.startswith(flow.DENOISER)
    }


def merge_loras(
    source: str | Path | TensorFile, loras: Iterable[LoraPath], target: str | Path, dtype: str = "bf16",
    config: FlowConfig | None = None, overwrite: bool = False, progress: Report | None = None,
) -> list[str]:  # fmt: skip
    """Write a checkpoint with LoRAs added to its weights, as `weights.flow.convert` does; returns warnings of LoRAs
    that may be of other weights.

    Files, or pairs of a file and its strength, are added up in float32 and rounded once, one tensor at a time. In the
    metadata `loras` (JSON) names what was merged, `base_name` and `base_sha256` the model. `progress` counts bytes as
    "hash" and "merge". Raises InputError for a source in 8 bit, otherwise as `convert`, `LoraFile.check` and `load`.
    """
    parse_dtype(dtype, WEIGHT_TYPES)
    checkpoint = source if isinstance(source, TensorFile) else TensorFile.open(source)
    check_target(Path(target), checkpoint, overwrite)
    checkpoint, config, _ = flow.resolve(checkpoint, config)
    if flow.in_int8(checkpoint):
        raise InputError(
            f"{checkpoint.path.name} is in 8 bit, where a small difference is rounded away; merge into the model's "
            "original or its bf16 conversion"
        )
    used = [Chosen.open(lora) for lora in loras]
    for chosen in used:
        chosen.file.check(config)
    check_space(Path(target), flow.file_layout(config, dtype))
    changed = _with(checkpoint, used)
    doubts = [chosen.file.doubt(checkpoint, progress) for chosen in used]
    kept = {k: v for k, v in checkpoint.metadata.items() if k not in (*flow.SOURCE_KEYS, flow.ORIGIN_HASH)}
    metadata = {**kept, **base_metadata(checkpoint, progress), "loras": json.dumps(list(map(_credit, used)))}
    flow.write(changed, config, target, dtype, metadata, "merge", progress)
    return [doubt for doubt in doubts if doubt]


def _credit(chosen: Chosen) -> dict[str, str | float]:
    told = {key: chosen.file.metadata[key] for key in ("license", "trigger_words") if key in chosen.file.metadata}
    return {"name": chosen.file.name, "strength": chosen.strength, **told}


def _with(checkpoint: TensorFile, loras: Sequence[Chosen]) -> TensorFile:
    """The checkpoint whose weights have LoRAs added when they are read."""
    adapters = defaultdict(list)
    for chosen in loras:
        for layer, lora in chosen.load().items() if chosen.strength else ():
            adapters[layer + WEIGHT].append(lora)
    changed = {name: _changed(checkpoint, name, added) for name, added in adapters.items()}
    return replace(checkpoint, tensors=checkpoint.tensors | changed)


def _changed(checkpoint: TensorFile, name: str, adapters: list[Lora]) -> StoredTensor:
    stored = checkpoint.tensors[name]

    def read() -> Tensor:
        weight = cast(stored.read(), torch.float32, name, checkpoint.path)
        return torch.no_grad()(merged)(weight, adapters)

    return StoredTensor(stored.shape, torch.float32, read)


# Recognising


def _is_lora(file: TensorFile) -> bool:
    found = filter(None, map(NAME.fullmatch, file.shapes))
    return any(LAYER.fullmatch(match[1]) and match[2] != ALPHA for match in found)


def _sorted(file: TensorFile) -> tuple[dict[str, dict[str, StoredTensor]], list[str]]:
    """The tensors by layer and part, and the names of those that are none of a LoRA's."""
    parts, others = defaultdict(dict), []
    for name, stored in file.tensors.items():
        match = NAME.fullmatch(name)
        if match and PARTS[match[2]] not in parts[match[1]]:
            parts[match[1]][PARTS[match[2]]] = stored
        else:
            others.append(name)
    return {layer: found for layer, found in parts.items() if found}, others


def _check_complete(file: TensorFile, parts: dict[str, dict[str, StoredTensor]], others: list[str]) -> None:
    whole = {layer: found for layer, found in parts.items() if DOWN in found and UP in found}
    problems = {
        "lack lora_A or lora_B": [layer for layer in parts if layer not in whole],
        "have factors that don't go together": [
            f"{layer} A {found[DOWN].shape}, B {found[UP].shape}" for layer, found in whole.items() if not _fit(found)
        ],
        "are of a type other than bf16, fp16 and fp32": [
            layer for layer, found in whole.items() if any(part.dtype not in READABLE for part in found.values())
        ],
    }
    found = [f"of its {len(parts)} layers {_listing(problems)}"] if any(problems.values()) else []
    found += [f"{len(others)} tensors are not those of a plain LoRA ({_first(others)})"] if others else []
    if found:
        raise CheckpointError(
            f"{file.path.name} can't be used: {'; '.join(found)}. Download it again, or save it as a plain LoRA"
        )


def _fit(parts: dict[str, StoredTensor]) -> bool:
    down, up = parts[DOWN].shape, parts[UP].shape
    single = ALPHA not in parts or math.prod(parts[ALPHA].shape) == 1
    return len(down) == len(up) == 2 and down[0] == up[1] > 0 and single


def _foreign(file: TensorFile) -> str:
    names = list(file.shapes)
    listed = f"({len(names)} tensors: {_first(names, 3)}); expected names such as {EXAMPLE}"
    if any(map(OF_ADAPTERS.search, names)):
        return f"{file.path.name} is a LoRA of another family of models {listed}"
    if any(map(flow.LAYER.match, names)):
        return f"{file.path.name} is a whole model, not a LoRA; give it as the model"
    return f"{file.path.name} isn't a LoRA {listed}"


def _listing(problems: dict[str, list[str]]) -> str:
    return "; ".join(f"{len(names)} {problem} ({_first(names)})" for problem, names in problems.items() if names)


def _first(names: Sequence[str], count: int = LISTED) -> str:
    return ", ".join(names[:count]) + (", .." if len(names) > count else "")
