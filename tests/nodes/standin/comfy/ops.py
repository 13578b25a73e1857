"""Layers that compute in their input's type and on its device, wherever the host keeps their weights."""

from torch import Tensor, nn
from torch.nn import functional as F


def _cast(layer: nn.Module, x: Tensor) -> list[Tensor | None]:
    return [None if given is None else given.to(x.device, x.dtype) for given in (layer.weight, layer.bias)]


class manual_cast:
    class Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, *_cast(self, x))

    class LayerNorm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, self.normalized_shape, *_cast(self, x), self.eps)
