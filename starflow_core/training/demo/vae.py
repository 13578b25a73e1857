"""The demo's VAE: like Wan 2.2's (16x in space, 4x in time), with a few million parameters.

It is trained as a plain autoencoder whose latents are disturbed a little, so that the decoder copes with what a flow
that was trained on noisy latents gives it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from ...model.vae.codec import VAE
from ...model.vae.layers import with_fast_layers
from ..loop import Loop
from ..optimiser import Muon
from . import clips

ASPECTS_DRAWN = ("1:1", "1:1", "1:1", "16:9", "9:16")  # each as likely as the others


@dataclass(frozen=True)
class Stage:
    """Steps on clips of one length, `batch` at a time."""

    steps: int
    frames: int
    batch: int


# Stills teach the shapes, short clips the motion, long ones to decode without the clip's start, which is far back when
# frames stream. One learning-rate schedule spans all stages.
STAGES = (Stage(700, 1, 16), Stage(800, 5, 8), Stage(800, 9, 4), Stage(200, 17, 2), Stage(600, 33, 2))
CONFIG = {
    "base_dim": 12,
    "decoder_base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
}


def fresh_vae():
    """An untrained `AutoencoderKLWan` of the demo's size."""
    from diffusers import AutoencoderKLWan

    unit = {"latents_mean": [0.0] * CONFIG["z_dim"], "latents_std": [1.0] * CONFIG["z_dim"]}
    return with_fast_layers(AutoencoderKLWan(**CONFIG, **unit))


def draw_clips(rng: random.Random, frames: int, batch: int) -> Tensor:
    """A batch of clips (B, 3, F, H, W) in [-1, 1]; those of one frame are stills."""
    height, width = clips.SIZES[rng.choice(ASPECTS_DRAWN)]
    scenes = [clips.random_scene(rng, height, width, moving=frames > 1) for _ in range(batch)]
    return clips.render(scenes, frames, height, width)


def reconstruction_loss(vae, pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """Weighted absolute error of clips decoded from disturbed latents, and figures for the log."""
    mean = vae.encode(pixels).latent_dist.mean.float()
    deviation = mean.detach().std(dim=(0, 2, 3, 4), keepdim=True)
    strength = torch.rand(len(mean), 1, 1, 1, 1, generator=generator).to(mean) * 0.25
    noise = torch.randn(mean.shape, generator=generator).to(mean)
    # Clamping would stop the gradients of saturated pixels.
    output = VAE(vae).decode(mean + strength * deviation * noise, clamp=False)
    saturation = pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True)
    weight = 1 + 4 * (saturation > 0.3).float()  # the shape is a tenth of the picture
    error = (weight * (output - pixels).abs()).mean()
    size = mean.square().mean()
    mse = (output.detach().clamp(-1, 1) - pixels).square().mean()
    psnr = 10 * torch.log10(4 / mse)
    figures = {"error": error.item(), "psnr": psnr.item(), "rms": size.item() ** 0.5}
    return error + 1e-4 * size, figures


def train_vae(loop: Loop):
    """Train to the end of the schedule; returns the averaged model with its latents' statistics."""
    torch.manual_seed(loop.seed)
    vae = fresh_vae()
    optimizer = Muon(vae.parameters(), lr=0.02, adam_lr=2e-3)
    stages = [stage for stage in STAGES for _ in range(loop.scaled(stage.steps))]

    def step(index: int, rng: random.Random, generator: torch.Generator):
        stage = stages[index]
        yield reconstruction_loss(vae, draw_clips(rng, stage.frames, stage.batch).to(loop.device), generator)

    return with_statistics(loop.run("vae", vae, optimizer, step, len(stages), ema=0.995))


@torch.no_grad()
def with_statistics(vae, count: int = 96):
    """The same VAE, with mean and deviation of its latents over `count` clips in its configuration."""
    rng = random.Random(1)
    device = next(vae.parameters()).device
    means = []
    for _ in range(count // 8):
        latents = vae.encode(draw_clips(rng, 33, 8).to(device)).latent_dist.mean
        means.append(latents.float().transpose(0, 1).flatten(1))
    latents = torch.cat(means, 1)
    vae.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).tolist())
    return vae
