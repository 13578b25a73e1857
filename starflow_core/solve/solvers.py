"""Inverting a block: x = a(x_<) z + b(x_<), token by token or by Jacobi iteration.

The map is strictly triangular, so that iterating it from anywhere reaches the autoregressive answer:
after k sweeps the first k tokens are exact. `solve_span` slides over a long sequence with a cache,
`solve_frames` iterates short sequences whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from ..errors import InputError, NonFiniteError

SLOPE_LIMIT = 0.9  # keeps the accelerated step from amplifying along the scan


@dataclass(frozen=True)
class SolverSettings:
    """How the blocks are inverted.

    `image_span`, `first_span` and `span` are the tokens that are solved at once: in an image, in the
    first frame of a clip, and after it. Larger spans take fewer sweeps and more token evaluations. A
    token settles when its squared change, relative to the mean square of its span, is below
    `tolerance`, or after `max_sweeps`. Shallow blocks iterate whole frames until the frame's relative
    squared change is below `shallow_tolerance`. `method` "autoregressive" ignores all of these.
    """

    image_span: int = 18
    first_span: int = 32
    span: int = 132
    tolerance: float = 1e-3
    shallow_tolerance: float = 3e-5
    max_sweeps: int = 64
    method: str = "jacobi"

    def __post_init__(self):
        if self.method not in ("jacobi", "autoregressive"):
            raise InputError(f"solver method {self.method!r}: expected jacobi or autoregressive")
        for name in ("image_span", "first_span", "span", "max_sweeps"):
            if getattr(self, name) < 1:
                raise InputError(f"solver setting {name} is {getattr(self, name)}, the least is 1")
        for name in ("tolerance", "shallow_tolerance"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"solver setting {name} is {getattr(self, name)}, expected 0 <= {name} < 1")

    def span_at(self, token: int, frame_tokens: int, length: int) -> int:
        """Tokens to solve at once from `token` on, in a window of `length` tokens."""
        if length == frame_tokens:
            return self.image_span
        return self.first_span if token < frame_tokens else self.span

    def with_numbers(self, **numbers) -> SolverSettings:
        """The same settings with those numbers changed that are not None."""
        return replace(self, **{k: v for k, v in numbers.items() if v is not None})


PRESETS = {
    "fast": SolverSettings(tolerance=1e-2, shallow_tolerance=3e-4),
    "balanced": SolverSettings(tolerance=1e-3, shallow_tolerance=3e-5),
    "exact": SolverSettings(tolerance=1e-10, shallow_tolerance=1e-10, max_sweeps=4096),
}
AUTOREGRESSIVE = SolverSettings(method="autoregressive")


@dataclass
class Statistics:
    """What the solvers did. Token evaluations count a batch element's tokens once per sweep,
    whatever the guidance; a shallow block's frames count separately.

    `deep_changes` has, for each sweep of the deep block, the first token's index in the whole clip and
    the relative squared change of each token of the span (largest over the batch).
    """

    deep_sweeps: int = 0
    deep_evaluations: int = 0
    shallow_sweeps: int = 0
    shallow_evaluations: int = 0
    deep_changes: list[tuple[int, Tensor]] = field(default_factory=list)


class Evaluate(Protocol):
    """A block with a cache: see `flow.BlockRun`."""

    def start(self, tokens: Tensor) -> Tensor: ...

    def __call__(self, inputs: Tensor, start: int) -> tuple[Tensor, Tensor]: ...


@dataclass
class Sequence:
    """A window of tokens in a block's order: noise z, tokens x, and the latest scale a and shift b
    of each, all (rows, L, c). The first `known` tokens are given. `width` is a row of the grid,
    `first` counts the tokens before the window."""

    z: Tensor
    frame_tokens: int
    width: int
    known: int = 0
    first: int = 0
    x: Tensor = None
    a: Tensor = None
    b: Tensor = None

    def __post_init__(self):
        self.x = self.z.clone() if self.x is None else self.x
        self.a, self.b = torch.ones_like(self.z), torch.zeros_like(self.z)

    def inputs(self, evaluate: Evaluate, start: int, stop: int) -> Tensor:
        """What the slots start .. stop - 1 read: the token before each."""
        if start:
            return self.x[:, start - 1 : stop - 1]
        return torch.cat((evaluate.start(self.x), self.x[:, : stop - 1]), 1)


def absorb(evaluate: Evaluate, sequence: Sequence) -> None:
    """Run the known tokens, so that their keys and values are in the cache."""
    if sequence.known:
        inputs = sequence.inputs(evaluate, 0, sequence.known)
        sequence.a[:, : sequence.known], sequence.b[:, : sequence.known] = evaluate(inputs, 0)


def solve_tokens(evaluate: Evaluate, sequence: Sequence) -> Iterator[int]:
    """Autoregressive: one token after the other. Yields how many are settled after each."""
    for token in range(sequence.known, sequence.z.shape[1]):
        a, b = evaluate(sequence.inputs(evaluate, token, token + 1), token)
        now = slice(token, token + 1)
        sequence.x[:, now] = a * sequence.z[:, now] + b
        yield token + 1


def solve_span(
    evaluate: Evaluate, sequence: Sequence, settings: SolverSettings, statistics: Statistics
) -> Iterator[tuple[int, float]]:
    """Jacobi over a sliding span; yields (tokens settled, residual) after every sweep.

    Each sweep commits the leading tokens that no longer change (at least one: the first has only
    settled tokens before it, so it is exact), and as many new ones enter, started from the affine
    map of the same place one frame (or one row) earlier.
    """
    z, x = sequence.z, sequence.x
    length = z.shape[1]
    settled = entered = sequence.known
    span = Span()
    while settled < length:
        size = settings.span_at(settled, sequence.frame_tokens, length)
        stop = max(min(settled + size, length), entered)
        if stop > entered:
            _enter(sequence, entered, stop)
        now = slice(settled, stop)
        a, b = evaluate(sequence.inputs(evaluate, settled, stop), settled)
        output = a * z[:, now] + b
        sequence.a[:, now], sequence.b[:, now] = a, b
        change = _change(output, x[:, now])
        leading = _leading(change < settings.tolerance, span.ages(entered, stop, settled) >= settings.max_sweeps)
        residual, leading = float(change.max()), int(leading)
        if residual != residual or residual == float("inf"):
            raise_non_finite(sequence, output, settled)
        statistics.deep_sweeps += 1
        statistics.deep_evaluations += stop - settled
        statistics.deep_changes.append((sequence.first + settled, change.cpu()))
        following = span.advance(x[:, now], output)
        x[:, settled : settled + leading] = output[:, :leading]
        x[:, settled + leading : stop] = following[:, leading:]
        span.drop(leading)
        settled, entered = settled + leading, stop
        yield settled, residual


class Span:
    """What the solver remembers of the tokens that are being solved: the last sweep, and ages."""

    def __init__(self):
        self.inputs = self.outputs = None  # of the last sweep, (rows, tokens still unsettled, c)
        self.sweeps = None  # how often each has been evaluated

    def ages(self, entered: int, stop: int, settled: int) -> Tensor:
        """Sweeps of each token, this one included."""
        fresh = torch.zeros(stop - max(entered, settled), dtype=torch.int32)
        old = self.sweeps if self.sweeps is not None else fresh[:0]
        self.sweeps = torch.cat((old, fresh)) + 1
        return self.sweeps

    def advance(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """The next inputs: outputs, plus what the change of each left neighbour will do to them.

        From two sweeps each token gets one slope s of its output against its neighbour's input;
        the change e of the inputs then follows e_j = (output_j - input_j) + s_j e_(j-1).
        """
        slope = torch.zeros_like(outputs[..., :1])
        if self.inputs is not None and self.inputs.shape[1] > 1:
            old = self.inputs.shape[1]
            moved = inputs[:, : old - 1] - self.inputs[:, :-1]
            answered = outputs[:, 1:old] - self.outputs[:, 1:]
            size = moved.square().sum(-1, keepdim=True)
            ratio = (moved * answered).sum(-1, keepdim=True) / size.clamp(min=1e-12)
            slope[:, 1:old] = ratio.clamp(-SLOPE_LIMIT, SLOPE_LIMIT)
        self.inputs, self.outputs = inputs.clone(), outputs
        return inputs + linear_scan(slope, outputs - inputs)

    def drop(self, count: int) -> None:
        self.inputs, self.outputs = self.inputs[:, count:], self.outputs[:, count:]
        self.sweeps = self.sweeps[count:]


def linear_scan(slope: Tensor, step: Tensor) -> Tensor:
    """e_j = step_j + slope_j e_(j-1) along dim 1, in log2(n) doublings.

    slope is (rows, n, 1), step (rows, n, c).
    """
    shift = 1
    while shift < step.shape[1]:
        step = torch.cat((step[:, :shift], step[:, shift:] + slope[:, shift:] * step[:, :-shift]), 1)
        slope = torch.cat((slope[:, :shift], slope[:, shift:] * slope[:, :-shift]), 1)
        shift *= 2
    return step


def _enter(sequence: Sequence, start: int, stop: int) -> None:
    """Start new tokens from z and the affine map of the nearest earlier slot that has one."""
    if start == 0:
        return
    slots = torch.arange(start, stop)
    source = _same_place(slots, start, sequence.frame_tokens)
    row = _same_place(slots, start, sequence.width)
    source = torch.where(source >= 0, source, torch.where(row >= 0, row, start - 1)).to(sequence.z.device)
    sequence.x[:, start:stop] = sequence.a[:, source] * sequence.z[:, start:stop] + sequence.b[:, source]


def _same_place(slots: Tensor, start: int, period: int) -> Tensor:
    """The last slot before `start` that is whole periods before each slot (negative: none)."""
    return slots - period * ((slots - start) // period + 1)


def _change(new: Tensor, old: Tensor) -> Tensor:
    """Squared change of each token relative to the mean square, the largest of the batch: (n,)."""
    scale = new.square().mean((1, 2), keepdim=True).clamp(min=1e-12)
    return ((new - old).square() / scale).mean(-1).amax(0)


def _leading(small: Tensor, old: Tensor) -> Tensor:
    """How many leading tokens may be committed, at least one."""
    stays = ~(small | old.to(small.device))
    return torch.where(stays.any(), stays.int().argmax(), len(stays)).clamp(min=1)


def raise_non_finite(sequence: Sequence, output: Tensor, start: int) -> None:
    """Name the first bad token of `output` (rows, n, c), which begins at slot `start`: what is after it
    has not seen it yet."""
    bad = ~torch.isfinite(output).all(-1)
    place = sequence.first + start + int(bad.any(0).int().argmax())
    element = int(bad.any(1).int().argmax())
    frame, token = divmod(place, sequence.frame_tokens)
    raise NonFiniteError(
        f"NaN or infinity in the deep block: batch element {element}, latent frame {frame}, token {token} in the "
        "block's order. Check the weights and the given latents, or run in float32 or bfloat16."
    )


def solve_frames(
    affine: Callable[[Tensor], tuple[Tensor, Tensor]],
    z: Tensor,
    settings: SolverSettings,
    statistics: Statistics,
    report: Callable[[int, float], None],
) -> Tensor:
    """Jacobi over whole frames z (rows, N, c), each row stopping on its own.

    `affine(tokens)` gives a, b of whole rows. `report(rows done, residual)` is called every sweep.
    """
    x, active = z.clone(), torch.arange(len(z), device=z.device)
    current, span = z, Span()
    for _ in range(min(settings.max_sweeps, z.shape[1])):
        a, b = affine(current)
        output = a * z[active] + b
        change = (output - current).square().mean((1, 2)) / output.square().mean((1, 2)).clamp(min=1e-12)
        x[active] = output
        statistics.shallow_sweeps += 1
        statistics.shallow_evaluations += output.shape[0] * output.shape[1]
        residual, going = float(change.max()), (~(change < settings.shallow_tolerance)).nonzero()[:, 0]
        report(len(z) - len(going), residual)
        if not len(going) or residual != residual:
            break
        following = span.advance(current, output)
        current, active = following[going], active[going]
        span.inputs, span.outputs = span.inputs[going], span.outputs[going]
    return x
