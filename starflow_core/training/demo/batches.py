"""What the flow sees in one step: a batch of one task and one aspect ratio, drawn from the banks."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...jobs.context import later_factors
from ...jobs.prompts import wrap
from ...model.config import FlowConfig
from ...model.latent import to_flow_space
from . import clips
from .bank import Bank

FPS = 16
TASK_SHARES = {"still": 8, "text": 26, "extend": 10, "edit": 26, "last_frame": 30}
GROWTH = 0.3  # share of the steps over which the clips grow to the whole window
LONGEST_SHARE = 0.8  # of the last-frame batches have clips of the longest length
CAPTION_DROP = 0.1  # share of empty captions, which guidance needs
PREFIX_DROP = 0.25  # share of continuations without `(extend)`, as in the later windows of a long video


@dataclass(frozen=True)
class Batch:
    """Clean latents (B, T, C, h, w) in flow space with their wrapped prompts. The first `given` frames belong to the
    task's context and are not learned."""

    latents: Tensor
    prompts: list[str]
    given: int


def draw_batch(config: FlowConfig, banks: list[Bank], rng: random.Random, progress: float) -> Batch:
    """A batch for a step at which this share of the steps, 0 to 1, is done."""
    bank = rng.choices(banks, weights=[len(b.scenes) for b in banks])[0]
    task = rng.choices(list(TASK_SHARES), weights=list(TASK_SHARES.values()))[0]
    frames = _draw_length(task, config.window, rng, progress)
    picks = _draw_scenes(bank, task, frames, rng)
    build = {"still": _stills, "text": _texts, "extend": _extensions, "edit": _edits, "last_frame": _lasts}[task]
    latents, captions = build(bank, picks, frames, rng)
    given = {"edit": bank.edits.shape[2], "last_frame": 1}.get(task, 0)
    latents = to_flow_space(config.latent, latents, later_factors(config, task, given, latents.shape[2]))
    drop_prefix = task == "extend" and rng.random() < PREFIX_DROP
    prefix = "text" if drop_prefix or task == "still" else task
    captions = ["" if rng.random() < CAPTION_DROP else c for c in captions]
    fps = 0 if task == "still" else FPS
    prompts = [wrap(c, config, fps=fps, aspect=bank.aspect, task=prefix) for c in captions]
    return Batch(latents, prompts, given)


def _draw_length(task: str, window: int, rng: random.Random, progress: float) -> int:
    """Latent frames of a clip; at first they are few."""
    longest = window if progress > GROWTH else 3 + int(progress / GROWTH * (window - 3))
    if task == "last_frame":
        # The given end decides a clip's first frames, and the others go on from those: mostly the first are trained.
        return min(longest, rng.choice((3, 3, 4, 5, longest)))
    return rng.choice((longest, longest, longest - 1, max(2, longest // 2)))


def _draw_scenes(bank: Bank, task: str, frames: int, rng: random.Random) -> list[int]:
    count = 64 if task == "still" else min(36, max(12, 120 // frames))
    # A shape that has stopped may be continued; elsewhere it would contradict the caption.
    pool = [i for i, scene in enumerate(bank.scenes) if task == "extend" or not scene.start]
    return rng.sample(pool, min(count, len(pool)))


# Each task's latents (B, C, T, h, w) in VAE space, and their captions.


def _captions(bank: Bank, picks: list[int], rng: random.Random) -> list[str]:
    return [clips.caption(bank.scenes[i], rng) for i in picks]


def _stills(bank: Bank, picks: list[int], frames: int, rng: random.Random):
    captions = [clips.caption(replace(bank.scenes[i], direction=None), rng) for i in picks]
    moment = rng.randrange(bank.lasts.shape[2] + 1)
    return (bank.lasts[:, :, moment - 1 : moment] if moment else bank.clips[:, :, :1])[picks], captions


def _texts(bank: Bank, picks: list[int], frames: int, rng: random.Random):
    return bank.clips[picks, :, :frames], _captions(bank, picks, rng)


def _extensions(bank: Bank, picks: list[int], frames: int, rng: random.Random):
    return bank.clips[picks, :, 1 : frames + 1], _captions(bank, picks, rng)


def _edits(bank: Bank, picks: list[int], frames: int, rng: random.Random):
    captions = [clips.edit_caption(bank.colours[i], rng) for i in picks]
    return torch.cat((bank.clips[picks, :, : bank.edits.shape[2]], bank.edits[picks]), 2), captions


def _lasts(bank: Bank, picks: list[int], frames: int, rng: random.Random):
    """Mostly clips of the longest length: nothing tells the model how long they will be."""
    longest = bank.lasts.shape[2] + 2
    length = max(frames, longest if rng.random() < LONGEST_SHARE else rng.randint(3, longest))
    last = bank.lasts[picks, :, length - 3 : length - 2]
    return torch.cat((last, bank.clips[picks, :, : frames - 1]), 2), _captions(bank, picks, rng)
