"""Cancel: every node that takes long stops soon, and gives back what it held."""

from __future__ import annotations

import gc

import pytest
import torch

from . import pack
from .steps import SMALL, run


@pytest.fixture
def long_nodes(monkeypatch, tmp_path, demo, clip):
    """Each such node, as something that can be run."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    latent, pair = demo.empty(**SMALL), demo.encode(demo.empty(**SMALL))[:2]
    given = {"vae": demo.vae, "latent": latent}
    return {
        "load": lambda: run("STARFlowLoadModel"),
        "sample": lambda: demo.sampler(*pair, latent),
        "decode": lambda: demo.decode(latent),
        "core's decode": lambda: pack.core_nodes()["VAEDecode"]().decode(demo.vae, latent),
        "first frame": lambda: run("STARFlowFirstFrame", image=clip[:1], **given),
        "last frame": lambda: run("STARFlowFirstLastFrame", last_image=clip[:1], **given),
        "extend": lambda: run("STARFlowExtend", model=demo.model, images=clip, **given),
        "edit": lambda: run("STARFlowVideoEdit", images=clip, **given),
        "invert": lambda: demo.inverted(*pair, {"samples": latent["samples"] + 1}),
        "likelihood": lambda: run("STARFlowLikelihood", model=demo.model, positive=pair[0], latent=latent),
        "edit by inversion": lambda: run(
            "STARFlowEditByInversion",
            model=demo.model,
            vae=demo.vae,
            latent={"samples": latent["samples"] + 1},
            shows=pair[0],
            positive=pair[0],
            negative=pair[1],
        ),
        "fill in": lambda: run(
            "STARFlowFillIn",
            model=demo.model,
            positive=pair[0],
            negative=pair[1],
            images=clip,
            mask=(torch.arange(96) < 30).float().expand(1, 96, 96),
            **given,
        ),
        "combine": lambda: run("STARFlowVideoCombine", images=clip, filename_prefix="c"),
    }


NAMES = [
    "load", "sample", "decode", "core's decode", "first frame", "last frame", "extend", "edit", "invert", "likelihood",
    "edit by inversion", "fill in", "combine",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_long_node_asks_whether_to_go_on(long_nodes, tmp_path, name):
    import comfy.model_management as management

    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        long_nodes[name]()
    management.throw_exception_if_processing_interrupted()  # it was told once
    assert not list(tmp_path.iterdir())


def test_a_sampler_asks_while_it_works(monkeypatch, demo):
    """In every phase, so that nothing takes long to stop."""
    import comfy.model_management as management

    sampling, seen, asked = pack.module("nodes.sampling"), [], []
    progress = sampling.Watch.progress

    def noted(watch, now):
        before = len(asked)
        progress(watch, now)
        seen.append((now.phase, len(asked) - before))

    monkeypatch.setattr(sampling.Watch, "progress", noted)
    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", lambda: asked.append(True))
    demo.sample(demo.empty(**SMALL))
    assert {phase for phase, _ in seen} == {"deep", "shallow", "denoise"}
    assert all(times >= 1 for _, times in seen)  # a host may ask again of its own, as 0.33 does for a preview


def test_cancel_gives_everything_back(monkeypatch, demo):
    import comfy.model_management as management

    latent = demo.empty(**SMALL)

    def held() -> tuple[int, int]:
        """Caches of keys and values, and models that the host has loaded."""
        gc.collect()
        kinds = [type(thing) for thing in gc.get_objects()]
        caches = sum(kind.__name__ == "Cache" and kind.__module__.startswith(pack.NAME) for kind in kinds)
        return caches, len(management.current_loaded_models)

    def cancelled() -> bool:
        try:
            demo.sample(latent)
        except management.InterruptProcessingException:
            return True
        return False

    expected = demo.sample(latent)[0]["samples"]
    before, seen, calls = held(), [], iter(range(1000))

    def interrupt():
        if next(calls) == 5:
            seen.append(held())
            raise management.InterruptProcessingException

    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", interrupt)
    assert cancelled()
    monkeypatch.undo()
    assert seen[0][0] > before[0]  # there was something to give back
    assert held() == before
    assert torch.equal(demo.sample(latent)[0]["samples"], expected)


def test_following_the_core_asks_in_every_phase():
    import comfy.model_management as management

    from starflow_core.control import Progress

    bar = pack.module("nodes.host").NodeProgress(None)
    for phase in ("deep", "shallow", "denoise"):
        bar.follow(Progress(phase, 1, 2))
        management.interrupt_current_processing()
        with pytest.raises(management.InterruptProcessingException):
            bar.follow(Progress(phase, 1, 2))
