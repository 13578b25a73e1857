"""Maximum likelihood for the flow and its text encoder, score matching for the denoiser."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...jobs.context import later_factors
from ...jobs.prompts import wrap
from ...model.config import Defaults, Denoiser, FlowConfig, PromptFormat
from ...model.denoiser import DenoiserRun
from ...model.flow import Flow
from ...model.latent import LatentFormat, to_flow_space
from ...model.text import TextEncoder
from ...solve.denoising import STEP
from ..loop import Loop
from ..optimiser import Muon
from . import clips
from .bank import Bank

FLOW_STEPS, DENOISER_STEPS = 4500, 1100
TASKS, SHARES = ("still", "text", "extend", "edit", "last_frame"), (8, 26, 10, 26, 30)
WHOLE = 0.8  # share of last-frame batches whose clips have the default's length
CAPTION_DROP = 0.1
PREFIX_DROP = 0.25  # later windows of a long video continue under a prompt without `(extend)`
FPS = 16
TEXT_CONFIG = {
    "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu", "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """Clean latents (B, T, C, h, w) in flow space with their wrapped prompts; the first `given` frames
    are a context of the task."""

    latents: Tensor
    prompts: list[str]
    given: int


def demo_config(vae) -> FlowConfig:
    """The demo model on this VAE: STARFlow-V in small."""
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
        text_dim=128,
        rope_length=6,
        noise_std=0.2,
        head_dim=32,
        rounding="exact",
        window=10,
        denoiser=Denoiser(width=128, layers=3, window=4),
        tasks=("text", "first_frame", "extend", "edit", "last_frame"),
        aspects=("1:1", "16:9", "9:16"),
        defaults=Defaults(guidance=1.0, size=96, aspect="1:1", frames=33, fps=FPS),
    )


def text_encoder(vocabulary: int):
    """A fresh T5 encoder of the demo's size."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=vocabulary, **TEXT_CONFIG))


class Model(nn.Module):
    """Flow and text encoder, trained together."""

    def __init__(self, config: FlowConfig, tokenizer):
        super().__init__()
        self.flow, self.text = initialised(Flow(config)), text_encoder(tokenizer.get_vocab_size())
        self.encoder = TextEncoder(self.text, tokenizer)

    def embed(self, prompts: list[str]) -> Tensor:
        """Embeddings (B, tokens, dim) with gradients."""
        return self.encoder.embed(prompts, self.flow.config.prompt.tokens).embeddings


def initialised(flow: Flow) -> Flow:
    """Fresh weights: every block starts as the identity, each layer adds nothing yet."""
    for name, parameter in flow.named_parameters():
        if name.endswith("sos_embed"):
            nn.init.normal_(parameter, std=0.5)
        elif "proj_out" in name or name.endswith(("attention.proj.weight", "main.2.weight")):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return flow


def draw(config: FlowConfig, banks: list[Bank], rng: random.Random, progress: float) -> Batch:
    """A batch of one task and one aspect ratio. `progress` 0..1: clips grow over the first third."""
    bank = rng.choices(banks, weights=[len(b.scenes) for b in banks])[0]
    task = rng.choices(TASKS, weights=SHARES)[0]
    longest = config.window if progress > 0.3 else 3 + int(progress / 0.3 * (config.window - 3))
    if task == "last_frame":
        # Its end decides a clip's first frames, the others go on as those began: mostly the first are learned.
        frames = min(longest, rng.choice((3, 3, 4, 5, longest)))
    else:
        frames = rng.choice((longest, longest, longest - 1, max(2, longest // 2)))
    count = 64 if task == "still" else min(36, max(12, 120 // frames))
    # A motion that has halted belongs into a continuation; elsewhere it would belie the caption.
    pool = [i for i, scene in enumerate(bank.scenes) if task == "extend" or not scene.start]
    picks = rng.sample(pool, min(count, len(pool)))
    build = {"still": _stills, "text": _texts, "extend": _extensions, "edit": _edits, "last_frame": _lasts}[task]
    latents, captions = build(bank, picks, frames, rng)
    given = {"edit": bank.edits.shape[2], "last_frame": 1}.get(task, 0)
    latents = to_flow_space(config.latent, latents, later_factors(config, task, given, latents.shape[2]))
    fps = 0 if task == "still" else FPS
    drop_prefix = task == "extend" and rng.random() < PREFIX_DROP
    prefix = "text" if drop_prefix or task == "still" else task
    captions = ["" if rng.random() < CAPTION_DROP else c for c in captions]
    prompts = [wrap(c, config, fps=fps, aspect=bank.aspect, task=prefix) for c in captions]
    return Batch(latents, prompts, given)


def _captions(bank: Bank, picks: list[int], rng: random.Random) -> list[str]:
    return [clips.caption(bank.scenes[i], rng) for i in picks]


def _stills(bank, picks, frames, rng):
    captions = [clips.caption(replace(bank.scenes[i], direction=None), rng) for i in picks]
    moment = rng.randrange(bank.lasts.shape[2] + 1)
    return (bank.lasts[:, :, moment - 1 : moment] if moment else bank.clips[:, :, :1])[picks], captions


def _texts(bank, picks, frames, rng):
    return bank.clips[picks, :, :frames], _captions(bank, picks, rng)


def _extensions(bank, picks, frames, rng):
    return bank.clips[picks, :, 1 : frames + 1], _captions(bank, picks, rng)


def _edits(bank, picks, frames, rng):
    captions = [clips.edit_caption(bank.colours[i], rng) for i in picks]
    return torch.cat((bank.clips[picks, :, : bank.edits.shape[2]], bank.edits[picks]), 2), captions


def _lasts(bank, picks, frames, rng):
    """Clips of the longest length, mostly: nothing says to the model how long they will be."""
    longest = bank.lasts.shape[2] + 2
    length = max(frames, longest if rng.random() < WHOLE else rng.randint(3, longest))
    last = bank.lasts[picks, :, length - 3 : length - 2]
    return torch.cat((last, bank.clips[picks, :, : frames - 1]), 2), _captions(bank, picks, rng)


def train_flow(loop: Loop, config: FlowConfig, banks: list[Bank], tokenizer) -> Model:
    """Maximum likelihood of noisy latents, text encoder included; returns averaged weights."""
    torch.manual_seed(loop.seed)
    model = Model(config, tokenizer)
    embeddings = [model.text.shared.weight, *(b.sos_embed for b in model.flow.blocks)]
    optimizer = Muon(_without_denoiser(model), lr=0.01, adam_lr=2e-3, vectors=embeddings)
    total = loop.scaled(FLOW_STEPS)

    def step(index: int, rng: random.Random, generator: torch.Generator):
        batch = draw(config, banks, rng, index / total)
        latents = _noisy(batch.latents, config.noise_std, generator, loop.device)
        loss = model.flow.loss(latents, model.embed(batch.prompts), batch.given).mean()
        return loss, {"loss": loss.item(), "frames": latents.shape[1]}

    return loop.run("flow", model, optimizer, step, total)


def train_denoiser(loop: Loop, model: Model, banks: list[Bank]) -> Model:
    """Teach the denoiser sigma^2 times the score of the frozen flow's own likelihood."""
    flow, config = model.flow, model.flow.config
    model.requires_grad_(False)
    net = initialised_denoiser(flow).requires_grad_()
    optimizer = Muon(net.parameters(), lr=0.01, adam_lr=2e-3)
    total = loop.scaled(DENOISER_STEPS)
    model.to(loop.device).eval()

    def step(index: int, rng: random.Random, generator: torch.Generator):
        batch = draw(config, banks, rng, 0.3 + index / total)
        noisy = _noisy(batch.latents, config.noise_std, generator, loop.device)
        text = model.embed(batch.prompts).detach()
        pull = config.noise_std**2 * _score(flow, noisy, text)
        output = STEP * _denoiser_output(flow, net, noisy, text)
        error = (output + pull).square().mean() / config.noise_std**2
        clean = batch.latents.to(noisy)
        left = ((noisy - output - clean).square().mean() / config.noise_std**2).item()
        best = ((noisy + pull - clean).square().mean() / config.noise_std**2).item()
        return error, {"error": error.item(), "noise left": left, "by score": best}

    flow.learnable_self_denoiser = loop.run("denoiser", net, optimizer, step, total)
    return model


def initialised_denoiser(flow: Flow) -> nn.Module:
    initialised(flow.learnable_self_denoiser)
    return flow.learnable_self_denoiser


def _without_denoiser(model: Model):
    return [p for name, p in model.named_parameters() if "learnable_self_denoiser" not in name]


def _score(flow: Flow, latents: Tensor, text: Tensor) -> Tensor:
    x = latents.detach().requires_grad_()
    return torch.autograd.grad(flow.encode(x, text).log_likelihood.sum(), x)[0]


def _denoiser_output(flow: Flow, net, latents: Tensor, text: Tensor) -> Tensor:
    grid = flow.grid(latents)
    rotary, text_rotary = flow.rotary(grid, latents.device), flow.text_rotary(text.shape[1], latents.device)
    run = DenoiserRun(net, flow.config.denoiser, text, grid.frame_tokens, text_rotary, rotary, flow.compute_dtype)
    return flow.latents(run.push(flow.tokens(latents), last=True), grid)


def _noisy(latents: Tensor, sigma: float, generator: torch.Generator, device) -> Tensor:
    noise = torch.randn(latents.shape, generator=generator)
    return (latents + sigma * noise).to(device)
