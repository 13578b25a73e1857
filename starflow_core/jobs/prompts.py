"""Prompts: wrapped as a model was trained with them, and what their embeddings may be used for."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError
from ..model.config import TASKS, FlowConfig
from .tasks import Job

MAX_PROMPT = 20_000  # characters of a prompt; models read some hundred tokens
TASK_PREFIX = {"extend": "(extend) ", "edit": "(v2v) ", "last_frame": "(last) "}


def wrap(caption: str, config: FlowConfig, *, fps: float, aspect: str, task: str = "text") -> str:
    """The text that a model reads for a caption; the empty caption is the unconditional text.

    `fps` 0 is a still; `aspect` is a ratio such as "16:9". Image models take the caption as it is, after its task's
    prefix. Raises InputError for an unknown task.
    """
    if task not in TASKS:
        raise InputError(f"unknown task {task!r}; known are {', '.join(TASKS)}")
    text = TASK_PREFIX.get(task, "") + caption if caption else ""
    if config.prompt.fps:
        text = f"A video with {fps:g} fps:\n{text}\n" if fps else f"An image:\n{text}\n"
    if config.prompt.noise_level:
        text = f"Noise Level {int(config.noise_std * 1000)}:\n{text}"
    if config.prompt.aspect:
        text = f"{text}\n in a {aspect} aspect ratio.\n"
    return text


def wrapped(config: FlowConfig, captions: list[str], job: Job, task: str | None = None) -> list[str]:
    """Captions in the wrapping the model was trained with, for the job's task or another."""
    for caption in captions:
        check_text(caption)
    fps, aspect = _prompt_rate(job), config.nearest_aspect(job.height, job.width)
    return [wrap(caption, config, fps=fps, aspect=aspect, task=task or job.task) for caption in captions]


def check_text(caption: str) -> None:
    """Raise InputError for a prompt that no model could read: far too long, or no text."""
    if len(caption) > MAX_PROMPT:
        raise InputError(f"a prompt has {len(caption)} characters; shorten it to {MAX_PROMPT} or fewer")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"a prompt contains an invalid character at position {error.start}; give it as UTF-8 text"
        ) from None


@dataclass(frozen=True)
class MadeFor:
    """What a prompt was wrapped for; its embeddings are wrong for another model, size, rate or task.

    `fps` is 0 for an image.
    """

    model: str
    height: int
    width: int
    fps: float
    task: str

    @classmethod
    def of(cls, config: FlowConfig, job: Job) -> MadeFor:
        return cls(config.name, job.height, job.width, _prompt_rate(job), job.task)

    def __str__(self) -> str:
        kind = f"a clip at {self.fps:g} fps" if self.fps else "an image"
        return f"{self.model}: {self.task.replace('_', ' ')}, {kind} of {self.width} x {self.height}"


def _prompt_rate(job: Job) -> float:
    """Frames per second as the prompt has them: 0 for an image."""
    return job.fps if job.frames > 1 else 0
