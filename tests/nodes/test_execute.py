"""Each node's execute, against a real ComfyUI checkout without a server (COMFYUI_PATH)."""

from __future__ import annotations

import gc
import re
import sys

import pytest
import torch

from . import pack

pytestmark = pytest.mark.skipif(not pack.COMFYUI, reason="COMFYUI_PATH doesn't name a ComfyUI checkout")
NODES = pack.load()
DEMO = "bundled demo"
PROMPT = "a red circle moving right on a black background"


def run(name: str, **inputs):
    with torch.inference_mode():  # as the host does
        return pack.run(NODES[name], **inputs).args


@pytest.fixture(scope="module")
def model():
    return run("STARFlowLoadModel", model_name=DEMO, weight_type="auto")[0]


@pytest.fixture(scope="module")
def text_encoder():
    return run("STARFlowLoadTextEncoder", encoder_name=DEMO, weight_type="auto")[0]


@pytest.fixture(scope="module")
def vae():
    return run("STARFlowLoadVAE", vae_name=DEMO, weight_type="auto")[0]


def empty(model, **values):
    given = {"aspect_ratio": "model's own", "width": 0, "height": 0, "frames": 9, "batch_size": 1}
    return run("STARFlowEmptyLatent", model=model, **{**given, **values})


@pytest.fixture(scope="module")
def latent(model):
    return empty(model)[0]


@pytest.fixture(scope="module")
def encode(model, text_encoder):
    def made(latent, prompt=PROMPT, **options):
        given = {"negative_prompt": "", "frame_rate": 0.0, **options}
        return run("STARFlowTextEncode", model=model, text_encoder=text_encoder, latent=latent, prompt=prompt, **given)

    return made


@pytest.fixture(scope="module")
def sample(model, encode):
    def made(latent, context=None, prompt=PROMPT, **options):
        given = {"context": context} if context else {}
        positive, negative, _ = encode(latent, prompt, **given)
        settings = {"seed": 1, "guidance": -1.0, "denoise": True, **given, **options}
        return run("STARFlowSampler", model=model, positive=positive, negative=negative, latent=latent, **settings)

    return made


def decode(vae, samples, **options):
    given = {"tile_size": 0, "trim_overlap": False, **options}
    return run("STARFlowVAEDecode", samples=samples, vae=vae, **given)[0]


@pytest.fixture(scope="module")
def clip(sample, vae, latent):
    return decode(vae, sample(latent)[0])


def test_empty_latent_takes_the_models_own_numbers(model):
    latent, width, height, frames = empty(model, frames=0)
    assert latent["samples"].shape == (1, 16, 9, 6, 6)
    assert (width, height, frames) == (96, 96, 33)
    assert empty(model, aspect_ratio="16:9", batch_size=2)[0]["samples"].shape == (2, 16, 3, 5, 8)
    assert empty(model, width=128, height=80)[0]["samples"].shape[-2:] == (5, 8)


def test_text_report_says_what_was_cut(encode, latent):
    positive, negative, report = encode(latent)
    assert positive[0][0].shape == negative[0][0].shape == (1, 48, 128)
    assert PROMPT in report
    assert "16 fps" in report
    long = encode(latent, "a red circle " * 30)[2]
    assert re.search(r"reads only 48 tokens; left out: .*red circle", long)
    negative = encode(latent, negative_prompt="a blue ring " * 30)[2]
    assert re.search(r"reads only 48 tokens; left out of the negative prompt: .*blue ring", negative)


def test_a_seed_repeats_and_another_differs(sample, latent):
    one, again, other = (sample(latent, seed=seed)[0]["samples"] for seed in (5, 5, 6))
    assert one.shape == latent["samples"].shape
    assert torch.equal(one, again)
    assert not torch.allclose(one, other, atol=0.1)


def test_statistics_and_convergence(sample, latent):
    _, report, picture = sample(latent)
    assert re.search(r"deep block: \d+ sweeps", report)
    assert picture.ndim == 4
    assert 0 <= picture.min() < picture.max() <= 1


@pytest.mark.parametrize("preset", ["fast", "exact", "autoregressive"])
def test_settings_reach_the_solver(sample, latent, preset):
    numbers = dict.fromkeys(("image_span", "first_span", "span", "max_sweeps"), 0)
    (settings,) = run("STARFlowJacobiSettings", preset=preset, tolerance=0.0, shallow_tolerance=0.0, **numbers)
    _, report, picture = sample(latent, settings=settings)
    assert picture.shape[-1] == 3
    assert ("autoregressive" in report) == (preset == "autoregressive")


def test_core_decodes_the_same_pixels(vae, sample, latent, clip):
    core = pack.core_nodes()
    samples = sample(latent)[0]
    assert clip.shape == (9, 96, 96, 3)
    assert 0 <= clip.min() < clip.max() <= 1
    with torch.inference_mode():
        whole = core["VAEDecode"]().decode(vae, samples)[0]
        tiled = core["VAEDecodeTiled"]().decode(vae, samples, 512, 64, 64, 8)[0]
    assert torch.equal(whole, clip)
    torch.testing.assert_close(tiled, clip, atol=1e-5, rtol=0)


def test_core_encodes_what_the_sampler_takes(vae, clip):
    with torch.inference_mode():
        encoded = pack.core_nodes()["VAEEncode"]().encode(vae, clip)[0]["samples"]
        back = decode(vae, {"samples": encoded})
    assert encoded.shape == (1, 16, 3, 6, 6)
    assert (back - clip).square().mean() < 0.01


def test_tiles_give_nearly_the_same(model, vae, sample):
    latent = empty(model, width=192, height=192, frames=5)[0]
    samples = sample(latent)[0]
    whole, tiled = decode(vae, samples), decode(vae, samples, tile_size=128)
    assert (whole - tiled).abs().mean() < 0.02


def test_short_memory_decodes_in_tiles(monkeypatch, vae, sample, latent, clip):
    host = sys.modules[f"{pack.NAME}.nodes.host"]
    samples, decode_frames, tried = sample(latent)[0], vae.core.decode_frames, []

    def allocate(latents, tile=None):
        tried.append(tile)
        if tile != 4:
            raise host.OUT_OF_MEMORY("no memory left")
        return decode_frames(latents, tile)

    monkeypatch.setattr(vae.core, "decode_frames", allocate)
    assert (decode(vae, samples) - clip).abs().mean() < 0.05
    assert tried == [None, 4]


def test_a_clip_that_cannot_fit_is_refused_and_a_picture_tiled(monkeypatch, vae, sample, latent):
    """What a clip's tiles remember is as much as the whole needs; a picture's tiles are all there is."""
    from diffusers import AutoencoderKL

    samples = sample(latent)[0]
    modules = [
        sys.modules[f"{pack.NAME}.{name}"]
        for name in ("starflow_core.jobs.memory", "starflow_core.model.vae.codec", "nodes.vae")
    ]
    memory, core, nodes = modules
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    module = AutoencoderKL(**blocks, block_out_channels=[8, 16], norm_num_groups=4).requires_grad_(False).eval()
    picture = nodes.HostVAE(core.VAE(module))
    monkeypatch.setattr(memory, "free", lambda device: picture.core.step_bytes(9, 9))
    assert picture.decode(torch.zeros(2, 4, 16, 16)).shape == (2, 32, 32, 3)
    with pytest.raises(Exception, match="decoding this needs about"):
        decode(vae, samples)


def test_first_frame_comes_back(model, vae, sample, latent, clip):
    (context,) = run("STARFlowFirstFrame", image=clip[-1:], vae=vae, latent=latent)
    made = decode(vae, sample(latent, context)[0])
    assert (made[0] - clip[-1]).abs().mean() < 0.05


def test_other_sizes_are_cropped_to_the_latents(model, vae, latent):
    (context,) = run("STARFlowFirstFrame", image=torch.rand(1, 100, 300, 3), vae=vae, latent=latent)
    assert context.latents.shape == (1, 16, 1, 6, 6)


def test_extend_trims_what_the_source_shows(model, vae, sample, latent, clip):
    (context,) = run("STARFlowExtend", model=model, images=clip, vae=vae, latent=latent, keep=2)
    samples = sample(latent, context)[0]
    assert decode(vae, samples).shape[0] == 9
    assert decode(vae, samples, trim_overlap=True).shape[0] == 4


def test_edit_is_as_long_as_its_source(model, vae, sample, clip):
    long = empty(model, frames=17)[0]
    context, latent = run("STARFlowVideoEdit", images=clip, vae=vae, latent=long)
    assert latent["samples"].shape[2] == 3
    assert sample(latent, context, "make it green")[0]["samples"].shape[2] == 3


def test_last_frame_is_no_part_of_the_result(vae, sample, latent, clip):
    (context,) = run("STARFlowFirstLastFrame", last_image=clip[-1:], vae=vae, latent=latent, first_image=clip[:1])
    assert sample(latent, context)[0]["samples"].shape[2] == 3


def test_score_denoising_works_under_inference_mode(monkeypatch, model, sample, latent):
    """A gradient step needs weights that aren't inference tensors, also where the host moves them to a card."""
    from dataclasses import replace

    import comfy.model_management as management

    def move(models, **_):
        for weight in models[0].model.parameters():
            weight.data = weight.data.clone()

    monkeypatch.setattr(management, "load_models_gpu", move)
    flow = model.model
    config, flow.config = flow.config, replace(flow.config, denoiser=None)
    try:
        assert sample(latent)[0]["samples"].isfinite().all()
    finally:
        flow.config = config


def test_conditioning_of_another_job_is_refused(model, encode, latent, vae, clip):
    positive, negative, _ = encode(latent)
    other = empty(model, width=128, height=80)[0]
    given = {"model": model, "seed": 1, "guidance": -1.0, "denoise": True}
    with pytest.raises(Exception, match="same latent"):
        run("STARFlowSampler", positive=positive, negative=negative, latent=other, **given)
    (context,) = run("STARFlowFirstFrame", image=clip[:1], vae=vae, latent=latent)
    with pytest.raises(Exception, match="first frame"):
        run("STARFlowSampler", positive=positive, negative=negative, latent=latent, context=context, **given)
    plain = [[positive[0][0], {}]]
    with pytest.raises(Exception, match="STARFlow Text Encode"):
        run("STARFlowSampler", positive=plain, negative=negative, latent=latent, **given)


def test_latents_of_another_model_are_refused(encode):
    with pytest.raises(Exception, match="4 channels"):
        encode({"samples": torch.zeros(1, 4, 8, 8)})


def test_cancel_gives_everything_back(monkeypatch, sample, latent):
    import comfy.model_management as management

    def held() -> tuple[int, int]:
        """Caches of keys and values, and models that the host has loaded."""
        gc.collect()
        kind = sys.modules[f"{pack.NAME}.starflow_core.model.cache"].Cache
        return sum(isinstance(thing, kind) for thing in gc.get_objects()), len(management.current_loaded_models)

    def cancelled() -> bool:
        try:
            sample(latent)
        except management.InterruptProcessingException:
            return True
        return False

    expected = sample(latent)[0]["samples"]
    before, seen, calls = held(), [], iter(range(1000))

    def interrupt():
        if next(calls) == 5:
            seen.append(held())
            raise management.InterruptProcessingException

    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", interrupt)
    assert cancelled()
    monkeypatch.undo()
    assert seen[0][0] > before[0]  # there was something to give back
    assert held() == before
    assert torch.equal(sample(latent)[0]["samples"], expected)


@pytest.mark.parametrize(("format", "suffix"), [("mp4", ".mp4"), ("webm", ".webm"), ("gif", ".gif"), ("webp", ".webp")])
def test_combine_writes_and_shows(monkeypatch, tmp_path, clip, format, suffix):
    import folder_paths

    from starflow_core.media import read_video

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    images = torch.cat((clip, clip))
    given = {"frame_rate": 16.0, "quality": 85, "filename_prefix": "a/b", "clip_frames": 9, "format": format}
    with torch.inference_mode():
        output = pack.run(NODES["STARFlowVideoCombine"], images=images, **given)
    files = sorted((tmp_path / "a").iterdir())
    assert [f.suffix for f in files] == [suffix] * 2
    assert read_video(files[0]).pixels.shape == (9, 3, 96, 96)
    assert len(output.args[0]) == 2
    assert output.args[0][0].get_components().images.shape == clip.shape
    assert [shown["filename"] for shown in output.ui["images"]] == [f.name for f in files]


def test_clips_of_a_batch_become_files_of_their_own(monkeypatch, tmp_path, model, vae, sample):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    images = decode(vae, sample(empty(model, frames=5, batch_size=2)[0])[0])
    given = {"frame_rate": 16.0, "quality": 85, "filename_prefix": "b", "clip_frames": 0, "format": "webp"}
    with torch.inference_mode():
        pack.run(NODES["STARFlowVideoCombine"], images=images, **given)
        assert len(list(tmp_path.iterdir())) == 2
        pack.run(NODES["STARFlowVideoCombine"], images=images.clone(), **given)  # from a node that knows nothing of it
    assert len(list(tmp_path.iterdir())) == 3
