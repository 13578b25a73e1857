"""Prompts that change, in the nodes: from the text to the sampler, and what else takes a conditioning."""

from __future__ import annotations

import pytest
import torch

from starflow_core import Timeline
from tests.core.models import relative_error

from .steps import PROMPT, SMALL, run

LATER = "a blue ring moving up on a white background"
TEXT = f"0s: {PROMPT} | 1s: {LATER}"


@pytest.fixture(scope="module")
def latent(demo):
    """9 latent frames of 6 tokens."""
    return demo.empty(**SMALL, frames=33)


@pytest.fixture(scope="module")
def conditioned(demo, latent):
    return demo.encode(latent, TEXT, negative_prompt="pink")


def made(core, **settings):
    """What the core makes of the same."""
    job = core.job(**{"height": 32, "width": 48, "frames": 33, **settings})
    return core.generate(Timeline.parse(TEXT), job, negative="pink").latents


def test_a_conditioning_carries_the_later_prompts(demo, latent, conditioned):
    """It stays one conditioning of one prompt for whatever else reads it."""
    (positive,), (negative,), report = conditioned
    first, second = (demo.encode(latent, prompt)[0][0][0] for prompt in (PROMPT, LATER))
    torch.testing.assert_close(positive[0], first, atol=1e-5, rtol=1e-4)
    ((time, rows),) = positive[1]["starflow_later"]
    assert time == 1.0
    torch.testing.assert_close(rows, second, atol=1e-5, rtol=1e-4)
    assert "starflow_later" not in negative[1]
    told = report.split("From frame ")
    assert [part.partition(" on:")[0] for part in told[1:]] == ["1", "18"]
    assert PROMPT in told[1]
    assert LATER in told[2]


def test_what_only_the_sampler_knows_is_not_asked_of_the_text(demo, clip):
    """A source and its edit that fit a larger window; Text Encode has no window."""
    source = clip[:1].expand(25, -1, -1, -1)
    edit = {"images": source, "vae": demo.vae, "latent": demo.empty(**SMALL, frames=25)}
    context, latent = run("STARFlowVideoEdit", **edit)[:2]
    positive, negative, _ = demo.encode(latent, "make it blue", context=context)
    made = demo.sampler(positive, negative, latent, context=context, window=14)[0]["samples"]
    assert made.shape[2] == 7


def test_a_plain_prompt_is_as_it_was(demo, latent):
    positive, _, report = demo.encode(latent, "red | blue: 2s")
    assert positive[0][1].keys() == {"starflow", "starflow_prompt"}
    assert "red | blue: 2s" in report


@pytest.mark.parametrize("settings", [
    {}, {"guidance": 2.5}, {"keep_at_change": 2}, {"change_kept": False}, {"window": 4, "keep": 2},
], ids=str)  # fmt: skip
def test_the_sampler_follows(demo, core, conditioned, latent, settings):
    samples, report, _ = demo.sampler(*conditioned[:2], latent, **settings)
    assert relative_error(samples["samples"], made(core, **settings)) < 1e-4
    kept, brought = settings.get("keep_at_change", 1), settings.get("change_kept", True)
    line = f"prompts change at frame 18; {kept} latent frames kept" + (", and brought under" if brought else "")
    assert line in report
    if settings:
        assert relative_error(samples["samples"], made(core)) > 1e-5


def test_what_is_cut_is_told_of_each_prompt(demo, latent):
    _, _, report = demo.encode(latent, f"{PROMPT} | 1s: {'a red circle ' * 30}")
    assert report.startswith("STARFlow demo reads only 48 tokens; left out of prompt 2: ")


@pytest.mark.parametrize(("text", "message"), [
    ("0s: a | 1s: ", "at 1s is empty"),
    ("0s: a | 3s: b", "at 3s begins after the clip's end"),
    ("0s: a | 1s: b | 1.05s: c", "less than a latent frame"),
])  # fmt: skip
def test_texts_that_make_no_sense_are_refused(demo, latent, text, message):
    with pytest.raises(Exception, match=message):
        demo.encode(latent, text)


def test_an_image_has_one_prompt(demo):
    with pytest.raises(Exception, match="one frame has one prompt"):
        demo.encode(demo.empty(**SMALL, frames=1), TEXT)


def test_an_inverse_reads_one_prompt(demo, conditioned, latent):
    with pytest.raises(Exception, match="positive has prompts that change, which only the sampler's positive"):
        demo.inverted(*conditioned[:2], {"samples": latent["samples"] + 1})
    with pytest.raises(Exception, match="negative has prompts that change"):
        demo.sampler(conditioned[0], conditioned[0], latent)


def test_a_noise_may_be_sampled_under_several(demo, core, conditioned, latent):
    (noise,) = run("STARFlowNoise", model=demo.model, latent=latent, seed=5)[:1]
    samples = demo.sampler(*conditioned[:2], latent, noise=noise)[0]["samples"]
    assert relative_error(samples, made(core, seed=5)) < 1e-4
