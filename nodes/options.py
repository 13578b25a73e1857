"""What a user fixes of how a job runs, beyond the solver's settings, and how it is fitted to the host's memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from comfy_api.latest import io

from ..starflow_core.jobs import CACHE_PLACES, CACHES, memory
from ..starflow_core.jobs.pace import Pace
from ..starflow_core.jobs.planner import HostedOptions, MemoryPlan, choose_hosted
from ..starflow_core.jobs.tasks import Job, Means
from . import host
from .types import CATEGORY, SEARCH, OptionsType

GB = 10**9


@dataclass(frozen=True)
class Options:
    """What the sampler's input of that name carries: a field for each node that makes it."""

    memory: HostedOptions = field(default_factory=HostedOptions)


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


NODES = [STARFlowMemory]


def fitted(model, job: Job, options: Options, widen: bool) -> tuple[Job, MemoryPlan, int]:
    """A job as it fits the host, its means, and the bytes that the host has to leave free of weights.

    `widen` allows a larger span. Raises OutOfMemoryForecast if nothing fits.
    """
    fixed = options.memory
    job = fixed.spanned(job)
    plan, work = planned(model, job, options, memory.forecast, "this job")
    plan = plan.timed(pace(model, job, plan))
    return plan.fitted(job, widen and fixed.span is None), plan, work


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


def pace(model, job: Job, plan: MemoryPlan) -> Pace:
    """How long such jobs take here."""
    return Pace(host.flow_of(model).config, job, model.load_device, host.flow_of(model).compute_dtype, plan.means)
