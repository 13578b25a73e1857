"""Banks of encoded clips, made once: what the flow learns from."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...errors import InputError
from ...parts import replacing
from ..files import load_state
from ..loop import Loop
from . import clips

COUNTS = {"1:1": 3600, "16:9": 450, "9:16": 450}  # clips of each aspect ratio
FRAMES = 41  # 11 latent frames: fills the training window, even without the first
EDIT_FRAMES = 17  # 5 latent frames: source and target fit the window together
LAST_FRAMES = range(4, 33, 4)  # the last frames of clips of 5, 9, .. 33 frames
BATCH, LOG_EVERY = 8, 25  # clips, batches


@dataclass(frozen=True)
class Bank:
    """Clips of one aspect ratio as VAE latents, float32.

    `clips` (n, C, 11, h, w); `edits` (n, C, 5, h, w), the same scenes in `colours`; `lasts` (n, C, 8, h, w), the
    clips' `LAST_FRAMES`, each encoded as a picture of its own.
    """

    aspect: str
    scenes: list[clips.Scene]
    colours: list[str]
    clips: Tensor
    edits: Tensor
    lasts: Tensor


@torch.no_grad()
def make_banks(vae, loop: Loop) -> list[Bank]:
    """A bank of each aspect ratio. One that an earlier run has made is read from its file."""
    banks = []
    for aspect, count in COUNTS.items():
        path = Path(loop.folder) / f"bank-{aspect.replace(':', '-')}.pt"
        if not path.exists():
            content = _encoded_scenes(vae, loop, aspect, loop.scaled(count))
            with replacing(path) as part:
                torch.save(content, part)
        banks.append(_load(path, loop))
    return banks


def _encoded_scenes(vae, loop: Loop, aspect: str, count: int) -> dict:
    """The content of a bank's file."""
    rng = random.Random(f"bank:{loop.seed}:{aspect}")
    scenes = [clips.random_scene(rng, *clips.SIZES[aspect]) for _ in range(count)]
    colours = [rng.choice([c for c in clips.COLOURS if c != s.colour]) for s in scenes]
    parts = {"clips": [], "edits": [], "lasts": []}
    for i in range(0, count, BATCH):
        batch = _encode_batch(vae, loop, scenes[i : i + BATCH], colours[i : i + BATCH], clips.SIZES[aspect])
        for name, latents in batch.items():
            parts[name].append(latents)
        if i % (BATCH * LOG_EVERY) == 0:
            loop.log(f"bank {aspect} {i}/{count}")
    latents = {name: torch.cat(tensors) for name, tensors in parts.items()}
    return {"seed": loop.seed, "aspect": aspect, "scenes": [asdict(s) for s in scenes], "colours": colours, **latents}


def _encode_batch(
    vae, loop: Loop, scenes: list[clips.Scene], colours: list[str], size: tuple[int, int]
) -> dict[str, Tensor]:
    """The latents of a few scenes, under the bank's names."""

    def encoded(pixels: Tensor) -> Tensor:
        with loop.autocast():
            return vae.encode(pixels.to(loop.device)).latent_dist.mean.float().cpu()

    pixels = clips.render(scenes, FRAMES, *size)
    recoloured = [s.recoloured(c) for s, c in zip(scenes, colours, strict=True)]
    pictures = pixels[:, :, list(LAST_FRAMES)].transpose(1, 2).flatten(0, 1).unsqueeze(2)
    return {
        "clips": encoded(pixels),
        "edits": encoded(clips.render(recoloured, EDIT_FRAMES, *size)),
        "lasts": encoded(pictures).squeeze(2).unflatten(0, (-1, len(LAST_FRAMES))).transpose(1, 2),
    }


def _load(path: Path, loop: Loop) -> Bank:
    """Raises InputError for a bank of another run."""
    state = load_state(path)
    found = (state.pop("seed", None), len(state.get("scenes", ())))
    wanted = (loop.seed, loop.scaled(COUNTS.get(state.get("aspect"), 0)))
    if found != wanted:
        raise InputError(f"{path} has (seed, clips) {found}, this run needs {wanted}; use another folder")
    state["scenes"] = [clips.Scene(**s) for s in state["scenes"]]
    return Bank(**state)
