"""Inverting a block, x = a(x_<) z + b(x_<): token by token, or as a fixed point by Jacobi iteration.

The map is strictly triangular, so its only fixed point is the autoregressive answer, and iterating from anywhere
reaches it: after k sweeps the first k tokens are exact. `solve_span` slides over a long sequence with a cache, where
a quasi-Newton step with one secant slope per token gets there sooner; `solve_frames` iterates short ones whole.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from ..errors import InputError, NonFiniteError
from ..model.schema import check_kinds

SLOPE_LIMIT = 0.9  # keeps the secant step from growing along the scan
UNKNOWN = 0.5  # a squared change of half the tokens' own size: next to nothing is known of the token yet
ROUNDING = 50  # squared change that rounding alone keeps up in the deep block, in a compute type's eps squared
REACH = 4  # a span goes on for a quarter of its length after the first token of which nothing is known
SPANS = ("image_span", "first_span", "span")
FEW_SWEEPS, FEW_EVALUATIONS = 96, 48  # spans that suit a sweep that waits for the weights, and one that computes
COMPUTING = ("cpu", "mps")  # devices whose memory is fast for what they compute
WAITING = 256  # tokens of all rows that an accelerator evaluates in about the time of one, while it reads the weights
ABSORBED = 512  # known tokens that are run at once


@dataclass(frozen=True)
class SolverSettings:
    """How the blocks are inverted.

    `image_span`, `first_span` and `span` are the tokens that are solved at once at most: in an image, in the first
    frame of a clip, and after it; None is what suits the device (`span_for`). Larger spans take fewer sweeps and more
    token evaluations. A token settles when its squared change, relative to the mean square of its span, is below
    `tolerance`, or after `max_sweeps`. Shallow blocks iterate whole frames until the frame's relative
    squared change is below `shallow_tolerance`. `method` "autoregressive" ignores all of these.
    """

    image_span: int | None = None
    first_span: int | None = None
    span: int | None = None
    tolerance: float = 3e-4
    shallow_tolerance: float = 3e-5
    max_sweeps: int = 64
    method: str = "jacobi"

    def __post_init__(self):
        check_kinds(self)
        if self.method not in ("jacobi", "autoregressive"):
            raise InputError(f"solver method {self.method!r}: expected jacobi or autoregressive")
        for name in (*SPANS, "max_sweeps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"solver setting {name} is {getattr(self, name)}; the minimum is 1")
        for name in ("tolerance", "shallow_tolerance"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"solver setting {name} is {getattr(self, name)}, expected 0 <= {name} < 1")

    def span_at(self, token: int, frame_tokens: int, length: int) -> int:
        """Tokens to solve at once from `token` on, in a window of `length` tokens."""
        if length == frame_tokens:
            return self.image_span
        return self.first_span if token < frame_tokens else self.span

    @property
    def widest(self) -> int:
        """The most tokens of the deep block that are evaluated at once."""
        return max(ABSORBED, *(getattr(self, name) or 0 for name in SPANS))

    def resolvable(self, dtype: torch.dtype) -> SolverSettings:
        """The same settings with tolerances no smaller than a compute type resolves: below, rounding moves every token
        a little in every sweep, so that hardly any settles before `max_sweeps`, for little that is gained."""
        least = torch.finfo(dtype).eps ** 2
        return self.with_numbers(
            tolerance=max(self.tolerance, ROUNDING * least), shallow_tolerance=max(self.shallow_tolerance, least)
        )

    def spanned(self, span: int) -> SolverSettings:
        """The same settings with this span in place of those that are None."""
        return self.with_numbers(**{name: span for name in SPANS if getattr(self, name) is None})

    def with_numbers(self, **numbers) -> SolverSettings:
        """The same settings with the given numbers changed; None leaves a number as it is."""
        return replace(self, **{k: v for k, v in numbers.items() if v is not None})


PRESETS = {
    "fast": SolverSettings(tolerance=3e-3, shallow_tolerance=3e-4),
    "balanced": SolverSettings(tolerance=3e-4, shallow_tolerance=3e-5),
    "exact": SolverSettings(tolerance=1e-10, shallow_tolerance=1e-10, max_sweeps=4096),
}
AUTOREGRESSIVE = SolverSettings(method="autoregressive")


def span_for(device: torch.device, rows: int) -> int:
    """The span that suits a device and so many rows of the deep block: where a sweep of few tokens takes as long as one
    of many, since it waits for the weights, the one with few sweeps, else the one with few evaluations."""
    waits = device.type not in COMPUTING and rows * FEW_SWEEPS <= WAITING
    return FEW_SWEEPS if waits else FEW_EVALUATIONS


@dataclass
class Statistics:
    """What the solvers did. Token evaluations count a batch element's tokens once per sweep,
    whatever the guidance; each frame of a shallow block counts.

    `deep_changes` has, for each sweep of the deep block, the first token's index in the whole clip and
    the relative squared change of each token of the span (largest over the batch), on the deep block's device.
    """

    deep_sweeps: int = 0
    deep_evaluations: int = 0
    shallow_sweeps: int = 0
    shallow_evaluations: int = 0
    deep_changes: list[tuple[int, Tensor]] = field(default_factory=list)


class Evaluate(Protocol):
    """A block with a cache: see `runs.BlockRun`. `agree` makes one decision of those of all processes that compute."""

    def __call__(self, before: Tensor, start: int) -> tuple[Tensor, Tensor]: ...

    def horizon(self, start: int) -> int: ...

    def agree(self, leading: int, known: int, residual: float) -> tuple[int, int, float]: ...


class Window:
    """The tokens of a window in a block's order: noise `z`, tokens `x`, and the latest scale `a` and shift `b` of
    each, all (rows, L, c).

    The first `known` tokens are given. `frame_tokens` and `width` are those of the grid, `first` counts the clip's
    tokens before the window.
    """

    def __init__(self, z: Tensor, frame_tokens: int, width: int, known: int = 0, first: int = 0):
        self.z, self.frame_tokens, self.width, self.known, self.first = z, frame_tokens, width, known, first
        self.x, self.a, self.b = z.clone(), torch.ones_like(z), torch.zeros_like(z)

    @property
    def length(self) -> int:
        return self.z.shape[1]

    def before(self, start: int, stop: int) -> Tensor:
        """The tokens before the slots start .. stop - 1, which the block reads for them: none for slot 0."""
        return self.x[:, max(start - 1, 0) : stop - 1]


def absorb(evaluate: Evaluate, window: Window, report: Callable[[int], None] = lambda done: None) -> None:
    """Run the known tokens, so that their keys and values are in the cache, and their scale and shift in the window.
    `report` is told how many are done."""
    for start in range(0, window.known, ABSORBED):
        stop = min(start + ABSORBED, window.known)
        window.a[:, start:stop], window.b[:, start:stop] = evaluate(window.before(start, stop), start)
        report(stop)


def solve_tokens(evaluate: Evaluate, window: Window) -> Iterator[int]:
    """Autoregressive: one token after the other. Yields how many are settled after each."""
    for token in range(window.known, window.z.shape[1]):
        a, b = evaluate(window.before(token, token + 1), token)
        now = slice(token, token + 1)
        window.x[:, now] = a * window.z[:, now] + b
        yield token + 1


def solve_span(
    evaluate: Evaluate, window: Window, settings: SolverSettings, statistics: Statistics
) -> Iterator[tuple[int, float]]:
    """Jacobi over a sliding span; yields (tokens settled, residual) after every sweep.

    Each sweep commits the leading tokens that no longer change (at least one: the first has only settled tokens
    before it, so it is exact). New ones enter warm-started, up to the span's size, but not far after a token of which
    nothing is known: they couldn't be right before it is.
    """
    settled = entered = known = window.known
    secant, sweep, first_sweeps = Secant(), 0, []  # of each token of the span, in which it was first evaluated
    while settled < window.length:
        size = settings.span_at(settled, window.frame_tokens, window.length)
        beyond = max(math.ceil(size / REACH), 2)  # one would be autoregressive
        stop = max(min(settled + size, known + beyond, window.length), entered)
        warm_start(window, entered, stop)
        first_sweeps += [sweep] * (stop - max(entered, settled))
        output, change = _sweep(evaluate, window, settled, stop)
        aged = bisect_right(first_sweeps, sweep + 1 - settings.max_sweeps)
        leading, sure, residual = evaluate.agree(*decide(change, settings.tolerance, aged))
        if not math.isfinite(residual):
            raise_non_finite(window, output, settled)
        leading = min(leading, evaluate.horizon(settled) - settled)
        statistics.deep_sweeps += 1
        statistics.deep_evaluations += stop - settled
        statistics.deep_changes.append((window.first + settled, change))
        following = secant.step(window.x[:, settled:stop], output)
        window.x[:, settled : settled + leading] = output[:, :leading]
        window.x[:, settled + leading : stop] = following[:, leading:]
        secant.drop(leading)
        del first_sweeps[:leading]
        sweep += 1
        known = settled + max(sure, leading)
        settled, entered = settled + leading, stop
        yield settled, residual


def _sweep(evaluate: Evaluate, window: Window, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """One evaluation: the new tokens, and how much each changed."""
    now = slice(start, stop)
    a, b = evaluate(window.before(start, stop), start)
    window.a[:, now], window.b[:, now] = a, b
    output = a * window.z[:, now] + b
    return output, _change(output, window.x[:, now])


class Secant:
    """A quasi-Newton step for x = f(x_<): the Jacobian is one slope for each token, of its output against its left
    neighbour's input, estimated from the last two sweeps."""

    def __init__(self):
        self.inputs = self.outputs = None  # of the last sweep, (rows, tokens still unsettled, c)

    def step(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """The next inputs: the change e of the inputs solves e_j = (output_j - input_j) + slope_j e_(j-1)."""
        slope = torch.zeros_like(outputs[..., :1])
        if self.inputs is not None and self.inputs.shape[1] > 1:
            old = self.inputs.shape[1]
            moved = inputs[:, : old - 1] - self.inputs[:, :-1]
            answered = outputs[:, 1:old] - self.outputs[:, 1:]
            size = moved.square().sum(-1, keepdim=True)
            ratio = (moved * answered).sum(-1, keepdim=True) / size.clamp(min=1e-12)
            slope[:, 1:old] = ratio.clamp(-SLOPE_LIMIT, SLOPE_LIMIT)
        self.inputs, self.outputs = inputs.clone(), outputs
        return inputs + parallel_scan(slope, outputs - inputs)

    def drop(self, count: int) -> None:
        """Forget the first tokens of the last sweep."""
        self.inputs, self.outputs = self.inputs[:, count:], self.outputs[:, count:]


def parallel_scan(slope: Tensor, step: Tensor) -> Tensor:
    """e_j = step_j + slope_j e_(j-1) along dim 1, in log2(n) doublings.

    slope is (rows, n, 1), step (rows, n, c).
    """
    shift = 1
    while shift < step.shape[1]:
        step = torch.cat((step[:, :shift], step[:, shift:] + slope[:, shift:] * step[:, :-shift]), 1)
        slope = torch.cat((slope[:, :shift], slope[:, shift:] * slope[:, :-shift]), 1)
        shift *= 2
    return step


def warm_start(window: Window, start: int, stop: int) -> None:
    """Start tokens start .. stop - 1 from their noise and the affine map of the same place one frame earlier, or
    else one row earlier, or else of the last token before them. A clip's first tokens start from noise alone."""
    if start in (0, stop):
        return
    slots = torch.arange(start, stop, device=window.z.device)
    source = _same_place(slots, start, window.frame_tokens)
    row = _same_place(slots, start, window.width)
    source = torch.where(source >= 0, source, torch.where(row >= 0, row, start - 1))
    window.x[:, start:stop] = window.a[:, source] * window.z[:, start:stop] + window.b[:, source]


def _same_place(slots: Tensor, start: int, period: int) -> Tensor:
    """The last slot before `start` that is whole periods before each slot (negative: none)."""
    return slots - period * ((slots - start) // period + 1)


def _change(new: Tensor, old: Tensor) -> Tensor:
    """Squared change of each token relative to the mean square, the largest of the batch: (n,)."""
    scale = new.square().mean((1, 2), keepdim=True).clamp(min=1e-12)
    return ((new - old).square() / scale).mean(-1).amax(0)


def decide(change: Tensor, tolerance: float, aged: int) -> tuple[int, int, float]:
    """A sweep's only question to the device: how many leading tokens of a span may be committed, at least one, before
    how many more or less is known of all, and the residual. The first `aged` may be committed in any case."""
    going = ~(change < tolerance)
    going[:aged] = False
    counts = [torch.where(rest.any(), rest.int().argmax(), len(rest)) for rest in (going, ~(change < UNKNOWN))]
    leading, known, residual = torch.stack([*(count.to(change.dtype) for count in counts), change.max()]).tolist()
    return max(int(leading), 1), int(known), residual


def raise_non_finite(window: Window, output: Tensor, start: int) -> None:
    """Name the first bad token of `output` (rows, n, c), which begins at slot `start`: what is after it
    has not seen it yet."""
    bad = ~torch.isfinite(output).all(-1)
    place = window.first + start + int(bad.any(0).int().argmax())
    element = int(bad.any(1).int().argmax())
    frame, token = divmod(place, window.frame_tokens)
    raise NonFiniteError(
        f"NaN or infinity in the deep block: batch element {element}, latent frame {frame}, token {token} in the "
        "block's order. Check the weights and the given latents, or run in float32 or bfloat16."
    )


def solve_frames(
    affine: Callable[[Tensor], tuple[Tensor, Tensor]],
    z: Tensor,
    opening: tuple[Tensor, Tensor],
    settings: SolverSettings,
    statistics: Statistics,
    report: Callable[[int, float], None],
) -> Tensor:
    """Jacobi over whole frames z (rows, N, c); each row stops on its own.

    `affine(tokens)` gives a, b of whole rows. All tokens start from their noise and the `opening` a, b, which broadcast
    to them: the first token's, which is right at once, suit the others better than the noise alone, by a whole sweep in
    the demo. `report(rows done, residual)` is called every sweep.
    """
    a, b = opening
    current = a * z + b
    x, active = current.clone(), torch.arange(len(z), device=z.device)
    for _ in range(max(min(settings.max_sweeps, z.shape[1] - 1), 1)):
        a, b = affine(current)
        output = a * z[active] + b
        change = (output - current).square().mean((1, 2)) / output.square().mean((1, 2)).clamp(min=1e-12)
        x[active] = output
        statistics.shallow_sweeps += 1
        statistics.shallow_evaluations += output.shape[0] * output.shape[1]
        residual, going = still_going(change, settings.shallow_tolerance)
        report(len(z) - len(going), residual)
        if not len(going) or residual != residual:
            break
        current, active = output[going], active[going]
    return x


def still_going(change: Tensor, tolerance: float) -> tuple[float, Tensor]:
    """The residual, and the rows whose change (rows,) is not below the tolerance, which stay on the device: a sweep's
    only question to it."""
    settled = (change < tolerance).float()
    count, residual = torch.stack(((1 - settled).sum(), change.max())).tolist()
    return residual, settled.argsort(stable=True)[: int(count)]
