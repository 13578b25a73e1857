"""Jobs: from prompts and given frames to latents in VAE space.

Text to image and video, first frame, extend, edit and last frame are one path: a `Job` with or
without a `Context`, run by a `Generation`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from ..control import Control
from ..errors import InputError, ran_out
from ..model.cache import RESIDENT, CacheSettings
from ..model.config import FlowConfig
from ..model.flow import Flow
from ..model.latent import to_flow_space, to_vae_space
from ..model.parallel import ONE, Mesh
from ..model.placement import Placement
from ..model.schema import check_kinds
from ..solve import noise
from ..solve.denoising import DenoiseStream, score_denoise
from ..solve.sampling import Sampler, Settled
from ..solve.solvers import PRESETS, SolverSettings, Statistics
from ..solve.windows import Prompts
from .context import Context, later_factors


@dataclass(frozen=True)
class Job:
    """What to make. Sizes are in pixels; `frames` is 4n + 1 (1: an image), `fps` frames per second.

    `frames` counts the result's frames, given ones included. Element i of a batch uses seed + i.
    `window` and `keep` are latent frames (None: the model's own). At each of `changes`, in seconds, another prompt
    begins; the next frames follow the last `keep_at_change` latent ones, which are brought under it first if
    `change_kept`: right for another colour, kind or background, while another direction is followed a little less.
    """

    height: int
    width: int
    frames: int = 1
    fps: float = 16
    seed: int = 0
    batch: int = 1
    guidance: float = 0.0
    denoise: bool = True
    context: Context | None = None
    window: int | None = None
    keep: int | None = None
    solver: SolverSettings = field(default_factory=lambda: PRESETS["balanced"])
    changes: tuple[float, ...] = ()
    keep_at_change: int = 1
    change_kept: bool = True

    def __post_init__(self):
        check_kinds(self)

    @property
    def task(self) -> str:
        return self.context.task if self.context else "text"

    @property
    def rows(self) -> int:
        """Sequences of the deep block: the batch, under guidance twice."""
        return self.batch * (2 if self.guidance else 1)


@dataclass(frozen=True)
class Means:
    """How a job is fitted to a device: the flow's large weights in 8 bit (`int8`), its layers brought in from main
    memory one by one (`streamed`), how settled keys and values are kept (`cache`), whether denoising and decoding wait
    until all is sampled (`in_turn`), and over which processes the deep block is spread (`mesh`)."""

    int8: bool = False
    streamed: bool = False
    cache: CacheSettings = RESIDENT
    in_turn: bool = False
    mesh: Mesh = ONE

    @property
    def uncompiled(self) -> str | None:
        """Why a flow isn't compiled with these means; None where it can be."""
        if self.mesh.count > 1:
            return "several processes compute it together"
        if self.streamed:
            return "its weights come in layer by layer"
        return "its keys and values are in 8 bit or in main memory" if self.cache.in_groups else None

    def __str__(self) -> str:
        cache = self.cache
        return "; ".join([
            f"weights {'in 8 bit' if self.int8 else 'in full'}"
            + (", brought in layer by layer" if self.streamed else ""),
            f"keys and values {'in 8 bit' if cache.quantised else 'in full'}"
            + (" in main memory" if cache.offloaded else ""),
            *(["denoised and decoded after sampling"] if self.in_turn else []),
            *([str(self.mesh)] if self.mesh.count > 1 else []),
        ])  # fmt: skip


PLAIN = Means()  # all on the device, at once


@dataclass(frozen=True)
class Layout:
    """A job in latent frames: `hidden` given ones that are not shown, then the result's `frames`. Prompts begin at the
    `starts`."""

    frames: int
    hidden: int
    given: int
    window: int
    keep: int
    shape: tuple[int, int, int]
    factors: Tensor
    starts: tuple[int, ...] = (0,)

    @property
    def total(self) -> int:
        return self.hidden + self.frames


MAX_FPS = 1000  # frames per second


def layout(config: FlowConfig, job: Job) -> Layout:
    """Lay a job out for a model. Raises InputError that names what is wrong and the nearest valid value."""
    config.check_size(job.height, job.width)
    if job.batch < 1:
        raise InputError(f"batch is {job.batch}; the minimum is 1")
    if not 0 <= job.guidance < math.inf:
        raise InputError(f"guidance is {job.guidance}; 0 is off, typical is {config.defaults.guidance:g}")
    if config.kind == "image" and job.frames != 1:
        raise InputError(f"{config.name} makes images: frames is {job.frames}, expected 1")
    if job.frames > 1 and not 0 < job.fps <= MAX_FPS:
        raise InputError(f"fps is {job.fps}; expected a number above 0, at most {MAX_FPS}")
    frames = config.latent.latent_frames(job.frames)
    context = job.context
    hidden, given = (context.hidden, context.frames) if context else (0, 0)
    total = hidden + frames
    window, keep = config.sliding_window(total, job.window, job.keep)
    size = tuple(side // config.latent.spatial for side in (job.height, job.width))
    shape = (config.latent.channels, *size)
    if context:
        _check_context(config, job, shape, window, total)
    factors = later_factors(config, job.task, hidden, total)
    return Layout(frames, hidden, given, window, keep, shape, factors, _starts(config, job, window, given, frames))


def _starts(config: FlowConfig, job: Job, window: int, given: int, frames: int) -> tuple[int, ...]:
    """The latent frames at which prompts begin: those nearest to the job's times."""
    if not job.changes:
        return (0,)
    _check_changes(config, job, window)
    latent, starts = config.latent, [0]
    length = latent.temporal / job.fps  # seconds of a latent frame
    for time in job.changes:
        start = latent.nearest(time * job.fps)
        if start <= starts[-1]:
            raise InputError(
                f"the prompt at {time:g}s begins less than a latent frame after the one before it; leave at least "
                f"{length:g}s between prompts"
            )
        if start >= frames:
            end = f"{job.frames} frames at {job.fps:g} a second end at {job.frames / job.fps:.2f}s"
            raise InputError(f"the prompt at {time:g}s begins after the clip's end: {end}; make it longer")
        if start <= given:
            first = latent.first_frame(given + 1) / job.fps
            raise InputError(
                f"the prompt at {time:g}s changes frames that are given; let it begin at {first:.2f}s or later"
            )
        starts.append(start)
    return tuple(starts)


def _check_changes(config: FlowConfig, job: Job, window: int) -> None:
    """Raise InputError for prompts that can't change in such a job."""
    if job.frames == 1:
        raise InputError("one frame has one prompt; prompts that change need a clip")
    if not all(0 < time < math.inf for time in job.changes):
        raise InputError(f"prompts change at {', '.join(f'{time:g}s' for time in job.changes)}; give times above 0")
    if job.context and job.context.hidden:
        raise InputError(
            f"{job.task.replace('_', ' ')} needs its given frames in every window, and a new prompt begins a new one; "
            "give one prompt"
        )
    if job.denoise and config.denoiser is None:
        raise InputError(f"{config.name} has no learned denoiser, so that all frames share a prompt; give one, or "
                         "switch denoising off")  # fmt: skip
    if not 1 <= job.keep_at_change < window:
        raise InputError(
            f"keep_at_change is {job.keep_at_change}; a window of {window} latent frames keeps 1 to {window - 1} where "
            "the prompt changes"
        )


def _check_context(config: FlowConfig, job: Job, shape, window: int, total: int) -> None:
    context, latent = job.context, config.latent
    if config.kind == "image":
        raise InputError(f"{config.name} makes images; a context needs a video model")
    found = (context.latents.shape[1], *context.latents.shape[3:])
    if found != shape:
        raise InputError(f"the context's latents are {found} (channels, height, width), the job's are {shape}")
    if len(context.latents) not in (1, job.batch):
        raise InputError(f"a context of {len(context.latents)} for a batch of {job.batch}; give one, or one each")
    if context.frames > window:
        remedy = "give fewer of them (keep), or a larger window" if context.task == "extend" else "shorten the clip"
        raise InputError(f"the context has {context.frames} latent frames, the window {window}; {remedy}")
    if context.frames >= total:
        longest = latent.frames(context.shown)
        raise InputError(f"frames is {job.frames}, but the context alone gives {longest}; ask for more frames")
    if context.hidden and total > window:
        if window < 2:
            remedy = "give a window of at least 2"
        elif context.hidden > window // 2:
            remedy = f"the source may have at most {latent.frames(window // 2)} frames"
        else:
            remedy = f"the longest result is {latent.frames(window - context.hidden)} frames"
        raise InputError(f"{context.task} needs source and result within {window} latent frames; {remedy}")


@dataclass(frozen=True)
class Piece:
    """Latent frames (B, C, n, h, w) in VAE space, starting at latent frame `first` of the result. A piece that isn't
    `final` is sampled, but not denoised yet."""

    first: int
    latents: Tensor
    final: bool


class Generation:
    """Runs a job. Text (B or 1, L, D) and uncond are embeddings of the wrapped prompts; text is (S, B or 1, L, D) of
    the S prompts of a job in which they change. `noise` (B, frames, C, h, w) of the result's latent frames is drawn
    from the job's seed unless given. Without a `placement` everything computes where the text is. Of `means`, `cache`
    and `in_turn` matter here; of the `fallbacks`, to which it turns one by one where memory runs out, `cache`. With
    `settled` frames it goes on where another one of the same job was, and `on_window` is called each time that a window
    is complete."""

    def __init__(
        self,
        flow: Flow,
        job: Job,
        text: Tensor,
        uncond: Tensor | None = None,
        control: Control | None = None,
        noise: Tensor | None = None,
        placement: Placement | None = None,
        means: Means = PLAIN,
        fallbacks: Iterable[Means] = (),
        settled: Settled | None = None,
        on_window: Callable[[Settled], None] = lambda settled: None,
    ):
        self.flow, self.job, self.control, self.means = flow, job, control or Control(), means
        self.fallbacks, self.on_window = list(fallbacks), on_window
        self.placement = placement or Placement.on(text.device)
        self.layout = layout(flow.config, job)
        texts = text if text.ndim == 4 else text.unsqueeze(0)
        if texts.shape[1] not in (1, job.batch):
            raise InputError(f"{texts.shape[1]} prompts for a batch of {job.batch}; give one, or one each")
        texts = texts.expand(-1, job.batch, -1, -1)
        self.prompts = Prompts(texts, self.layout.starts, job.keep_at_change, job.change_kept)
        self.given = self._given()
        self._sampler = partial(
            Sampler,
            flow,
            self._noise(noise),
            self.prompts,
            uncond,
            guidance=job.guidance,
            context=self._noisy_context(),
            window=self.layout.window,
            keep=self.layout.keep,
            settings=job.solver,
            control=self.control,
            placement=self.placement,
        )
        self.sampler = self._sampler(cache=means.cache, settled=settled)
        if flow.compiled and means.uncompiled:
            self.control.warn(f"the deep block isn't compiled: {means.uncompiled}")

    @property
    def text(self) -> Tensor:
        """The embeddings (B, L, D) of the first prompt."""
        return self.prompts.first

    @property
    def statistics(self) -> Statistics:
        return self.sampler.statistics

    def run(self) -> Tensor:
        """All latents at once: (B, C, T, h, w) in VAE space."""
        sampled = self._sampled()
        hidden = self.layout.hidden
        return self._convert(self.denoised(sampled)[:, hidden:], hidden)

    def follow(self) -> None:
        """Compute along with the leader of the flow's team, which alone has the latents."""
        self.sampler.follow()

    def stream(self) -> Iterator[Piece]:
        """Pieces as they are made. The final ones come in order and add up to what `run` returns; if frames are
        denoised, each comes first as a provisional piece, and so it does if everything waits for its turn."""
        if self.means.in_turn or (self.job.denoise and not self._learned):
            yield from self._stream_in_turn()
            return
        denoiser = self._denoise_stream() if self._learned else None
        done = first = 0
        for frames in self._frames():
            if denoiser:
                yield from self._piece(first, frames, False)
                final = self._fed(denoiser, frames)
            else:
                final = frames
            first += frames.shape[1]
            yield from self._piece(done, final, True)
            done += final.shape[1]

    def _stream_in_turn(self) -> Iterator[Piece]:
        """The cache is gone when denoising begins."""
        sampled, first = [], 0
        for frames in self._frames():
            sampled.append(frames)
            yield from self._piece(first, frames, False)
            first += frames.shape[1]
        yield from self._piece(0, self.denoised(torch.cat(sampled, 1)), True)

    def _sampled(self) -> Tensor:
        with self._falling_back():
            return self.sampler.sample().latents
        return torch.cat(list(self._frames()), 1)

    def _frames(self) -> Iterator[Tensor]:
        """Sampled frames, each once, whatever it takes."""
        done, known = 0, self.sampler.done
        while done < self.layout.total:
            with self._falling_back():
                for frames in self.sampler.stream(done):
                    done += frames.shape[1]
                    if done > known and self.sampler.ends_window(done):
                        self.on_window(self.sampler.finished)
                    yield frames

    @contextmanager
    def _falling_back(self) -> Iterator[None]:
        """Where memory runs out inside, the sampler becomes one that takes less and goes on from what is settled.
        Raises the error where there is none."""
        try:
            yield
            return
        except (MemoryError, RuntimeError) as error:
            if not (self.fallbacks and ran_out(error)):
                raise
        self.means = replace(self.means, cache=self.fallbacks.pop(0).cache)
        settled, statistics = self.sampler.settled, self.sampler.statistics
        self.sampler = self._sampler(cache=self.means.cache, settled=settled)
        self.sampler.statistics = statistics
        done = f"{self.sampler.done} of {self.layout.total} latent frames"
        self.control.warn(f"memory ran out after {done}; going on with {self.means}")

    def draft(self) -> Piece | None:
        """The result's frame that is being solved, roughly: noise where it hasn't settled yet. Call it from
        `control.progress`; None where there is no such frame."""
        solving = self.sampler.draft()
        return None if solving is None else next(self._piece(*solving, False), None)

    @property
    def _learned(self) -> bool:
        return self.job.denoise and self.flow.config.denoiser is not None

    def _piece(self, first: int, frames: Tensor, final: bool) -> Iterator[Piece]:
        hidden = self.layout.hidden
        frames = frames[:, max(hidden - first, 0) :]
        if frames.shape[1]:
            first = max(first, hidden)
            yield Piece(first - hidden, self._convert(frames, first), final)

    def _convert(self, frames: Tensor, first: int) -> Tensor:
        """Flow-space frames of the deep sequence to VAE space, with given frames replaced by their clean latents."""
        stop = first + frames.shape[1]
        given = self.given[:, first : min(stop, self.layout.given)]
        frames = torch.cat((given, frames[:, given.shape[1] :]), 1)
        return to_vae_space(self.flow.config.latent, frames, self.layout.factors[first:stop])

    def _given(self) -> Tensor:
        """The context's clean latents in flow space (B, given, C, h, w), where the shallow blocks are."""
        context, device = self.job.context, self.placement.shallow
        if context is None:
            return torch.zeros(self.job.batch, 0, *self.layout.shape, device=device)
        factors = self.layout.factors[: context.frames]
        clean = to_flow_space(self.flow.config.latent, context.latents.to(device), factors)
        return clean.expand(self.job.batch, -1, -1, -1, -1)

    def _noise(self, sampled: Tensor | None) -> Tensor:
        """Noise for each frame; hidden frames are given and get zeros."""
        shape = (self.job.batch, self.layout.frames, *self.layout.shape)
        if sampled is None:
            sampled = noise.draw(self.job.seed, self.job.batch, self.layout.frames, self.layout.shape)
        elif sampled.shape != shape:
            raise InputError(f"noise of shape {tuple(sampled.shape)}, the job's latents are {shape}")
        hidden = sampled.new_zeros(self.job.batch, self.layout.hidden, *self.layout.shape)
        return torch.cat((hidden, sampled), 1)

    def _noisy_context(self) -> Tensor | None:
        if not self.layout.given:
            return None
        if not self.job.context.noisy:
            return self.given
        drawn = noise.draw_context(self.job.seed, self.job.batch, self.layout.given, self.layout.shape)
        return self.given + self.flow.config.noise_std * drawn.to(self.given)

    def denoised(self, latents: Tensor) -> Tensor:
        """Sampled frames (B, T, C, h, w) of the deep sequence in flow space, without noise if the job denoises."""
        if not self.job.denoise:
            return latents
        if self._learned:
            return self._fed(self._denoise_stream(), latents)
        return score_denoise(self.flow, latents, self.text.to(self.placement.deep[0]), self.control)

    def _denoise_stream(self) -> DenoiseStream:
        prompts = self.prompts.to(self.placement.denoiser)
        return DenoiseStream(self.flow, self.sampler.grid, prompts, self.layout.window, control=self.control)

    def _fed(self, stream: DenoiseStream, frames: Tensor) -> Tensor:
        """Give the denoiser the next frames of the deep sequence; return those that are done."""
        done = stream.feed(self.flow.tokens(frames).to(self.placement.denoiser))
        return self.flow.latents(done, self.sampler.grid).to(self.placement.shallow)
