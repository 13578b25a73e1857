"""Pictures and clips to noise and back: the flow's exact inverse, and its likelihood."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from .control import Control
from .errors import CheckpointError, InputError
from .jobs import memory
from .jobs.build import default_job
from .jobs.tasks import Generation, Job, layout
from .model.config import FlowConfig
from .model.latent import to_flow_space
from .pipeline import Pipeline
from .solve.solvers import PRESETS, SolverSettings
from .weights.tensorfiles import TensorFile, save_tensors

NOISE_SCHEMA = 1  # version of the noise file
NOISE_KEY = "starflow_noise"
NO_NOISE = "{} isn't a noise file; create one with `encode`"


@dataclass(frozen=True)
class Inversion:
    """The noise (1, T, C, h, w) that a clip is made from, under a prompt, and how likely it is.

    `log_likelihood` in nats and `bits_per_dim` are those of the clean latents; the model was trained
    on latents with noise added. `model` is the name of the flow.
    """

    noise: Tensor
    prompt: str
    fps: float
    model: str
    log_likelihood: float
    bits_per_dim: float

    def job(self, config: FlowConfig, solver: SolverSettings = PRESETS["exact"]) -> Job:
        """The job that makes the clip again."""
        frames, _, height, width = self.noise.shape[1:]
        height, width = height * config.latent.spatial, width * config.latent.spatial
        return inversion_job(config, height, width, config.latent.frames(frames), self.fps, solver)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, missing folders included. Raises InputError where that fails."""
        values = {"schema": NOISE_SCHEMA, **{k: v for k, v in asdict(self).items() if k != "noise"}}
        save_tensors({"noise": self.noise}, path, "fp32", {NOISE_KEY: json.dumps(values)})

    @classmethod
    def load(cls, path: str | Path) -> Inversion:
        """Read what `save` wrote. Raises CheckpointError for anything else."""
        if os.path.isfile(path) and Path(path).suffix.lower() != ".safetensors":
            raise CheckpointError(NO_NOISE.format(path))
        file = TensorFile.open(path)
        try:
            values = json.loads(file.metadata[NOISE_KEY])
            if values.pop("schema") != NOISE_SCHEMA:
                raise CheckpointError(f"{path} was written by a newer version; update this one")
            noise = file.tensor("noise")
            if noise.ndim != 5:
                raise ValueError(noise.shape)
            return cls(noise, **values)
        except (KeyError, ValueError, TypeError, AttributeError):
            raise CheckpointError(NO_NOISE.format(path)) from None


def inversion_job(
    config: FlowConfig, height: int, width: int, frames: int, fps: float | None = None,
    solver: SolverSettings = PRESETS["exact"],
) -> Job:  # fmt: skip
    """The job that inverts a clip and makes it again: no guidance, no denoising, one window."""
    rate = {} if fps is None else {"fps": fps}
    job = default_job(
        config, height=height, width=width, frames=frames, guidance=0.0, denoise=False, solver=solver, **rate
    )
    plan = layout(config, job)
    if plan.total > plan.window:
        raise InputError(
            f"the clip is longer than the window of {plan.window} latent frames; "
            f"shorten it to {config.latent.frames(plan.window)} frames or fewer"
        )
    return job


@torch.no_grad()
def encode_to_noise(
    pipeline: Pipeline, pixels: Tensor, prompt: str = "", fps: float | None = None, control: Control | None = None
) -> tuple[Inversion, str]:
    """The noise of a clip (F, 3, H, W) in [-1, 1] (a picture if F = 1), and what was cut off the prompt.

    Raises InputError for impossible sizes and frame counts, and for clips longer than the window.
    """
    config = pipeline.config
    job = inversion_job(config, *pixels.shape[-2:], len(pixels), fps)
    pipeline.require(memory.forecast_encode(config, job, pipeline.dtype), "encoding this")
    text, _, cut = pipeline.encode_text([prompt], "", job)
    latents = pipeline.encode_pixels(pixels.transpose(0, 1).unsqueeze(0), control)
    clean = to_flow_space(config.latent, latents, layout(config, job).factors).to(pipeline.placement.shallow)
    encoding = pipeline.flow.encode(clean, text, control)
    values = (float(encoding.log_likelihood), float(encoding.bits_per_dim))
    return Inversion(encoding.noise.cpu(), prompt, job.fps, config.name, *values), cut[0]


def decode_from_noise(
    pipeline: Pipeline, inversion: Inversion, solver: SolverSettings = PRESETS["exact"], control: Control | None = None
) -> Generation:
    """A generation that makes the clip again; `Pipeline.frames` gives its pixels."""
    job = inversion.job(pipeline.config, solver)
    return pipeline.start(inversion.prompt, job, control=control, noise=inversion.noise)[0]
