"""Prompts, wrapped as a model was trained with them."""

from __future__ import annotations

from ..errors import InputError
from ..model.config import TASKS, FlowConfig
from .tasks import Job


def wrap(caption: str, config: FlowConfig, *, fps: float, aspect: str, task: str = "text") -> str:
    """The text that a model reads for a caption; the empty caption is the unconditional text.

    `fps` 0 is a still; `aspect` is a ratio such as "16:9". Image models take the caption as it is,
    with its task's prefix. Raises InputError for an unknown task.
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


TASK_PREFIX = {"extend": "(extend) ", "edit": "(v2v) ", "last_frame": "(last) "}


def wrapped(config: FlowConfig, captions: list[str], job: Job, task: str | None = None) -> list[str]:
    """Captions in the wrapping the model was trained with, for the job's task or another."""
    fps = job.fps if job.frames > 1 else 0
    aspect = config.nearest_aspect(job.height, job.width)
    return [wrap(caption, config, fps=fps, aspect=aspect, task=task or job.task) for caption in captions]
