"""The file of an unfinished clip, with which sampling goes on after anything: the same clip, to the bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, InputError
from ..model.flow import Flow
from ..model.lora import Lora
from ..solve import noise
from ..solve.sampling import Settled
from ..weights.tensorfiles import TensorFile, check_target, save_tensors
from .tasks import Job, Means
from .timeline import Timeline

ENDING = ".unfinished.safetensors"
KEY = "starflow_unfinished"
SAMPLE = 16  # values of each weight by which a model is known


@dataclass(frozen=True)
class Unfinished:
    """Frames that are sampled, in a file beside the `output`, as they are after each complete window.

    `identity` names all that decides what is sampled; a file with another is refused.
    """

    output: str
    identity: dict[str, Any]

    @property
    def path(self) -> Path:
        return path_of(self.output)

    def load(self) -> Settled | None:
        """What is there; None for no file. Raises InputError for frames of another job, CheckpointError for a file that
        is something else."""
        if not self.path.exists():
            return None
        file = TensorFile.open(self.path)
        try:
            found = json.loads(file.metadata[KEY])
            different = [name for name in found.keys() | self.identity.keys() if self.identity[name] != found[name]]
            settled = Settled(file.tensor("tokens"), file.tensor("latents"))
            sizes = settled.tokens.shape, settled.latents.shape
            if (len(sizes[0]), len(sizes[1])) != (4, 5) or sizes[0][:2] != sizes[1][:2]:
                raise ValueError(sizes)
        except (KeyError, ValueError, AttributeError):
            raise CheckpointError(f"{self.path} isn't an unfinished clip of this version; delete it") from None
        if different:
            raise InputError(
                f"{self.path} is of another job: {', '.join(sorted(different))} differ. Give the same options to go on "
                "with it, or delete it."
            )
        return settled

    def save(self, settled: Settled) -> None:
        """Write what is sampled so far, over what was there."""
        tensors = {"tokens": settled.tokens, "latents": settled.latents}
        save_tensors(tensors, self.path, "fp32", {KEY: json.dumps(self.identity)})


def path_of(output: str) -> Path:
    """Where the frames of an unfinished output are. Image sequences have it beside their folder."""
    path = Path(output)
    return path.with_name(path.name + ENDING)


def check_unfinished(output: str) -> None:
    """Raise InputError unless such a file can be written."""
    check_target(path_of(output), None, overwrite=True)


def identity(flow: Flow, job: Job, means: Means, captions: list[Timeline], negative: str) -> dict[str, Any]:
    """All that decides what is sampled. The text encoder is taken to be the same."""
    context = job.context
    named = {"prompt": [str(each) for each in captions], "negative": negative, "noise version": noise.VERSION}
    given = context and [context.task, context.hidden, context.noisy, _digest([context.latents])]
    numbers = {k: v for k, v in vars(job).items() if k not in ("context", "solver", "denoise")}
    types = {"dtype": str(flow.compute_dtype), "compiled": flow.compiled, "cache": asdict(means.cache)}
    values = {**named, **numbers, "solver": asdict(job.solver), "given frames": given, **types, "weights": _known(flow)}
    return json.loads(json.dumps(values))


def _known(flow: Flow) -> str:
    """A digest of a few values of every weight, and of what LoRAs are multiplied by."""
    weights = [p.detach().flatten()[:: max(1, p.numel() // SAMPLE)] for p in flow.state_dict().values()]
    scales = torch.tensor([layer.scale for layer in flow.modules() if isinstance(layer, Lora)])
    return _digest([*weights, scales])


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
