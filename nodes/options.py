"""What a user fixes of how a job runs, beyond the solver's settings, and how it is fitted to the host's memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from comfy_api.latest import io

from ..starflow_core.jobs import CACHE_PLACES, CACHES, memory
from ..starflow_core.jobs.pace import Pace
from ..starflow_core.jobs.planner import HostedOptions, MemoryPlan, choose_hosted
from ..starflow_core.jobs.tasks import Job, Means
from . import host
from .types import CATEGORY, SEARCH, ModelType, OptionsType

GB = 10**9
NONE = "none"


@dataclass(frozen=True)
class Options:
    """What the sampler's input of that name carries: a field for each node that makes it."""

    memory: HostedOptions = field(default_factory=HostedOptions)
    second: str = NONE  # device of guidance's second half


class STARFlowMemory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STARFlowMemory",
            display_name="STARFlow Memory",
            category=CATEGORY,
            **SEARCH,
            description="How a job is fitted to the memory there is. Without it, or with its defaults, the fastest way "
            "that fits is chosen.",
            inputs=[
                io.Float.Input(
                    "budget",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    tooltip="GB that the model and its work may take on the device; 0 uses what is free.",
                ),
                io.Combo.Input(
                    "cache",
                    options=list(CACHES),
                    default="auto",
                    tooltip="Settled keys and values. full: in the type that the model computes in. int8: in 8 bit, "
                    "about half of a 16-bit cache. auto: in 8 bit if they don't fit otherwise.",
                ),
                io.Combo.Input(
                    "offload_cache",
                    options=list(CACHE_PLACES),
                    default="auto",
                    tooltip="Whether settled keys and values wait in main memory, which is slow. auto: only if nothing "
                    "else fits.",
                ),
                io.Int.Input(
                    "span",
                    default=0,
                    min=0,
                    max=65536,
                    tooltip="Tokens solved at once after a clip's first frame; 0 uses what the sampler's settings say. "
                    "Larger suits weights that wait in main memory.",
                ),
            ],
            outputs=[OptionsType.Output(display_name="options", tooltip="For the sampler.")],
        )

    @classmethod
    def validate_inputs(cls, cache: str = "auto", offload_cache: str = "auto") -> bool | str:
        for name, value, known in (("cache", cache, CACHES), ("offload_cache", offload_cache, CACHE_PLACES)):
            if value not in known:
                return f"{name} is {value!r}; expected one of {', '.join(known)}"
        return True

    @classmethod
    def execute(cls, budget: float, cache: str, offload_cache: str, span: int) -> io.NodeOutput:
        fixed = HostedOptions(round(budget * GB) or None, cache, offload_cache, span or None)
        return io.NodeOutput(Options(fixed))


class STARFlowDevices(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STARFlowDevices",
            display_name="STARFlow Devices",
            category=CATEGORY,
            **SEARCH,
            description="Shares a job out over two devices: guidance's two halves are computed at the same time, each "
            "with half of the keys and values. Takes effect with guidance.",
            inputs=[
                io.Combo.Input(
                    "second",
                    options=[NONE, *host.devices()],
                    default=NONE,
                    tooltip="Device of the half without the prompt, beside the one that ComfyUI uses. A second copy of "
                    "the flow's deep block is held there until this is none, or the model is freed.",
                ),
                OptionsType.Input("options", optional=True, tooltip="From STARFlow Memory; for the first device."),
            ],
            outputs=[OptionsType.Output(display_name="options", tooltip="For the sampler.")],
        )

    @classmethod
    def validate_inputs(cls, second: str = NONE) -> bool | str:
        known = (NONE, *host.devices())
        return second in known or f"second is {second!r}, which isn't there; this machine has {', '.join(known)}"

    @classmethod
    def execute(cls, second: str, options: Options | None = None) -> io.NodeOutput:
        return io.NodeOutput(replace(options or Options(), second=second))


class STARFlowCompile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STARFlowCompile",
            display_name="STARFlow Compile",
            category=CATEGORY,
            **SEARCH,
            description="Compiles what a sweep computes, which takes about a minute the first time. For graphics cards "
            "that hold all of the model; elsewhere it is left out, and the log says so.",
            inputs=[ModelType.Input("model", tooltip="From STARFlow Load Model or Load LoRA.")],
            outputs=[ModelType.Output(display_name="model", tooltip="For the sampler, Fill In or Edit by Inversion.")],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        return io.NodeOutput(host.compiled(model))


NODES = [STARFlowMemory, STARFlowDevices, STARFlowCompile]


def fitted(
    model, job: Job, options: Options, second: torch.device | None = None
) -> tuple[Job, MemoryPlan, int]:  # fmt: skip
    """A job as it fits the host, its means, and the bytes that the host has to leave free of weights.

    Guidance's second half may be on a `second` device. Raises OutOfMemoryForecast if nothing fits.
    """
    fixed = options.memory
    job = fixed.spanned(job)
    half = replace(job, guidance=0.0) if second else job  # its rows
    plan, work = planned(model, half, options, memory.forecast, "this job")
    if second:
        flow = host.flow_of(model)
        need = memory.forecast(flow.config, half, flow.compute_dtype, plan.means, ("deep",))
        need = replace(need, weights=0) if host.has_copy(model, second) else need
        memory.require(need.total, second, "guidance's second half")
    plan = plan.timed(pace(model, job, plan, second))
    return plan.fitted(job, model.load_device), plan, work


def second_of(model, job: Job, options: Options) -> torch.device | None:
    """The device of guidance's second half, if there is one beside the host's."""
    second = torch.device(options.second) if job.guidance and options.second != NONE else None
    return None if second == model.load_device else second


def planned(
    model, job: Job, options: Options, forecast: Callable[..., memory.Forecast], what: str
) -> tuple[MemoryPlan, int]:  # fmt: skip
    """The means with which a job fits the host, and the bytes that the host has to leave free of weights. `forecast` is
    one of memory's. Raises OutOfMemoryForecast, which names `what`, if nothing fits."""
    flow, room = host.flow_of(model), host.room(model)

    def need(job: Job, means: Means) -> memory.Forecast:
        return forecast(flow.config, job, flow.compute_dtype, means)

    plan = choose_hosted(job, room, options.memory, need, what)
    return plan, room.work(plan)


def pace(model, job: Job, plan: MemoryPlan, second: torch.device | None = None) -> Pace:
    """How long such jobs take here."""
    flow, others = host.flow_of(model), (second,) if second else ()
    return Pace(flow.config, job, model.load_device, flow.compute_dtype, plan.means, others)
