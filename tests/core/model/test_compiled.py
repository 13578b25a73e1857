"""Compiled sweeps: the same results, whole graphs, few of them. Most tests count graphs as PyTorch finds them, and run
these as they are; two have inductor compile them."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from starflow_core import load_pipeline
from starflow_core.errors import InputError
from starflow_core.jobs.tasks import Means
from starflow_core.model import attention, compiled
from starflow_core.model.cache import CacheSettings
from starflow_core.model.compiled import evaluate, require_compiler
from starflow_core.model.int8 import Int8Linear, quantise, replace_linear
from starflow_core.model.lora import adapt
from starflow_core.model.parallel import Mesh
from starflow_core.solve.noise import draw
from starflow_core.solve.sampling import Sampler, sample
from starflow_core.solve.solvers import AUTOREGRESSIVE, PRESETS
from starflow_core.weights.flow import QUANTISED
from tests.core import models

EXACT = replace(PRESETS["exact"], first_span=7, span=13)
MOST = 3  # graphs of a job; a fourth only where a length and an offset are equal at first
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++")


@pytest.fixture
def graphs(monkeypatch):
    """What is compiled in a test, each graph once for each form that it takes; it runs as it is."""
    torch._dynamo.reset()
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    def compiler() -> compiled.Evaluate:
        compiled.keep_many_forms()
        return torch.compile(evaluate, fullgraph=True, backend=backend)

    monkeypatch.setattr("starflow_core.model.flow.compiled", compiler)
    return found


def both(flow, z, **options):
    """Samples as they are, and by graphs."""
    options = {"guidance": 2.0, "settings": EXACT, **options}
    inputs = flow, z, models.text(flow, len(z)), models.text(flow, 1, seed=7)
    with torch.no_grad():
        eager = sample(*inputs, **options)
        flow.compile()
        return eager, sample(*inputs, **options)


def in_int8(flow):
    for name, weight in [(n, w) for n, w in flow.named_parameters() if QUANTISED.fullmatch(n)]:
        layer, bias = name.removesuffix(".weight"), flow.get_submodule(name.removesuffix(".weight")).bias
        replace_linear(flow, layer)
        new = flow.get_submodule(layer)
        assert isinstance(new, Int8Linear)
        values, scale = quantise(weight)
        new.weight, new.weight_scale = (torch.nn.Parameter(x, False) for x in (values, scale))
        new.bias = bias
    return flow


def with_lora(flow):
    adapters = adapt(flow, rank=2, alpha=2, generator=torch.Generator().manual_seed(0))
    for number, lora in enumerate(adapters.values()):
        lora.lora_B.data = 0.1 * models.randn(*lora.lora_B.shape, seed=number)
        lora.strength = 1 - 0.01 * number  # each another number
    return flow.requires_grad_(False)


JOBS = {
    "image": (lambda: models.flow(kind="image"), (1, 1, 4, 5, 5), {}),
    "batch": (lambda: models.flow(kind="image"), (3, 1, 4, 4, 5), {}),
    "without guidance": (models.flow, (1, 3, 4, 5, 5), {"guidance": 0.0}),
    "windows": (models.flow, (1, 9, 4, 5, 5), {"window": 4, "keep": 2}),
    "blocks of other depths": (lambda: models.flow(layers=(1, 1, 3)), (1, 3, 4, 5, 5), {}),
    "weights in 8 bit": (lambda: in_int8(models.flow()), (1, 3, 4, 5, 5), {}),
    "a LoRA": (lambda: with_lora(models.flow()), (1, 3, 4, 5, 5), {}),
    "token by token": (models.flow, (1, 2, 4, 3, 3), {"settings": AUTOREGRESSIVE}),
    "one token at the end": (models.flow, (1, 3, 4, 3, 3), {"settings": replace(EXACT, first_span=4, span=2)}),
}


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_a_job_is_the_same_by_few_graphs(graphs, job):
    make, shape, options = job
    eager, result = both(make(), models.randn(*shape), **options)
    assert models.relative_error(result.latents, eager.latents) < 1e-9
    assert result.statistics.deep_sweeps == eager.statistics.deep_sweeps
    assert 2 <= len(graphs) <= MOST


def test_sizes_and_lengths_that_follow_share_graphs(graphs):
    flow = models.flow()
    both(flow, models.randn(2, 5, 4, 5, 5))
    there = len(graphs)
    both(flow, models.randn(2, 4, 4, 5, 5), settings=replace(EXACT, first_span=5, span=19))
    assert len(graphs) == there


@pytest.mark.parametrize("name", ["flash", "efficient"])
def test_kernels_of_a_card_are_within_the_graph(monkeypatch, name):
    """No card is needed to find the graph; it isn't run."""
    found = []

    def backend(graph, inputs):
        found.append([str(node.target) for node in graph.graph.nodes])
        raise RuntimeError("found")

    monkeypatch.setattr(compiled, "kernel", lambda *kind: getattr(attention, f"_{name}"))
    torch._dynamo.reset()
    flow = models.flow()
    flow.evaluate = torch.compile(evaluate, fullgraph=True, backend=backend)
    with torch.no_grad(), pytest.raises(InputError, match="found"):
        sample(flow, models.randn(1, 1, 4, 3, 3), models.text(flow), settings=EXACT)
    assert sum(f"{name}_attention" in target for target in found[0]) == 2 * flow.config.layers[-1]


@needs_compiler
@pytest.mark.parametrize("kind", ["image", "video"])
def test_what_inductor_makes_is_the_same(kind):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, result = both(models.flow(kind=kind), models.randn(1, 1 if kind == "image" else 3, 4, 5, 5))
    assert models.relative_error(result.latents, eager.latents) < 1e-9
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] <= MOST
    assert not counters["graph_break"]


def test_a_cache_that_is_elsewhere_is_read_as_ever(graphs):
    """Only the shallow blocks have graphs then."""
    flow, text = models.flow(), models.text(models.flow())
    options = {"settings": EXACT, "cache": CacheSettings(quantised=True)}
    with torch.no_grad():
        eager = sample(flow, models.randn(1, 3, 4, 5, 5), text, **options)
        flow.compile()
        result = sample(flow, models.randn(1, 3, 4, 5, 5), text, **options)
    assert models.relative_error(result.latents, eager.latents) < 1e-9
    assert len(graphs) <= 2


def test_gradients_and_whole_clips_take_no_graphs(graphs):
    flow, latents = models.flow(), models.randn(1, 2, 4, 3, 3)
    flow.compile()
    text = models.text(flow)
    latents.requires_grad_()
    flow.loss(latents, text).sum().backward()
    assert latents.grad is not None
    assert not graphs


def test_keys_of_padding_are_not_kept(graphs):
    """What the cache has after compiled sweeps is what it has after others."""
    kept = []
    for compile in (False, True):
        flow = models.flow()
        sampler = Sampler(flow, draw(0, 1, 2, (4, 3, 3)), models.text(flow), settings=EXACT)
        if compile:
            flow.compile()
        caches = []
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr("starflow_core.solve.sampling.Cache", _noting(caches))
            sampler.sample()
        kept.append(caches[0].recent)
    torch.testing.assert_close(*kept, atol=1e-5, rtol=1e-5)


def _noting(caches: list):
    from starflow_core.model.cache import Cache

    def make(*args, **options):
        caches.append(Cache(*args, **options))
        caches[-1].recent.zero_()
        return caches[-1]

    return make


@pytest.mark.parametrize(
    ("means", "why"),
    [
        (Means(int8=True), None),
        (Means(streamed=True), "layer by layer"),
        (Means(cache=CacheSettings(quantised=True)), "8 bit"),
        (Means(cache=CacheSettings(offloaded=True)), "main memory"),
        (Means(mesh=Mesh(1, 2)), "several processes"),
    ],
)
def test_means_that_leave_it_out(means, why):
    assert why in means.uncompiled if why else means.uncompiled is None


@pytest.mark.parametrize(
    ("device", "message"), [("cpu", "C[+][+] compiler nothing-like-it"), ("cuda", "triton"), ("mps", "not supported")]
)
def test_what_is_missing_is_said_before(monkeypatch, device, message):
    monkeypatch.setenv("CXX", "nothing-like-it")
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=message):
        require_compiler(torch.device(device))
    with pytest.raises(InputError, match=message):
        load_pipeline("nowhere", device=_placement(device), compile=True)


def test_an_older_pytorch_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.4.1+cpu")
    with pytest.raises(InputError, match=r"PyTorch 2\.5 or newer, not 2\.4\.1"):
        require_compiler(torch.device("cpu"))


def _placement(device):
    from starflow_core import Placement

    return Placement.on(device)


def test_a_compiler_that_fails_is_named(monkeypatch):
    def fails(graph, inputs):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(
        "starflow_core.model.flow.compiled", lambda: torch.compile(evaluate, fullgraph=True, backend=fails)
    )
    torch._dynamo.reset()
    flow = models.flow()
    with pytest.raises(InputError, match="could not be compiled"):
        both(flow, models.randn(1, 1, 4, 3, 3))
