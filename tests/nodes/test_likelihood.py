"""The Likelihood node: its figures are the core's, its pictures those of the frames it was given."""

from __future__ import annotations

import math

import pytest
import torch

from .steps import SMALL, run


def likelihood(demo, latent, prompt="a red circle moving right", context=None, **inputs):
    positive, _, _ = demo.encode(latent, prompt, context=context)
    return run("STARFlowLikelihood", model=demo.model, positive=positive, latent=latent, context=context, **inputs)


@pytest.fixture(scope="module")
def samples(demo):
    return demo.sample(demo.empty(**SMALL, batch_size=2), seed=3, guidance=0.0)[0]


def test_figures_of_a_batch(demo, samples):
    both, bits, mask, overlay, report, best = likelihood(demo, samples)
    single = [likelihood(demo, {"samples": part})[0] for part in samples["samples"].split(1)]
    assert both == pytest.approx(sum(single) / 2, rel=1e-4)
    assert torch.equal(best["samples"], samples["samples"].split(1)[single.index(max(single))])
    turned = likelihood(demo, {"samples": samples["samples"].flip(0)})[5]
    assert torch.equal(turned["samples"], best["samples"])
    assert bits == pytest.approx(-both / (3 * 16 * 6 * math.log(2)), rel=1e-4)
    assert mask.shape == (18, 32, 48)
    assert overlay.shape[0] == 18
    assert 0 <= float(overlay.min()) <= float(overlay.max()) <= 1
    assert report.splitlines()[0].startswith(f"clip 1: log-likelihood {single[0]:.2f} nats")
    assert "frames 1 to 4: " in report


def test_the_prompt_matters(demo, samples):
    assert likelihood(demo, samples, "a red circle moving right")[0] != likelihood(demo, samples, "a blue ring")[0]


def test_the_mask_follows_the_threshold(demo, samples):
    shares = [float(likelihood(demo, samples, threshold=threshold)[2].mean()) for threshold in (-1e6, -8.0, 1e6)]
    assert shares[0] == 1 > shares[1] > shares[2] == 0


def test_the_overlay_is_on_the_images(demo, samples):
    dark, bright = (likelihood(demo, samples, images=torch.full((18, 32, 48, 3), v))[3] for v in (0.0, 1.0))
    assert (bright[:, :320, :300] - dark[:, :320, :300]).mean() > 0.1
    assert torch.equal(bright[:, :, -20:], dark[:, :, -20:])  # the scale
    with pytest.raises(Exception, match="17 images, but the latent has 18 frames"):
        likelihood(demo, samples, images=torch.zeros(17, 32, 48, 3))


def test_given_frames_are_a_condition(demo, samples):
    latent = demo.empty(**SMALL)
    context = run("STARFlowFirstFrame", image=torch.rand(1, 32, 48, 3), vae=demo.vae, latent=latent)[0]
    made = {"samples": samples["samples"][:1]}
    found = likelihood(demo, made, context=context, threshold=-1e6)
    assert not found[2][0].any()
    assert found[2][1:].all()
    assert "frames 0 to 0" not in found[4]
    assert found[0] != likelihood(demo, made)[0]


def test_a_prompt_for_something_else_is_refused(demo, samples):
    positive, _, _ = demo.encode(demo.empty(**SMALL, frames=1))
    with pytest.raises(Exception, match="positive was made for"):
        run("STARFlowLikelihood", model=demo.model, positive=positive, latent=samples)
