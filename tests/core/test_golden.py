"""The recorded tensors of the reference, matched in float32."""

from __future__ import annotations

import pytest
import torch

from starflow_core.model.config import FlowConfig
from starflow_core.model.flow import Flow
from starflow_core.solve.denoising import denoise, score_denoise
from starflow_core.solve.sampling import sample
from starflow_core.solve.solvers import AUTOREGRESSIVE, PRESETS
from tests.core import golden

TOLERANCE = 2e-4


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


def relative_error(actual, exact):
    return float((actual - exact).square().sum() / exact.square().sum())


def make(config, weights, **overrides):
    flow = Flow(FlowConfig.from_reference(config, **{"rounding": "exact", **overrides}))
    flow.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return flow.eval().requires_grad_(False)


def recorded(name, weights=None, **overrides):
    tensors, config, notes = golden.load(name)
    return make(config, golden.load(weights or f"{name}_weights")[0], **overrides), tensors, notes


@pytest.fixture(scope="module")
def image():
    return recorded("image", noise_std=0.3)


@pytest.fixture(scope="module")
def video():
    return recorded("video")


def sampled(flow, data, notes, settings=AUTOREGRESSIVE, guidance=None, noise=None, **options):
    noise = data["noise"] if noise is None else noise
    guidance = notes["guidance"] if guidance is None else guidance
    image = noise.ndim == 4
    noise = noise.unsqueeze(1) if image else noise
    out = sample(flow, noise, data["y"], data["y_uncond"], guidance=guidance, settings=settings, **options).latents
    return out.squeeze(1) if image else out


@pytest.mark.parametrize("name", ["image", "video"])
def test_encode(name, request):
    flow, data, _ = request.getfixturevalue(name)
    encoding = flow.encode(data["x"], data["y"])
    close(encoding.noise, data["forward_z"])
    for i, (block, logdet) in enumerate(zip(flow.blocks, encoding.logdets, strict=True)):
        expected = data[f"logdet_{i}"]  # recorded in the block's own order
        close(block.ordered(logdet).reshape(expected.shape), expected)


def test_loss(image):
    flow, data, _ = image
    encoding = flow.encode(data["x"], data["y"])
    close(sum(-d.mean() for d in encoding.logdets), data["loss_logdet"])
    close(0.5 * encoding.noise.square().mean(), data["loss_z"])
    close(flow.loss(data["x"], data["y"]).mean(), data["loss"])


@pytest.mark.parametrize("name", ["image", "video"])
@pytest.mark.parametrize("settings", [AUTOREGRESSIVE, PRESETS["exact"]], ids=["autoregressive", "jacobi"])
def test_sample(name, settings, request):
    flow, data, notes = request.getfixturevalue(name)
    close(sampled(flow, data, notes, settings, guidance=0.0), data["sample_ar"])
    close(sampled(flow, data, notes, settings), data["sample_ar_cfg"])


def test_sequences_between_blocks(image):
    """The latents between blocks, deep first: each shallow block maps one to the one before it."""
    flow, data, _ = image
    close(data["sequence_0"], data["noise"])
    sequences = [flow.tokens(data[f"sequence_{i}"].unsqueeze(1)) for i in range(1, len(flow.blocks) + 1)]
    rotary = flow.rotary(flow.grid(data["x"].unsqueeze(1)), "cpu")
    for block, after, before in zip(flow.shallow, sequences[:0:-1], sequences[-2::-1], strict=True):
        x = block.ordered(after).flatten(0, 1)
        a, b = flow.shallow_affine(block, x, rotary)
        close(block.ordered((x - b) / a).unsqueeze(1), before)


@pytest.mark.parametrize("name", ["image", "video"])
def test_jacobi_is_nearer_than_the_reference(name, request):
    flow, data, notes = request.getfixturevalue(name)
    ours = sampled(flow, data, notes, PRESETS["balanced"])
    theirs = data["sample_jacobi_cfg"]
    assert relative_error(ours, data["sample_ar_cfg"]) <= relative_error(theirs, data["sample_ar_cfg"])
    close(sampled(flow, data, notes, PRESETS["exact"]), data["sample_jacobi_tight"])


def test_score_denoising(image):
    flow, data, _ = image
    close(score_denoise(flow, data["sample_ar_cfg"], data["y"]), data["score_denoised"])


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("settings", [AUTOREGRESSIVE, PRESETS["exact"]], ids=["autoregressive", "jacobi"])
def test_context(video, frames, settings):
    flow, data, notes = video
    context = data[f"context_{frames}"]
    out = sampled(flow, data, notes, settings, context=context)
    close(out, data[f"sample_context_{frames}"])
    assert torch.equal(out[:, :frames], context)


def test_denoiser(video):
    flow, data, _ = video
    noisy = data["sample_jacobi_tight"]
    close((noisy - denoise(flow, noisy, data["y"])) / 0.3, data["denoiser"])


@pytest.mark.parametrize("settings", [AUTOREGRESSIVE, PRESETS["exact"]], ids=["autoregressive", "jacobi"])
def test_long_video(settings):
    flow, data, notes = recorded("video_long", "video_weights")
    options = {"window": notes["window"], "keep": notes["context_length"]}
    close(sampled(flow, data, notes, settings, **options), data["sample_long"])
    context = data["context_1"]
    close(sampled(flow, data, notes, settings, context=context, **options), data["sample_long_context_1"])


def test_long_denoising():
    flow, data, notes = recorded("video_long", "video_weights")
    window = notes["denoise_window"]
    close(denoise(flow, data["sample_long"], data["y"], window=window, overlap="denoised"), data["denoised_long"])


@pytest.mark.parametrize(("rounding", "name"), [
    ("exact", "float32"), ("angles", "rounded_angles"), ("positions", "rounded_positions"),
])  # fmt: skip
def test_rounded_angles(rounding, name):
    data, config, notes = golden.load("mixed_precision")
    weights = {key.removeprefix("weights."): value for key, value in data.items() if key.startswith("weights.")}
    flow = make(config, weights, rounding=rounding)
    close(flow.encode(data["x"], data["y"]).noise, data[f"forward_z_{name}"])
    close(sampled(flow, data, notes), data[f"sample_ar_cfg_{name}"])
