"""A rough picture of latents, for the preview while a clip is made."""

from __future__ import annotations

import torch
from torch import Tensor

from ..starflow_core.model.config import FlowConfig
from ..starflow_core.model.latent import to_flow_space
from . import host


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

    def picture(self, latent: Tensor) -> Tensor | None:
        """(H, W, 3) in 0..1 of a latent frame (C, h, w) in VAE space; None where no factors are known."""
        if not len(self.factors):
            return None
        normal = to_flow_space(self.format, latent[None, :, None].cpu(), torch.ones(1))[0, 0]
        colours = torch.einsum("chw,cr->hwr", normal, self.factors) + self.bias
        picture = (colours + 1) / 2
        return picture.repeat_interleave(self.format.spatial, 0).repeat_interleave(self.format.spatial, 1)
