"""Samples of fixed prompts from fixed noise while training goes on: what it has learned so far, as a picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..jobs.prompts import wrapped
from ..jobs.tasks import Generation
from ..media import write_video
from ..model.config import FlowConfig
from ..model.flow import Flow
from ..model.placement import Placement
from .data.dataset import Dataset
from .processes import Processes
from .rehearsal import own_job
from .settings import Settings

SHOWN = 5  # frames of a clip


class Sheets:
    """A row for each of the settings' prompts: a picture, or frames of a clip."""

    def __init__(self, settings: Settings, config: FlowConfig, folder: Path):
        self.config, self.folder = config, folder
        self.captions = list(settings.prompts)
        self.job = own_job(config, settings, **({} if settings.guidance is None else {"guidance": settings.guidance}))

    @property
    def texts(self) -> list[str]:
        """What the text encoder has to have read before."""
        return [*wrapped(self.config, [*self.captions, ""], self.job)] if self.captions else []

    def draw(
        self, flow: Flow, dataset: Dataset, sources, device: torch.device, processes: Processes, done: int
    ) -> dict[str, float]:
        """Write the sheet of a step. All processes sample, since the weights may be spread over them."""
        *texts, empty = [dataset.embedding(text).to(device) for text in self.texts]
        placement = Placement.on(device)
        latents = []
        for seed, text in enumerate(texts):
            job = replace(self.job, seed=seed)
            uncond = empty[None] if job.guidance else None
            latents.append(Generation(flow, job, text[None], uncond, placement=placement).run())
        if processes.leads:
            self._write(done, sources.load_vae(device), latents)
        return {}

    def _write(self, done: int, vae, latents: list[Tensor]) -> None:
        rows = [self._row(vae, latent) for latent in latents]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_video(self.folder / f"step-{done:07d}.png", torch.cat(rows, 1)[None], 1)

    def _row(self, vae, latents: Tensor) -> Tensor:
        """Frames (3, H, W') side by side in [-1, 1] of latents (1, C, T, h, w)."""
        latents = latents if vae.kind == "video" else latents.squeeze(2)
        frames = torch.cat([part.float().cpu() for part in vae.decode_frames(latents)], 2)[0].transpose(0, 1)
        shown = torch.linspace(0, len(frames) - 1, min(SHOWN, len(frames))).round().long()
        return torch.cat(list(frames[shown]), -1)
