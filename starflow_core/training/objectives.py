"""Fresh weights for a flow, and what it and its denoiser are trained to do."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..model.denoiser import DenoiserNet
from ..model.flow import Encoding, Flow
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


def shares(encoding: Encoding, given: int = 0) -> dict[str, Tensor]:
    """The parts of a flow's loss, which add up to it: nats per element of the noise and of each block, (B,) each. The
    first `given` frames don't count."""
    noise = encoding.noise[:, given:].flatten(1)
    blocks = {f"block {i}": -d[:, given:].flatten(1).mean(1) for i, d in enumerate(encoding.logdets)}
    return {"noise": 0.5 * noise.square().mean(1)} | blocks


def bits_per_dim(losses: Tensor) -> Tensor:
    """Of losses in nats per element, which lack the constant of the Gaussian."""
    return (losses + 0.5 * math.log(2 * math.pi)) / math.log(2)


def denoiser_loss(
    flow: Flow, denoiser: DenoiserNet, clean: Tensor, noisy: Tensor, text: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """The mean of each of `denoiser_errors`, in units of sigma^2, and the one that is minimised."""
    errors, variance = denoiser_errors(flow, denoiser, clean, noisy, text), flow.config.noise_std**2
    means = {name: value.mean() / variance for name, value in errors.items()}
    return means["error"], {name: value.item() for name, value in means.items()}


def denoiser_errors(
    flow: Flow, denoiser: DenoiserNet, clean: Tensor, noisy: Tensor, text: Tensor
) -> dict[str, Tensor]:  # fmt: skip
    """Squared error of the denoiser against sigma^2 times the score of the flow, and how much noise is left, squared,
    after the denoiser and after the score itself; each (B, T, C, h, w)."""
    variance = flow.config.noise_std**2
    pull = variance * _score(flow, noisy, text)
    taken = STEP * _denoiser_output(flow, denoiser, noisy, text)
    return {
        "error": (taken + pull).square(),
        "noise left": (noisy - taken - clean).square(),
        "by score": (noisy + pull - clean).square(),
    }


def pictures_apart(made: Tensor, wanted: Tensor, sizes: int = 3) -> Tensor:
    """The mean absolute error of pictures (b, 3, H, W) at full, half and a quarter of their size: (b,)."""
    total = (made - wanted).abs().flatten(1).mean(1)
    for _ in range(sizes - 1):
        made, wanted = (torch.nn.functional.avg_pool2d(x, 2, ceil_mode=True) for x in (made, wanted))
        total = total + (made - wanted).abs().flatten(1).mean(1)
    return total / sizes


def _score(flow: Flow, latents: Tensor, text: Tensor) -> Tensor:
    """The gradient of the log-likelihood with respect to the latents."""
    x = latents.detach().requires_grad_()
    return torch.autograd.grad(flow.encode(x, text).log_likelihood.sum(), x)[0]


def _denoiser_output(flow: Flow, denoiser: DenoiserNet, latents: Tensor, text: Tensor) -> Tensor:
    grid = flow.grid(latents)
    output = flow.denoiser_run(text, grid, denoiser).push(flow.tokens(latents), last=True)
    return flow.latents(output, grid)
