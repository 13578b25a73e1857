"""Rough pictures of latents, for the preview while they are made."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..starflow_core.model.config import FlowConfig
from ..starflow_core.model.latent import to_flow_space
from . import host

GAP = 2  # pixels around each picture of a batch


class Preview:
    """Colours by a linear map of the normalised latents: the model's own, or the host's for its VAE."""

    def __init__(self, config: FlowConfig):
        latent = config.latent
        if latent.rgb:
            factors, bias = latent.rgb, latent.rgb_bias
        else:
            factors, bias = host.rgb_factors(latent.channels)
        self.factors = torch.tensor(factors, dtype=torch.float32)
        self.bias = torch.tensor(bias, dtype=torch.float32)
        self.format = latent

    @property
    def known(self) -> bool:
        """Whether there are factors."""
        return len(self.factors) > 0

    def picture(self, latents: Tensor) -> Tensor | None:
        """(H, W, 3) in 0..1 of a latent frame (B, C, h, w) in VAE space, a batch as a grid; None where no factors are
        known."""
        if not self.known:
            return None
        normal = to_flow_space(self.format, latents.unsqueeze(2).cpu(), torch.ones(1))[:, 0]
        colours = torch.einsum("bchw,cr->brhw", normal, self.factors) + self.bias.view(-1, 1, 1)
        columns = math.ceil(math.sqrt(len(latents)))
        return _grid(self._enlarged((colours + 1) / 2, columns), columns).movedim(0, -1)

    def _enlarged(self, pictures: Tensor, columns: int) -> Tensor:
        """Smoothly, to their real size, or as far as a grid with so many columns may be shown."""
        height, width = pictures.shape[-2:]
        rows = math.ceil(len(pictures) / columns)
        scale = min(self.format.spatial, host.PREVIEW_SIDE / max(rows * height, columns * width))
        size = max(1, round(height * scale)), max(1, round(width * scale))
        return F.interpolate(pictures, size, mode="bilinear", antialias=True)


def _grid(pictures: Tensor, columns: int) -> Tensor:
    """Pictures (B, 3, H, W) in rows of so many, as one (3, H, W)."""
    if len(pictures) == 1:
        return pictures[0]
    missing = -len(pictures) % columns
    framed = F.pad(F.pad(pictures, (GAP,) * 4), (0, 0) * 3 + (0, missing))
    return torch.cat([torch.cat(list(row), 2) for row in framed.split(columns)], 1)
