"""The learned denoiser: a transformer over text and frames with a band of frames in sight.

A frame sees the text, `look_ahead` frames after itself and `window - look_ahead` before. It is run
as a pipeline: each layer takes a frame as soon as the frames it sees have left the layer below, so
that frames can be given as they are made. All at once is the same pipeline, filled in one step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .config import Denoiser, FlowConfig
from .rope import Rotary
from .transformer import FinalNorm, Layer


class DenoiserNet(nn.Module):
    """Weights of the denoiser; `DenoiserRun` runs it."""

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


class DenoiserRun:
    """One pass over up to as many frames as `rotary` has positions for."""

    def __init__(self, net: DenoiserNet, config: Denoiser, text: Tensor, text_rotary: Rotary, rotary: Rotary, dtype):
        self.net, self.dtype, self.rotary = net, dtype, rotary
        self.layers = [BandedLayer(layer, config, text_rotary) for layer in net.attn_blocks]
        self.text = net.proj_txt(text.to(dtype))
        self.taken = 0

    def push(self, tokens: Tensor, last: bool) -> Tensor:
        """Take frames (B, n, N, c); give the output (B, m, N, c), float32, of the frames that are
        complete by now, in order. With `last` no more frames come and all are given."""
        count, frame_tokens = tokens.shape[1:3]
        slots = slice(self.taken * frame_tokens, (self.taken + count) * frame_tokens)
        self.taken += count
        hidden = self.net.proj_in(tokens.flatten(1, 2).to(self.dtype)).unflatten(1, (count, frame_tokens))
        text, rotary = self.text, self.rotary[slots]
        self.text = None  # the text goes through once, before the first frame
        for layer in self.layers:
            text, hidden, rotary = layer.push(text, hidden, rotary, last)
        out = self.net.proj_out(self.net.final_norm(hidden.flatten(1, 2))).float()
        return out.unflatten(1, (-1, frame_tokens))


class BandedLayer:
    """One layer of the pipeline: keys and values in sight, and the frames that wait for theirs."""

    def __init__(self, layer: Layer, config: Denoiser, text_rotary: Rotary):
        self.layer, self.text_rotary = layer, text_rotary
        self.ahead, self.behind = config.look_ahead, config.window - config.look_ahead
        self.text = None  # (hidden, queries, keys, values) of the text
        self.frames = {}  # index -> (keys, values)
        self.waiting = []  # (hidden, queries, rotary) of frames not yet given
        self.given = self.taken = 0

    def push(self, text, hidden, rotary, last):
        """Hidden (B, n, N, w) of new frames in, of finished frames out; the text on its first way."""
        if text is not None:
            self.text = (text, *self.layer.attention.project(text, self.text_rotary))
        self._take(hidden, rotary)
        until = self.taken if last else max(self.taken - self.ahead, 0)
        ready, self.waiting = self.waiting[: until - self.given], self.waiting[until - self.given :]
        text_out = None
        if ready and self.given == 0:
            text_out = self._text_output()
        if not ready:
            return text_out, hidden[:, :0], rotary[:0]
        attended = [self._attend(queries, self.given + i) for i, (_, queries, _) in enumerate(ready)]
        self.given = until
        self.frames = {i: kv for i, kv in self.frames.items() if i >= until - self.behind}
        before = torch.cat([item[0] for item in ready], 1)
        after = self.layer.update(before, torch.cat(attended, 2)).unflatten(1, (len(ready), -1))
        parts = [item[2] for item in ready]
        return text_out, after, Rotary(torch.cat([p.cos for p in parts]), torch.cat([p.sin for p in parts]))

    def _take(self, hidden: Tensor, rotary: Rotary) -> None:
        count, frame_tokens = hidden.shape[1:3]
        if not count:
            return
        parts = self.layer.attention.project(hidden.flatten(1, 2), rotary)
        for i, (queries, keys, values) in enumerate(zip(*(p.split(frame_tokens, 2) for p in parts), strict=True)):
            self.frames[self.taken + i] = (keys, values)
            slots = slice(i * frame_tokens, (i + 1) * frame_tokens)
            self.waiting.append((hidden[:, i], queries, rotary[slots]))
        self.taken += count

    def _attend(self, queries: Tensor, frame: int) -> Tensor:
        """Attention of one frame, or of the text, which stands at frame 0 but has no frame behind."""
        seen = [self.frames[i] for i in range(frame - self.behind, frame + self.ahead + 1) if i in self.frames]
        keys = torch.cat([self.text[2], *(kv[0] for kv in seen)], 2)
        values = torch.cat([self.text[3], *(kv[1] for kv in seen)], 2)
        return scaled_dot_product_attention(queries, keys, values)

    def _text_output(self) -> Tensor:
        hidden, queries = self.text[:2]
        return self.layer.update(hidden, self._attend(queries, 0))
