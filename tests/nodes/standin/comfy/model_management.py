"""Devices, loaded models and Cancel, on a machine with a CPU only."""

from __future__ import annotations

import enum
import weakref
from pathlib import Path

import torch

OOM_EXCEPTION = torch.cuda.OutOfMemoryError
CPU = torch.device("cpu")

current_loaded_models: list[weakref.ref] = []  # patchers whose weights are on their devices; others own them
_interrupted = False


class VRAMState(enum.Enum):
    DISABLED, NO_VRAM, LOW_VRAM, NORMAL_VRAM, HIGH_VRAM, SHARED = range(6)


vram_state = VRAMState.DISABLED
lowvram_available = True
MIN_WEIGHT_MEMORY_RATIO = 0.4  # of what is free: weights that stay on a card that isn't NVIDIA's


class InterruptProcessingException(Exception):
    pass


def get_torch_device() -> torch.device:
    return CPU


text_encoder_device = vae_device = intermediate_device = get_torch_device
unet_offload_device = text_encoder_offload_device = vae_offload_device = get_torch_device


def is_device_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


def should_use_bf16(device: torch.device | None = None) -> bool:
    return False


should_use_fp16 = should_use_bf16


def get_free_memory(device: torch.device) -> int:
    """Of main memory, where all devices are."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def extra_reserved_memory() -> int:
    return 400 * 1024 * 1024


def loaded_models() -> list:
    return [loaded() for loaded in current_loaded_models]


def load_models_gpu(models, memory_required: int = 0, force_full_load: bool = False) -> None:
    """The real one frees `memory_required` on a card first; a CPU has what it has."""
    for patcher in models:
        patcher.load()
    others = (loaded for loaded in current_loaded_models if loaded() not in (None, *models))
    current_loaded_models[:] = [*map(weakref.ref, models), *others]


def unload_all_models() -> None:
    current_loaded_models.clear()


def soft_empty_cache() -> None:
    pass


def interrupt_current_processing(value: bool = True) -> None:
    """What Cancel does."""
    global _interrupted
    _interrupted = value


def processing_interrupted() -> bool:
    return _interrupted


def throw_exception_if_processing_interrupted() -> None:
    """Raises once for each Cancel."""
    if _interrupted:
        interrupt_current_processing(False)
        raise InterruptProcessingException
