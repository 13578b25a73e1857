"""Latents: their format, and the maps between VAE space and flow space."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError, InputError
from .schema import check_fields, number


@dataclass(frozen=True)
class LatentFormat:
    """How VAE space maps to flow space: (latent - mean) / std, later frames times a factor.

    `spatial` and `temporal` are pixels and frames per latent. `mean` and `std` have one value per channel, or one for
    all. `rgb` (channels x 3) and `rgb_bias` turn a flow-space latent into a rough picture in [-1, 1]; empty where no
    such factors are known.
    """

    channels: int = number(1, 4096)
    spatial: int = number(1, 1024)
    temporal: int = number(1, 1024, 1)
    mean: tuple[float, ...] = number(-1e6, 1e6, (0.0,))
    std: tuple[float, ...] = number(1e-6, 1e6, (1.0,))
    later_factor: float = number(1e-6, 1e6, 1.0)
    rgb: tuple[tuple[float, float, float], ...] = ()
    rgb_bias: tuple[float, ...] = ()

    def __post_init__(self):
        check_fields(self)
        lengths = {"mean": (1, self.channels), "std": (1, self.channels), "rgb": (0, self.channels)}
        lengths["rgb_bias"] = (3,) if self.rgb else (0, 3)
        for name, expected in lengths.items():
            if len(getattr(self, name)) not in expected:
                found = len(getattr(self, name))
                raise CheckpointError(f"{name} has {found} entries, expected {' or '.join(map(str, expected))}")

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip. Raises InputError where the VAE can't make that many frames."""
        if frames < 1 or (frames - 1) % self.temporal:
            low = max(1, (frames - 1) // self.temporal * self.temporal + 1)
            high = low + self.temporal
            raise InputError(f"{frames} frames: a clip has {self.temporal}n + 1 frames; nearest are {low} and {high}")
        return (frames - 1) // self.temporal + 1

    def frames(self, latent_frames: int) -> int:
        """Pixel frames that `latent_frames` decode to."""
        return (latent_frames - 1) * self.temporal + 1

    def nearest(self, frame: float) -> int:
        """The latent frame whose first pixel frame is the nearest to `frame`, the later one of two."""
        return math.floor((frame - 1) / self.temporal + 1.5) if frame >= 0.5 else 0

    def first_frame(self, index: int) -> int:
        """The first pixel frame, counted from 0, that latent frame `index` decodes to."""
        return (index - 1) * self.temporal + 1 if index else 0


def to_flow_space(latent: LatentFormat, latents: Tensor, factors: Tensor) -> Tensor:
    """VAE space (B, C, T, h, w) -> flow space (B, T, C, h, w), float32, without noise."""
    mean, std = _statistics(latent, latents.device)
    x = (latents.float() - mean) / std * factors.to(latents.device).view(-1, 1, 1)
    return x.transpose(1, 2)


def to_vae_space(latent: LatentFormat, latents: Tensor, factors: Tensor) -> Tensor:
    """The inverse of `to_flow_space`."""
    mean, std = _statistics(latent, latents.device)
    return latents.transpose(1, 2) / factors.to(latents.device).view(-1, 1, 1) * std + mean


def _statistics(latent: LatentFormat, device) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(v, device=device).view(1, -1, 1, 1, 1) for v in (latent.mean, latent.std))


# The published statistics of Wan 2.2's 48 latent channels.
WAN22_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
WAN22_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip

SD_VAE = LatentFormat(channels=4, spatial=8, std=(1 / 0.18215,))
WAN22_VAE = LatentFormat(48, 16, 4, WAN22_MEAN, WAN22_STD, later_factor=0.6)
