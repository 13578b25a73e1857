"""Fresh weights for a flow, and what it and its denoiser are trained to do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..model.denoiser import DenoiserNet
from ..model.flow import Flow
from ..solve.denoising import STEP


def with_fresh_weights(module: Flow | DenoiserNet):
    """The module, initialised: every block of a flow starts as the identity, every layer adds nothing yet."""
    for name, parameter in module.named_parameters():
        if name.endswith("sos_embed"):
            nn.init.normal_(parameter, std=0.5)
        elif "proj_out" in name or name.endswith(("attention.proj.weight", "main.2.weight")):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return module


def with_noise(latents: Tensor, sigma: float, generator: torch.Generator, device: torch.device) -> Tensor:
    """Latents on the device, with the noise that a flow is trained on."""
    noise = torch.randn(latents.shape, generator=generator)
    return (latents + sigma * noise).to(device)


def denoiser_loss(
    flow: Flow, denoiser: DenoiserNet, clean: Tensor, noisy: Tensor, text: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Squared error of the denoiser against sigma^2 times the score of the flow, in units of sigma^2.

    The figures are this error, and how much noise is left after the denoiser and after the score itself.
    """
    variance = flow.config.noise_std**2
    pull = variance * _score(flow, noisy, text)
    taken = STEP * _denoiser_output(flow, denoiser, noisy, text)
    error = (taken + pull).square().mean() / variance
    left = (noisy - taken - clean).square().mean() / variance
    best = (noisy + pull - clean).square().mean() / variance
    return error, {"error": error.item(), "noise left": left.item(), "by score": best.item()}


def _score(flow: Flow, latents: Tensor, text: Tensor) -> Tensor:
    """The gradient of the log-likelihood with respect to the latents."""
    x = latents.detach().requires_grad_()
    return torch.autograd.grad(flow.encode(x, text).log_likelihood.sum(), x)[0]


def _denoiser_output(flow: Flow, denoiser: DenoiserNet, latents: Tensor, text: Tensor) -> Tensor:
    grid = flow.grid(latents)
    output = flow.denoiser_run(text, grid, denoiser).push(flow.tokens(latents), last=True)
    return flow.latents(output, grid)
