"""Noise in graphs: clips come back from it, it can be varied and mixed, and the sampler follows what it carries."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.core.models import relative_error

from . import pack
from .steps import SMALL, run

(EXACT,) = run("STARFlowJacobiSettings", preset="exact")
OTHER = "a blue ring moving right on a black background"


@pytest.fixture(scope="module")
def source(demo):
    """A clip of 3 latent frames, 48 x 32."""
    return {"samples": demo.sample(demo.empty(**SMALL), seed=4)[0]["samples"].clone()}


@pytest.fixture(scope="module")
def conditioned(demo, source):
    return demo.encode(source)[:2]


@pytest.fixture(scope="module")
def invert(demo, source, conditioned):
    """Noise, bits per dimension and report of that clip under its own prompt."""

    def invert(latent=source, pair=conditioned, **inputs):
        return demo.inverted(*pair, latent, **inputs)

    return invert


def drawn(demo, **inputs):
    return run("STARFlowNoise", **{"model": demo.model, "latent": demo.empty(**SMALL), **inputs})[0]


def mixed(noise, **inputs):
    return run("STARFlowMixNoise", noise=noise, **inputs)[0]


def long(demo):
    """More latent frames than the demo's window of 10."""
    latent = demo.empty(**SMALL, frames=45)
    return {"samples": torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("inputs", [{}, {"guidance": 1.5}, {"window": 2, "keep": 1}], ids=str)
def test_a_clean_clip_comes_back(demo, invert, source, conditioned, inputs):
    """With what the noise carries: no setting of the sampler's says so."""
    noise = invert(add_noise=False, **inputs)[0]
    again = demo.sampler(*conditioned, source, noise=noise, settings=EXACT)[0]["samples"]
    assert relative_error(again, source["samples"]) < 1e-4


def test_a_clip_beyond_the_window_comes_back(demo, invert):
    latent = long(demo)
    pair = demo.encode(latent)[:2]
    noise = invert(latent, pair, add_noise=False)[0]
    again = demo.sampler(*pair, latent, noise=noise, settings=EXACT)[0]["samples"]
    assert relative_error(again, latent["samples"]) < 1e-4


def test_a_clip_with_given_frames_comes_back(demo, source, clip, invert):
    (context,) = run("STARFlowFirstFrame", image=clip[:1], vae=demo.vae, latent=source)
    pair = demo.encode(source, context=context)[:2]
    noise = invert(pair=pair, add_noise=False, context=context)[0]
    wanted = torch.cat((context.latents, source["samples"][:, :, 1:]), 2)
    for given in (None, context):  # the noise's own, or the same one connected, though that has noise added
        again = demo.sampler(*pair, source, noise=noise, context=given, settings=EXACT)[0]["samples"]
        assert relative_error(again, wanted) < 1e-4


def test_with_noise_added_it_comes_back_denoised(demo, invert, source, conditioned):
    noise, _, report = invert(seed=3)
    assert noise.seed == 3
    assert 0.8 < float(noise.noise.std()) < 1.3
    assert "the model's own noise of seed 3: deviation" in report
    raw, again = (
        demo.sampler(*conditioned, source, noise=noise, denoise=on)[0]["samples"] for on in (False, True)
    )  # fmt: skip
    assert relative_error(again, source["samples"]) < 0.7 * relative_error(raw, source["samples"])


def test_the_added_noise_is_the_seeds(invert):
    first, again, other = (invert(seed=seed)[0].noise for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert relative_error(other, first) > 0.01


def test_clean_noise_is_never_denoised(demo, invert, source, conditioned):
    noise = invert(add_noise=False)[0]
    on, off = (demo.sampler(*conditioned, source, noise=noise, denoise=given)[0]["samples"] for given in (True, False))
    assert torch.equal(on, off)


def test_another_prompt_makes_another_clip(demo, invert, source):
    noise = invert(add_noise=False)[0]
    assert noise.prompt == "a red circle moving right on a black background"
    other = demo.encode(source, OTHER)[:2]
    changed = demo.sampler(*other, source, noise=noise)[0]["samples"]
    assert relative_error(changed, source["samples"]) > 0.1


def test_bits_are_those_of_the_clean_clip_without_guidance(core, invert, source):
    from starflow_core.jobs.noises import inversion_job, inverted, noise_of

    job = inversion_job(core.config, core.job(height=32, width=48, frames=9, guidance=0.0), True)
    text = core.encode_text(["a red circle moving right on a black background"], "", job)[0]
    wanted = noise_of(core.config, job, inverted(core.flow, job, source["samples"], text), "").bits_per_dim
    for inputs in ({"add_noise": False}, {"add_noise": True, "seed": 9}, {"add_noise": False, "guidance": 2.0}):
        noise, bits, report = invert(**inputs)
        assert bits == pytest.approx(wanted, rel=1e-4)
        assert f"{bits:.4f} bits per dimension" in report
        assert (noise.bits_per_dim is None) == (inputs != {"add_noise": False})


def test_guidance_counts_when_inverting(invert):
    plain, guided = (invert(add_noise=False, guidance=guidance)[0] for guidance in (0.0, 2.0))
    assert relative_error(guided.noise, plain.noise) > 0.01
    assert guided.guidance == 2.0


def test_without_guidance_the_negative_is_not_read(invert, conditioned):
    nothing = [["nothing", {}]]
    assert invert(pair=(conditioned[0], nothing))[1] < 0
    with pytest.raises(Exception, match="negative wasn't made for STARFlow"):
        invert(pair=(conditioned[0], nothing), guidance=1.0)


@pytest.mark.parametrize("guidance", [-1.0, float("nan"), float("inf")])
def test_no_guidance_below_0_or_none_at_all(invert, guidance):
    with pytest.raises(Exception, match=f"guidance is {guidance}; 0 is off"):
        invert(guidance=guidance)


def test_an_empty_latent_is_not_inverted(demo, invert):
    with pytest.raises(Exception, match="this latent is empty; connect VAE Encode"):
        invert(demo.empty(**SMALL))


def test_a_prompt_for_another_size_is_refused(demo, invert):
    other = {"samples": torch.ones_like(demo.empty(width=48, height=48)["samples"])}
    with pytest.raises(Exception, match=r"positive was made for .* of 48 x 32, but this is .* of 48 x 48"):
        invert(other)


def test_a_batch_is_inverted_clip_by_clip(demo, invert, source, conditioned):
    pair = {"samples": torch.cat((source["samples"], source["samples"].flip(-1)))}
    noise = invert(pair, add_noise=False)[0]
    assert torch.allclose(noise.noise[:1], invert(add_noise=False)[0].noise, atol=1e-4)
    # One clip's latent gives the size; the noise says how many.
    again = demo.sampler(*conditioned, source, noise=noise, settings=EXACT)[0]["samples"]
    assert relative_error(again, pair["samples"]) < 1e-4


def test_memory_is_planned_and_asked_for(demo, core, invert, told):
    from starflow_core.jobs.memory import forecast_encode
    from starflow_core.jobs.noises import inversion_job

    told.loads.clear()
    report = invert(guidance=1.0)[2]
    job = core.job(height=32, width=48, frames=9, guidance=1.0)
    need = forecast_encode(core.config, inversion_job(core.config, job, False), torch.float32)
    assert [load[1:] for load in told.loads] == [(need.total - need.weights, False)]
    assert "keys and values in full. Needs" in report.splitlines()[-1]
    assert told.texts[0].startswith("weights in full; keys and values in full. Needs")
    assert told.texts[-1].startswith("48 x 32, 9 frames, inverted in")


def test_options_fix_how_it_fits(demo, invert):
    (options,) = run("STARFlowMemory", cache="int8")
    noise, _, report = invert(long(demo), demo.encode(long(demo))[:2], options=options, add_noise=False)
    plain = invert(long(demo), demo.encode(long(demo))[:2], add_noise=False)[0]
    assert "keys and values in 8 bit" in report
    assert 0 < relative_error(noise.noise, plain.noise) < 1e-2
    (options,) = run("STARFlowMemory", budget=1e-5)
    with pytest.raises(Exception, match=r"inverting this needs at least .* but 10 kB are free"):
        invert(options=options)


def test_progress_of_both_inversions_is_one_bar(invert, told):
    invert()
    values = [value for value, _ in told.steps]
    assert values == sorted(values)
    assert told.steps[-1] == (2 * 18, 2 * 18)
    assert told.nodes == {pack.NODE_ID}
    told.steps.clear()
    invert(add_noise=False)
    assert told.steps[-1] == (18, 18)


def test_an_image_is_inverted_and_varied(image_model):
    """Its denoiser takes a gradient, which noise made in inference mode must not forbid."""
    latent = {"samples": torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))}
    pair = image_model.encode(latent)[:2]
    noise = image_model.inverted(*pair, latent, add_noise=False)[0]
    again = image_model.sampler(*pair, latent, noise=noise, settings=EXACT)[0]["samples"]
    assert again.shape == latent["samples"].shape
    assert relative_error(again, latent["samples"]) < 1e-4
    varied = mixed(image_model.inverted(*pair, latent)[0])
    assert image_model.sampler(*pair, latent, noise=varied)[0]["samples"].isfinite().all()


@pytest.mark.parametrize("inputs", [{}, {"guidance": 2.5}, {"denoise": False}], ids=str)
def test_noise_of_a_seed_is_what_the_sampler_draws(demo, source, conditioned, inputs):
    """The size is what matters of a latent, and the sampler's own seed doesn't count."""
    noise = drawn(demo, seed=5)
    made = demo.sampler(*conditioned, source, seed=8, noise=noise, **inputs)[0]["samples"]
    assert torch.equal(made, demo.sampler(*conditioned, source, seed=5, **inputs)[0]["samples"])


def test_noise_of_a_seed_knows_its_given_frames(demo, clip):
    latent = demo.empty(**SMALL)
    (context,) = run("STARFlowExtend", model=demo.model, images=clip, vae=demo.vae, latent=latent, keep=2)
    pair, noise = demo.encode(latent, context=context)[:2], drawn(demo, latent=latent, seed=5, context=context)
    made = demo.sampler(*pair, latent, noise=noise)[0]
    wanted = demo.sampler(*pair, latent, seed=5, context=context)[0]
    assert torch.equal(made["samples"], wanted["samples"])
    assert made["starflow"] == wanted["starflow"] == {"overlap": 5}


def test_a_connected_context_counts_more_than_the_noises(demo, clip):
    latent = demo.empty(**SMALL)
    own, other = (run("STARFlowFirstFrame", image=clip[i : i + 1], vae=demo.vae, latent=latent)[0] for i in (0, 8))
    pair = demo.encode(latent, context=own)[:2]
    noise = drawn(demo, latent=latent, context=own)
    made = demo.sampler(*pair, latent, noise=noise, context=other)[0]["samples"]
    assert torch.allclose(made[:, :, :1], other.latents, atol=1e-4)
    assert relative_error(made[:, :, :1], own.latents) > 1e-4


def test_the_prompt_has_to_know_the_noises_context(demo, clip, conditioned, source):
    (context,) = run("STARFlowFirstFrame", image=clip[:1], vae=demo.vae, latent=source)
    with pytest.raises(Exception, match=r"text, .*, but this is STARFlow demo: first frame"):
        demo.sampler(*conditioned, source, noise=drawn(demo, context=context))


@pytest.mark.parametrize("inputs", [{"guidance": 2.0}, {"window": 2}, {"window": 2, "keep": 1}], ids=str)
def test_the_samplers_own_settings_count_more_than_the_noises(demo, source, conditioned, inputs):
    noise = replace(drawn(demo, seed=5), guidance=0.5, window=3)
    wanted = demo.sampler(*conditioned, source, seed=5, **{"guidance": 0.5, "window": 3, **inputs})[0]["samples"]
    made = demo.sampler(*conditioned, source, noise=noise, **inputs)[0]["samples"]
    assert torch.equal(made, wanted)
    assert relative_error(made, demo.sampler(*conditioned, source, noise=noise)[0]["samples"]) > 1e-6


def test_the_noises_window_is_used(demo, source, conditioned):
    noise = replace(drawn(demo, seed=5), window=2, keep=1)
    wanted = demo.sampler(*conditioned, source, seed=5, window=2, keep=1)[0]["samples"]
    assert torch.equal(demo.sampler(*conditioned, source, noise=noise)[0]["samples"], wanted)


def test_the_prompts_rate_counts(demo, source):
    slow = demo.encode(source, frame_rate=8.0)[:2]
    assert demo.sampler(*slow, source, noise=drawn(demo))[0]["samples"].isfinite().all()


def test_settings_reach_the_solver(demo, source, conditioned):
    noise = drawn(demo)
    report = demo.sampler(*conditioned, source, noise=noise, settings=EXACT)[1]
    assert report != demo.sampler(*conditioned, source, noise=noise)[1]
    (settings,) = run("STARFlowJacobiSettings", preset="autoregressive")
    assert "method autoregressive" in demo.sampler(*conditioned, source, noise=noise, settings=settings)[1]


def test_the_report_says_how_the_noise_was_made(demo, source, conditioned):
    noise = mixed(drawn(demo, seed=5), amount=0.25, seed=7, keep_frames=1)
    lines = demo.sampler(*conditioned, source, noise=noise)[1].splitlines()
    assert lines[0].startswith("method jacobi, guidance 1, seed 5, ")
    assert lines[-1] == "noise: drawn from seed 5; varied by 0.25, seed 7, 1 latent frames kept"


def test_a_noise_for_another_size_is_refused(demo, source, conditioned):
    others = {"48 x 32, 13 frames": {"frames": 13}, "48 x 48, 9 frames": {"height": 48}, "48 x 32, one frame": {
        "frames": 1}}  # fmt: skip
    for words, size in others.items():
        noise = drawn(demo, latent=demo.empty(**{**SMALL, **size}))
        said = f"this noise is for {words}, but the latent is of 48 x 32, 9 frames; connect the latent that the noise"
        with pytest.raises(Exception, match=said):
            demo.sampler(*conditioned, source, noise=noise)


def test_a_noise_of_another_models_channels_is_refused(demo, source, conditioned):
    noise = drawn(demo)
    noise = replace(noise, noise=noise.noise[:, :, :4])
    with pytest.raises(Exception, match="this noise has 4 channels, but STARFlow demo uses 16; make it with the same"):
        demo.sampler(*conditioned, source, noise=noise)


def test_a_noise_of_another_model_is_warned_of(caplog, demo, source, conditioned):
    demo.sampler(*conditioned, source, noise=drawn(demo))
    assert not caplog.records
    demo.sampler(*conditioned, source, noise=replace(drawn(demo), model="another"))
    assert "the noise was made with another, but this is STARFlow demo" in caplog.text


def test_a_variation_differs_as_much_as_it_is_told(demo, source, conditioned):
    noise = drawn(demo, seed=5)
    whole = demo.sampler(*conditioned, source, noise=noise)[0]["samples"]
    made = [demo.sampler(*conditioned, source, noise=mixed(noise, amount=amount, seed=1))[0]["samples"]
            for amount in (0.0, 0.1, 0.35, 1.0)]  # fmt: skip
    errors = [relative_error(samples, whole) for samples in made]
    assert errors[0] == 0
    assert errors == sorted(errors)
    assert errors[1] > 1e-5
    assert torch.equal(mixed(noise).noise, mixed(noise, amount=0.35, seed=0).noise)
    assert not torch.equal(mixed(noise, seed=1).noise, mixed(noise, seed=2).noise)


def test_frames_that_are_kept_stay(demo, source, conditioned):
    noise = drawn(demo, seed=5)
    varied = mixed(noise, amount=0.8, seed=1, keep_frames=1)
    assert torch.equal(varied.noise[:, :1], noise.noise[:, :1])
    assert not torch.equal(varied.noise[:, 1:], noise.noise[:, 1:])
    first, again = (
        demo.sampler(*conditioned, source, noise=given, denoise=False)[0]["samples"] for given in (noise, varied)
    )  # fmt: skip
    assert relative_error(again[:, :, :1], first[:, :, :1]) < 1e-3
    assert relative_error(again[:, :, 1:], first[:, :, 1:]) > 0.01


def test_two_noises_are_mixed(demo):
    first, second = drawn(demo, seed=5), drawn(demo, seed=6)
    assert torch.allclose(mixed(first, second_noise=second, amount=1.0).noise, second.noise, atol=1e-4)
    half = mixed(first, second_noise=second, amount=0.5)
    assert torch.equal(half.noise, first.mix(second, 0.5).noise)
    assert torch.equal(half.noise, mixed(first, second_noise=second, amount=0.5, seed=9, keep_frames=2).noise)


def test_what_cannot_be_blended_is_refused(demo, invert):
    clean, noise = invert(add_noise=False)[0], drawn(demo)
    refusals = {
        "clean latents, which can't be blended with fresh noise; invert the clip with": {"noise": clean},
        "one noise is that of clean latents, the other isn't": {"noise": clean, "second_noise": noise},
        "invert clips of one size and length": {
            "noise": noise, "second_noise": drawn(demo, latent=demo.empty(**SMALL, frames=5)),
        },
        "keep is 4 latent frames; this noise has 3": {"noise": noise, "keep_frames": 4},
    }  # fmt: skip
    for words, inputs in refusals.items():
        with pytest.raises(Exception, match=words):
            mixed(**inputs)


def test_the_noise_is_an_optional_input_of_the_sampler():
    info = pack.load()["STARFlowSampler"].GET_NODE_INFO_V1()
    assert info["input_order"]["optional"][:6] == ["settings", "context", "window", "keep", "options", "noise"]
    assert info["input"]["optional"]["noise"][0] == "STARFLOW_NOISE"
