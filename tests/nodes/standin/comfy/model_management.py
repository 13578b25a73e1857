"""Devices, loaded models and Cancel, on a machine with a CPU only."""

from __future__ import annotations

import weakref

import torch

OOM_EXCEPTION = torch.cuda.OutOfMemoryError
CPU = torch.device("cpu")

current_loaded_models: list[weakref.ref] = []  # patchers whose weights are on their devices; others own them
_interrupted = False


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


def load_models_gpu(models, memory_required: int = 0, force_full_load: bool = False) -> None:
    """The real one frees `memory_required` on a card first; a CPU has what it has."""
    for patcher in models:
        patcher.load()
    others = (loaded for loaded in current_loaded_models if loaded() not in (None, *models))
    current_loaded_models[:] = [*map(weakref.ref, models), *others]


def soft_empty_cache() -> None:
    pass


def interrupt_current_processing(value: bool = True) -> None:
    """What Cancel does."""
    global _interrupted
    _interrupted = value


def throw_exception_if_processing_interrupted() -> None:
    """Raises once for each Cancel."""
    if _interrupted:
        interrupt_current_processing(False)
        raise InterruptProcessingException
