"""The parts together: what is checked before loading, sizes, progress, and the public names."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import starflow_core
from starflow_core import pipeline as pipelines
from starflow_core.control import Control
from starflow_core.errors import Cancelled, CheckpointError, InputError, OutOfMemoryForecast
from starflow_core.jobs.build import default_job
from starflow_core.jobs.memory import forecast
from starflow_core.jobs.planner import MemoryPlan
from starflow_core.jobs.tasks import Means
from starflow_core.jobs.unfinished import identity
from starflow_core.model.int8 import Int8Linear
from starflow_core.model.lora import Lora, adapt, attach, detach, linear_names
from starflow_core.model.placement import Placement
from starflow_core.model.text import EncodedText
from starflow_core.pipeline import Pipeline, find_parts, load_pipeline
from starflow_core.weights.flow import convert, load_flow
from starflow_core.weights.lora import base_metadata, save_lora
from starflow_core.weights.tensorfiles import TensorFile
from tests.core import models, tiny

ROOT = Path(__file__).parents[2]
NAMES = """
AUTOREGRESSIVE Cancelled Candidate CheckpointError Context Control Edited Encoding Filled Flow FlowConfig Generation
InputError Inversion Job LoraFile Noise NonFiniteError OutOfMemoryForecast Output PRESETS Piece Pipeline Placement
Progress Sampler SolverSettings StarflowError Surprise Timeline VideoWriter Wish best_of choose_caption convert
decode_from_noise denoise encode_to_noise fill fit fresh_noise load_flow load_pipeline load_text_encoder load_vae
merge_loras outpainted read_image read_metadata read_video reprompt sample score_denoise write_video
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model"))


def files(folder):
    return [folder / name for name in (tiny.FLOW_FILE, tiny.TEXT_FILE, tiny.VAE_FILE)]


def load(folder):
    return load_pipeline(*files(folder), device="cpu")


@pytest.fixture(scope="module")
def pipeline(folder):
    return load(folder)


def test_public_names_stay():
    assert starflow_core.__all__ == NAMES.split()
    assert all(getattr(starflow_core, name) is not None for name in starflow_core.__all__)


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, starflow_core; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_both_lists_of_requirements_are_one():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    project = (ROOT / "pyproject.toml").read_text()
    listed = project.split("\ndependencies = [", 1)[1].split("]", 1)[0]
    assert [line for line in lines if not line.startswith("#")] == [
        line.strip(' ",') for line in listed.splitlines() if line.strip()
    ]


def test_the_version_is_one():
    assert f'\nversion = "{starflow_core.__version__}"\n' in (ROOT / "pyproject.toml").read_text()
    assert f"\n## [{starflow_core.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("damaged", [tiny.TEXT_FILE, tiny.VAE_FILE])
def test_small_files_are_checked_before_the_flow_is_read(tmp_path, monkeypatch, damaged):
    tiny.write_model(tmp_path)
    (tmp_path / damaged).write_bytes((tmp_path / damaged).read_bytes()[:-8])
    monkeypatch.setattr(pipelines, "load_flow", lambda *_, **__: pytest.fail("the flow was read"))
    with pytest.raises(CheckpointError, match="truncated"):
        load(tmp_path)


def test_the_forecast_counts_all_parts(folder, pipeline):
    parts, kind = find_parts(*files(folder)), torch.bfloat16
    job = default_job(parts.config, height=96, width=128)
    flow, whole, tiled = (
        forecast(parts.config, job, kind),
        parts.forecast(job, dtype=kind),
        parts.forecast(job, dtype=kind, tile=4),
    )
    weights = 2 * sum(p.numel() for p in pipeline.vae.module.parameters())
    assert whole.vae - weights == pipeline.vae.step_bytes(6, 8) // 2  # the pipeline's is in float32
    assert tiled.vae == whole.vae  # a clip of so few cells isn't helped by tiles
    encoder = parts.text.load()
    assert whole.text == 2 * sum(p.numel() for p in encoder.model.parameters())
    assert whole.total == whole.vae + max(flow.total, flow.weights + whole.text)
    assert parts.forecast(replace(job, batch=3), dtype=kind).vae - weights == 3 * (whole.vae - weights)
    assert parts.forecast(job, dtype=kind, keep_text_encoder=True).total == whole.vae + flow.total + whole.text
    assert parts.forecast_encode(job, kind).vae == whole.vae


def test_weights_in_8_bit(folder, tmp_path):
    """Asked for, or those of the file; the text encoder's too if asked for."""
    model, text, vae = files(folder)
    convert(model, tmp_path / "int8.safetensors", "int8")
    job, kind = default_job(find_parts(model, text, vae).config, height=32, width=32), torch.bfloat16
    whole = find_parts(model, text, vae).forecast(job, dtype=kind)
    for quantise, path in ((True, model), (False, tmp_path / "int8.safetensors")):
        parts = find_parts(path, text, vae, quantise)
        pipeline = parts.load(Placement.on("cpu"), kind)
        assert isinstance(pipeline.flow.deep.attn_blocks[0].attention.qkv, Int8Linear)
        need = parts.forecast(job, dtype=kind)
        assert need.weights == sum(weight.nbytes for weight in pipeline.flow.parameters())
        assert need.activations == whole.activations + 2 * 4 * parts.config.deep_width**2
        encoder = pipeline.text.load(kind)
        assert any(isinstance(layer, Int8Linear) for layer in encoder.model.modules()) == quantise
        assert need.text == sum(weight.nbytes for weight in encoder.model.parameters())
    output = load_pipeline(model, text, vae, quantise=True).text_to_image("a ring", height=32, width=32)
    assert output.pixels.isfinite().all()


def test_loras(folder, tmp_path):
    """Of a file or a pair; they are counted, attached before weights stream, and doubted if of an unknown base."""
    model, *others = files(folder)
    checkpoint = TensorFile.open(model)
    flow = load_flow(checkpoint)
    loras = adapt(flow, 2, 4.0, generator=torch.Generator().manual_seed(0))
    for lora in loras.values():
        torch.nn.init.normal_(lora.lora_B, generator=torch.Generator().manual_seed(1))
    save_lora(loras, tmp_path / "a.safetensors", flow.config, base_metadata(checkpoint))
    save_lora(loras, tmp_path / "b.safetensors", flow.config, {})
    bare = find_parts(model, *others)
    parts = find_parts(model, *others, loras=[tmp_path / "a.safetensors", (str(tmp_path / "b.safetensors"), 0.5)])
    assert list(map(str, parts.loras)) == ["a.safetensors:1", "b.safetensors:0.5"]
    job, kind = default_job(parts.config, height=32, width=32, frames=1), torch.float32
    plan = MemoryPlan(Means(streamed=True), parts.forecast(job, dtype=kind), None)
    pipeline = parts.load(Placement.on("cpu"), kind, plan=plan)
    more = sum(weight.nbytes for weight in pipeline.flow.parameters()) - bare.forecast(job, dtype=kind).weights
    assert parts.forecast(job, dtype=kind).weights - bare.forecast(job, dtype=kind).weights == more > 0
    scales = [layer.scale for layer in pipeline.flow.modules() if isinstance(layer, Lora)]
    assert (len(scales), set(scales)) == (2 * len(loras), {2.0, 1.0})
    with pytest.warns(UserWarning, match=r"b\.safetensors doesn't say of which weights"):
        plain = load_pipeline(
            model, *others, device="cpu", loras=[tmp_path / "a.safetensors", (tmp_path / "b.safetensors", 0.5)]
        )
    assert torch.equal(*(each.generate("a ring", job).latents for each in (plain, pipeline)))
    with pytest.raises(InputError, match="finite"):
        find_parts(model, *others, loras=[(tmp_path / "a.safetensors", float("nan"))])


def test_a_file_of_another_strength_is_not_gone_on_from(folder, pipeline):
    flow, seen = copy.deepcopy(pipeline.flow), set()
    job = default_job(flow.config, height=32, width=32)
    for strength in (0.0, 1.0, 0.5):
        detach(flow)
        attach(flow, {name: Lora(torch.ones(1, 72), torch.ones(216, 1), 1.0, strength=strength) for name in
                      linear_names(flow)[:1]})  # fmt: skip
        seen.add(json.dumps(identity(flow, job, Means(), [], ""), sort_keys=True))
    assert len(seen) == 3
    assert json.dumps(identity(pipeline.flow, job, Means(), [], ""), sort_keys=True) in seen


def test_a_vae_of_another_compression_in_time_is_refused(pipeline):
    flow = models.flow(channels=tiny.CHANNELS)
    flow.config = replace(flow.config, latent=replace(flow.config.latent, temporal=8))
    with pytest.raises(InputError, match=r"1/4 of the frames; .* needs 4, 1/16 and 1/8"):
        Pipeline(flow, pipeline.vae, None, pipeline.placement, pipeline.dtype)


@pytest.mark.parametrize(("shape", "expected"), [((60, 100), (32, 48)), ((50, 50), (32, 32)), ((200, 100), (48, 32))])
def test_given_frames_say_the_ratio_unless_a_size_is_asked_for(pipeline, shape, expected):
    picture = torch.zeros(3, *shape)
    job = pipeline.with_context("first_frame", image=picture)
    assert (job.height, job.width) == pipeline.config.size(pipeline.config.nearest_aspect(*shape))
    asked = pipeline.with_context("first_frame", image=picture, height=expected[0], width=expected[1])
    assert (asked.height, asked.width) == expected


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"height": 32}, "go together"),
        ({"height": 32, "width": 32, "aspect": "1:1"}, "give either height and width, or aspect"),
    ],
)
def test_half_a_size_is_refused(pipeline, sizes, message):
    with pytest.raises(InputError, match=message):
        pipeline.job(**sizes)


def run(pipeline, control):
    clip = torch.zeros(5, 3, 32, 32)
    job = pipeline.with_context("extend", clip=clip, frames=13, height=32, width=32, control=control)
    return pipeline.generate("a red circle", job, control=control)


def test_progress_of_every_phase_rises_to_its_total(pipeline):
    seen = {}
    run(pipeline, Control(lambda p: seen.setdefault(p.phase, []).append(p)))
    assert set(seen) == {"encode", "deep", "shallow", "denoise", "decode"}
    for phase, reports in seen.items():
        steps = [(p.step, p.settled) for p in reports]
        assert phase == "shallow" or steps == sorted(steps), phase
        assert all((0 <= p.step <= p.total and 0 <= p.settled <= p.tokens) or not p.tokens for p in reports)
    for phase in ("deep", "denoise", "decode"):
        assert seen[phase][-1].step == seen[phase][-1].total, phase
    blocks = [p.step for p in seen["shallow"]]
    assert blocks == sorted(blocks)
    assert set(blocks) == {0, 1}


@pytest.mark.parametrize("phase", ["encode", "deep", "shallow", "denoise", "decode"])
def test_every_phase_can_be_cancelled(pipeline, phase):
    reached = []
    control = Control(lambda p: reached.append(p.phase), lambda: phase in reached)
    with pytest.raises(Cancelled):
        run(pipeline, control)
    assert reached.count(phase) == 1


class Reader:
    """A text encoder that notes what it reads."""

    def __init__(self, dim):
        self.dim, self.texts = dim, []

    def encode(self, texts, tokens):
        self.texts += texts
        return EncodedText(torch.zeros(len(texts), tokens, self.dim), [""] * len(texts))


@pytest.fixture
def reader(pipeline, monkeypatch):
    reader = Reader(pipeline.config.text_dim)
    reader.loads = 0

    class Source:
        def load(self, dtype, device):
            reader.loads += 1
            return reader

        def weight_bytes(self, dtype):
            return 0

    monkeypatch.setattr(pipeline, "text", Source())
    monkeypatch.setattr(pipeline, "_encoder", None)
    return reader


def test_a_still_has_no_rate_and_a_negative_prompt_no_prefix(pipeline, reader):
    clip = torch.zeros(5, 3, 32, 32)
    job = pipeline.with_context("extend", clip=clip, frames=13, height=32, width=32, guidance=1.0)
    pipeline.encode_text(["a ring"], "a circle", job)
    positive, negative = reader.texts
    assert "16 fps:\n(extend) a ring\n" in positive
    assert "16 fps:\na circle\n" in negative
    reader.texts.clear()
    pipeline.encode_text(["a ring"], "a circle", pipeline.job(frames=1, height=32, width=32, guidance=1.0))
    assert all("An image:" in text and "fps" not in text for text in reader.texts)


def test_one_call_tasks_take_the_options_of_start(pipeline, reader):
    seen = []
    options = {"negative": "a circle", "control": Control(lambda p: seen.append(p.phase)), "keep_text_encoder": True}
    for _ in range(2):
        pipeline.extend("a ring", torch.zeros(5, 3, 32, 32), frames=13, height=32, width=32, guidance=1.0, **options)
    assert "a circle" in reader.texts[1]
    assert {"encode", "deep", "decode"} <= set(seen)
    assert reader.loads == 1
    pipeline.text_to_image("a ring", height=32, width=32)
    assert reader.loads == 1
    pipeline.text_to_image("a ring", height=32, width=32)  # the call before didn't keep it
    assert reader.loads == 2


def test_a_text_encoder_that_does_not_fit_is_refused(pipeline, monkeypatch):
    job = pipeline.job(frames=1, height=32, width=32)
    monkeypatch.setattr(pipeline, "_encoder", None)
    monkeypatch.setattr("starflow_core.jobs.memory.free", lambda device: 10**9)
    monkeypatch.setattr(type(pipeline.text), "weight_bytes", lambda self, dtype: 2 * 10**9)
    with pytest.raises(OutOfMemoryForecast, match=r"this job needs at least 2\.0 GB"):
        pipeline.start("a ring", job)


@pytest.mark.parametrize(
    ("task", "message"), [("exted", "task is 'exted'; expected one of"), ("first_frame", "needs image")]
)
def test_tasks_that_lack_something_are_refused(pipeline, task, message):
    with pytest.raises(InputError, match=message):
        pipeline.with_context(task, frames=9)


@pytest.mark.parametrize(("task", "given", "message"), [
    ("first_frame", {"image": (32, 48, 3)}, r"image has the shape \(32, 48, 3\); expected \(3, H, W\), or \(B"),
    ("last_frame", {"last": (48, 3)}, r"last has the shape \(48, 3\)"),
    ("extend", {"clip": (9, 32, 48, 3)}, r"clip has the shape \(9, 32, 48, 3\); expected \(F, 3, H, W\)"),
])  # fmt: skip
def test_pixels_of_another_layout_are_refused(pipeline, task, given, message):
    with pytest.raises(InputError, match=message):
        pipeline.with_context(task, **{name: torch.zeros(shape) for name, shape in given.items()})


def test_an_image_of_several_frames_is_refused(pipeline):
    with pytest.raises(InputError, match="text_to_image makes one frame, not 9; use text_to_video"):
        pipeline.text_to_image("a ring", frames=9)


def test_a_pipeline_is_loaded_onto_a_placement(folder):
    placement = replace(Placement.on("cpu"), text=torch.device("meta"))
    pipeline = load_pipeline(*files(folder), device=placement)
    assert pipeline.placement is placement
    assert pipeline.dtype == torch.float32


@pytest.mark.parametrize("fps", [0, -3, float("nan"), float("inf"), 1e6])
def test_rates_that_are_none_are_refused(pipeline, fps):
    with pytest.raises(InputError, match="fps is"):
        pipeline.start("a ring", pipeline.job(frames=9, fps=fps))


def test_a_text_encoder_elsewhere_takes_nothing_of_the_device(pipeline, monkeypatch):
    """As planned where it alone would not fit: here on another device than the flow."""
    job = pipeline.job(frames=9, height=32, width=32)
    monkeypatch.setattr(pipeline, "_encoder", None)
    monkeypatch.setattr("starflow_core.jobs.memory.free", lambda device: 10**9)
    monkeypatch.setattr(type(pipeline.text), "weight_bytes", lambda self, dtype: 2 * 10**9)
    with pytest.raises(OutOfMemoryForecast):
        pipeline.start("a ring", job)
    monkeypatch.setattr(pipeline, "placement", replace(pipeline.placement, text=torch.device("cpu", 0)))
    pipeline.start("a ring", job)


def test_a_pipeline_fits_each_job_to_what_is_free(pipeline, monkeypatch):
    """Without means of its own: here the job fits only once parts take turns."""
    job = pipeline.job(frames=9, height=32, width=32)
    monkeypatch.setattr(type(pipeline.text), "weight_bytes", lambda self, dtype: 0)
    needs = [replace(forecast(pipeline.config, job, pipeline.dtype, means), weights=0).total
             for means in (Means(), Means(in_turn=True))]  # fmt: skip
    assert needs[1] < needs[0]
    for free, in_turn in ((2 * needs[0], False), ((needs[0] + needs[1]) / 2, True)):
        monkeypatch.setattr("starflow_core.jobs.memory.free", lambda device, free=free: int(free / 0.97))
        generation, _ = pipeline.start("a ring", job)
        assert generation.means == Means(in_turn=in_turn)
        assert sum(frames.shape[1] for frames in pipeline.frames(generation)) == 9
