"""What can be trained: each has a module of which some weights learn, a loss of every sample, and a file at the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..model.config import FlowConfig
from ..model.flow import Flow
from ..model.latent import to_vae_space
from ..model.lora import Lora, adapt
from ..model.vae.codec import VAE
from ..weights.flow import save_flow
from ..weights.lora import save_lora
from ..weights.vae import save_vae
from .objectives import bits_per_dim, denoiser_errors, pictures_apart, shares, with_fresh_weights
from .processes import Processes, whole
from .settings import Settings

Losses = tuple[Tensor, dict[str, Tensor]]  # of each sample (b,): what is minimised, and figures for the log


@dataclass(frozen=True)
class Rows:
    """What a subject sees of a batch: clean and noisy latents (b, T, C, h, w) in flow space, text (b, L, D), how many
    frames don't count, and, where it looks at them, pixels (b, 3, F, H, W) in [-1, 1]."""

    clean: Tensor
    noisy: Tensor
    text: Tensor
    given: int
    pixels: Tensor | None = None


class Likelihood:
    """A flow, trained by maximum likelihood of noisy latents (STARFlow, section 3.1): its weights, or a LoRA's."""

    sees_pixels = False

    def __init__(self, flow: Flow, loras: dict[str, Lora] | None = None):
        self.module, self.config, self.loras = flow, flow.config, loras

    def losses(self, rows: Rows) -> Losses:
        losses = self.module.loss(rows.noisy, rows.text, rows.given)
        return losses, {"bits/dim": bits_per_dim(losses.detach())}

    def measured(self, rows: Rows) -> dict[str, Tensor]:
        """Figures of samples that are held out: bits a dimension, and the nats an element of each block."""
        parts = shares(self.module(rows.noisy, rows.text), rows.given)
        return {"held out bits/dim": bits_per_dim(sum(parts.values()))} | {f"held out {k}": v for k, v in parts.items()}

    def write(self, path: Path, metadata: dict[str, str], processes: Processes) -> None:
        """All processes have to call it; one writes."""
        if self.loras is not None:
            loras = {name: _whole_lora(lora) for name, lora in self.loras.items()}
            if processes.leads:
                save_lora(loras, path, self.module.config, metadata)
        else:
            write_flow(self.module, path, metadata, processes)


class Denoising:
    """The learned denoiser, trained to give sigma^2 times the score of its flow, which stays (STARFlow-V, section
    3.2)."""

    sees_pixels = False

    def __init__(self, flow: Flow):
        flow.requires_grad_(False)
        flow.learnable_self_denoiser.float().requires_grad_()
        self.module, self.config = flow, flow.config

    def losses(self, rows: Rows) -> Losses:
        denoiser, variance = self.module.learnable_self_denoiser, self.module.config.noise_std**2
        errors = denoiser_errors(self.module, denoiser, rows.clean, rows.noisy, rows.text)
        figures = {name: value.flatten(1).mean(1) / variance for name, value in errors.items()}
        return figures["error"], {name: value.detach() for name, value in figures.items()}

    def measured(self, rows: Rows) -> dict[str, Tensor]:
        with torch.enable_grad():  # the score is one
            _, figures = self.losses(rows)
        return {f"held out {name}": value for name, value in figures.items()}

    def write(self, path: Path, metadata: dict[str, str], processes: Processes) -> None:
        write_flow(self.module, path, metadata, processes)


class Decoding:
    """An image VAE's decoder, trained to show the pictures behind noisy latents, so that a sample needs no denoising.

    By absolute error at several sizes; the authors also use networks that judge pictures, which aren't to be had here.
    """

    sees_pixels = True

    def __init__(self, vae: VAE, config: FlowConfig):
        if vae.kind != "image":
            raise InputError(f"the VAE of {config.name} is for clips; the decoder of an image VAE can be trained")
        self.vae, self.module, self.config = vae, vae.module, config
        for part in (vae.module.decoder, vae.module.post_quant_conv):
            if part is not None:
                part.requires_grad_()

    def losses(self, rows: Rows) -> Losses:
        latents = to_vae_space(self.config.latent, rows.noisy, torch.ones(1)).squeeze(2)
        errors = pictures_apart(self.vae.decode(latents, clamp=False), rows.pixels.squeeze(2))
        return errors, {"error": errors.detach()}

    def measured(self, rows: Rows) -> dict[str, Tensor]:
        return {"held out error": self.losses(rows)[0]}

    def write(self, path: Path, metadata: dict[str, str], processes: Processes) -> None:
        if processes.leads:
            save_vae(self.vae, path, metadata)


def subject_of(flow: Flow, settings: Settings) -> Likelihood | Denoising:
    """What the settings train of a flow, with float32 weights where it learns."""
    if settings.train == "denoiser":
        return Denoising(flow)
    if settings.train == "lora":
        generator = torch.Generator().manual_seed(settings.seed)
        alpha = settings.alpha if settings.alpha is not None else float(settings.rank)
        return Likelihood(flow, adapt(flow, settings.rank, alpha, settings.dropout, settings.blocks, generator))
    if settings.train == "scratch":
        torch.manual_seed(settings.seed)
        with_fresh_weights(flow)
    flow.requires_grad_()
    if flow.config.denoiser:
        flow.learnable_self_denoiser.requires_grad_(False)
    return Likelihood(flow)


def write_flow(flow: Flow, path: Path, metadata: dict[str, str], processes: Processes) -> None:
    """A flow's file, also where its weights are spread over processes."""
    state = {}
    for name, value in flow.state_dict().items():
        gathered = whole(value)  # by all, but kept by one
        if processes.leads:
            state[name] = gathered.cpu()
    if processes.leads:
        copy = Flow(flow.config, device="meta")
        copy.load_state_dict(state, assign=True)
        save_flow(copy, path, "bf16", metadata)


def _whole_lora(lora: Lora) -> Lora:
    return Lora(whole(lora.lora_A.detach()).cpu(), whole(lora.lora_B.detach()).cpu(), lora.alpha)
