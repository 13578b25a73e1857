"""The flow as mathematics: invertible, autoregressive, a likelihood."""

from __future__ import annotations

import pytest
import torch

from starflow_core.errors import InputError, NonFiniteError
from starflow_core.model.rope import token_rotary
from starflow_core.model.transformer import FinalNorm
from starflow_core.solve.runs import DeepRun
from starflow_core.solve.sampling import Sampler, sample
from starflow_core.solve.solvers import AUTOREGRESSIVE, PRESETS
from tests.core import models


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("settings", [AUTOREGRESSIVE, PRESETS["exact"]], ids=["autoregressive", "jacobi"])
def test_decoding_inverts_encoding(seed, settings):
    flow, x = models.random_case(seed)
    text = models.text(flow, len(x))
    noise = flow.encode(x, text).noise
    torch.testing.assert_close(sample(flow, noise, text, settings=settings).latents, x, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_encoding_inverts_decoding(seed):
    flow, z = models.random_case(seed)
    text = models.text(flow, len(z))
    x = sample(flow, z, text, settings=PRESETS["exact"]).latents
    torch.testing.assert_close(flow.encode(x, text).noise, z, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_log_determinant_is_that_of_the_jacobian(kind):
    flow = models.flow(kind=kind, channels=2)
    x = models.randn(1, 2 if kind == "video" else 1, 2, 2, 3).double()
    flow.double()
    flow.compute_dtype = torch.float64
    text = models.text(flow).double()
    # The core works in float32; the numbers here are small enough for it.
    jacobian = torch.autograd.functional.jacobian(lambda v: flow.encode(v.float(), text).noise.flatten(), x.float())
    expected = torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel())).logabsdet
    actual = sum(d.sum() for d in flow.encode(x.float(), text).logdets)
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)


def test_likelihood_and_bits():
    flow = models.flow()
    x, text = models.randn(2, 2, 4, 3, 3), models.text(flow, 2)
    encoding = flow.encode(x, text)
    size = x[0].numel()
    half_log = 0.5 * torch.log(torch.tensor(2 * torch.pi))
    torch.testing.assert_close(-encoding.log_likelihood / size, flow.loss(x, text) + half_log)
    torch.testing.assert_close(encoding.bits_per_dim, (flow.loss(x, text) + half_log) / torch.log(torch.tensor(2.0)))


def test_the_deep_block_sees_nothing_later():
    flow = models.flow()
    x = models.randn(1, 3, 4, 3, 3)
    tokens, text, grid = flow.tokens(x).flatten(1, 2), models.text(flow), flow.grid(x)
    a, b = flow.deep_affine(tokens, text, grid)
    changed = tokens.clone()
    changed[:, 14] += 5
    a2, b2 = flow.deep_affine(changed, text, grid)
    assert torch.equal(a[:, :15], a2[:, :15])
    assert torch.equal(b[:, :15], b2[:, :15])
    assert not torch.allclose(b[:, 15:], b2[:, 15:])


def test_shallow_blocks_keep_frames_apart():
    flow = models.flow()
    x = models.randn(1, 3, 4, 3, 3)
    tokens, _ = flow.encode_shallow(x)
    x[:, 1] += 1
    changed, _ = flow.encode_shallow(x)
    assert torch.equal(tokens[:, [0, 2]], changed[:, [0, 2]])
    assert not torch.allclose(tokens[:, 1], changed[:, 1])


def test_the_cached_run_equals_the_whole_pass():
    flow = models.flow()
    x = models.randn(2, 3, 4, 3, 3)
    grid, text = flow.grid(x), models.text(flow, 2)
    tokens = flow.tokens(x).flatten(1, 2)
    a, b = flow.deep_affine(tokens, text, grid)
    run = DeepRun(flow, grid, text, None, 0.0)
    for start, stop in ((0, 7), (3, 8), (8, 9), (9, 27)):
        part_a, part_b = run(tokens[:, max(start - 1, 0) : stop - 1], start)
        torch.testing.assert_close(part_a, a[:, start:stop], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(part_b, b[:, start:stop], atol=1e-5, rtol=1e-5)


def test_guidance_zero_and_equal_texts_change_nothing():
    flow = models.flow()
    z, text = models.randn(1, 2, 4, 3, 3), models.text(flow)
    plain = sample(flow, z, text, settings=AUTOREGRESSIVE).latents
    assert torch.equal(sample(flow, z, text, models.text(flow, seed=9), settings=AUTOREGRESSIVE).latents, plain)
    guided = sample(flow, z, text, text, guidance=3.0, settings=AUTOREGRESSIVE).latents
    torch.testing.assert_close(guided, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_a_bf16_network_differs_by_its_rounding(seed):
    """Against float32 with the same rounded weights. A bfloat16 number is off by up to 2^-9, so its square by 4e-6,
    and a result has been through some ten layers."""
    half = models.flow(seed).to(torch.bfloat16)
    half.compute_dtype = torch.bfloat16
    full = models.flow(seed)
    full.load_state_dict({name: weight.float() for name, weight in half.state_dict().items()})
    x, text = models.randn(1, 2, 4, 3, 3, seed=seed), models.text(full)
    noise, rounded = full.encode(x, text).noise, half.encode(x, text).noise
    assert rounded.dtype == torch.float32
    assert 1e-6 < models.relative_error(rounded, noise) < 2e-4
    back = sample(half, rounded, text, settings=AUTOREGRESSIVE).latents
    assert back.dtype == torch.float32
    assert models.relative_error(back, x) < 2e-2


def test_nan_in_weights_names_the_block():
    flow = models.flow()
    flow.blocks[1].proj_in.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"block 1.*token 0"):
        flow.encode(models.randn(1, 2, 4, 3, 3), models.text(flow))
    with pytest.raises(NonFiniteError, match="block 1"):
        sample(flow, models.randn(1, 2, 4, 3, 3), models.text(flow))


@pytest.mark.parametrize("settings", [AUTOREGRESSIVE, PRESETS["balanced"]], ids=["autoregressive", "jacobi"])
def test_nan_in_the_deep_block_names_the_token(monkeypatch, settings):
    """Of the frame and token where it began, though what comes after is spoilt, too."""
    flow, original = models.flow(), DeepRun.__call__

    def spoilt(self, before, start):
        a, b = original(self, before, start)
        place = 9 + 5 - start
        if 0 <= place < b.shape[1]:
            b[1, place] = float("nan")
        return a, b

    monkeypatch.setattr(DeepRun, "__call__", spoilt)
    with pytest.raises(NonFiniteError, match="deep block: batch element 1, latent frame 1, token 5"):
        sample(flow, models.randn(2, 2, 4, 3, 3), models.text(flow, 2), settings=settings)


def test_nan_in_a_shallow_block_names_the_clips_frame():
    """A stream inverts the shallow blocks of one frame at a time."""
    flow = models.flow()
    sampler = Sampler(flow, models.randn(1, 3, 4, 3, 3), models.text(flow))
    flow.blocks[0].proj_out.bias.data[0] = float("nan")
    with pytest.raises(NonFiniteError, match="block 0: batch element 0, latent frame 2"):
        sampler.through_shallow(models.randn(1, 1, 9, 4), first=2)


def test_nan_in_latents_names_the_token():
    flow = models.flow()
    x = models.randn(2, 2, 4, 3, 3)
    x[1, 1, 0, 2, 1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"element 1, latent frame 1, token 7 \(row 2, column 1\)"):
        flow.encode(x, models.text(flow, 2))


def test_wrong_channels_are_refused():
    flow = models.flow()
    with pytest.raises(InputError, match="4 channels"):
        flow.encode(models.randn(1, 2, 5, 3, 3), models.text(flow))


def test_shallow_blocks_in_parts_are_the_blocks_at_once(monkeypatch):
    flow = models.flow()
    x = models.randn(2, 3, 4, 3, 3)
    whole, logdets = flow.encode_shallow(x)
    monkeypatch.setattr("starflow_core.model.flow.SHALLOW_TOKENS", 2 * 9)  # two of the six frames
    parts, others = flow.encode_shallow(x)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(others, logdets, atol=1e-5, rtol=1e-5)


def test_final_norm_and_rotation_compute_in_float32():
    """In bfloat16 they would round after every operation; so they round once, at the end."""
    x = models.randn(2, 9, 48).bfloat16()
    norm = FinalNorm(48)
    norm.weight.data = models.randn(48, seed=1)
    assert torch.equal(norm(x), norm(x.float()).bfloat16())
    rotary = token_rotary(1, 3, 3, length=5, head_dim=48, rounding="exact", device="cpu")
    assert torch.equal(rotary.rotate(x), rotary.rotate(x.float()).bfloat16())


def test_log_determinants_are_in_row_major_order():
    """A token's log-determinant in a reversing block depends on the tokens after it, in row-major order."""
    flow = models.flow()
    assert flow.blocks[0].reverses
    x = models.randn(1, 1, 4, 2, 3)
    changed = x.clone()
    changed[..., 0, 0] += 1  # the first token, which a reversed block reads last
    before, after = (flow.encode(v, models.text(flow)).logdets[0][0, 0] for v in (x, changed))
    assert torch.equal(before, after)
    changed[..., 1, 2] += 1  # the last token
    after = flow.encode(changed, models.text(flow)).logdets[0][0, 0]
    assert torch.equal(before[-1], after[-1])
    assert not torch.allclose(before[:-1], after[:-1])
