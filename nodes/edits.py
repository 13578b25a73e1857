"""Edits of a clip by the noise that it has."""

from __future__ import annotations

import math
import time
from functools import partial

import torch
from comfy_api.latest import io
from torch import Tensor

from ..starflow_core.applications.reprompt import Reprompting, Wish, check_hold
from ..starflow_core.control import Control
from ..starflow_core.errors import InputError
from ..starflow_core.jobs import HOLDS, memory
from ..starflow_core.jobs.planner import MemoryPlan
from ..starflow_core.jobs.tasks import Job
from ..starflow_core.model.placement import Placement
from . import host
from .conditioning import as_clip, at_rate_of, embeddings_for, job_of, prompt_of
from .latent import decoded
from .noise import LARGEST_SEED, filled
from .options import Options, fitted, planned
from .types import CATEGORY, SEARCH, ContextType, ModelType, OptionsType, SolverType

OWN_GUIDANCE = -1.0  # in guidance's place: what suits what is held on to


class STARFlowEditByInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STARFlowEditByInversion",
            display_name="STARFlow Edit by Inversion",
            category=CATEGORY,
            **SEARCH,
            description="Another prompt for a picture or clip: what the prompt says changes, and the rest stays. Of "
            "several candidates the best is kept. Nothing was trained for it.",
            inputs=[
                ModelType.Input("model", tooltip="The flow."),
                io.Vae.Input("vae", tooltip="The VAE that goes with the model."),
                io.Latent.Input("latent", tooltip="The picture or clip, from VAE Encode with the model's VAE."),
                io.Conditioning.Input("shows", tooltip="What it shows; from STARFlow Text Encode."),
                io.Conditioning.Input("positive", tooltip="What it shall show; from STARFlow Text Encode."),
                io.Conditioning.Input("negative", tooltip="From STARFlow Text Encode; used only with guidance."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How strongly to hold on to the source: 1 keeps all of its noise, 0 none. With a "
                    "context it doesn't matter.",
                ),
                io.Float.Input(
                    "guidance",
                    default=OWN_GUIDANCE,
                    min=OWN_GUIDANCE,
                    max=100.0,
                    step=0.1,
                    tooltip="How strongly the prompts count; more of it holds on less. -1 uses 0, or 3 where a first "
                    "frame is held on to.",
                ),
                io.Int.Input(
                    "candidates",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="How many are made. The best has the outlines that are most like the source's, and fits "
                    "the new prompt better than the old one.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=LARGEST_SEED,
                    control_after_generate=True,
                    tooltip="Determines all candidates but the first, which has the source's own noise.",
                ),
                SolverType.Input("settings", optional=True, tooltip="Without it, the balanced preset is used."),
                ContextType.Input(
                    "context",
                    optional=True,
                    tooltip="From STARFlow First Frame: holds on to that frame alone, as for another motion. Connect "
                    "it to both Text Encodes as well.",
                ),
                OptionsType.Input("options", optional=True, tooltip="From STARFlow Memory."),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The best candidate."),
                io.Image.Output(display_name="images", tooltip="Its frames."),
                io.String.Output(display_name="report", tooltip="The candidates and their scores."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, vae, latent, shows, positive, negative, strength: float, guidance: float, candidates: int,
        seed: int, settings=None, context=None, options=None,
    ) -> io.NodeOutput:  # fmt: skip
        flow, samples = host.flow_of(model), filled(latent["samples"])
        wish = _wish(shows, positive, negative, context, guidance, strength=strength, candidates=candidates, seed=seed)
        given = {"seed": seed, "guidance": wish.guidance, "context": context}
        job = at_rate_of(positive, job_of(flow.config, samples, **given, **({"solver": settings} if settings else {})))
        _check(job, wish)
        texts = [embeddings_for(flow.config, job, each, name) for each, name in ((shows, "shows"),
                                                                                (positive, "positive"))]  # fmt: skip
        uncond = embeddings_for(flow.config, job, negative, "negative") if job.guidance else None
        began, bar = time.monotonic(), host.NodeProgress(cls.hidden.unique_id)
        job, plan, work = fitted(model, job, options or Options())
        work = max(work, planned(model, job, options or Options(), memory.forecast_encode, "this job")[1])
        bar.say(str(plan))

        def decode(made: Tensor) -> Tensor:
            pixels = _decoded(vae, made, flow.config.kind == "video")
            host.load(model, work, "this job")  # the VAE may have taken its place
            return pixels

        edit = Reprompting(
            flow, wish, job, decode(as_clip(samples)), as_clip(samples), torch.cat(texts).to(flow.compute_dtype),
            None if uncond is None else uncond.to(flow.compute_dtype), decode,
            control=Control(bar.follow, warn=host.log.warning), placement=Placement.on(model.load_device),
            means=plan.means, fallbacks=plan.fallbacks,
        )  # fmt: skip

        def told(index: int) -> None:
            bar.say(f"candidate {index + 1} of {wish.candidates} is made")

        best, pixels, scores = host.compute(model, partial(edit.best, told))
        report = _report(job, wish, scores, best.noise.made, plan, time.monotonic() - began)
        bar.say(report.splitlines()[0])
        latents = best.latents.to(host.result_device())
        latents = latents if samples.ndim == 5 else latents.squeeze(2)
        return io.NodeOutput({"samples": latents}, ((pixels + 1) / 2).movedim(1, -1), report)


NODES = [STARFlowEditByInversion]


def _wish(shows, positive, negative, context, guidance: float, **settings) -> Wish:
    if not (0 <= guidance < math.inf or guidance == OWN_GUIDANCE):
        raise InputError(f"guidance is {guidance:g}; 0 is off, {OWN_GUIDANCE:g} uses what suits the edit")
    if context is not None and context.task != "first_frame":
        raise InputError(f"the context is one for {context.task}; connect STARFlow First Frame, or nothing")
    prompts = (prompt_of(each) for each in (shows, positive, negative))
    hold = HOLDS[context is not None]
    return Wish(*prompts, hold, guidance=guidance if guidance >= 0 else None, **settings)


def _check(job: Job, wish: Wish) -> None:
    check_hold(wish, job)
    if job.batch > 1:
        raise InputError(f"a batch of {job.batch}; edit one picture or clip at a time, see Latent From Batch")


def _decoded(vae, latents: Tensor, video: bool) -> Tensor:
    """Pixels (F, 3, H, W) in [-1, 1] of one clip's latents (1, C, T, h, w), by the host's VAE."""
    images = decoded(vae, (latents if video else latents.squeeze(2)).to(host.result_device()))[0]
    return images.movedim(-1, 1).float().cpu() * 2 - 1


def _report(job: Job, wish: Wish, scores: list[float], made: tuple[str, ...], plan: MemoryPlan, seconds: float) -> str:
    kept = scores.index(max(scores))
    what = "likeness of outlines" if wish.hold == "clip" else "nats that the new prompt is ahead"
    return "\n".join(
        [
            f"the best of {len(scores)}, guidance {job.guidance:g}, seed {wish.seed}, {seconds:.1f} s",
            f"{what}: " + ", ".join(f"{score:.3f}{' (kept)' if i == kept else ''}" for i, score in enumerate(scores)),
            f"noise: {'; '.join(made)}",
            f"memory: {plan}",
        ]
    )
