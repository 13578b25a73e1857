"""Given frames: each node gives what the core makes of the same pictures."""

from __future__ import annotations

import pytest
import torch

from tests.core.models import relative_error

from .steps import PROMPT, SMALL, PlainVAE, run

JOB = {"height": 32, "width": 48, "seed": 4}


@pytest.fixture(scope="module")
def latent(demo):
    return demo.empty(**SMALL, frames=9)


@pytest.fixture(scope="module")
def pixels(clip):
    """The clip as the core has it."""
    return clip.movedim(-1, 1) * 2 - 1


def same(demo, made, latent, context, job) -> None:
    """The core's job gives the same latents, and it isn't what comes without given frames."""
    wanted = made(job)[0]
    assert relative_error(demo.sample(latent, context=context, seed=4)[0]["samples"], wanted) < 1e-6
    assert relative_error(demo.sample(latent, seed=4)[0]["samples"], wanted) > 1e-2


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
    for index in (0, 8):
        (alone,) = run("STARFlowFirstFrame", image=clip[index : index + 1], vae=demo.vae, latent=latent)
        assert relative_error(context.latents[index // 8 :][:1], alone.latents) < 1e-6
    assert demo.sample(latent, context=context)[0]["samples"].shape[0] == 2


def test_given_frames_come_back(demo, clip):
    (context,) = run("STARFlowFirstFrame", image=clip[-1:], vae=demo.vae, latent=demo.empty())
    assert (demo.decode(demo.sample(demo.empty(), context=context)[0])[0] - clip[-1]).abs().mean() < 0.05


def test_pictures_of_any_size_and_with_alpha(demo, latent):
    picture = torch.rand(1, 100, 300, 4, generator=torch.Generator().manual_seed(0))
    (context,) = run("STARFlowFirstFrame", image=picture, vae=demo.vae, latent=latent)
    assert context.latents.shape == (1, 16, 1, 2, 3)
    (plain,) = run("STARFlowFirstFrame", image=picture[..., :3], vae=demo.vae, latent=latent)
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


def test_the_prompt_of_a_given_frame_still_counts(demo, latent, clip):
    (context,) = run("STARFlowFirstFrame", image=clip[:1], vae=demo.vae, latent=latent)
    one, other = (demo.sample(latent, prompt, context=context)[0]["samples"] for prompt in (PROMPT, "a blue ring"))
    assert relative_error(one, other) > 1e-2
