"""Given frames: each node gives what the core makes of the same pictures."""

from __future__ import annotations

import pytest
import torch

from starflow_core import fit
from tests.core.models import relative_error

from .steps import SMALL, PlainVAE, run

JOB = {"height": 32, "width": 48, "seed": 4}


@pytest.fixture(scope="module")
def latent(demo):
    return demo.empty(**SMALL, frames=9)


@pytest.fixture(scope="module")
def pixels(clip):
    """The clip as the core has it."""
    return clip.movedim(-1, 1) * 2 - 1


def same(demo, made, latent, context, job) -> None:
    """The core's job gives the same latents."""
    samples = demo.sample(latent, context=context, seed=4)[0]["samples"]
    assert relative_error(samples, made(job)) < 1e-4


def test_first_frame(demo, core, made, latent, clip, pixels):
    (context,) = run("STARFlowFirstFrame", image=clip[4:5], vae=demo.vae, latent=latent)
    job = core.with_context("first_frame", image=pixels[4], frames=9, **JOB)
    same(demo, made, latent, context, job)


@pytest.mark.parametrize("first", [None, 2])
def test_last_frame(demo, core, made, latent, clip, pixels, first):
    images = {} if first is None else {"first_image": clip[first : first + 1]}
    (context,) = run("STARFlowFirstLastFrame", last_image=clip[8:], vae=demo.vae, latent=latent, **images)
    job = core.with_context(
        "last_frame", last=pixels[8], image=None if first is None else pixels[first], frames=9, **JOB
    )
    same(demo, made, latent, context, job)


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_extend(demo, core, made, latent, clip, pixels, keep):
    """keep 0 is what the window keeps: more than this short clip has, so all of it but its first latent frame."""
    inputs = {"model": demo.model, "images": clip, "vae": demo.vae, "latent": latent, "keep": keep}
    (context,) = run("STARFlowExtend", **inputs)
    assert context.frames == (keep or 2)
    job = core.with_context("extend", clip=pixels, frames=9, keep_latents=keep or None, **JOB)
    same(demo, made, latent, context, job)


def test_extend_keeps_what_the_window_keeps(demo, latent, clip):
    source = torch.cat([clip] * 6)  # 14 latent frames
    (context,) = run("STARFlowExtend", model=demo.model, images=source, vae=demo.vae, latent=latent, keep=0)
    assert context.frames == 8


def test_video_edit(demo, core, made, clip, pixels):
    """The result is as long as the source, whichever is shorter: the frames or the latent."""
    context, latent = run("STARFlowVideoEdit", images=clip, vae=demo.vae, latent=demo.empty(**SMALL, frames=17))
    assert latent["samples"].shape == (1, 16, 3, 2, 3)
    same(demo, made, latent, context, core.with_context("edit", clip=pixels, **JOB))
    context, latent = run("STARFlowVideoEdit", images=clip, vae=demo.vae, latent=demo.empty(**SMALL, frames=5))
    assert latent["samples"].shape[2] == context.frames == 2
    same(demo, made, latent, context, core.with_context("edit", clip=pixels[:5], **JOB))


def test_pictures_of_a_batch_go_to_clips_of_their_own(demo, clip):
    latent = demo.empty(**SMALL, frames=5, batch_size=2)
    (context,) = run("STARFlowFirstFrame", image=clip[[0, 8]], vae=demo.vae, latent=latent)
    for given, picture in zip(context.latents, clip[[0, 8]], strict=True):
        (alone,) = run("STARFlowFirstFrame", image=picture[None], vae=demo.vae, latent=latent)
        assert relative_error(given, alone.latents[0]) < 1e-4
    assert demo.sample(latent, context=context)[0]["samples"].shape[0] == 2


def test_a_first_frame_comes_back(demo, clip):
    latent = demo.empty(frames=5)
    (context,) = run("STARFlowFirstFrame", image=clip[-1:], vae=demo.vae, latent=latent)
    assert (demo.decode(demo.sample(latent, context=context)[0])[0] - clip[-1]).abs().mean() < 0.05


def test_pictures_of_any_size_and_with_alpha(demo, latent):
    picture, vae = torch.rand(1, 100, 300, 4, generator=torch.Generator().manual_seed(0)), PlainVAE(demo.vae)
    (context,) = run("STARFlowFirstFrame", image=picture, vae=vae, latent=latent)
    assert context.latents.shape == (1, 16, 1, 2, 3)
    (plain,) = run("STARFlowFirstFrame", image=picture[..., :3], vae=vae, latent=latent)
    assert torch.equal(context.latents, plain.latents)


def test_cores_vae_takes_one_clip_at_a_time(demo, latent, clip):
    """Its latents may be of a smaller type."""
    given = {"image": clip[[0, 8]], "latent": latent}
    (context,) = run("STARFlowFirstFrame", vae=PlainVAE(demo.vae), **given)
    (ours,) = run("STARFlowFirstFrame", vae=demo.vae, **given)
    assert context.latents.dtype == torch.float32
    torch.testing.assert_close(context.latents, ours.latents, atol=0.02, rtol=0.02)


def test_an_image_models_vae_or_latent_is_refused(demo, image_model, latent, clip):
    with pytest.raises(Exception, match="this VAE encodes single images"):
        run("STARFlowVideoEdit", images=clip, vae=image_model.vae, latent=latent)
    with pytest.raises(Exception, match="this latent is an image; given frames need a clip"):
        run("STARFlowFirstFrame", image=clip[:1], vae=demo.vae, latent=image_model.empty(frames=1))


def test_another_models_vae_is_refused(demo, latent, clip):
    """By its channels, and where a model is at hand by what it makes of a frame, too."""
    other = PlainVAE(demo.vae)
    other.latent_channels = 48
    for node, images in (("FirstFrame", "image"), ("FirstLastFrame", "last_image"), ("VideoEdit", "images")):
        with pytest.raises(Exception, match="makes latents of 48 channels, but the latent has 16; load the VAE that"):
            run(f"STARFlow{node}", **{images: clip[:1]}, vae=other, latent=latent)
    other.latent_channels, other.spacial_compression_decode = 16, lambda: 8
    wanted = (
        r"16 channels, 1/8 of the size and 1/4 of the frames; STARFlow demo needs 16, 1/16 and 1/4: load the VAE that"
    )
    with pytest.raises(Exception, match=wanted):
        run("STARFlowExtend", model=demo.model, images=clip, vae=other, latent=latent)


@pytest.mark.parametrize("how", ["crop", "pad", "stretch"])
def test_pictures_are_fitted_as_asked(demo, latent, how):
    """In every node, and in the same way as by the core."""
    source, vae = torch.rand(9, 40, 100, 3, generator=torch.Generator().manual_seed(0)), PlainVAE(demo.vae)
    fitted = (fit(source.movedim(-1, 1) * 2 - 1, 32, 48, how).movedim(1, -1) + 1) / 2
    given = {"vae": vae, "latent": latent}
    for name, more in {
        "FirstFrame": {"image": source[:1]},
        "FirstLastFrame": {"last_image": source[:1], "first_image": source[1:2]},
        "Extend": {"images": source, "model": demo.model},
        "VideoEdit": {"images": source},
    }.items():
        ready = {key: value if key == "model" else fitted[: len(value)] for key, value in more.items()}
        if "first_image" in ready:
            ready["first_image"] = fitted[1:2]
        context, wanted = (run(f"STARFlow{name}", **g, **given)[0] for g in ({**more, "fit": how}, ready))
        assert relative_error(context.latents, wanted.latents) < 1e-3, name
