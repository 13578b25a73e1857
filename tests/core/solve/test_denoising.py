"""The denoiser as a pipeline, against its definition with a dense mask; the score step."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from starflow_core.control import Control
from starflow_core.errors import Cancelled, NonFiniteError
from starflow_core.jobs.tasks import Generation, Job
from starflow_core.model.config import Denoiser
from starflow_core.model.rope import joined
from starflow_core.solve.denoising import DenoiseStream, denoise, score_denoise
from tests.core import models


def dense(flow, latents, text):
    """The denoiser's output by the definition: one sequence, one mask."""
    net, config, grid = flow.learnable_self_denoiser, flow.config.denoiser, flow.grid(latents)
    length, per_frame = text.shape[1], grid.frame_tokens
    index = torch.arange(length + grid.frames * per_frame)
    frame = (index - length).div(per_frame, rounding_mode="floor")
    ahead = config.look_ahead
    upper = frame.clamp(min=0)[:, None] + ahead
    lower = frame[:, None] + ahead - config.window
    seen = (index[None] < length) | ((frame[None] >= lower) & (frame[None] <= upper))
    hidden = torch.cat((net.proj_txt(text), net.proj_in(flow.tokens(latents).flatten(1, 2))), 1)
    rotary = joined(flow.text_rotary(length, "cpu"), flow.rotary(grid, "cpu"))
    for layer in net.attn_blocks:
        hidden = layer(hidden, rotary, lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=seen))
    out = net.proj_out(net.final_norm(hidden[:, length:])).unflatten(1, (grid.frames, per_frame))
    return flow.latents(out, grid)


@pytest.mark.parametrize(
    ("ahead", "window", "frames"), [(1, 3, 5), (1, 1, 4), (2, 3, 5), (0, 2, 4), (1, 10, 3), (1, 3, 1)]
)
def test_the_pipeline_equals_the_definition(ahead, window, frames):
    flow = models.flow(denoiser=Denoiser(48, 3, window, ahead))
    x, text = models.randn(2, frames, 4, 2, 3), models.text(flow, 2)
    clean = denoise(flow, x, text)
    torch.testing.assert_close((x - clean) / 0.3, dense(flow, x, text), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sizes", [(1,) * 11, (3, 1, 5, 2), (11,)])
@pytest.mark.parametrize("overlap", ["noisy", "denoised"])
def test_streaming_equals_at_once(sizes, overlap):
    flow = models.flow()
    x, text = models.randn(1, 11, 4, 2, 3), models.text(flow)
    whole = denoise(flow, x, text, overlap=overlap)
    stream = DenoiseStream(flow, flow.grid(x), text, overlap=overlap)
    done, given, out = 0, 0, []
    for size in sizes:
        given += size
        out.append(stream.push(flow.tokens(x[:, done:given]), last=given == 11))
        done = given
    torch.testing.assert_close(flow.latents(torch.cat(out, 1), flow.grid(x)), whole, atol=1e-5, rtol=1e-5)


def test_a_frame_is_given_once_its_reach_has_been_seen():
    flow = models.flow(denoiser=Denoiser(48, 2, 3, 1), window=9)
    x, text = models.randn(1, 9, 4, 2, 3), models.text(flow)
    stream = DenoiseStream(flow, flow.grid(x), text)
    counts = [stream.push(flow.tokens(x[:, i : i + 1]), last=i == 8).shape[1] for i in range(9)]
    reach = flow.config.denoiser.reach
    assert reach == 2
    assert counts == [0, 0, 1, 1, 1, 1, 1, 1, 3]


def test_score_step_is_the_gradient():
    flow = models.flow(denoiser=None)
    x, text = models.randn(2, 2, 4, 2, 3), models.text(flow, 2)
    clean = score_denoise(flow, x, text)
    step = 1e-2
    direction = models.randn(*x.shape, seed=3)
    up, down = (flow.encode(x + s * direction, text).log_likelihood for s in (step, -step))
    slope = ((clean - x) / flow.config.noise_std**2 * direction).flatten(1).sum(1)
    torch.testing.assert_close(slope, (up - down) / (2 * step), rtol=2e-2, atol=2e-2)


def test_score_step_inside_inference_mode():
    flow = models.flow(kind="image")
    x, text = models.randn(2, 4, 3, 3), models.text(flow, 2)
    expected = score_denoise(flow, x, text)
    with torch.inference_mode():
        clean = score_denoise(flow, x.clone(), text.clone())
    torch.testing.assert_close(clean, expected)
    assert not any(block.recompute for block in flow.blocks)


def test_score_step_keeps_no_activations():
    """Bytes that autograd saves for a deeper model, with and without recomputing."""

    def saved(layers: int, recompute: bool) -> int:
        flow = models.flow(kind="image", layers=(1, layers))
        for block in flow.blocks:
            block.recompute = recompute
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            flow.encode(models.randn(1, 4, 12, 12).requires_grad_(), models.text(flow)).log_likelihood.sum()
        return sum(sizes)

    hidden_state = (12 * 12 + 5) * 72 * 4
    assert saved(9, True) - saved(1, True) <= 8 * hidden_state
    assert saved(9, False) - saved(1, False) > 8 * 10 * hidden_state


def test_score_step_can_be_cancelled():
    flow = models.flow(kind="image")
    x, text = models.randn(3, 4, 3, 3), models.text(flow, 3)
    with pytest.raises(Cancelled):
        score_denoise(flow, x, text, Control(cancelled=lambda: True))
    assert not any(block.recompute for block in flow.blocks)


def at(phase, step):
    """A control that cancels once this step of a phase is reported."""
    seen = []
    return Control(seen.append, lambda: any((p.phase, p.step) == (phase, step) for p in seen))


@pytest.mark.parametrize("step", [0, 1, 2])
def test_the_way_to_noise_can_be_cancelled_in_every_layer(step):
    flow = models.flow(layers=(1, 2))
    with pytest.raises(Cancelled):
        flow.encode(models.randn(1, 2, 4, 2, 2), models.text(flow), at("invert", step))
    seen = []
    flow.encode(models.randn(1, 2, 4, 2, 2), models.text(flow), Control(seen.append))
    assert [(p.phase, p.step, p.total) for p in seen] == [("invert", i, 3) for i in range(4)]


@pytest.mark.parametrize("frame", [1, 2])
def test_the_denoiser_can_be_cancelled_within_a_clip(frame):
    flow = models.flow()
    job = Job(32, 32, frames=9, guidance=0.0)
    with pytest.raises(Cancelled):
        Generation(flow, job, models.text(flow), control=at("denoise", frame)).run()


def test_denoising_by_itself_can_be_followed_and_cancelled():
    flow, seen = models.flow(), []
    x, text = models.randn(1, 3, 4, 2, 2), models.text(flow)
    denoise(flow, x, text, control=Control(seen.append))
    assert [(p.phase, p.step, p.total) for p in seen] == [("denoise", i, 3) for i in range(4)]
    with pytest.raises(Cancelled):
        denoise(flow, x, text, control=at("denoise", 1))


@pytest.mark.parametrize("recompute", [False, True])
def test_the_score_step_leaves_blocks_as_they_were(recompute):
    flow = models.flow(kind="image")
    for block in flow.blocks:
        block.recompute = recompute
    score_denoise(flow, models.randn(1, 4, 3, 3), models.text(flow))
    assert [block.recompute for block in flow.blocks] == [recompute] * 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_denoisers_nan_is_named(value):
    flow = models.flow()
    flow.learnable_self_denoiser.attn_blocks[1].attention.proj.weight.data[0, 0] = value
    with pytest.raises(NonFiniteError, match="NaN or infinity in the denoiser: batch element 0, latent frame 0"):
        denoise(flow, models.randn(1, 3, 4, 2, 2), models.text(flow))


def test_the_frame_at_which_the_denoisers_nan_begins_is_that_of_the_clip():
    flow = models.flow()
    latents = models.randn(1, 9, 4, 2, 2)
    latents[:, 8] = math.nan
    with pytest.raises(NonFiniteError, match=r"in the denoiser: batch element 0, latent frame [5-8],"):
        denoise(flow, latents, models.text(flow))


@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_score_steps_nan_is_named(kind):
    """Likelihoods can be finite where their gradient isn't: it overflows in the reverse pass."""
    flow = models.flow(kind=kind, denoiser=None)
    shape = (1, 2, 4, 2, 2) if kind == "video" else (1, 4, 2, 2)
    flow.blocks[0].proj_in.register_full_backward_hook(lambda module, given, taken: (given[0] * math.nan,))
    with pytest.raises(NonFiniteError, match="the score step of batch element 0"):
        score_denoise(flow, models.randn(*shape), models.text(flow))


def test_a_chunk_begins_with_as_many_sampled_frames_as_a_frame_sees():
    """Chunks of 5 with 3 in common: frames 0..4, 2..6 and 4..8, each denoised by itself, its new frames kept."""
    flow = models.flow()
    x, text = models.randn(1, 9, 4, 2, 3), models.text(flow)
    chunks = [denoise(flow, x[:, start : start + 5], text) for start in (0, 2, 4)]
    expected = torch.cat((chunks[0], chunks[1][:, 3:], chunks[2][:, 3:]), 1)
    torch.testing.assert_close(denoise(flow, x, text), expected, atol=1e-5, rtol=1e-5)
