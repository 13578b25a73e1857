"""The demo's flow, trained with its text encoder by maximum likelihood, and its denoiser."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from ...model.config import Defaults, Denoiser, FlowConfig, PromptFormat
from ...model.flow import Flow
from ...model.latent import LatentFormat
from ...model.text import TextEncoder
from ..loop import Loop
from ..objectives import denoiser_loss, with_fresh_weights, with_noise
from ..optimiser import Muon
from .bank import Bank
from .batches import FPS, draw_batch
from .clips import SIZES

FLOW_STEPS, DENOISER_STEPS = 4500, 1100
TEXT_CONFIG = {
    "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu", "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip


def demo_config(vae) -> FlowConfig:
    """The demo model on this VAE: a small STARFlow-V."""
    statistics = vae.config
    return FlowConfig(
        name="STARFlow demo",
        kind="video",
        latent=LatentFormat(
            statistics.z_dim, 16, 4, tuple(statistics.latents_mean), tuple(statistics.latents_std), later_factor=0.8
        ),
        prompt=PromptFormat(tokens=48, fps=True, noise_level=True, aspect=True),
        layers=(2, 2, 5),
        width=128,
        deep_width=160,
        text_dim=TEXT_CONFIG["d_model"],
        rope_length=6,
        noise_std=0.2,
        head_dim=32,
        rounding="exact",
        window=10,
        denoiser=Denoiser(width=128, layers=3, window=4),
        tasks=("text", "first_frame", "extend", "edit", "last_frame"),
        aspects=tuple(SIZES),
        defaults=Defaults(guidance=1.0, size=96, aspect="1:1", frames=33, fps=FPS),
    )


def fresh_text_encoder(vocabulary: int):
    """An untrained T5 encoder of the demo's size."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=vocabulary, **TEXT_CONFIG))


class FlowWithText(nn.Module):
    """A flow and its text encoder, to be trained together."""

    def __init__(self, config: FlowConfig, tokenizer):
        super().__init__()
        self.flow = with_fresh_weights(Flow(config))
        self.text = fresh_text_encoder(tokenizer.get_vocab_size())
        self.encoder = TextEncoder(self.text, tokenizer)

    def embed(self, prompts: list[str]) -> Tensor:
        """Embeddings (B, tokens, dim) with gradients."""
        return self.encoder.embed(prompts, self.flow.config.prompt.tokens).embeddings


def train_flow(loop: Loop, config: FlowConfig, banks: list[Bank], tokenizer) -> FlowWithText:
    """Maximum likelihood of noisy latents, text encoder included; returns averaged weights."""
    torch.manual_seed(loop.seed)
    model = FlowWithText(config, tokenizer)
    learned = [p for name, p in model.named_parameters() if "learnable_self_denoiser" not in name]
    embeddings = [model.text.shared.weight, *(b.sos_embed for b in model.flow.blocks)]
    optimizer = Muon(learned, lr=0.01, adam_lr=2e-3, vectors=embeddings)
    total = loop.scaled(FLOW_STEPS)

    def step(index: int, rng: random.Random, generator: torch.Generator):
        batch = draw_batch(config, banks, rng, index / total)
        noisy = with_noise(batch.latents, config.noise_std, generator, loop.device)
        loss = model.flow.loss(noisy, model.embed(batch.prompts), batch.given).mean()
        yield loss, {"loss": loss.item(), "frames": noisy.shape[1]}

    return loop.run("flow", model, optimizer, step, total)


def train_denoiser(loop: Loop, model: FlowWithText, banks: list[Bank]) -> FlowWithText:
    """Teach the denoiser sigma^2 times the score of the flow, which stays as it is."""
    flow, config = model.flow, model.flow.config
    model.requires_grad_(False)
    denoiser = with_fresh_weights(flow.learnable_self_denoiser).requires_grad_()
    optimizer = Muon(denoiser.parameters(), lr=0.01, adam_lr=2e-3)
    total = loop.scaled(DENOISER_STEPS)
    model.to(loop.device).eval()

    def step(index: int, rng: random.Random, generator: torch.Generator):
        batch = draw_batch(config, banks, rng, progress=1.0)
        noisy = with_noise(batch.latents, config.noise_std, generator, loop.device)
        yield denoiser_loss(flow, denoiser, batch.latents.to(noisy), noisy, model.embed(batch.prompts).detach())

    flow.learnable_self_denoiser = loop.run("denoiser", denoiser, optimizer, step, total)
    return model
