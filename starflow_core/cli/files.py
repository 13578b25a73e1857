"""`convert`, `merge` and `inspect`: checkpoints and LoRAs, and the metadata of finished files."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections import Counter
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from .. import pipeline
from ..errors import OutOfMemoryForecast
from ..jobs import memory
from ..jobs.build import default_job
from ..jobs.pace import Pace
from ..jobs.planner import MemoryOptions, choose
from ..jobs.tasks import Job, Means
from ..media import read_metadata
from ..model.config import FlowConfig
from ..model.placement import default_dtype, pick_device
from ..weights import INT8, WEIGHT_TYPES
from ..weights import flow as checkpoints
from ..weights import lora as lorafiles
from ..weights.lora import LoraFile
from ..weights.tensorfiles import PICKLES, parse_dtype
from .progress import Meter
from .settings import chosen, size_options

COUNTED = ("weights", "cache", "activations", "total")  # in the forecast of a flow by itself
WEIGHTS = (".safetensors", ".json", *PICKLES)


def convert(args: Namespace) -> None:
    """Write a checkpoint as one safetensors file."""
    with Meter() as meter:
        checkpoints.convert(args.source, args.target, args.dtype, overwrite=args.overwrite, progress=meter.bytes)
    print(args.target)


def merge(args: Namespace) -> None:
    """Write a checkpoint with LoRAs added to its weights."""
    with Meter() as meter:
        doubts = lorafiles.merge_loras(
            args.source, args.loras, args.output, args.dtype, overwrite=args.overwrite, progress=meter.bytes
        )
        for doubt in doubts:
            meter.warn(doubt)
    print(args.output)


def inspect(args: Namespace) -> None:
    """Show what a checkpoint contains and needs, what a LoRA is for, or how a picture or clip was made."""
    path = Path(args.model) if args.model else pipeline.BUNDLED / pipeline.FLOW_FILE
    if _is_media(path):
        values = read_metadata(args.model)
        text = "\n".join(f"{key:14} {_readable(value)}" for key, value in values.items() if value not in ("", None))
        text = text or f"no metadata in {path}"
    elif lorafiles.quick_look(path):
        values = _describe_lora(LoraFile.open(path))
        text = "\n".join(
            [path.name, *(f"  {key:18} {_readable(value)}" for key, value in _lora_lines(values) if value)]
        )
    else:
        values = _describe(args, path)
        text = _text(values)
    print(json.dumps(values, ensure_ascii=False) if args.json else text)


def _readable(value: Any) -> str:
    """A value of a file's metadata on one line; a dictionary, such as the solver's settings, as a list."""
    return ", ".join(f"{key} {v}" for key, v in value.items()) if isinstance(value, dict) else str(value)


def _is_media(path: Path) -> bool:
    """Whether this is a picture, a clip, or a folder of pictures made here."""
    if os.path.isdir(path):
        return os.path.isfile(path / "metadata.json")
    return bool(path.suffix) and path.suffix.lower() not in WEIGHTS


def _describe(args: Namespace, path: Path) -> dict[str, Any]:
    checkpoint, config, shapes = checkpoints.resolve(path)
    stored = Counter()
    for name, shape in shapes.items():
        stored[str(checkpoint.dtypes[name]).removeprefix("torch.")] += prod(shape)
    job = default_job(config, batch=args.batch, **chosen(args, "frames", "guidance"), **size_options(args))
    types = (args.dtype,) if args.dtype else _usual_types(checkpoints.in_int8(checkpoint))
    forecasts = {name: _forecast(config, job, name, checkpoints.in_int8(checkpoint)) for name in types}
    device = pick_device(args.device)
    options = MemoryOptions(args.memory, args.cache, args.offload)
    return {
        "name": config.name,
        "kind": config.kind,
        "file": str(path),
        "parameters": sum(stored.values()),
        "dtypes": dict(stored),
        "blocks": _blocks(config),
        "tasks": list(config.tasks),
        "window": config.window,
        "defaults": vars(config.defaults),
        "metadata": {k: v for k, v in checkpoint.metadata.items() if k not in (checkpoints.CONFIG_KEY, "format")},
        "job": {name: getattr(job, name) for name in ("frames", "height", "width", "batch", "guidance")},
        "memory": {name: {part: getattr(f, part) for part in COUNTED} for name, f in forecasts.items()},
        "plan": _plan(config, job, device, options, args.dtype, checkpoints.in_int8(checkpoint)),
        "device": str(device),
        "free": memory.free(device),
    }


def _describe_lora(found: LoraFile) -> dict[str, Any]:
    told = {key: value for key, value in found.metadata.items() if key not in (checkpoints.CONFIG_KEY, "format")}
    return {
        "kind": "lora",
        "file": str(found.file.path),
        "base": found.config and found.config.name,
        "ranks": sorted(set(found.ranks.values())),
        "layers": len(found.parts),
        "blocks": sorted({int(layer.split(".")[1]) for layer in found.parts}),
        "parameters": found.nbytes // 4,
        "metadata": told,
    }


def _lora_lines(found: dict[str, Any]) -> list[tuple[str, Any]]:
    """The same for people."""
    lines = {
        "file": found["file"],
        "kind": "LoRA",
        "base": found["base"] or "unknown",
        "rank": ", ".join(map(str, found["ranks"])),
        "layers": f"{found['layers']} in block {', '.join(map(str, found['blocks']))}",
        "parameters": f"{found['parameters'] / 1e6:,.1f} million",
    }
    told = {key.replace("_", " "): value for key, value in found["metadata"].items()}
    if "settings" in told:
        told["settings"] = _training(told["settings"])
    return [*lines.items(), *told.items()]


def _training(settings: str) -> str:
    """What a LoRA was trained with, without what says nothing; of long lists the first and how many."""
    try:
        values = dict(json.loads(settings))
    except (ValueError, TypeError):  # of another program
        return settings
    lists = {key: value for key, value in values.items() if isinstance(value, list)}
    values |= {key: ", ".join(map(str, value)) for key, value in lists.items() if len(value) <= 3}
    values |= {key: f"{value[0]}, .. ({len(value)})" for key, value in lists.items() if len(value) > 3}
    return _readable({key: value for key, value in values.items() if value not in (None, "", False)})


def _usual_types(in_int8: bool) -> tuple[str, ...]:
    """The types of weights to show needs for: what is in 8 bit stays so."""
    return (INT8,) if in_int8 else tuple(name for name in WEIGHT_TYPES if name != "fp16")


def _forecast(config: FlowConfig, job: Job, name: str, in_int8: bool) -> memory.Forecast:
    """What a job needs with weights of that type; with int8 it computes in bf16."""
    return memory.forecast(config, job, parse_dtype(name, WEIGHT_TYPES), Means(in_int8 or name == INT8))


def _plan(
    config: FlowConfig, job: Job, device: torch.device, options: MemoryOptions, name: str | None, in_int8: bool
) -> str:
    """How the flow by itself would be fitted to the device, in words."""
    dtype = parse_dtype(name, WEIGHT_TYPES) if name else default_dtype(device, config)
    weights = (in_int8 or name == INT8,) if name or in_int8 else (False, True)
    need = partial(memory.forecast, config, dtype=dtype)
    try:
        plan = choose(job, device, options, weights, lambda job, means: need(job, means=means))
        return str(plan.timed(Pace(config, job, device, dtype, plan.means)))
    except OutOfMemoryForecast as error:
        return f"doesn't fit: {error}"


def _blocks(config: FlowConfig) -> list[dict[str, Any]]:
    blocks = [{"block": "shallow", "layers": layers, "width": config.width} for layers in config.layers[:-1]]
    blocks.append({"block": "deep", "layers": config.layers[-1], "width": config.deep_width})
    if config.denoiser:
        blocks.append({"block": "denoiser", "layers": config.denoiser.layers, "width": config.denoiser.width})
    return blocks


def _text(found: dict[str, Any]) -> str:
    """The description as text."""
    defaults, job = found["defaults"], found["job"]
    rate = f" at {defaults['fps']} fps" if defaults["fps"] else ""
    free = "unknown" if found["free"] is None else memory.readable(found["free"])
    lines = {
        "file": found["file"],
        "kind": found["kind"],
        "parameters": f"{found['parameters'] / 1e6:,.1f} million, {', '.join(found['dtypes'])}",
        "blocks": "; ".join(f"{b['block']} {b['layers']} x {b['width']}" for b in found["blocks"]),
        "tasks": ", ".join(found["tasks"]),
        "window": f"{found['window']} latent frames" if found["window"] else "",
        "defaults": f"{defaults['frames']} frames{rate}, {defaults['aspect']} at {defaults['size']}, "
        f"guidance {defaults['guidance']:g}",
        **found["metadata"],
    }
    text = [found["name"], *(f"  {key:18} {value}" for key, value in lines.items() if value)]
    text.append(
        f"Memory for {job['batch']} x {job['frames']} frames of {job['height']} x {job['width']}, "
        f"guidance {job['guidance']:g} (text encoder and VAE not counted)"
    )
    for name, need in found["memory"].items():
        parts = ", ".join(f"{part} {memory.readable(need[part])}" for part in COUNTED[:-1])
        text.append(f"  {name:18} {memory.readable(need['total'])} ({parts})")
    text.append(f"  {'free on ' + found['device']:18} {free}")
    return "\n".join([*text, f"  {'plan':18} {found['plan']}"])
