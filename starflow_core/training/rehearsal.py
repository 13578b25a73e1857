"""What a model is to go on knowing: it draws some of that itself before it learns, and sees it again in between.

Without it a model that learns one new thing soon takes everything for that (`benchmarks/teaching.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..control import Progress
from ..errors import InputError
from ..jobs.build import default_job
from ..jobs.context import Context
from ..jobs.prompts import TASK_PREFIX, wrapped
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
    """What a model has drawn: by which model, from which prompt and seed, at which size and guidance; for an edit also
    the prompt and seed of its source, for a clip with a last frame the prompt of that."""

    flow: str
    prompt: str
    seed: int
    height: int
    width: int
    frames: int
    fps: str
    guidance: float
    source: str

    kind = "drawn"


@dataclass(frozen=True)
class Wish:
    """What is to be drawn, and its number among all."""

    task: str
    caption: str
    number: int

    @classmethod
    def read(cls, text: str, number: int) -> Wish:
        """Of a caption, after "(v2v)" of an instruction, after "(last)" of a caption whose last frame is given."""
        for task in ("edit", "last_frame"):
            prefix = TASK_PREFIX[task]
            if text.startswith(prefix):
                return cls(task, text.removeprefix(prefix), number)
        return cls("text", text, number)


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

    An edit's source is a clip of another caption; a last frame is a still of its own caption. All are drawn by the
    model, whose identity `flow` is. Raises InputError for what can't be drawn.
    """

    def __init__(self, settings: Settings, dataset: Dataset, flow: str):
        self.settings, self.dataset, self.flow = settings, dataset, flow
        self.config, self.wishes = dataset.practice.config, [Wish.read(t, i) for i, t in enumerate(settings.rehearse)]
        self.texts_alone = [wish for wish in self.wishes if wish.task == "text"]
        self.jobs = {bucket: self._job(bucket) for bucket in dataset.buckets}
        self.parts = {
            (bucket, task): found
            for bucket in dataset.buckets
            for task in ("text", "last_frame", "edit")
            if (found := [wish for wish in self.wishes if wish.task == task]) and self._can(bucket, task)
        }
        self._check()

    def _check(self) -> None:
        for task in {wish.task for wish in self.wishes}:
            if not any(task == found for _, found in self.parts):
                raise InputError(
                    f"rehearse: {TASK_PREFIX[task].strip()} needs clips, of which there are none; leave it out"
                )
        if not self.texts_alone:
            raise InputError("rehearse: edits and last frames need captions of clips beside them; add some")

    def _can(self, bucket: Bucket, task: str) -> bool:
        """Whether the model can draw that at a size."""
        window = {"text": 1, "last_frame": 3, "edit": 2}[task]
        return task == "text" or (bucket.frames > 1 and self.config.window >= window)

    @property
    def texts(self) -> list[str]:
        """What the text encoder has to have read."""
        found = [self._prompt(bucket, wish) for (bucket, _), wishes in self.parts.items() for wish in wishes]
        found += [self._still(bucket, wish) for (bucket, task), wishes in self.parts.items() if task == "last_frame"
                  for wish in wishes]  # fmt: skip
        return [*found, *map(self._empty, self.jobs)]

    def draw(
        self, flow: Flow, device: torch.device, processes: Processes, progress: Callable[[Progress], None] | None
    ) -> None:
        """Draw this process's share of what isn't in the cache yet, as many at once as learn at once. All processes
        have to call it: edits begin when their sources are there."""
        together = min(self.settings.micro_batch or self.settings.batch, AT_ONCE)
        for first in (True, False):
            parts = [part for part in self.parts if (part[1] == "text") is first]
            groups = [(part, some) for part in parts for some in _chunks(self.parts[part], together)]
            missing = [
                (bucket, some)
                for (bucket, _), some in groups[processes.rank :: processes.count]
                if not all(self.dataset.cache.has(self._key(bucket, wish)) for wish in some)
            ]
            for done, (bucket, some) in enumerate(missing):
                if progress:
                    progress(Progress("rehearse", done, len(missing)))
                for wish, latents in zip(some, self._drawn(flow, bucket, some, device), strict=True):
                    self.dataset.cache.put(self._key(bucket, wish), latents)
            processes.wait()

    def plan(self, index: int, seed: int, batch: int) -> Plan:
        """As a data set's: of one size, which comes as often as in the data, and of one task."""
        rng, counts = random.Random(f"rehearse:{seed}:{index}"), self.dataset.buckets
        weights = [counts[bucket] * len(wishes) for (bucket, _), wishes in self.parts.items()]
        bucket, task = rng.choices(list(self.parts), weights)[0]
        wishes = self.parts[bucket, task]
        picks = [wish for _ in range(-(-batch // len(wishes))) for wish in rng.sample(wishes, len(wishes))][:batch]
        drop = self.settings.caption_drop
        prompts = tuple(self._empty(bucket) if rng.random() < drop else self._prompt(bucket, wish) for wish in picks)
        given = self.dataset.practice.given(bucket, task)
        return Plan(bucket, task, tuple(wish.number for wish in picks), prompts, given, batch)

    def load(self, plan: Plan, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As a data set's."""
        keys = [self._key(plan.bucket, self.wishes[plan.picks[row]]) for row in rows]
        drawn = [self.dataset.cache.get(key, "a rehearsed sample") for key in keys]
        text = [self.dataset.embedding(plan.prompts[row]) for row in rows]
        return self.dataset.in_flow_space(torch.stack(drawn), plan.task, plan.given), torch.stack(text)

    def names(self, plan: Plan) -> list[str]:
        return [f"rehearsed: {self.settings.rehearse[pick]}" for pick in plan.picks]

    def _job(self, bucket: Bucket) -> Job:
        return own_job(self.config, self.settings, height=bucket.height, width=bucket.width, frames=bucket.frames)

    def _prompt(self, bucket: Bucket, wish: Wish) -> str:
        return wrapped(self.config, [wish.caption], self.jobs[bucket], wish.task)[0]

    def _empty(self, bucket: Bucket) -> str:
        return wrapped(self.config, [""], self.jobs[bucket], "text")[0]

    def _still(self, bucket: Bucket, wish: Wish) -> str:
        return wrapped(self.config, [wish.caption], replace(self.jobs[bucket], frames=1), "text")[0]

    def _source(self, wish: Wish) -> Wish:
        """Whose clip an edit changes."""
        return self.texts_alone[wish.number % len(self.texts_alone)]

    def _seed(self, wish: Wish) -> int:
        return self.settings.seed + wish.number

    def _key(self, bucket: Bucket, wish: Wish) -> Drawn:
        job, source = self.jobs[bucket], ""
        if wish.task == "edit":
            source = f"{self._prompt(bucket, self._source(wish))} {self._seed(self._source(wish))}"
        if wish.task == "last_frame":
            source = self._still(bucket, wish)
        return Drawn(
            self.flow, self._prompt(bucket, wish), self._seed(wish), job.height, job.width, job.frames,
            repr(float(job.fps)), float(job.guidance), source,
        )  # fmt: skip

    def _drawn(self, flow: Flow, bucket: Bucket, wishes: Sequence[Wish], device: torch.device) -> Tensor:
        """Clean latents (n, C, T, h, w) in VAE space of one task, after their context if it has one; the seeds of a
        batch count up."""
        task, job = wishes[0].task, replace(self.jobs[bucket], seed=self._seed(wishes[0]), batch=len(wishes))
        prompts = [self._prompt(bucket, wish) for wish in wishes]
        if task == "text":
            return self._sampled(flow, job, prompts, bucket, device)
        if task == "edit":
            count = self.dataset.practice.length(bucket, "edit")
            sources = [self.dataset.cache.get(self._key(bucket, self._source(w)), "a rehearsed sample") for w in wishes]
            context = Context("edit", torch.stack(sources)[:, :, :count], hidden=count)
        else:
            stills = [self._still(bucket, wish) for wish in wishes]
            context = Context(
                "last_frame", self._sampled(flow, replace(job, frames=1), stills, bucket, device), hidden=1
            )
        frames = self.config.latent.frames(self.dataset.practice.length(bucket, task))
        job = replace(job, frames=frames, context=context)
        return torch.cat((context.latents, self._sampled(flow, job, prompts, bucket, device)), 2)

    def _sampled(
        self, flow: Flow, job: Job, prompts: Sequence[str], bucket: Bucket, device: torch.device
    ) -> Tensor:  # fmt: skip
        embedding = self.dataset.embedding
        text = torch.stack([embedding(prompt) for prompt in prompts]).to(device)
        uncond = embedding(self._empty(bucket))[None].to(device) if job.guidance else None
        with torch.no_grad():
            return Generation(flow, job, text, uncond, placement=Placement.on(device)).run().float().cpu()


def _chunks(wishes: Sequence[Wish], most: int) -> Iterator[Sequence[Wish]]:
    """At most so many at once, whose numbers follow one another, as the seeds of a batch do."""
    first = 0
    for place in range(1, len(wishes) + 1):
        ends = place == len(wishes) or wishes[place].number != wishes[place - 1].number + 1
        if ends or place - first == most:
            yield wishes[first:place]
            first = place
