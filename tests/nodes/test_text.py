"""Text encode: the words around a prompt, and the embeddings of both."""

from __future__ import annotations

import re

import pytest
import torch

from . import pack
from .steps import PROMPT, SMALL, run


@pytest.fixture(scope="module")
def latent(demo):
    return demo.empty(**SMALL)


@pytest.fixture(scope="module")
def given(demo, latent, clip):
    """A context of each task, and the prefix of its prompts."""
    place = {"vae": demo.vae, "latent": latent}
    return {
        "": run("STARFlowFirstFrame", image=clip[:1], **place)[0],
        "(last) ": run("STARFlowFirstLastFrame", last_image=clip[:1], **place)[0],
        "(extend) ": run("STARFlowExtend", model=demo.model, images=clip, **place)[0],
        "(v2v) ": run("STARFlowVideoEdit", images=clip, **place)[0],
    }


def test_embeddings_are_the_cores(demo, core, latent):
    positive, negative, _ = demo.encode(latent, negative_prompt="a blue ring")
    text, uncond, _ = core.encode_text([PROMPT], "a blue ring", core.job(height=32, width=48))
    torch.testing.assert_close(positive[0][0], text, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(negative[0][0], uncond, atol=1e-5, rtol=1e-4)
    assert (text - uncond).abs().max() > 0.1


def test_the_report_is_what_the_model_reads(demo, latent):
    inside = f"{PROMPT}\n\n in a 16:9 aspect ratio."
    assert demo.encode(latent)[2] == f"Noise Level 200:\nA video with 16 fps:\n{inside}"
    assert demo.encode(latent, frame_rate=24.0)[2] == f"Noise Level 200:\nA video with 24 fps:\n{inside}"
    still = demo.empty(**SMALL, frames=1)
    assert demo.encode(still, frame_rate=24.0)[2] == f"Noise Level 200:\nAn image:\n{inside}"
    high = demo.empty(width=32, height=48)
    assert demo.encode(high)[2].endswith("in a 9:16 aspect ratio.")


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -1.0, 1e9])
@pytest.mark.parametrize("frames", [1, 9])
def test_impossible_rates_are_refused(demo, frames, rate):
    with pytest.raises(Exception, match=rf"^frame_rate is {re.escape(f'{rate:g}')}; give frames per second, at most"):
        demo.encode(demo.empty(**{**SMALL, "frames": frames}), frame_rate=rate)


def test_only_the_prompt_has_the_tasks_prefix(demo, latent, given):
    _, plain, _ = demo.encode(latent, negative_prompt="a blue ring")
    for prefix, context in given.items():
        _, negative, report = demo.encode(latent, negative_prompt="a blue ring", context=context)
        assert f"fps:\n{prefix}{PROMPT}\n" in report
        torch.testing.assert_close(negative[0][0], plain[0][0], atol=1e-5, rtol=1e-4)


def test_what_is_cut_is_reported_and_warned_of(caplog, demo, latent, told):
    _, _, report = demo.encode(latent)
    assert "left out" not in report
    assert told.texts == [report]
    assert told.nodes == {pack.NODE_ID}
    assert not caplog.records
    _, _, report = demo.encode(latent, "a red circle " * 30)
    assert re.search(r"reads only 48 tokens; left out: .*red circle", report)
    assert report.splitlines()[0] in caplog.text
    _, _, report = demo.encode(latent, negative_prompt="a blue ring " * 30)
    assert re.search(r"reads only 48 tokens; left out of the negative prompt: .*blue ring", report)


def test_the_whole_encoder_is_loaded(demo, latent, told):
    demo.encode(latent)
    assert told.loads == [(demo.text_encoder.patcher, 0, True)]


def test_embeddings_wait_where_the_host_wants_them(monkeypatch, demo, latent):
    import comfy.model_management as management

    positive, negative, _ = demo.encode(latent)
    assert {rows.dtype for ((rows, _),) in (positive, negative)} == {torch.float32}
    monkeypatch.setattr(management, "intermediate_device", lambda: torch.device("meta"))
    positive, negative, _ = demo.encode(latent)
    assert {rows.device.type for ((rows, _),) in (positive, negative)} == {"meta"}


def test_embeddings_of_a_smaller_type_become_float(demo, latent):
    """As core's conditioning: the sampler casts it to what the flow computes in."""
    (text_encoder,) = run("STARFlowLoadTextEncoder", weight_type="bf16")
    inputs = {"model": demo.model, "text_encoder": text_encoder, "latent": latent, "prompt": PROMPT}
    positive, _, _ = run("STARFlowTextEncode", **inputs)
    assert positive[0][0].dtype == torch.float32


def test_an_encoder_of_another_model_is_refused(demo, image_model, latent):
    inputs = {"model": demo.model, "text_encoder": image_model.text_encoder, "latent": latent}
    with pytest.raises(Exception, match=r"the text encoder gives 12 channels, .* reads 128"):
        run("STARFlowTextEncode", **inputs)


def test_latents_of_another_model_are_refused(demo):
    with pytest.raises(
        Exception, match=r"this latent has 4 channels, but .* uses 16; make it with STARFlow Empty Latent"
    ):
        demo.encode({"samples": torch.zeros(1, 4, 8, 8)})
