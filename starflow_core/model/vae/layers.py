"""Wan's norms and convolutions, faster on a CPU."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.Module):
    """diffusers' `WanRMS_norm` with the norm taken as a sum: `F.normalize` is slow on a CPU over an axis that
    is not the last one. It took a quarter of decoding and a third of the training."""

    def __init__(self, gamma: nn.Parameter):
        super().__init__()
        self.gamma = gamma

    def forward(self, x: Tensor) -> Tensor:
        squares = x.float().square().sum(1, keepdim=True)
        inverse = squares.clamp_min(1e-24).rsqrt() * len(self.gamma) ** 0.5
        return (x * inverse).to(x.dtype) * self.gamma.to(x.dtype)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...]) -> Tensor:
    """`F.conv3d`, on a CPU always by oneDNN: for one clip of small frames PyTorch takes a loop of its own, which needs
    two to five times as long."""
    if x.is_cpu and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.mkldnn_convolution(x, weight, bias, (0, 0, 0), stride, (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, stride)


def with_fast_layers(module: nn.Module) -> nn.Module:
    """The same module with the same weights: every `WanRMS_norm` in it becomes a `ChannelNorm`, and every
    `WanCausalConv3d` computes by `convolved`, after it has padded its input itself."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm

    for parent in list(module.modules()):
        if isinstance(parent, WanCausalConv3d):
            parent._conv_forward = partial(convolved, stride=parent.stride)
        for name, child in parent.named_children():
            if isinstance(child, WanRMS_norm) and child.channel_first and not isinstance(child.bias, nn.Parameter):
                setattr(parent, name, ChannelNorm(child.gamma))
    return module
