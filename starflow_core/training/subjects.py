"""What can be trained: each has a module of which some weights learn, a loss of every sample, and a file at the end."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..model.flow import Flow
from ..model.lora import Lora, adapt
from ..weights.flow import save_flow
from ..weights.lora import save_lora
from .objectives import bits_per_dim, denoiser_errors, shares, with_fresh_weights
from .processes import Processes, whole
from .settings import Settings

Losses = tuple[Tensor, dict[str, Tensor]]  # of each sample (B,): what is minimised, and figures for the log


class Likelihood:
    """A flow, trained by maximum likelihood of noisy latents (STARFlow, section 3.1): its weights, or a LoRA's."""

    def __init__(self, flow: Flow, loras: dict[str, Lora] | None = None):
        self.module, self.loras = flow, loras

    def losses(self, clean: Tensor, noisy: Tensor, text: Tensor, given: int) -> Losses:
        losses = self.module.loss(noisy, text, given)
        return losses, {"bits/dim": bits_per_dim(losses.detach())}

    def measured(self, clean: Tensor, noisy: Tensor, text: Tensor, given: int) -> dict[str, Tensor]:
        """Figures of samples that are held out: bits a dimension, and the nats an element of each block."""
        parts = shares(self.module(noisy, text), given)
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

    def __init__(self, flow: Flow):
        flow.requires_grad_(False)
        flow.learnable_self_denoiser.requires_grad_()
        self.module = flow

    def losses(self, clean: Tensor, noisy: Tensor, text: Tensor, given: int) -> Losses:
        denoiser, variance = self.module.learnable_self_denoiser, self.module.config.noise_std**2
        errors = denoiser_errors(self.module, denoiser, clean, noisy, text)
        figures = {name: value.flatten(1).mean(1) / variance for name, value in errors.items()}
        return figures["error"], {name: value.detach() for name, value in figures.items()}

    def measured(self, clean: Tensor, noisy: Tensor, text: Tensor, given: int) -> dict[str, Tensor]:
        with torch.enable_grad():  # the score is one
            _, figures = self.losses(clean, noisy, text, given)
        return {f"held out {name}": value for name, value in figures.items()}

    def write(self, path: Path, metadata: dict[str, str], processes: Processes) -> None:
        write_flow(self.module, path, metadata, processes)


def subject_of(flow: Flow, settings: Settings) -> Likelihood | Denoising:
    """What the settings train of a flow, with float32 weights where it learns."""
    if settings.train == "denoiser":
        return Denoising(flow)
    if settings.train == "lora":
        generator = torch.Generator().manual_seed(settings.seed)
        alpha = settings.alpha if settings.alpha is not None else float(settings.rank)
        return Likelihood(flow, adapt(flow, settings.rank, alpha, settings.dropout, blocks_of(settings), generator))
    if settings.train == "scratch":
        torch.manual_seed(settings.seed)
        with_fresh_weights(flow)
    flow.requires_grad_()
    if flow.config.denoiser:
        flow.learnable_self_denoiser.requires_grad_(False)
    return Likelihood(flow)


def blocks_of(settings: Settings) -> str | list[int]:
    """ "deep", "all", or numbers. Raises InputError for anything else."""
    if settings.blocks in ("deep", "all"):
        return settings.blocks
    try:
        return [int(part) for part in settings.blocks.split(",")]
    except ValueError:
        raise InputError(f"blocks is {settings.blocks!r}: expected deep, all, or numbers such as 4,5") from None


def write_flow(flow: Flow, path: Path, metadata: dict[str, str], processes: Processes) -> None:
    """A flow's file, also where its weights are spread over processes."""
    state = {name: whole(value) for name, value in flow.state_dict().items()}
    if processes.leads:
        with torch.device("meta"):
            copy = Flow(flow.config)
        copy.load_state_dict({name: value.cpu() for name, value in state.items()}, assign=True)
        save_flow(copy, path, "bf16", metadata)


def _whole_lora(lora: Lora) -> Lora:
    return Lora(whole(lora.lora_A.detach()).cpu(), whole(lora.lora_B.detach()).cpu(), lora.alpha)
