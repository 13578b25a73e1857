"""LoRA: small trained differences beside the large weights of linear layers.

They are kept apart from the weights, and added to what these compute: a weight in bfloat16 or 8 bit would round most of
a small difference away.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from .flow import Flow

LINEAR = ("attention.qkv", "attention.proj", "mlp.main.0", "mlp.main.2")  # of each layer of a block, in its order
DEEP, ALL = "deep", "all"  # names for blocks


class Lora(nn.Module):
    """The difference of one linear layer, scale * B A, with A (rank, in) and B (out, rank).

    It computes in its input's type and on its device, whatever its own are.
    """

    def __init__(self, lora_A: Tensor, lora_B: Tensor, alpha: float, dropout: float = 0.0, strength: float = 1.0):
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
        self.alpha, self.dropout, self.strength = alpha, dropout, strength

    @classmethod
    def fresh(
        cls, in_features: int, out_features: int, rank: int, alpha: float, dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Lora:  # fmt: skip
        """One that changes nothing yet: A as `nn.Linear` begins, drawn on the generator's device, B of zeros."""
        bound = 1 / math.sqrt(in_features)
        down = torch.empty(rank, in_features, device=generator.device if generator else None)
        down.uniform_(-bound, bound, generator=generator)
        return cls(down, down.new_zeros(out_features, rank), alpha, dropout)

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def scale(self) -> float:
        return self.strength * self.alpha / self.rank

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = F.dropout(inputs, self.dropout, self.training)
        return F.linear(self.scale * F.linear(inputs, self.lora_A.to(inputs)), self.lora_B.to(inputs))

    def delta(self) -> Tensor:
        """What it adds to the weight: (out, in), float32."""
        return self.scale * (self.lora_B.float() @ self.lora_A.float())

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}, strength={self.strength:g}"


class AdaptedLinear(nn.Module):
    """A linear layer of any kind, and differences that are added to what it computes.

    The layer's own weights have their names here, too, so that whoever asks the flow for one by name finds it.
    """

    def __init__(self, base: nn.Module, adapters: Iterable[Lora] = ()):
        super().__init__()
        self.base, self.adapters = base, nn.ModuleList(adapters)

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def weight(self) -> nn.Parameter:
        return self.base.weight

    @property
    def weight_scale(self) -> nn.Parameter:
        return self.base.weight_scale

    @property
    def bias(self) -> nn.Parameter | None:
        return self.base.bias

    def forward(self, inputs: Tensor) -> Tensor:
        return added(self.base(inputs), inputs, self.adapters)


def added(out: Tensor, inputs: Tensor, adapters: Iterable[Lora]) -> Tensor:
    """What a layer gave for its inputs, with what its adapters give. `out` is used up."""
    for adapter in adapters:
        more = adapter(inputs)
        # In place it takes no more memory than what comes after the layer.
        out = out + more if out.requires_grad or more.requires_grad else out.add_(more)
    return out


def linear_names(flow: Flow, blocks: str | Iterable[int] = DEEP) -> list[str]:
    """Names of the linear layers that can be adapted in `blocks`, as `block_indices` reads them.

    Raises InputError for a block that the flow lacks.
    """
    layers = flow.config.layers
    return [
        f"blocks.{block}.attn_blocks.{layer}.{part}"
        for block in block_indices(blocks, len(layers))
        for layer in range(layers[block])
        for part in LINEAR
    ]


def adapt(
    flow: Flow, rank: int, alpha: float, dropout: float = 0.0, blocks: str | Iterable[int] = DEEP,
    generator: torch.Generator | None = None,
) -> dict[str, Lora]:  # fmt: skip
    """Put fresh trainable adapters onto the flow's layers, and return them by the layers' names.

    Nothing else of the flow is trainable afterwards. A layer that has adapters gets one more. Raises InputError for
    settings out of range and for a block that the flow lacks.
    """
    _check_settings(rank, alpha, dropout)
    names = linear_names(flow, blocks)
    flow.requires_grad_(False)
    layers = {name: flow.get_submodule(name) for name in names}
    with torch.inference_mode(False):
        loras = {
            name: Lora.fresh(layer.in_features, layer.out_features, rank, alpha, dropout, generator)
            for name, layer in layers.items()
        }
    attach(flow, loras)
    return loras


def attach(flow: Flow, loras: dict[str, Lora]) -> None:
    """Put adapters onto the layers of these names, where the layers are. Those of strength 0 are left out, so that the
    layer computes what it did to the bit. Raises InputError for a layer that the flow lacks, or that has another shape.
    """
    _check_layers(flow, loras)
    for name, lora in loras.items():
        if not lora.strength:
            continue
        layer = flow.get_submodule(name)
        if not isinstance(layer, AdaptedLinear):
            layer = AdaptedLinear(layer).train(layer.training)
            _put(flow, name, layer)
        with torch.inference_mode(False):
            layer.adapters.append(lora.to(layer.weight.device).train(layer.training))
    flow.copy_deep(flow.copies)


def detach(flow: Flow) -> None:
    """Take all adapters off again."""
    for name, layer in _adapted(flow):
        _put(flow, name, layer.base)
    flow.copy_deep(flow.copies)


@torch.no_grad()
def merge(flow: Flow) -> None:
    """Add every adapter's difference to its weight, rounding once, and take the adapters off.

    Raises InputError for weights in 8 bit, where a small difference would be lost.
    """
    layers = _adapted(flow)
    for name, layer in layers:
        if not layer.weight.is_floating_point():
            raise InputError(
                f"{name} is in 8 bit, where a small difference is rounded away; merge into the model's original, or "
                "keep the LoRA apart"
            )
    for _, layer in layers:
        layer.weight.copy_(merged(layer.weight, layer.adapters))
    detach(flow)


def merged(weight: Tensor, adapters: Iterable[Lora]) -> Tensor:
    """A weight (out, in) with the differences of adapters, in float32."""
    total = weight.float()
    for adapter in adapters:
        total = total + adapter.delta().to(total.device)
    return total


def block_indices(blocks: str | Iterable[int], count: int) -> list[int]:
    """Which of a flow's `count` blocks are meant by "deep", "all", "4,5", or these numbers. Raises InputError for
    anything else."""
    try:
        named = {DEEP: [count - 1], ALL: range(count)}.get(blocks) if isinstance(blocks, str) else blocks
        wanted = list(dict.fromkeys(map(int, blocks.split(",")) if named is None else named))
    except ValueError:
        raise InputError(f"blocks is {blocks!r}: expected {DEEP}, {ALL}, or numbers such as 4,5") from None
    for block in wanted:
        if block not in range(count):
            raise InputError(
                f"blocks: there is no block {block}; this flow has the blocks 0 to {count - 1}, the last is deep"
            )
    return wanted


def _check_settings(rank: int, alpha: float, dropout: float) -> None:
    if rank < 1:
        raise InputError(f"rank is {rank}; the minimum is 1")
    if not 0 < alpha < math.inf:
        raise InputError(f"alpha is {alpha:g}; give a number above 0, such as the rank")
    if not 0 <= dropout < 1:
        raise InputError(f"dropout is {dropout:g}; give a number from 0 up to, but not including, 1")


def _check_layers(flow: Flow, loras: dict[str, Lora]) -> None:
    known = set(linear_names(flow, ALL))
    for name, lora in loras.items():
        if name not in known:
            raise InputError(f"{flow.config.name} has no layer {name} that can be adapted")
        layer = flow.get_submodule(name)
        found, wanted = (lora.lora_A.shape[1], lora.lora_B.shape[0]), (layer.in_features, layer.out_features)
        if found != wanted or lora.lora_B.shape[1] != lora.rank:
            raise InputError(
                f"the adapter of {name} has A {tuple(lora.lora_A.shape)} and B {tuple(lora.lora_B.shape)}; the layer "
                f"has {wanted[0]} inputs and {wanted[1]} outputs"
            )


def _adapted(flow: Flow) -> list[tuple[str, AdaptedLinear]]:
    return [(name, layer) for name, layer in flow.named_modules() if isinstance(layer, AdaptedLinear)]


def _put(flow: Flow, name: str, layer: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(flow.get_submodule(parent), attribute, layer)
