"""Edit by Inversion in graphs: the core's candidates, by the host's VAE."""

from __future__ import annotations

import random

import pytest
import torch

from benchmarks.judge import look, verdict
from tests.core.models import relative_error

from . import pack
from .steps import SMALL, run


@pytest.fixture(scope="module")
def source(demo):
    """A clip of 3 latent frames, 48 x 32."""
    return {"samples": demo.sample(demo.empty(**SMALL), seed=4)[0]["samples"].clone()}


@pytest.fixture(scope="module")
def edit(demo, source):
    """Latent, images and report of an edit of that clip."""

    def edit(prompt="a blue circle moving right on a black background", latent=source, context=None, **inputs):
        shows, negative, _ = demo.encode(latent, context=context)
        positive = demo.encode(latent, prompt, context=context)[0]
        return run(
            "STARFlowEditByInversion", model=demo.model, vae=demo.vae, latent=latent, shows=shows, positive=positive,
            negative=negative, **{"candidates": 1, "context": context, **inputs},
        )  # fmt: skip

    return edit


def test_the_same_prompt_gives_the_clip_back(edit, source):
    (exact,) = run("STARFlowJacobiSettings", preset="exact")
    latent, images, report = edit("a red circle moving right on a black background", settings=exact)
    assert relative_error(latent["samples"], source["samples"]) < 1e-4
    assert images.shape == (9, 32, 48, 3)
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    assert report.startswith("the best of 1, guidance 0, seed 0")
    assert "likeness of outlines: 1.000 (kept)" in report
    assert "noise: from a clip" in report


def test_a_clip_becomes_what_the_prompt_says(demo, core):
    from benchmarks import flow_features

    scene = flow_features.scenes(1, 3)[0]
    latent = {"samples": core.encode_clip(flow_features.drawn([scene])[0])}
    shows, negative, _ = demo.encode(latent, flow_features.prompt(scene))
    wanted = flow_features.changed(scene, "background", random.Random(0))
    positive = demo.encode(latent, flow_features.prompt(wanted))[0]
    given = {"model": demo.model, "vae": demo.vae, "latent": latent, "shows": shows, "positive": positive}
    _, images, _ = run("STARFlowEditByInversion", **given, negative=negative, candidates=1)
    assert all(verdict(look(images.movedim(-1, 1) * 2 - 1), wanted).values())


def test_the_best_of_several_is_kept(edit):
    latent, _, report = edit(candidates=3, seed=2)
    scores = report.splitlines()[1]
    assert scores.count(",") == 2
    assert scores.count("(kept)") == 1
    assert torch.equal(edit(candidates=3, seed=2)[0]["samples"], latent["samples"])


def test_strength_lets_go(edit, source):
    held, let_go = (edit(strength=strength)[0]["samples"] for strength in (1.0, 0.2))
    assert relative_error(held, let_go) > 0.05


def test_a_context_holds_on_to_its_frame(demo, edit, source, clip):
    (context,) = run("STARFlowFirstFrame", image=clip[:1], vae=demo.vae, latent=source)
    latent, _, report = edit(context=context, candidates=2)
    assert torch.allclose(latent["samples"][:, :, :1], context.latents, atol=1e-5)
    assert report.startswith("the best of 2, guidance 3")
    assert "nats that the new prompt is ahead: " in report
    (last,) = run("STARFlowFirstLastFrame", last_image=clip[:1], vae=demo.vae, latent=source)
    with pytest.raises(Exception, match="the context is one for last_frame; connect STARFlow First Frame, or nothing"):
        edit(context=last)


@pytest.mark.parametrize(("inputs", "message"), [
    ({"prompt": " "}, "the prompt is empty; say what the clip shall show"),
    ({"guidance": -0.5}, "guidance is -0.5; 0 is off, -1 uses what suits the edit"),
])  # fmt: skip
def test_what_cannot_be_made(edit, inputs, message):
    with pytest.raises(Exception, match=message):
        edit(**inputs)


def test_one_clip_at_a_time(edit, source):
    with pytest.raises(Exception, match="a batch of 2; edit one picture or clip at a time"):
        edit(latent={"samples": torch.cat((source["samples"],) * 2)})


def test_an_empty_latent_is_not_edited(demo, edit):
    with pytest.raises(Exception, match="this latent is empty; connect VAE Encode"):
        edit(latent=demo.empty(**SMALL))


def test_cancel_stops_the_flow(edit, monkeypatch):
    """Not the VAE alone: Cancel comes when the source has been decoded."""
    import comfy.model_management as management

    edits = pack.module("nodes.edits")
    decoded = edits._decoded

    def decode_and_cancel(*given):
        pixels = decoded(*given)
        management.interrupt_current_processing()
        return pixels

    asked = []
    monkeypatch.setattr(edits, "_decoded", decode_and_cancel)
    monkeypatch.setattr(edits.Reprompting, "_score", lambda *_: asked.append(1) or 0.0)
    with pytest.raises(management.InterruptProcessingException):
        edit()
    assert not asked  # nothing was made
