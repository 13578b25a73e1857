"""Removing the noise from samples: the learned denoiser in chunks, or one score step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..control import Control, Progress
from ..errors import InputError
from ..model.flow import Flow, Grid, require_finite
from .windows import Prompts

STEP = 0.3  # share of the denoiser's output that is taken off, trained with the model


class DenoiseStream:
    """Learned denoising (STARFlow-V, section 3.3) of frames as they come.

    Clips longer than the window are denoised in chunks of `window` frames; each later chunk starts with the last frames
    of the one before, as they were sampled, and only its new frames are kept. With `overlap` "denoised" it starts with
    their denoised versions, as in the reference. `grid` is the whole clip's. `text` (B, L, D) may be `Prompts`: where
    the prompt changes, a chunk ends, and the next one begins without frames of before, which show something else.
    """

    def __init__(
        self, flow: Flow, grid: Grid, text: Tensor | Prompts, window: int | None = None, overlap: str = "noisy",
        control: Control | None = None,
    ):  # fmt: skip
        config = flow.config
        if config.denoiser is None:
            raise InputError(f"{config.name} has no learned denoiser; use score_denoise")
        if overlap not in ("noisy", "denoised"):
            raise InputError(f"overlap is {overlap!r}, expected noisy or denoised")
        self.flow, self.prompts, self.overlap = flow, Prompts.of(text), overlap
        self.control = control or Control()
        self.window = window or config.window
        lead = min(config.denoiser.window, self.window - 1)  # frames a chunk shares with the last
        self.recent = deque(maxlen=lead)
        self.grid, self.taken, self.done = grid, 0, 0  # frames that came in, and that were returned
        self.chunks = self.prompts.extents(grid.frames, self.window, lead, kept=0)
        self._begin()

    def feed(self, tokens: Tensor) -> Tensor:
        """As `push`, one frame at a time, each of which is reported; the clip ends by itself."""
        done = [tokens[:, :0]]
        for frame in tokens.split(1, 1):
            self.control.report(Progress("denoise", self.taken, self.grid.frames))
            done.append(self.push(frame, last=self.taken + 1 == self.grid.frames))
        self.control.report(Progress("denoise", self.taken, self.grid.frames))
        return torch.cat(done, 1)

    def push(self, tokens: Tensor, last: bool = False) -> Tensor:
        """Take sampled frames (B, n, N, c); return the denoised frames that are final, in order."""
        done = [tokens[:, :0]]
        while tokens.shape[1]:
            if self.taken == self.chunk.stop:
                self._begin()
            room = self.chunk.stop - self.taken
            part, tokens = tokens[:, :room], tokens[:, room:]
            self.taken += part.shape[1]
            done.append(self._advance(part))
        if last:
            done.append(self._run(tokens, True))
        clean = torch.cat(done, 1)
        require_finite(clean, "the denoiser", self.grid, self.done)
        self.done += clean.shape[1]
        return clean

    def _begin(self) -> None:
        self.chunk = next(self.chunks)
        text = self.prompts.texts[self.chunk.prompt]
        self.run = self.flow.denoiser_run(text, self.grid.with_frames(self.window))
        self.pending, self.known = [], self.chunk.known
        if self.known:
            self._run(torch.stack(list(self.recent), 1), False)

    def _advance(self, part: Tensor) -> Tensor:
        if self.overlap == "noisy":
            self.recent.extend(part.unbind(1))
        clean = self._run(part, self.taken == self.chunk.stop)
        if self.overlap == "denoised":
            self.recent.extend(clean.unbind(1))
        return clean

    def _run(self, part: Tensor, last: bool) -> Tensor:
        """Run frames through the chunk; return the clean ones that are final and new."""
        self.pending += part.unbind(1)
        output = self.run.push(part, last)
        count = output.shape[1]
        noisy, self.pending = self.pending[:count], self.pending[count:]
        new = noisy[self.known :]
        output, self.known = output[:, self.known :], max(self.known - count, 0)
        return torch.stack(new, 1) - STEP * output if new else output


def denoise(flow: Flow, latents: Tensor, text: Tensor, **options) -> Tensor:
    """Learned denoising of a whole clip (B, T, C, H, W), conditional text (B, L, D); options as in `DenoiseStream`."""
    grid = flow.grid(latents)
    return flow.latents(DenoiseStream(flow, grid, text, **options).feed(flow.tokens(latents)), grid)


def score_denoise(flow: Flow, latents: Tensor, text: Tensor, control: Control | None = None) -> Tensor:
    """One Tweedie step x + sigma^2 grad log p(x | text) (STARFlow, section 3.2), no guidance.

    Latents (B, T, C, H, W) or (B, C, H, W). Samples are processed one at a time; each keeps one hidden state per layer
    and one layer's activations. May be called inside `torch.inference_mode()`.
    """
    control = control or Control()
    clean = []
    with torch.inference_mode(False), torch.enable_grad(), _recomputing(flow):
        for index in range(len(latents)):
            control.report(Progress("denoise", index, len(latents)))
            x = latents[index : index + 1].detach().clone().requires_grad_()
            y = text[index : index + 1].detach().clone()
            (score,) = torch.autograd.grad(flow.encode(x, y, control).log_likelihood.sum(), x)
            _require_finite_score(flow, score, index)
            clean.append((x + flow.config.noise_std**2 * score).detach())
    control.report(Progress("denoise", len(latents), len(latents)))
    return torch.cat(clean)


def _require_finite_score(flow: Flow, score: Tensor, index: int) -> None:
    clip = score if score.ndim == 5 else score.unsqueeze(1)
    require_finite(flow.tokens(clip), f"the score step of batch element {index}", flow.grid(clip))


@contextmanager
def _recomputing(flow: Flow) -> Iterator[None]:
    """While this context is open, blocks recompute their activations for the gradient instead of keeping them."""
    before = [block.recompute for block in flow.blocks]
    for block in flow.blocks:
        block.recompute = True
    try:
        yield
    finally:
        for block, recompute in zip(flow.blocks, before, strict=True):
            block.recompute = recompute
