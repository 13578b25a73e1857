"""Muon for matrices and kernels, Adam for the rest (biases, gains, embeddings)."""

from __future__ import annotations

import torch
from torch import Tensor

# Newton-Schulz coefficients of the quintic iteration (Keller Jordan, 2024): they push every
# singular value near 1 in five steps, without an SVD.
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices to `matrices` (..., rows, columns), roughly."""
    a, b, c = QUINTIC
    rows, columns = matrices.shape[-2:]
    x = matrices.bfloat16() if rows * columns > 4096 else matrices.float()
    wide = rows <= columns
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """One optimizer for a whole module: `lr` for matrices, `adam_lr` for everything else.

    A kernel (out, in, ...) counts as the matrix (out, in * ...). `vectors` are matrices that
    should be treated by Adam all the same (token embeddings).
    """

    def __init__(self, parameters, lr=0.02, adam_lr=2e-3, momentum=0.95, vectors=()):
        parameters = [p for p in parameters if p.requires_grad]
        keep = {id(p) for p in vectors}
        matrices = [p for p in parameters if _is_matrix(p) and id(p) not in keep]
        known = {id(p) for p in matrices}
        rest = [p for p in parameters if id(p) not in known]
        groups = [
            {"params": matrices, "lr": lr, "muon": True},
            {"params": rest, "lr": adam_lr, "muon": False},
        ]
        super().__init__([g for g in groups if g["params"]], {"momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                for alike in _by_shape(parameters):
                    self._muon(alike, group)
            else:
                for parameter in parameters:
                    self._adam(parameter, group)

    def _muon(self, parameters: list[Tensor], group: dict) -> None:
        """Matrices of one shape, in one product: many small ones would cost mostly overhead."""
        ahead = torch.stack([self._look_ahead(p, group["momentum"]) for p in parameters])
        rows, columns = ahead.shape[1:]
        rate = group["lr"] * max(1.0, rows / columns) ** 0.5
        for parameter, update in zip(parameters, orthogonalised(ahead), strict=True):
            parameter.add_(update.view_as(parameter), alpha=-rate)

    def _look_ahead(self, parameter: Tensor, beta: float) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - beta)
        return parameter.grad.lerp(state["momentum"], beta).flatten(1)

    def _adam(self, parameter: Tensor, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # a tensor, as all that is saved
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        state["mean"].lerp_(parameter.grad, 0.1)
        state["square"].lerp_(parameter.grad.square(), 0.01)
        step = int(state["step"])
        mean = state["mean"] / (1 - 0.9**step)
        root = (state["square"] / (1 - 0.99**step)).sqrt()
        parameter.addcdiv_(mean, root + 1e-8, value=-group["lr"])


def set_rates(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Scale the learning rates that an optimizer began with by a schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * scale


def _by_shape(parameters: list[Tensor]) -> list[list[Tensor]]:
    alike: dict[tuple[int, int], list[Tensor]] = {}
    for parameter in parameters:
        alike.setdefault((len(parameter), parameter[0].numel()), []).append(parameter)
    return list(alike.values())


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and parameter.shape[0] > 1 and parameter[0].numel() > 1
