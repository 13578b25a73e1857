"""What a model finds unlikely in a clip: each token's surprise over the pixels, by frame, and as a mask.

Surprise is in nats for each token, minus its log density given what comes before it, as `Inverted` has it. A token
stands for a cell of pixels; a latent frame of a video for several frames, but the first one for one alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..errors import InputError
from ..model.config import FlowConfig
from ..model.latent import LatentFormat

UNIT = "nats per token"


@dataclass(frozen=True)
class Surprise:
    """The surprise (T, N) of one clip's tokens in nats, row-major, and the height and width that its frames have in
    pixels. The first `given` latent frames were given and have none."""

    nats: Tensor
    config: FlowConfig
    height: int
    width: int
    given: int = 0

    @property
    def log_likelihood(self) -> float:
        return -float(self.nats.sum())

    @property
    def dimensions(self) -> int:
        """Latent elements that the likelihood is of."""
        return self.nats[self.given :].numel() * self.config.token_channels

    @property
    def bits_per_dim(self) -> float:
        return -self.log_likelihood / (self.dimensions * math.log(2))

    @property
    def cells(self) -> Tensor:
        """As the tokens lie: (T, rows, columns)."""
        return self.nats.unflatten(-1, (self.height // self.config.cell, self.width // self.config.cell))

    @property
    def map(self) -> Tensor:
        """Each pixel (F, H, W) shows its token's nats, in given frames NaN; nothing between cells is made up."""
        cell, cells = self.config.cell, self.cells.clone()
        cells[: self.given] = math.nan
        frames = cells.repeat_interleave(_lengths(self.config.latent, self.nats), 0)
        return frames.repeat_interleave(cell, -2).repeat_interleave(cell, -1)

    def mask(self, threshold: float) -> Tensor:
        """Where the surprise is above so many nats a token, as 1.0 among 0.0: (F, H, W). Given frames never are. Raises
        InputError for a threshold that is no number."""
        if not math.isfinite(threshold):
            raise InputError(f"the threshold is {threshold}; give a number of nats a token")
        return (self.map > threshold).float()

    def curve(self) -> list[dict[str, float]]:
        """For each latent frame that wasn't given: its `first` and `last` frame, counted from 0, its `nats` together,
        and the `largest` of a token."""
        lengths = _lengths(self.config.latent, self.nats).tolist()
        points, first = [], 0
        for index, (length, nats) in enumerate(zip(lengths, self.nats, strict=True)):
            if index >= self.given:
                place = {"first": first, "last": first + length - 1}
                points.append({**place, "nats": float(nats.sum()), "largest": float(nats.max())})
            first += length
        return points


def _lengths(latent: LatentFormat, nats: Tensor) -> Tensor:
    """How many frames each latent frame stands for: (T,)."""
    lengths = nats.new_full((len(nats),), latent.temporal).long()
    lengths[0] = 1
    return lengths
