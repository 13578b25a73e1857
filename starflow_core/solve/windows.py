"""Where the windows of a long clip begin and end: they slide when full, and begin anew where the prompt changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Extent:
    """The frames `first` .. `stop` - 1 of a clip, of which the first `known` are there already. They are read under the
    prompt of that number; `changes` says that those were made under the prompt before it."""

    first: int
    known: int
    stop: int
    prompt: int = 0
    changes: bool = False


@dataclass(frozen=True)
class Prompts:
    """Embeddings (S, B, L, D) of S prompts; each is read from its frame in `starts` on, which begin with 0. At a change
    the next frames follow the last `kept` ones; if they are to `change`, these are brought under the new prompt first.
    """

    texts: Tensor
    starts: tuple[int, ...] = (0,)
    kept: int = 1
    change: bool = True

    def __post_init__(self):
        if len(self.starts) != len(self.texts):
            raise InputError(f"{len(self.texts)} prompts begin at {len(self.starts)} frames; give one for each")
        if self.starts[0] or any(a >= b for a, b in zip(self.starts, self.starts[1:], strict=False)):
            raise InputError(f"prompts begin at the latent frames {self.starts}; they start with 0 and increase")
        if self.kept < 1:
            raise InputError(f"{self.kept} latent frames kept at a change; the minimum is 1")

    @classmethod
    def of(cls, text: Tensor | Prompts) -> Prompts:
        """Also of one prompt's embeddings (B, L, D)."""
        return text if isinstance(text, Prompts) else cls(text.unsqueeze(0))

    @property
    def first(self) -> Tensor:
        """(B, L, D)."""
        return self.texts[0]

    def to(self, device: torch.device) -> Prompts:
        return replace(self, texts=self.texts.to(device))

    def extents(
        self, frames: int, window: int, keep: int, given: int = 0, kept: int | None = None
    ) -> Iterator[Extent]:  # fmt: skip
        """The windows of a clip of so many frames, the first `given` of which are there: at most `window` frames each,
        `keep` of which stay when it slides, and `kept` (None: the prompts' own) where the prompt changes; fewer
        where fewer were made under the prompt, or under the one before it."""
        kept = self.kept if kept is None else kept
        first, known = 0, given
        for prompt, (start, end) in enumerate(zip(self.starts, (*self.starts[1:], frames), strict=True)):
            changes = prompt > 0
            if changes:
                known = min(kept, start - self.starts[prompt - 1])
                first = start - known
            while True:
                stop = min(first + window, end)
                yield Extent(first, known, stop, prompt, changes)
                if stop == end:
                    break
                # Frames that were made under the prompt before aren't read again.
                known = min(keep, stop - start)
                first, changes = stop - known, False
