"""Where each part of a model computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import InputError
from .config import FlowConfig

PARTS = ("deep", "shallow", "denoiser")  # of a flow
WIDE = 384  # channels: at 160 bfloat16 gains nothing on a CPU, here it takes 0.6 of float32's time, at 3072 0.3


@dataclass(frozen=True)
class Placement:
    """The device of each part.

    `deep` names one device, or two: then guidance's conditional rows are on the first and its unconditional rows on
    the second, each with a key/value cache of its own.
    """

    deep: tuple[torch.device, ...]
    shallow: torch.device
    denoiser: torch.device
    text: torch.device
    vae: torch.device

    @classmethod
    def on(cls, device: torch.device | str) -> Placement:
        """Everything on one device. Raises InputError for a name that isn't a device."""
        try:
            device = torch.device(device)
        except RuntimeError as error:
            raise InputError(f"device {device} cannot be used: {error}") from None
        return cls((device,), device, device, device, device)

    @classmethod
    def over(cls, devices: Sequence[torch.device], guided: bool) -> Placement:
        """The deep block on the first device, or for guidance a half on each of the first two; all else on the last.

        Raises InputError for more devices than there are parts for.
        """
        halves = 2 if guided else 1
        if len(devices) > halves + 1:
            raise InputError(
                f"{len(devices)} devices, but {'with' if guided else 'without'} guidance {halves + 1} are used: "
                f"{'two for its halves' if guided else 'one for the deep block'}, one for all else; name those"
            )
        last = devices[-1]
        return cls(tuple(devices[:halves]), last, last, last, last)

    @classmethod
    def following(cls, device: torch.device) -> Placement:
        """The deep block on a device, and nothing else anywhere, as in a process that follows a leader."""
        nowhere = torch.device("meta")
        return cls((device,), nowhere, nowhere, nowhere, nowhere)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All that are used, once each."""
        return tuple(dict.fromkeys((*self.deep, self.shallow, self.denoiser, self.text, self.vae)))

    @property
    def several(self) -> bool:
        """Whether the flow's parts are on more than one device."""
        return len({*self.deep, self.shallow, self.denoiser}) > 1

    def parts_on(self, device: torch.device) -> tuple[str, ...]:
        """Which of a flow's parts compute on a device."""
        places = {"deep": self.deep, "shallow": (self.shallow,), "denoiser": (self.denoiser,)}
        return tuple(part for part, devices in places.items() if device in devices)

    def __post_init__(self):
        if len(self.deep) not in (1, 2):
            raise InputError(f"the deep block is on {len(self.deep)} devices; give one, or two to split guidance")


def default_dtype(device: torch.device, config: FlowConfig) -> torch.dtype:
    """The type that a model runs in by default. On a CPU bfloat16 pays where layers are wide and the CPU multiplies in
    it (benchmarks/dtypes.py)."""
    if device.type != "cpu" or (config.deep_width >= WIDE and _multiplies_bfloat16()):
        return torch.bfloat16
    return torch.float32


def _multiplies_bfloat16() -> bool:
    """Whether the CPU does, as far as PyTorch can tell: older ones can't."""
    return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def pick_device(name: str | None = None) -> torch.device:
    """The named device, or the best there is. Raises InputError for one that isn't there."""
    found = ["cpu"]
    if torch.cuda.is_available():
        found = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + found
    if torch.backends.mps.is_available():
        found = ["mps", *found]
    if name is None:
        return torch.device(found[0])
    if name not in found and f"{name}:0" not in found:
        raise InputError(f"device {name!r} isn't there; this machine has {', '.join(found)}")
    return torch.device(name)
