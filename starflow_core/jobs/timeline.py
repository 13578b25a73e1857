"""Prompts that change in a clip: from when on each is read, as text and as what a job needs."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ..errors import InputError
from .prompts import check_text
from .tasks import Job

EXAMPLE = "0s: a red circle moving right | 2s: a red circle moving up"
MARK = re.compile(r"\s*([0-9]{1,6}(?:\.[0-9]{1,6})?)\s*s\s*:")  # a part's time, at its beginning


@dataclass(frozen=True)
class Timeline:
    """Prompts, each from its time in seconds on; the first from 0. Raises InputError for times that don't increase and
    for a prompt without text."""

    prompts: tuple[str, ...]
    times: tuple[float, ...] = (0.0,)

    def __post_init__(self):
        if len(self.prompts) != len(self.times) or not self.prompts:
            raise InputError(f"{len(self.prompts)} prompts with {len(self.times)} times; give one time for each")
        for prompt in self.prompts:
            check_text(prompt)
        if self.times[0]:
            raise InputError(f"the first prompt begins at {self.times[0]:g}s; it has to begin at 0s")
        for before, after in zip(self.times, self.times[1:], strict=False):
            if not before < after:
                raise InputError(f"a prompt at {after:g}s follows one at {before:g}s; times have to increase")
        if self.changes:
            self._check_words()

    def _check_words(self) -> None:
        for prompt, time in zip(self.prompts, self.times, strict=True):
            if not prompt.strip():
                raise InputError(f"the prompt at {time:g}s is empty; say what to show from then on")
            if "|" in prompt:
                raise InputError(f"the prompt at {time:g}s contains |, which separates prompts; leave it out")

    @classmethod
    def parse(cls, text: str) -> Timeline:
        """Of text such as `0s: a red circle moving right | 2s: a red circle moving up`; the first time may be left out.
        A text in which no part begins with a time is one prompt, whatever it contains."""
        parts = text.split("|")
        marks = [MARK.match(part) for part in parts]
        if not any(marks):
            return cls((text,))
        times, prompts = [], []
        for part, mark in zip(parts, marks, strict=True):
            if not mark and times:
                shown = part.strip()[:40]
                raise InputError(f"{shown!r} has no time; begin it with one, as in {EXAMPLE!r}")
            times.append(float(mark[1]) if mark else 0.0)
            prompts.append(part[mark.end() if mark else 0 :].strip())
            if not prompts[-1]:
                raise InputError(f"the prompt at {times[-1]:g}s is empty; say what to show from then on")
        return cls(tuple(prompts), tuple(times))

    @property
    def changes(self) -> tuple[float, ...]:
        """The times at which another prompt begins."""
        return self.times[1:]

    def __str__(self) -> str:
        if not self.changes:
            return self.prompts[0]
        return " | ".join(f"{time:g}s: {prompt}" for time, prompt in zip(self.times, self.prompts, strict=True))


Caption = str | Timeline  # a string is one prompt, whatever it contains


def timed(captions: Caption | list[Caption], job: Job) -> tuple[list[Timeline], Job]:
    """Captions as timelines, and the job with their changes. Raises InputError where they change at different times."""
    captions = [captions] if isinstance(captions, Caption) else captions
    timelines = [each if isinstance(each, Timeline) else Timeline((each,)) for each in captions]
    changes = {timeline.changes for timeline in timelines} | ({tuple(job.changes)} - {()})
    if len(changes) > 1:
        times = " and ".join(sorted(", ".join(f"{time:g}s" for time in each) or "never" for each in changes))
        raise InputError(f"prompts of one batch change at different times: {times}; make them one after the other")
    return timelines, replace(job, changes=changes.pop() if changes else ())
