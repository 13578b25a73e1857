"""What a model is to go on knowing: it draws some of that itself before it learns, and sees it again in between.

Without it a model that learns one new thing soon takes everything for that (`benchmarks/teaching.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
    """A sample of the size and length that is trained, unless another is chosen."""
    if "height" not in chosen:
        frames = 1 if config.kind == "image" else settings.frames or config.defaults.frames
        chosen = {"size": settings.size, "frames": frames} | chosen
    rate = {"fps": settings.fps} if settings.fps else {}
    return default_job(config, solver=PRESETS["balanced"], **rate, **chosen)


class Rehearsal:
    """Samples of the settings' captions to rehearse, of every size that a data set has, kept in its cache. Steps see
    them as they see data.

    `flow` is the identity of the model that draws them.
    """

    def __init__(self, settings: Settings, dataset: Dataset, flow: str):
        self.settings, self.dataset, self.flow = settings, dataset, flow
        self.config = dataset.practice.config
        self.jobs = {bucket: self._job(bucket) for bucket in dataset.buckets}
        captions = [*settings.rehearse, ""]  # the empty one last
        self.prompts = {bucket: wrapped(self.config, captions, job) for bucket, job in self.jobs.items()}

    @property
    def texts(self) -> list[str]:
        """What the text encoder has to have read."""
        return [prompt for prompts in self.prompts.values() for prompt in prompts]

    def draw(
        self, flow: Flow, device: torch.device, processes: Processes, progress: Callable[[Progress], None] | None
    ) -> None:
        """Draw this process's share of what isn't in the cache yet, as many at once as learn at once."""
        together = min(self.settings.micro_batch or self.settings.batch, AT_ONCE)
        numbers = range(len(self.settings.rehearse))
        groups = [(b, numbers[i : i + together]) for b in self.prompts for i in range(0, len(numbers), together)]
        has = self.dataset.cache.has
        mine = [
            (bucket, some)
            for bucket, some in groups[processes.rank :: processes.count]
            if not all(has(self._key(bucket, number)) for number in some)
        ]
        for done, (bucket, some) in enumerate(mine):
            if progress:
                progress(Progress("rehearse", done, len(mine)))
            for number, latents in zip(some, self._drawn(flow, bucket, some, device), strict=True):
                self.dataset.cache.put(self._key(bucket, number), latents)

    def plan(self, index: int, seed: int, batch: int) -> Plan:
        """As a data set's: of one size, which comes as often as in the data."""
        rng, counts = random.Random(f"rehearse:{seed}:{index}"), self.dataset.buckets
        bucket = rng.choices(list(counts), list(counts.values()))[0]
        *prompts, empty = self.prompts[bucket]
        count = len(prompts)
        picks = [pick for _ in range(-(-batch // count)) for pick in rng.sample(range(count), count)]
        drop = self.settings.caption_drop
        drawn = tuple(empty if rng.random() < drop else prompts[pick] for pick in picks[:batch])
        return Plan(bucket, "text", tuple(picks[:batch]), drawn, 0, batch)

    def load(self, plan: Plan, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As a data set's."""
        keys = [self._key(plan.bucket, plan.picks[row]) for row in rows]
        drawn = [self.dataset.cache.get(key, "a rehearsed sample") for key in keys]
        text = [self.dataset.embedding(plan.prompts[row]) for row in rows]
        return self.dataset.in_flow_space(torch.stack(drawn), "text", 0), torch.stack(text)

    def names(self, plan: Plan) -> list[str]:
        return [f"rehearsed: {self.settings.rehearse[pick]}" for pick in plan.picks]

    def _job(self, bucket: Bucket) -> Job:
        return own_job(self.config, self.settings, height=bucket.height, width=bucket.width, frames=bucket.frames)

    def _key(self, bucket: Bucket, number: int) -> Drawn:
        job = self.jobs[bucket]
        return Drawn(
            self.flow, self.prompts[bucket][number], self.settings.seed + number, job.height, job.width, job.frames,
            repr(float(job.fps)), float(job.guidance),
        )  # fmt: skip

    def _drawn(self, flow: Flow, bucket: Bucket, numbers: range, device: torch.device) -> Tensor:
        """Clean latents (n, C, T, h, w) in VAE space; the seeds of a batch count up."""
        embedding, prompts = self.dataset.embedding, self.prompts[bucket]
        job = replace(self.jobs[bucket], seed=self.settings.seed + numbers[0], batch=len(numbers))
        text = torch.stack([embedding(prompts[number]) for number in numbers]).to(device)
        uncond = embedding(prompts[-1])[None].to(device) if job.guidance else None
        with torch.no_grad():
            return Generation(flow, job, text, uncond, placement=Placement.on(device)).run().float().cpu()
