"""What a model is to go on knowing: it draws some of that itself before it learns, and sees it again in between.

Without it a model that learns one new thing soon takes everything for that (`benchmarks/teaching.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..control import Progress
from ..jobs.build import default_job
from ..jobs.prompts import wrapped
from ..jobs.tasks import Generation, Job
from ..model.config import FlowConfig
from ..model.flow import Flow
from ..model.placement import Placement
from ..solve.solvers import PRESETS
from .data.buckets import Bucket
from .data.dataset import Dataset, Plan
from .processes import Processes
from .settings import Settings

AT_ONCE = 8  # samples that are drawn at once, at most


@dataclass(frozen=True)
class Drawn:
    """What a model has drawn: by which model, from which prompt and seed, at which size and guidance."""

    flow: str
    prompt: str
    seed: int
    height: int
    width: int
    frames: int
    fps: str
    guidance: float

    kind = "drawn"


def own_job(config: FlowConfig, settings: Settings, **chosen) -> Job:
    """A sample of the size and length that is trained."""
    frames = 1 if config.kind == "image" else settings.frames or config.defaults.frames
    rate = {"fps": settings.fps} if settings.fps else {}
    return default_job(config, size=settings.size, frames=frames, solver=PRESETS["balanced"], **rate, **chosen)


class Rehearsal:
    """Samples of the settings' captions to rehearse, read from the data's cache; steps see them as they see data.

    `flow` is the identity of the model that draws them.
    """

    def __init__(self, settings: Settings, config: FlowConfig, flow: str):
        self.settings, self.config, self.flow = settings, config, flow
        self.job = own_job(config, settings)
        self.prompts = wrapped(config, list(settings.rehearse), self.job)
        self.empty = wrapped(config, [""], self.job)[0]
        aspect = config.nearest_aspect(self.job.height, self.job.width)
        self.bucket = Bucket(aspect, self.job.height, self.job.width, self.job.frames)
        self.dataset: Dataset | None = None

    @property
    def texts(self) -> Sequence[str]:
        """What the text encoder has to have read before."""
        return [*self.prompts, self.empty]

    def draw(
        self, flow: Flow, dataset: Dataset, device: torch.device, processes: Processes,
        progress: Callable[[Progress], None] | None,
    ) -> None:  # fmt: skip
        """Draw this process's share of what isn't in the cache yet, as many at once as learn at once."""
        self.dataset = dataset
        together = min(self.settings.micro_batch or self.settings.batch, AT_ONCE)
        groups = [range(len(self.prompts))[i : i + together] for i in range(0, len(self.prompts), together)]
        mine = groups[processes.rank :: processes.count]
        missing = [numbers for numbers in mine if not all(dataset.cache.has(self._key(n)) for n in numbers)]
        for done, numbers in enumerate(missing):
            if progress:
                progress(Progress("rehearse", done, len(missing)))
            for number, latents in zip(numbers, self._drawn(flow, numbers, device), strict=True):
                dataset.cache.put(self._key(number), latents)

    def plan(self, index: int, seed: int, batch: int) -> Plan:
        """As a data set's: every sample once in a round, some more often so that batches are full."""
        count, (turn, place) = len(self.prompts), divmod(index * batch, len(self.prompts))
        order = [n for t in range(turn, turn + 2 + batch // count) for n in _shuffled(count, seed, t)]
        picks, rng = tuple(order[place : place + batch]), random.Random(f"rehearse:{seed}:{index}")
        drop = self.settings.caption_drop
        prompts = tuple(self.empty if rng.random() < drop else self.prompts[pick] for pick in picks)
        return Plan(self.bucket, "text", picks, prompts, 0, batch)

    def load(self, plan: Plan, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As a data set's."""
        drawn = [self.dataset.cache.get(self._key(plan.picks[row]), "a rehearsed sample") for row in rows]
        text = [self.dataset.embedding(plan.prompts[row]) for row in rows]
        return self.dataset.in_flow_space(torch.stack(drawn), "text", 0), torch.stack(text)

    def names(self, plan: Plan) -> list[str]:
        return [f"rehearsed: {self.settings.rehearse[pick]}" for pick in plan.picks]

    def _key(self, number: int) -> Drawn:
        job = self.job
        return Drawn(
            self.flow, self.prompts[number], self.settings.seed + number, job.height, job.width, job.frames,
            repr(float(job.fps)), float(job.guidance),
        )  # fmt: skip

    def _drawn(self, flow: Flow, numbers: range, device: torch.device) -> Tensor:
        """Clean latents (n, C, T, h, w) in VAE space; the seeds of a batch count up."""
        embedding = self.dataset.embedding
        text = torch.stack([embedding(self.prompts[number]) for number in numbers]).to(device)
        uncond = embedding(self.empty)[None].to(device) if self.job.guidance else None
        job = own_job(self.config, self.settings, seed=self._key(numbers[0]).seed, batch=len(numbers))
        with torch.no_grad():
            return Generation(flow, job, text, uncond, placement=Placement.on(device)).run().float().cpu()


def _shuffled(count: int, seed: int, turn: int) -> list[int]:
    return random.Random(f"rehearse order:{seed}:{turn}").sample(range(count), count)
