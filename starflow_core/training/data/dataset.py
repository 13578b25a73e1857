"""What each step of a training sees, dealt out in an order that depends on seed and step alone."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ...jobs.context import later_factors
from ...jobs.prompts import wrap
from ...model.config import FlowConfig
from ...model.latent import to_flow_space
from .buckets import Bucket, Notes, Sample
from .cache import Cache, Text, Window
from .windows import read_windows

PREFIX_DROP = 0.25  # share of continuations without `(extend)`, as in the later windows of a long video


@dataclass(frozen=True)
class Plan:
    """One step's batch: numbers of samples, their wrapped prompts, and the latent frames `given`, which belong to the
    task's context and don't count in the loss. Of a batch to measure only the first `count` rows are real."""

    bucket: Bucket
    task: str
    picks: tuple[int, ...]
    prompts: tuple[str, ...]
    given: int
    count: int


@dataclass(frozen=True)
class Identities:
    """Hashes of media files' content by path, and what tells VAE and text encoder from others."""

    files: Mapping
    vae: str
    encoder: str


@dataclass(frozen=True)
class Practice:
    """How samples are used: the model, the training rate, the tasks' shares, the share of captions left empty."""

    config: FlowConfig
    fps: float
    shares: Mapping[str, float]
    caption_drop: float

    def tasks(self, bucket: Bucket, paired: bool) -> dict[str, float]:
        """The tasks that samples of a bucket can practise, with their shares.

        The caption of a pair tells what to change, so that pairs practise edits alone, and nothing else does.
        """
        frames = self.config.latent.latent_frames(bucket.frames)
        able = {
            "text": not paired,
            "first_frame": frames >= 2 and not paired,
            "extend": frames >= 2 and not paired,
            "last_frame": frames >= 2 and self.config.window >= 3 and not paired,
            "edit": paired and self.config.window >= 2,
        }
        return {task: share for task, share in self.shares.items() if share and able[task]}

    def length(self, bucket: Bucket, task: str) -> int:
        """Latent frames of the clip that a task begins from: a last frame or a source fit the window beside them."""
        frames, window = self.config.latent.latent_frames(bucket.frames), self.config.window
        return {"last_frame": min(frames, window - 1), "edit": min(frames, window // 2)}.get(task, frames)

    def given(self, bucket: Bucket, task: str) -> int:
        """Latent frames of a batch that are context."""
        return {"first_frame": 1, "last_frame": 1, "edit": self.length(bucket, "edit")}.get(task, 0)

    def prompt(self, caption: str, bucket: Bucket, task: str) -> str:
        """A caption as the model reads it."""
        fps = self.fps if bucket.frames > 1 else 0
        return wrap(caption, self.config, fps=fps, aspect=bucket.aspect, task=task)

    def prompts(self, caption: str, bucket: Bucket, tasks: Iterable[str]) -> set[str]:
        """All that a caption can become in some tasks."""
        found = {self.prompt(caption, bucket, task) for task in tasks}
        found |= {self.prompt(caption, bucket, "text")} if "extend" in tasks else set()
        return found | ({self.prompt("", bucket, "text")} if self.caption_drop else set())


@dataclass
class Dataset:
    """Encoded samples: those that are learned from, then the `held` ones, which are only measured on.

    Read from the cache as they are needed. Equal on all processes.
    """

    samples: Sequence[Sample]
    held: int
    practice: Practice
    identities: Identities
    cache: Cache
    notes: Notes = field(default_factory=Notes)
    lines: list[str] = field(default_factory=list)
    _turns: list = field(default_factory=list, init=False, repr=False)  # of each step: its stream, and how often before
    _had: Counter = field(default_factory=Counter, init=False, repr=False)  # how many turns each stream has had

    def __len__(self) -> int:
        """Samples that are learned from, without repeats."""
        return len(self.samples) - self.held

    @property
    def buckets(self) -> dict[Bucket, int]:
        """How many samples there are to learn from in each bucket."""
        return dict(sorted(Counter(sample.bucket for sample in self.samples[: len(self)]).items()))

    def steps(self, batch: int) -> int:
        """Steps in which each sample is seen as often as its folder says, on average."""
        return -(-self._total // batch)

    def shares(self) -> dict[str, float]:
        """The share of the steps in which each task is practised, on average."""
        found, total = Counter(), self._total
        for (bucket, paired), group in self._learned.items():
            tasks = self.practice.tasks(bucket, paired)
            for task, share in tasks.items():
                found[task] += len(group) / total * share / sum(tasks.values())
        return dict(found.most_common())

    def plan(self, index: int, seed: int, batch: int) -> Plan:
        """What step `index` sees; it depends on seed and index alone.

        Samples that fit in one batch are an endless stream, shuffled anew each time they have all been seen; a stream's
        turn comes as often as it is long, so that every sample is seen as often as its folder says.
        """
        stream, before = self._turn(index)
        picks = _picked(self._learned[stream], f"{seed}:{stream}", before * batch, batch)
        first, rng = self.samples[picks[0]], random.Random(f"task:{seed}:{index}")
        shares = self.practice.tasks(first.bucket, bool(first.item.source))
        task = rng.choices(list(shares), list(shares.values()))[0]
        wrapping = "text" if task == "extend" and rng.random() < PREFIX_DROP else task
        drop = self.practice.caption_drop
        captions = ["" if rng.random() < drop else self.samples[pick].item.caption for pick in picks]
        prompts = tuple(self.practice.prompt(caption, first.bucket, wrapping) for caption in captions)
        return Plan(first.bucket, task, picks, prompts, self.practice.given(first.bucket, task), batch)

    def held_out(self, batch: int) -> list[Plan]:
        """Fixed batches of all samples that are kept for measuring, without any randomness."""
        plans = []
        for (bucket, paired), group in self._groups(range(len(self), len(self.samples)), False).items():
            task = "edit" if paired else "text"
            for start in range(0, len(group), batch):
                picks = group[start : start + batch]
                full = _filled(picks, group, batch)
                prompts = tuple(self.practice.prompt(self.samples[p].item.caption, bucket, task) for p in full)
                plans.append(Plan(bucket, task, full, prompts, self.practice.given(bucket, task), len(picks)))
        return plans

    def load(self, plan: Plan, rows: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Clean latents (b, T, C, h, w) in flow space and text embeddings (b, L, D), float32, of some rows of a batch.

        Raises InputError for an entry of the cache that is missing or damaged.
        """
        rows = range(len(plan.picks)) if rows is None else rows
        latents = torch.stack([self._latents(self.samples[plan.picks[row]], plan.task) for row in rows])
        text = torch.stack([self.embedding(plan.prompts[row]) for row in rows])
        return self.in_flow_space(latents, plan.task, plan.given), text

    def in_flow_space(self, latents: Tensor, task: str, given: int) -> Tensor:
        """Latents (b, C, T, h, w) of a task in VAE space as (b, T, C, h, w) in flow space."""
        config = self.practice.config
        return to_flow_space(config.latent, latents, later_factors(config, task, given, latents.shape[2]))

    def pixels(self, plan: Plan, rows: Sequence[int] | None = None) -> Tensor:
        """The clips (b, 3, F, H, W) in [-1, 1], read from their files. Raises InputError for one that can't be read."""
        rows = range(len(plan.picks)) if rows is None else rows
        return torch.stack([self.frames(self.samples[plan.picks[row]]).transpose(0, 1) for row in rows])

    def frames(self, sample: Sample, part: str = "clip") -> Tensor:
        """Pixels (F, 3, H, W) of a sample's clip, or of its `source`."""
        path = sample.item.source if part == "source" else sample.item.path
        bucket, span = sample.bucket, (sample.start, sample.bucket.frames)
        facts, fps = self.cache.facts(path), Fraction(self.practice.fps)
        [(_, pixels)] = read_windows(path, facts, bucket.height, bucket.width, fps, [span])
        return pixels

    def embedding(self, prompt: str) -> Tensor:
        """The embedding (L, D) of a wrapped prompt, zero after its end. Raises InputError if it isn't in the cache."""
        rows = self.cache.get(self.text(prompt), f"the prompt {prompt[:60]!r}").float()
        return F.pad(rows, (0, 0, 0, self.practice.config.prompt.tokens - len(rows)))

    def text(self, prompt: str) -> Text:
        """A prompt's entry in the cache."""
        return Text(prompt, self.identities.encoder, self.practice.config.prompt.tokens)

    def window(self, sample: Sample, part: str = "clip") -> Window:
        """The entry of a sample's clip, its `source`, or the `last` frame that it is practised with."""
        bucket, start, path = sample.bucket, sample.start, sample.item.path
        frames = bucket.frames
        if part == "source":
            path = sample.item.source
        elif part == "last":
            end = self.practice.config.latent.frames(self.practice.length(bucket, "last_frame"))
            start, frames = start + end - 1, 1
        fps = repr(float(self.practice.fps))
        content, vae = self.identities.files[path], self.identities.vae
        return Window(content, bucket.height, bucket.width, start, frames, fps, vae)

    def windows(self, sample: Sample) -> dict[Window, str]:
        """All entries that a sample needs, and which part each is."""
        tasks = self.practice.tasks(sample.bucket, bool(sample.item.source))
        parts = ["clip", *(["source"] if "edit" in tasks else []), *(["last"] if "last_frame" in tasks else [])]
        return {self.window(sample, part): part for part in parts}

    def prompts(self, extra: Iterable[str] = ()) -> list[str]:
        """All wrapped prompts that can be drawn, and `extra` ones, in a fixed order."""
        found = dict.fromkeys(extra)
        for number, sample in enumerate(self.samples):
            paired = bool(sample.item.source)
            tasks = list(self.practice.tasks(sample.bucket, paired))
            tasks += ["edit" if paired else "text"] if number >= len(self) else []
            found |= dict.fromkeys(sorted(self.practice.prompts(sample.item.caption, sample.bucket, tasks)))
        return list(found)

    @cached_property
    def identity(self) -> str:
        """Of all that steps can see; another one follows other losses."""
        seen = [[*map(repr, self.windows(sample)), sample.item.caption, sample.item.repeats] for sample in self.samples]
        return hashlib.sha256(json.dumps([self.held, seen]).encode()).hexdigest()[:16]

    def names(self, plan: Plan) -> list[str]:
        """The files of a batch."""
        return [self.samples[pick].item.path.name for pick in plan.picks]

    def report(self) -> list[str]:
        """What is learned from, line by line."""
        return list(self.lines)

    def _latents(self, sample: Sample, task: str) -> Tensor:
        """What a task makes of a sample, (C, T, h, w) in VAE space: its context, then its clip."""
        clip = self._part(sample, "clip")[:, : self.practice.length(sample.bucket, task)]
        if task == "extend":  # as cut out of a longer clip
            return clip[:, 1:]
        if task == "last_frame":
            return torch.cat((self._part(sample, "last"), clip), 1)
        if task == "edit":
            return torch.cat((self._part(sample, "source")[:, : clip.shape[1]], clip), 1)
        return clip

    def _part(self, sample: Sample, part: str) -> Tensor:
        path = sample.item.source if part == "source" else sample.item.path
        return self.cache.get(self.window(sample, part), str(path))

    @cached_property
    def _total(self) -> int:
        """Samples that are learned from, as often as they are repeated."""
        return sum(map(len, self._learned.values()))

    @cached_property
    def _learned(self) -> dict[tuple[Bucket, bool], list[int]]:
        return self._groups(range(len(self)), True)

    def _groups(self, numbers: Iterable[int], repeated: bool) -> dict[tuple[Bucket, bool], list[int]]:
        """Samples that can be in one batch, by number, as often as they are repeated."""
        groups = defaultdict(list)
        for number in numbers:
            item = self.samples[number].item
            groups[self.samples[number].bucket, bool(item.source)] += [number] * (item.repeats if repeated else 1)
        return dict(sorted(groups.items()))

    def _turn(self, index: int) -> tuple[tuple[Bucket, bool], int]:
        """The stream whose turn a step is, and how many turns it has had: the one that is furthest behind its share."""
        total = self._total
        while len(self._turns) <= index:
            due = len(self._turns) + 1
            stream = max(self._learned, key=lambda s: due * len(self._learned[s]) / total - self._had[s])
            self._turns.append((stream, self._had[stream]))
            self._had[stream] += 1
        return self._turns[index]


def _picked(group: Sequence[int], name: str, start: int, count: int) -> tuple[int, ...]:
    """Some of an endless stream of a group, which is shuffled for each round."""
    rounds = range(start // len(group), (start + count - 1) // len(group) + 1)
    seen = [group[place] for number in rounds for place in _shuffled(name, number, len(group))]
    first = start % len(group)
    return tuple(seen[first : first + count])


@lru_cache(maxsize=32)  # rounds of several streams go side by side
def _shuffled(name: str, number: int, count: int) -> tuple[int, ...]:
    """The places of a round in their order."""
    return tuple(random.Random(f"{name}:{number}").sample(range(count), count))


def _filled(picks: list[int], group: list[int], batch: int) -> tuple[int, ...]:
    """A full batch, with the group's first ones again if need be."""
    rest = batch - len(picks)
    return tuple(picks + [group[i % len(group)] for i in range(rest)])
