"""The learned denoiser: a transformer over text and frames, each of which sees a band of frames.

A frame sees the text, `look_ahead` frames after itself and `window - look_ahead` before. The layers form a
pipeline: each passes a frame on as soon as the frames it sees have arrived, so that frames can be denoised while
later ones are still being sampled. A whole clip goes through the same pipeline in one step.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .config import Denoiser, FlowConfig
from .rope import Rotary
from .transformer import FinalNorm, Layer


class DenoiserNet(nn.Module):
    """The denoiser's weights; `DenoiserRun` feeds it frame by frame."""

    def __init__(self, config: FlowConfig, operations, **factory):
        super().__init__()
        width, channels = config.denoiser.width, config.token_channels
        self.proj_in = operations.Linear(channels, width, **factory)
        self.proj_txt = operations.Linear(config.text_dim, width, **factory)
        self.attn_blocks = nn.ModuleList(
            Layer(width, config.head_dim, operations, **factory) for _ in range(config.denoiser.layers)
        )
        self.final_norm = FinalNorm(width, **factory)
        self.proj_out = operations.Linear(width, channels, **factory)

    def forward(self, tokens: Tensor, bands: list[Band], last: bool, text: Tensor | None = None) -> Tensor:
        """Take tokens (B, n, c) of new frames; return outputs (B, m, c), float32, of the frames that are complete by
        now.

        `bands` holds what each layer has seen so far. `text` (B, L, D) goes in once, before the first frame;
        `last` says that no more frames will come. Tokens and text are in the compute type.
        """
        hidden = self.proj_in(tokens)
        if text is not None:
            hidden = torch.cat((self.proj_txt(text), hidden), 1)
        for layer, band in zip(self.attn_blocks, bands, strict=True):
            rotary = band.next_rotary(hidden.shape[1])
            hidden = layer(hidden, rotary, partial(band.attend, last=last), band.residual)
        return self.proj_out(self.final_norm(hidden)).float()


class DenoiserRun:
    """One pass over text (B, L, D) and at most as many frames of `frame_tokens` as `rotary`, which begins with the
    text's, has positions for."""

    def __init__(
        self, net: DenoiserNet, config: Denoiser, text: Tensor, frame_tokens: int, rotary: Rotary, dtype: torch.dtype
    ):
        self.net, self.dtype, self.text = net, dtype, text.to(dtype)
        final = len(net.attn_blocks) - 1
        self.bands = [Band(config, rotary, text.shape[1], frame_tokens, i < final) for i in range(final + 1)]
        self.taken = 0  # frames

    def push(self, tokens: Tensor, last: bool) -> Tensor:
        """Take frames (B, n, N, c); return the outputs (B, m, N, c) of those that are complete, in order.

        `last` says that no more frames will come, and returns all that are left.
        """
        self.taken += tokens.shape[1]
        text, self.text = self.text, None
        out = self.net(tokens.flatten(1, 2).to(self.dtype), self.bands, last, text)
        return out.unflatten(1, (-1, tokens.shape[2]))


class Band:
    """What one layer holds: the keys and values that later frames need, and the frames still waiting for theirs.

    The text comes first and is seen by all; it sees what frame 0 sees. The last layer needn't pass it on.
    """

    def __init__(self, config: Denoiser, rotary: Rotary, text_tokens: int, frame_tokens: int, passes_text: bool):
        self.ahead, self.behind = config.look_ahead, config.window - config.look_ahead
        self.rotary, self.text_tokens, self.frame_tokens = rotary, text_tokens, frame_tokens
        self.passes_text = passes_text
        self.text: tuple[Tensor, Tensor, Tensor] | None = None  # queries, keys, values
        self.frames: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values by index
        self.queries: list[Tensor] = []  # of the frames that wait
        self.hidden: list[Tensor] = []  # of all that waits, in one piece
        self.slots = self.taken = self.given = 0  # slots that came in, frames that came in, frames that went out

    def next_rotary(self, slots: int) -> Rotary:
        """Positions of the next slots to come in."""
        return self.rotary[self.slots : self.slots + slots]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, last: bool) -> Tensor:
        """Take new slots (rows, heads, slots, head_dim); return the attention of the frames whose band is complete."""
        self._take(*(self._pieces(x, 2) for x in (queries, keys, values)))
        until = self.taken if last else max(self.taken - self.ahead, 0)
        done = [queries[:, :, :0]]
        if self.passes_text and until and not self.given:
            done.append(self._attended(self.text[0], 0))
        ready, self.queries = self.queries[: until - self.given], self.queries[until - self.given :]
        done += [self._attended(piece, frame) for frame, piece in enumerate(ready, self.given)]
        self.given = until
        self.frames = {i: kv for i, kv in self.frames.items() if i >= until - self.behind}
        return torch.cat(done, 2)

    def residual(self, hidden: Tensor, leaving: int) -> Tensor:
        """Take the hidden states of the slots `attend` took; return those of the `leaving` slots it returned."""
        skipped = 0 if self.slots or self.passes_text else self.text_tokens
        self.slots += hidden.shape[1]
        waiting = torch.cat((*self.hidden, hidden[:, skipped:]), 1)
        self.hidden = [waiting[:, leaving:].clone()]  # not a slice, which would keep what leaves
        return waiting[:, :leaving]

    def _pieces(self, x: Tensor, dim: int) -> list[Tensor]:
        """New slots split by frame; the text, which comes with the first frame, is a piece of its own."""
        frames = (x.shape[dim] - (0 if self.slots else self.text_tokens)) // self.frame_tokens
        if frames < 0:  # the layer below has given nothing yet
            return []
        text = [] if self.slots else [self.text_tokens]
        return list(x.split([*text, *[self.frame_tokens] * frames], dim))

    def _take(self, queries: list[Tensor], keys: list[Tensor], values: list[Tensor]) -> None:
        # Copies: a slice would keep the projections of all that came in with it.
        pieces = [tuple(part.clone() for part in piece) for piece in zip(queries, keys, values, strict=True)]
        if self.text is None and pieces:
            self.text, *pieces = pieces
        for queries, keys, values in pieces:
            self.queries.append(queries)
            self.frames[self.taken] = (keys, values)
            self.taken += 1

    def _attended(self, queries: Tensor, frame: int) -> Tensor:
        """Attention of one frame, or of the text as frame 0, to the text and the frames in sight."""
        seen = [self.frames[i] for i in range(frame - self.behind, frame + self.ahead + 1) if i in self.frames]
        keys = torch.cat([self.text[1], *(kv[0] for kv in seen)], 2)
        values = torch.cat([self.text[2], *(kv[1] for kv in seen)], 2)
        return scaled_dot_product_attention(queries, keys, values)
