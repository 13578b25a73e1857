"""Noise as a thing to hold: from a seed or a clip, with all that makes the clip from it, kept in files, blended."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..control import Control
from ..errors import CheckpointError, InputError
from ..model.config import FlowConfig
from ..model.flow import Flow
from ..model.latent import to_flow_space
from ..model.placement import Placement
from ..solve import noise as draws
from ..solve.inverting import Inverted, invert, invert_deep, invert_shallow
from ..solve.solvers import PRESETS, SolverSettings
from ..weights.tensorfiles import TensorFile, save_tensors
from .build import default_job
from .context import Context
from .tasks import PLAIN, Job, Layout, Means, layout

SCHEMA = 2  # version of the noise file
KEY = "starflow_noise"
NO_NOISE = "{} isn't a noise file; create one with `encode`"
IN_METADATA = ("prompt", "negative", "fps", "guidance", "seed", "window", "keep", "model", "log_likelihood",
               "bits_per_dim", "made")  # fmt: skip


@dataclass(frozen=True)
class Noise:
    """The noise (B, T, C, h, w) of a result's latent frames, and the settings that make the result from it.

    With a `seed` it is like fresh noise, of deviation 1: either drawn from the seed, or that of a clip to whose latents
    the model's own noise was added first, drawn from the seed. Without one it is that of clean latents, which are
    sampled without denoising and come back exactly; it must not be blended with fresh noise.

    `log_likelihood` in nats and `bits_per_dim` are known for clean latents without guidance. `made` says how it came
    about, step by step.
    """

    noise: Tensor
    prompt: str
    fps: float
    model: str
    log_likelihood: float | None = None
    bits_per_dim: float | None = None
    negative: str = ""
    guidance: float = 0.0
    seed: int | None = None
    window: int | None = None
    keep: int | None = None
    context: Context | None = None
    made: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        return self.seed is None

    def job(self, config: FlowConfig, solver: SolverSettings = PRESETS["exact"], **settings) -> Job:
        """The job that makes the result; `settings` replace its own."""
        batch, frames, _, height, width = self.noise.shape
        latent = config.latent
        own = {
            "height": height * latent.spatial, "width": width * latent.spatial, "frames": latent.frames(frames),
            "batch": batch, "fps": self.fps, "guidance": self.guidance, "denoise": not self.clean,
            "seed": self.seed or 0, "context": self.context, "window": self.window, "keep": self.keep,
        }  # fmt: skip
        return default_job(config, **{**own, "solver": solver, **settings})

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, missing folders included. Raises InputError where that fails."""
        values = {"schema": SCHEMA, **{name: getattr(self, name) for name in IN_METADATA}}
        tensors = {"noise": self.noise}
        if self.context:
            tensors["context"] = self.context.latents
            values["context"] = {k: v for k, v in asdict(self.context).items() if k != "latents"}
        save_tensors(tensors, path, "fp32", {KEY: json.dumps(values)})

    @classmethod
    def load(cls, path: str | Path) -> Noise:
        """Read what `save` wrote, in this or an earlier version. Raises CheckpointError for anything else."""
        if os.path.isfile(path) and Path(path).suffix.lower() != ".safetensors":
            raise CheckpointError(NO_NOISE.format(path))
        file = TensorFile.open(path)
        try:
            values = json.loads(file.metadata[KEY])
            if not 1 <= values.pop("schema") <= SCHEMA:
                raise CheckpointError(f"{path} was written by a newer version; update this one")
            return _checked(file, values)
        except (KeyError, ValueError, TypeError, AttributeError):
            raise CheckpointError(NO_NOISE.format(path)) from None

    def vary(self, strength: float, seed: int, keep: int = 0) -> Noise:
        """sqrt(1 - s^2) z + s fresh, with fresh noise from a seed: 0 is the same, 1 another. The first `keep` latent
        frames stay. Raises InputError for noise of clean latents."""
        if not 0 <= strength <= 1:
            raise InputError(f"the strength of a variation is {strength:g}; give a number from 0 to 1")
        if not 0 <= keep <= self.noise.shape[1]:
            raise InputError(f"keep is {keep} latent frames; this noise has {self.noise.shape[1]}")
        if self.clean:
            raise InputError(
                "this noise is that of clean latents, which can't be blended with fresh noise; invert the clip with "
                "the model's own noise added to it (encode --seed)"
            )
        batch, frames, *shape = self.noise.shape
        fresh = draws.draw(seed, batch, frames, tuple(shape)).to(self.noise)
        varied = (1 - strength**2) ** 0.5 * self.noise + strength * fresh
        kept = f", {keep} latent frames kept" if keep else ""
        return self._changed(
            torch.cat((self.noise[:, :keep], varied[:, keep:]), 1), f"varied by {strength:g}, seed {seed}{kept}"
        )

    def mix(self, other: Noise, share: float) -> Noise:
        """From this noise (0) to another (1), on the arc between them. Everything else is this one's. Raises InputError
        for noises that don't go together."""
        if not 0 <= share <= 1:
            raise InputError(f"the share of the second noise is {share:g}; give a number from 0 to 1")
        if self.noise.shape != other.noise.shape:
            raise InputError(
                f"the noises have the shapes {tuple(self.noise.shape)} and {tuple(other.noise.shape)}; invert clips of "
                "one size and length"
            )
        if self.clean != other.clean:
            raise InputError(
                "one noise is that of clean latents, the other isn't; invert both clips with the model's own noise, or "
                "both without"
            )
        return self._changed(_slerp(self.noise, other.noise.to(self.noise), share), f"mixed with another by {share:g}")

    def beginning_as(self, other: Noise) -> Noise:
        """This noise with the first latent frame of another one."""
        noise = torch.cat((other.noise[:, :1], self.noise[:, 1:]), 1)
        return self._changed(noise, f"begun as: {'; '.join(other.made)}")

    def _changed(self, noise: Tensor, how: str) -> Noise:
        return replace(self, noise=noise, log_likelihood=None, bits_per_dim=None, made=(*self.made, how))


def fresh_noise(config: FlowConfig, job: Job) -> Noise:
    """The noise that a job draws from its seed."""
    plan = layout(config, job)
    return Noise(
        draws.draw(job.seed, job.batch, plan.frames, plan.shape), "", job.fps, config.name, guidance=job.guidance,
        seed=job.seed, window=job.window, keep=job.keep, context=job.context, made=(f"drawn from seed {job.seed}",),
    )  # fmt: skip


@torch.no_grad()
def inverted(
    flow: Flow, job: Job, latents: Tensor, text: Tensor, uncond: Tensor | None = None, *,
    control: Control | None = None, placement: Placement | None = None, means: Means = PLAIN,
) -> Inverted:  # fmt: skip
    """The noise, and the surprise of each token, of a result's latents (B, C, T, h, w) in VAE space. The model's own
    noise is added to them first if the job denoises; given frames are the job's."""
    check_one_prompt(job)
    plan, placement = layout(flow.config, job), placement or Placement.on(text.device)
    found = invert(
        flow, flowing(flow.config, job, latents.to(placement.shallow)), text.expand(job.batch, -1, -1), uncond,
        guidance=job.guidance, given=plan.given, window=plan.window, keep=plan.keep, control=control,
        placement=placement, cache=means.cache,
    )  # fmt: skip
    return shown(plan, found)


@torch.no_grad()
def under_each(
    flow: Flow, job: Job, latents: Tensor, texts: Tensor, together: int = 1, *, control: Control | None = None,
    placement: Placement | None = None, means: Means = PLAIN,
) -> Iterator[Inverted]:  # fmt: skip
    """One result's latents (1, C, T, h, w) in VAE space, inverted under each of texts (P, L, D), of which `together`
    are read at once. The shallow blocks, which read no text, are inverted once."""
    plan, placement = layout(flow.config, job), placement or Placement.on(texts.device)
    halfway = invert_shallow(flow, flowing(flow.config, job, latents.to(placement.shallow)), control)
    for part in texts.split(together):
        found = invert_deep(
            flow, halfway.repeated(len(part)), part.to(placement.deep[0]), given=plan.given, window=plan.window,
            keep=plan.keep, control=control, placement=placement, cache=means.cache,
        )  # fmt: skip
        ours = shown(plan, found)
        for noise, surprise in zip(ours.noise, ours.surprise, strict=True):
            yield Inverted(noise[None], surprise[None], ours.given)


def check_one_prompt(job: Job) -> None:
    """Raise InputError for a job whose prompt changes: a noise holds one prompt."""
    if job.changes:
        raise InputError("a clip can be inverted under one prompt only; give one that doesn't change")


def flowing(config: FlowConfig, job: Job, latents: Tensor) -> Tensor:
    """The deep sequence (B, T, C, h, w) in flow space, hidden frames included, of a result's latents in VAE space.
    Raises InputError for latents that aren't of the job's shape."""
    plan = layout(config, job)
    expected = (job.batch, plan.shape[0], plan.frames, *plan.shape[1:])
    if latents.shape != expected:
        raise InputError(f"latents of shape {tuple(latents.shape)}, the job's are {expected}")
    if job.context:
        given = job.context.latents.to(latents).expand(job.batch, -1, -1, -1, -1)
        latents = torch.cat((given, latents[:, :, job.context.shown :]), 2)
    clean = to_flow_space(config.latent, latents, plan.factors)
    if not job.denoise:
        return clean
    own = draws.draw_context(job.seed, job.batch, plan.total, plan.shape)
    return clean + config.noise_std * own.to(clean)


def shown(plan: Layout, found: Inverted) -> Inverted:
    """What belongs to the result's own frames."""
    return Inverted(found.noise[:, plan.hidden :], found.surprise[:, plan.hidden :], plan.given - plan.hidden)


def noise_of(config: FlowConfig, job: Job, found: Inverted, prompt: str, negative: str = "") -> Noise:
    """What was inverted as such a job, with its likelihood if that is the model's own: of clean latents, without
    guidance. Of a batch the likelihood is the mean."""
    how = "from a clip" + (f", with the model's own noise of seed {job.seed}" if job.denoise else "")
    noise = Noise(
        found.noise.cpu(), prompt, job.fps, config.name, negative=negative, guidance=job.guidance,
        seed=job.seed if job.denoise else None, window=job.window, keep=job.keep, context=job.context, made=(how,),
    )  # fmt: skip
    if job.denoise or job.guidance:
        return noise
    likelihood = float(found.log_likelihood.mean())
    return replace(noise, log_likelihood=likelihood, bits_per_dim=-likelihood / (found.dimensions * math.log(2)))


def inversion_job(config: FlowConfig, job: Job, clean: bool) -> Job:
    """The job that inverts a clip, and makes it again: given frames are as clean as the others."""
    context = job.context and replace(job.context, noisy=not clean)
    return replace(job, denoise=not clean, context=context)


def _slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """On the great circle between two vectors, each element of the batch by itself."""
    cosine = torch.cosine_similarity(a.flatten(1), b.flatten(1), dim=1)
    angle = cosine.clamp(-1 + 1e-6, 1 - 1e-6).acos().view(-1, *[1] * (a.ndim - 1))  # of equal ones any small angle
    return (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()


def _checked(file: TensorFile, values: dict[str, Any]) -> Noise:
    """Raises one of the errors of wrong values where they are no noise's."""
    noise, context = file.tensor("noise"), values.pop("context", None)
    if noise.ndim != 5:
        raise ValueError(noise.shape)
    if context is not None:
        context = Context(latents=file.tensor("context"), **context)
    return Noise(noise, context=context, **{**values, "made": tuple(values.get("made", ()))})
