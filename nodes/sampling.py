"""The solver's settings and the sampler."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch
from comfy_api.latest import io

from ..starflow_core.control import Control, Progress
from ..starflow_core.errors import InputError
from ..starflow_core.jobs.noises import Noise
from ..starflow_core.jobs.planner import MemoryPlan
from ..starflow_core.jobs.tasks import Generation, Job, Piece, layout
from ..starflow_core.model.config import FlowConfig
from ..starflow_core.model.placement import Placement
from ..starflow_core.solve.solvers import AUTOREGRESSIVE, PRESETS, Statistics
from . import host
from .conditioning import at_rate_of, changing_as, embeddings_for, job_of, texts_for
from .noise import job_from
from .options import Options, fitted, pace, second_of
from .plot import convergence
from .preview import Preview
from .types import CATEGORY, KEY, SEARCH, ContextType, ModelType, NoiseType, OptionsType, SolverType

METHODS = (*PRESETS, "autoregressive")
OWN = 0  # in a number's place: what the preset says
OWN_GUIDANCE = -1.0  # in guidance's place: the model's own
SAY_EVERY = 0.5  # seconds between two lines of text
PICTURE_EVERY = 0.25  # seconds between two pictures: a latent frame of 4 at 16 frames a second


class STARFlowJacobiSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STARFlowJacobiSettings",
            display_name="STARFlow Jacobi Settings",
            category=CATEGORY,
            **SEARCH,
            description="How the flow is inverted: a preset, or numbers of your own. 0 leaves a number to the preset, "
            "a span to what suits the device.",
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=list(METHODS),
                    default="balanced",
                    tooltip="fast: fewest sweeps, slightly off the exact answer. balanced: the default. exact: "
                    "matches autoregressive to 1e-6 in fp32. In bf16 the three differ little. autoregressive: token by "
                    "token, slowest, ignores the numbers below.",
                ),
                io.Int.Input(
                    "image_span",
                    default=OWN,
                    min=0,
                    max=4096,
                    tooltip="Tokens solved at once in an image, at most. Larger: fewer sweeps, but slower ones.",
                ),
                io.Int.Input(
                    "first_span",
                    default=OWN,
                    min=0,
                    max=4096,
                    tooltip="Tokens solved at once in a clip's first frame, at most. Larger: fewer sweeps, but slower "
                    "ones.",
                ),
                io.Int.Input(
                    "span",
                    default=OWN,
                    min=0,
                    max=65536,
                    tooltip="Tokens solved at once after the first frame, at most. Larger suits fast graphics cards; "
                    "smaller wastes less work on slow ones and in batches.",
                ),
                io.Float.Input(
                    "tolerance",
                    default=0.0,
                    min=0.0,
                    max=0.9,
                    step=1e-5,
                    round=False,
                    tooltip="A token settles once its relative squared change falls below this. Smaller: closer to "
                    "the exact answer, but more sweeps.",
                ),
                io.Float.Input(
                    "shallow_tolerance",
                    default=0.0,
                    min=0.0,
                    max=0.9,
                    step=1e-6,
                    round=False,
                    tooltip="The same for whole frames in the shallow blocks. A smaller value costs little.",
                ),
                io.Int.Input(
                    "max_sweeps",
                    default=OWN,
                    min=0,
                    max=65536,
                    tooltip="A token counts as settled after this many sweeps at the latest. Limits the time, at the "
                    "expense of accuracy.",
                ),
            ],
            outputs=[SolverType.Output(display_name="settings", tooltip="For the sampler.")],
        )

    @classmethod
    def validate_inputs(cls, preset: str = "balanced") -> bool | str:
        return preset in METHODS or f"preset is {preset!r}; expected one of {', '.join(METHODS)}"

    @classmethod
    def execute(cls, preset: str, **numbers) -> io.NodeOutput:
        if preset == "autoregressive":
            return io.NodeOutput(AUTOREGRESSIVE)
        return io.NodeOutput(PRESETS[preset].with_numbers(**{name: value or None for name, value in numbers.items()}))


class STARFlowSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STARFlowSampler",
            display_name="STARFlow Sampler",
            category=CATEGORY,
            **SEARCH,
            description="Turns noise into an image or a clip. There are no steps to choose: the flow is inverted, "
            "and frames are finished one after another.",
            inputs=[
                ModelType.Input("model", tooltip="The flow."),
                io.Conditioning.Input("positive", tooltip="From STARFlow Text Encode."),
                io.Conditioning.Input("negative", tooltip="From STARFlow Text Encode; used only with guidance."),
                io.Latent.Input("latent", tooltip="Only its size and length matter, not its content."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Determines the noise, which is the same on every machine. A batch uses consecutive seeds, "
                    "starting with this one.",
                ),
                io.Float.Input(
                    "guidance",
                    default=OWN_GUIDANCE,
                    min=OWN_GUIDANCE,
                    max=100.0,
                    step=0.1,
                    tooltip="How strongly the prompt counts. 0 is off and corresponds to a CFG of 1 elsewhere; -1 "
                    "uses the model's own value.",
                ),
                io.Boolean.Input(
                    "denoise",
                    default=True,
                    tooltip="Removes the noise that the model was trained with. Off shows the raw samples.",
                ),
                SolverType.Input("settings", optional=True, tooltip="Without it, the balanced preset is used."),
                ContextType.Input(
                    "context", optional=True, tooltip="Given frames; connect them to Text Encode as well."
                ),
                io.Int.Input(
                    "window",
                    default=0,
                    min=0,
                    max=1024,
                    optional=True,
                    tooltip="Latent frames attended to at once in a long video; 0 uses the trained number. Fewer take "
                    "less memory, but the video is less coherent.",
                ),
                io.Int.Input(
                    "keep",
                    default=0,
                    min=0,
                    max=1024,
                    optional=True,
                    tooltip="Latent frames kept when the window slides; 0 keeps about three quarters of the window.",
                ),
                OptionsType.Input(
                    "options",
                    optional=True,
                    tooltip="From STARFlow Memory or Devices. Without it, the fastest way that fits.",
                ),
                NoiseType.Input(
                    "noise",
                    optional=True,
                    tooltip="Used in place of the seed's; from STARFlow Invert, Noise or Mix Noise. Guidance -1, "
                    "window 0 and keep 0 mean the noise's own.",
                ),
                io.Int.Input(
                    "keep_at_change",
                    default=1,
                    min=1,
                    max=1024,
                    optional=True,
                    tooltip="Latent frames that the clip goes on from where the prompt changes. More make a smoother "
                    "change, but a new direction is followed less.",
                ),
                io.Boolean.Input(
                    "change_kept",
                    default=True,
                    optional=True,
                    tooltip="Brings these frames under the new prompt first. On for another colour, kind or "
                    "background; off, another direction is followed best.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="For STARFlow VAE Decode or ComfyUI's own nodes."),
                io.String.Output(
                    display_name="statistics", tooltip="What the solver did, and how the job fits into memory."
                ),
                io.Image.Output(
                    display_name="convergence",
                    tooltip="Residual by sweep and frame: how the clip settled. Brighter areas are still changing.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, latent, seed: int, guidance: float, denoise: bool, settings=None, context=None,
        window: int = 0, keep: int = 0, options=None, noise=None, keep_at_change: int = 1,
        change_kept: bool = True,
    ) -> io.NodeOutput:  # fmt: skip
        check_guidance(guidance)
        flow = host.flow_of(model)
        given = {"seed": seed, "denoise": denoise, "context": context, "window": window or None, "keep": keep or None}
        given |= {"solver": settings} if settings else {}
        given |= {"guidance": guidance} if guidance >= 0 else {}
        given |= {"keep_at_change": keep_at_change, "change_kept": change_kept}
        job = at_rate_of(positive, _job(flow.config, latent["samples"], noise, **given))
        job = changing_as(positive, job)
        text = texts_for(flow.config, job, positive, "positive")
        uncond = embeddings_for(flow.config, job, negative, "negative") if job.guidance else None
        if job.task not in flow.config.tasks:
            host.log.warning("%s wasn't trained for %s; the result may ignore it", flow.config.name, job.task)
        began = time.monotonic()
        options = options or Options()
        second = second_of(model, job, options)
        job, plan, work = fitted(model, job, options, second)
        samples, statistics = _sample(model, job, text, uncond, plan, work, cls.hidden.unique_id, noise, second)
        report = _report(statistics, job, plan, time.monotonic() - began, noise)
        report += _changes(flow.config, job)
        overlap = job.context.overlap(flow.config.latent) if job.context else 0
        result = {"samples": samples, KEY: {"overlap": overlap}}
        return io.NodeOutput(result, report, convergence(statistics, job, flow.config))


NODES = [STARFlowJacobiSettings, STARFlowSampler]


def check_guidance(guidance: float) -> None:
    """Raise InputError unless it is one, or stands for the model's own."""
    if not (0 <= guidance < math.inf or guidance == OWN_GUIDANCE):
        raise InputError(f"guidance is {guidance:g}; 0 is off, {OWN_GUIDANCE:g} uses the model's own value")


def _job(config: FlowConfig, samples: torch.Tensor, noise: Noise | None, seed: int, **settings) -> Job:
    """What the latents, settings and a noise ask for; the seed counts only without a noise."""
    return job_from(noise, config, samples, **settings) if noise else job_of(config, samples, seed=seed, **settings)


def _sample(
    model, job: Job, text, uncond, plan: MemoryPlan, work: int, node_id, noise: Noise | None,
    second: torch.device | None,
) -> tuple[torch.Tensor, Statistics]:  # fmt: skip
    """The host's latents, streamed so that finished frames can be shown; `work` bytes stay free of weights. Guidance's
    second half may be on a `second` device."""
    flow, device = host.flow_of(model), model.load_device
    watch = Watch(node_id, Preview(flow.config))
    watch.bar.say(str(plan))
    host.load(model, work, "this job")
    placement = Placement.on(device)
    flow.copies = {} if second is None else flow.copies  # the second device is free again
    if second:
        host.copy_deep(model, second)
        placement = replace(placement, deep=(device, second))

    def act() -> list[torch.Tensor]:
        watch.generation = Generation(
            flow,
            job,
            text.to(flow.compute_dtype),
            None if uncond is None else uncond.to(flow.compute_dtype),
            Control(watch.progress, warn=host.log.warning),
            noise and noise.noise,
            placement=placement,
            means=plan.means,
            fallbacks=plan.fallbacks,
        )
        if flow.compiled:
            watch.bar.say("compiling what sweeps compute, which takes about a minute the first time")
        final = []
        for piece in watch.generation.stream():
            watch.show(piece)
            if piece.final:
                final.append(piece.latents.to(host.result_device()))
        return final

    began = time.monotonic()
    samples = torch.cat(host.compute(model, act, second is not None), 2)
    watch.finished()
    generation = watch.generation
    if generation.means == plan.means and not host.is_compiled(model):  # the first run of one says little
        pace(model, job, plan, second).note(time.monotonic() - began)
    return samples if flow.config.kind == "video" else samples.squeeze(2), generation.statistics


class Watch:
    """Shows a run on its node: the bar counts settled tokens, the text says how far it is and how long it will take,
    and the picture loops over the frames so far, up to the one that is being solved."""

    def __init__(self, node_id: str | None, preview: Preview):
        self.bar, self.preview = host.NodeProgress(node_id), preview
        self.began = time.monotonic()
        self.said, self.step, self.total, self.sweeps = 0.0, 0, 1, 0
        self.generation: Generation | None = None
        self.frames: list[torch.Tensor] = []  # (B, C, h, w) each, that are there
        self.playing, self.next_picture = 0, 0.0

    def progress(self, progress: Progress) -> None:
        """Raises the host's exception on Cancel."""
        host.check_interrupted()
        if progress.phase != "deep":  # shallow blocks and denoiser run between the frames
            return
        self.step, self.total = progress.settled, progress.tokens
        self.sweeps += 1
        self.bar.update(self.step, self.total)
        self._say(progress.residual)
        self._play()

    def show(self, piece: Piece) -> None:
        """Add finished frames, or put denoised ones in place of noisy ones, and show the last of them now."""
        frames = piece.latents.cpu().unbind(2)
        self.frames[piece.first : piece.first + len(frames)] = frames
        self._picture(frames[-1])
        self.playing, self.next_picture = 0, time.monotonic() + PICTURE_EVERY

    def finished(self) -> None:
        """The last line of text says what was done, not what was left."""
        seconds = f"{time.monotonic() - self.began:.1f} s, {self.sweeps} sweeps"
        frames = self.generation.job.frames
        self.bar.say(f"{self._size}, {f'{frames} frames ' if frames > 1 else ''}in {seconds}")

    @property
    def _size(self) -> str:
        job = self.generation.job
        return f"{job.width} x {job.height}" + (f", batch of {job.batch}" if job.batch > 1 else "")

    @property
    def _place(self) -> str:
        """The frame that is being solved: of a latent frame the last one."""
        plan, frames = self.generation.layout, self.generation.job.frames
        if frames == 1:
            return self._size
        made = min(self.step * plan.total // self.total, plan.total - 1) - plan.hidden
        return f"{self._size}, frame {self.preview.format.frames(made + 1)} of {frames}"

    def _say(self, residual: float) -> None:
        now = time.monotonic()
        if now - self.said < SAY_EVERY:
            return
        left = (now - self.began) * (self.total - self.step) / max(self.step, 1)
        self.said = now
        tokens = f"{self.step} of {self.total} tokens, residual {residual:.1e}"
        self.bar.say(f"{self._place}: {tokens}, about {left:.0f} s left")

    def _play(self) -> None:
        """The next frame, if it is time; a draft costs work, so the next one waits ten times as long as it took."""
        began = time.monotonic()
        if began < self.next_picture or not self.preview.known:
            return
        if self.playing < len(self.frames):
            frame = self.frames[self.playing]
            self.playing += 1
        else:
            draft, self.playing = self.generation.draft(), 0
            frame = draft and draft.latents[:, :, 0]
        if frame is not None:
            self._picture(frame)
        took = time.monotonic() - began
        self.next_picture = began + max(PICTURE_EVERY, 10 * took)

    def _picture(self, latents: torch.Tensor) -> None:
        """Of a frame (B, C, h, w) in VAE space."""
        self.bar.update(self.step, self.total, self.preview.picture(latents))


def _changes(config: FlowConfig, job: Job) -> str:
    """A line of the report on prompts that change, frames counted from 1."""
    if not job.changes:
        return ""
    frames = [str(config.latent.first_frame(start) + 1) for start in layout(config, job).starts[1:]]
    return f"\nprompts change at frame {', '.join(frames)}; {job.keep_at_change} latent frames kept" + (
        ", and brought under the new prompt" if job.change_kept else ""
    )


def _report(statistics: Statistics, job: Job, plan: MemoryPlan, seconds: float, noise: Noise | None) -> str:
    tokens = {first + i for first, change in statistics.deep_changes for i in range(len(change))}
    per_token = statistics.deep_evaluations / max(len(tokens), 1)
    return "\n".join(
        [
            f"method {job.solver.method}, guidance {job.guidance:g}, seed {job.seed}, {seconds:.1f} s",
            f"deep block: {statistics.deep_sweeps} sweeps, {statistics.deep_evaluations} token evaluations"
            + (f", {per_token:.1f} per token" if tokens else ""),
            f"shallow blocks: {statistics.shallow_sweeps} sweeps, {statistics.shallow_evaluations} token evaluations",
            f"memory: {plan}",
            *([f"noise: {'; '.join(noise.made)}"] if noise else []),
        ]
    )
