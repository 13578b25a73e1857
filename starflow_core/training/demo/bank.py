"""A bank of encoded clips, made once: what the flow learns from."""

from __future__ import annotations

import os
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...errors import InputError
from ..loop import Loop
from . import clips

ASPECTS = {"1:1": (96, 96), "16:9": (80, 128), "9:16": (128, 80)}
FRAMES = 41  # 11 latent frames: a whole training window, also without the first
EDIT_FRAMES = 17  # 5 latent frames, so that source and target fit the window together
LAST_FRAMES = range(4, 33, 4)  # frames that end a clip of 5, 9, .. 33 frames
SHARES = {"1:1": 3600, "16:9": 450, "9:16": 450}
BATCH = 8


@dataclass(frozen=True)
class Bank:
    """Clips of one aspect ratio as VAE latents, float32.

    `clips` (n, C, 11, h, w), `edits` (n, C, 5, h, w) the same scene recoloured, `lasts` (n, C, 8, h, w)
    `LAST_FRAMES`, each encoded as a picture of its own.
    """

    aspect: str
    scenes: list[clips.Scene]
    colours: list[str]
    clips: Tensor
    edits: Tensor
    lasts: Tensor


@torch.no_grad()
def make(vae, loop: Loop) -> list[Bank]:
    """Encode all clips, or read those that an earlier run has encoded."""
    return [_load(_bank_file(vae, loop, aspect, loop.scaled(count)), loop) for aspect, count in SHARES.items()]


def _bank_file(vae, loop: Loop, aspect: str, count: int) -> Path:
    path = Path(loop.folder) / f"bank-{aspect.replace(':', '-')}.pt"
    if path.exists():
        return path
    rng = random.Random(f"bank:{loop.seed}:{aspect}")
    height, width = ASPECTS[aspect]
    scenes = [clips.random_scene(rng, height, width) for _ in range(count)]
    colours = [rng.choice([c for c in clips.COLOURS if c != s.colour]) for s in scenes]
    parts = {"clips": [], "edits": [], "lasts": []}
    for i in range(0, count, BATCH):
        pixels = clips.render(scenes[i : i + BATCH], FRAMES, height, width)
        recoloured = [s.recoloured(c) for s, c in zip(scenes[i : i + BATCH], colours[i : i + BATCH], strict=True)]
        parts["clips"].append(_encode(vae, pixels, loop))
        parts["edits"].append(_encode(vae, clips.render(recoloured, EDIT_FRAMES, height, width), loop))
        stills = pixels[:, :, list(LAST_FRAMES)].transpose(1, 2).flatten(0, 1).unsqueeze(2)
        parts["lasts"].append(
            _encode(vae, stills, loop).squeeze(2).unflatten(0, (-1, len(LAST_FRAMES))).transpose(1, 2)
        )
        if i % (BATCH * 25) == 0:
            loop.log(f"bank {aspect} {i}/{count}")
    state = {"seed": loop.seed, "aspect": aspect, "scenes": [asdict(s) for s in scenes], "colours": colours}
    state |= {name: torch.cat(items) for name, items in parts.items()}
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)
    return path


def _encode(vae, pixels: Tensor, loop: Loop) -> Tensor:
    with torch.autocast(loop.device.type, loop.dtype, enabled=loop.dtype != torch.float32):
        return vae.encode(pixels.to(loop.device)).latent_dist.mean.float().cpu()


def _load(path: Path, loop: Loop) -> Bank:
    """Raises InputError for a bank of another run."""
    state = torch.load(path, weights_only=True)
    found = (state.pop("seed", None), len(state["scenes"]))
    wanted = (loop.seed, loop.scaled(SHARES[state["aspect"]]))
    if found != wanted:
        raise InputError(f"{path} has (seed, clips) {found}, this run needs {wanted}; use another folder")
    state["scenes"] = [clips.Scene(**s) for s in state["scenes"]]
    return Bank(**state)
