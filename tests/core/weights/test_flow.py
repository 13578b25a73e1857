"""Checkpoints: every file here is a real one, small and made on the spot."""

from __future__ import annotations

import hashlib
import json
import math
import re
import signal
import types
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from starflow_core.errors import CheckpointError, InputError, NonFiniteError
from starflow_core.model.config import KNOWN_MODELS, FlowConfig
from starflow_core.model.flow import Flow
from starflow_core.weights import tensorfiles
from starflow_core.weights.flow import (
    APPLE_LICENSE,
    check_keys,
    config_file,
    convert,
    expected_shapes,
    find_config,
    load_flow,
    quick_look,
    save_flow,
)
from starflow_core.weights.tensorfiles import StoredTensor, TensorFile

from ..weightfiles import CONFIG, METADATA, random_weights, write_pickle, write_safetensors, write_shards

SAFETENSORS = tuple(map(int, safetensors.__version__.split(".")[:2]))
REFERENCE = {
    "in_channels": 3, "img_size": 8, "pt_seq_len": 5, "patch_size": 1, "channels": 20, "top_block_channels": 40,
    "layers_per_block": [1, 1, 2], "head_dim": 20, "rope": 1, "sos": 1, "txt_size": 4, "txt_dim": 6,
    "cond_top_only": 1, "use_softplus": 1, "use_final_norm": 1, "soft_clip": 4, "temporal_causal": 2,
    "shallow_block_local": 1,
}  # fmt: skip
BUFFERS = {
    "var": torch.ones(25, 3),
    "feat_rope.freqs_cos": torch.ones(29, 10),
    "feat_rope.freqs_sin": torch.ones(29, 10),
    "blocks.0.attn_mask": torch.ones(4, 4),
}


def unread(shapes: dict[str, tuple[int, ...]], name: str = "model.pth") -> TensorFile:
    """A checkpoint of these shapes whose tensors are never read."""
    path = Path("nowhere") / name
    tensors = {key: StoredTensor(shape, torch.float32, read=None) for key, shape in shapes.items()}
    return TensorFile(path, [path], tensors, {})


def assert_loads(source, weights=None, **options) -> Flow:
    flow = load_flow(source, **options)
    for name, value in (weights or random_weights()).items():
        torch.testing.assert_close(flow.state_dict()[name], value, rtol=0, atol=0)
    return flow


# Recognising


def test_config_from_metadata(tmp_path):
    assert find_config(TensorFile.open(write_safetensors(tmp_path / "a.safetensors"))) == CONFIG


@pytest.mark.parametrize("name", ["a.json", "config.json"])
@pytest.mark.parametrize("values", [CONFIG.to_dict(), REFERENCE])
def test_config_beside(tmp_path, name, values):
    path = write_pickle(tmp_path / "a.pth")
    if values is REFERENCE:
        save_file(random_weights(replace(CONFIG, denoiser=None)), tmp_path / "a.safetensors")
        path = tmp_path / "a.safetensors"
    (tmp_path / name).write_text(json.dumps(values))
    config = find_config(TensorFile.open(path))
    assert (config.layers, config.width, config.deep_width) == ((1, 1, 2), 20, 40)
    assert_loads(path, random_weights(config))


def test_config_beside_shards(tmp_path):
    index = write_shards(tmp_path)
    assert config_file(TensorFile.open(index)) == tmp_path / "model.json"


def test_reference_arguments_in_the_metadata(tmp_path):
    config = FlowConfig.from_reference(REFERENCE)
    path = write_safetensors(tmp_path / "a.safetensors", random_weights(config), {"config": json.dumps(REFERENCE)})
    assert find_config(TensorFile.open(path)) == config


def test_reference_arguments_get_the_released_latents(tmp_path):
    """They name neither VAE nor noise: channels and kind decide, what is given counts first."""
    values = {**REFERENCE, "in_channels": 48}
    config = FlowConfig.from_reference(values)
    path = tmp_path / "a.safetensors"
    for extra, noise in (({}, 0.5), ({"noise_std": 0.2}, 0.2)):
        write_safetensors(path, random_weights(config), {"config": json.dumps({**values, **extra})})
        found = find_config(TensorFile.open(path))
        assert found.latent == KNOWN_MODELS["starflow-v-7b"].latent
        assert found.noise_std == noise


def test_json_about_something_else_is_passed_over(tmp_path):
    path = write_safetensors(tmp_path / "a.safetensors", metadata={"config": '{"sd_version": "SDXL"}'})
    (tmp_path / "a.json").write_text('{"model": "preview notes"}')
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    assert find_config(TensorFile.open(path)) == CONFIG


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "a.json isn't JSON"),
        ('{"schema": 99}', "a.json: configuration has schema 99"),
        ('{"schema": 1}', "a.json: configuration lacks kind"),
        (json.dumps({**REFERENCE, "use_swiglu": 1}), "a.json: unsupported option use_swiglu"),
        ('{"layers_per_block": [1, 2]}', "a.json: configuration lacks in_channels"),
    ],
)
def test_unusable_config_beside(tmp_path, text, message):
    path = write_safetensors(tmp_path / "a.safetensors", metadata=None)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        find_config(TensorFile.open(path))


@pytest.mark.parametrize("name", list(KNOWN_MODELS))
def test_presets_from_shapes(name):
    preset = KNOWN_MODELS[name]
    shapes = expected_shapes(preset)
    assert find_config(unread(shapes)) is preset
    positions = round(preset.rope_length**2)
    buffers = {"var": (positions, 4), "feat_rope.freqs_cos": (positions + preset.prompt.tokens, 32)}
    assert find_config(unread(shapes | buffers)) is preset
    with pytest.raises(CheckpointError, match=rf"rows of var .* 4096 instead of {positions}"):
        find_config(unread(shapes | {"var": (4096, 4)}))


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("blocks.5.attn_blocks.23.", r"2, 2, 2, 2, 2, 23 instead of 2, 2, 2, 2, 2, 24"),
        ("blocks.2.", r"2, 2, 2, 2, 24 instead of 2, 2, 2, 2, 2, 24"),
        ("blocks.5.", r"text width none instead of 2048"),
    ],
)
def test_partial_3b(left_out, message):
    shapes = expected_shapes(KNOWN_MODELS["starflow-3b"])
    partial = {name: shape for name, shape in shapes.items() if not name.startswith(left_out)}
    with pytest.raises(CheckpointError, match=f"It is not the whole STARFlow 3B.*{message}"):
        find_config(unread(partial))


def test_3b_without_some_tensors_names_them():
    shapes = expected_shapes(KNOWN_MODELS["starflow-3b"])
    del shapes["blocks.5.attn_blocks.7.mlp.main.0.bias"]
    checkpoint = unread(shapes)
    with pytest.raises(CheckpointError, match=r"1 missing \(blocks.5.attn_blocks.7.mlp.main.0.bias\)"):
        load_flow(checkpoint)


def test_unknown_shapes_ask_for_a_config_by_name(tmp_path):
    path = write_pickle(tmp_path / "mine.pth")
    with pytest.raises(CheckpointError, match=r"layers per block 1, 1, 2; shallow width 20; .* as mine\.json"):
        find_config(TensorFile.open(path))


def test_contradicting_config(tmp_path):
    wrong = replace(CONFIG, layers=(1, 1, 3), text_dim=8)
    path = write_safetensors(tmp_path / "a.safetensors", metadata={"starflow_config": json.dumps(wrong.to_dict())})
    message = "contradicts .*layers per block 1, 1, 2 instead of 1, 1, 3; text width 6 instead of 8"
    with pytest.raises(CheckpointError, match=message):
        find_config(TensorFile.open(path))
    with pytest.raises(CheckpointError, match=message):
        load_flow(path, config=wrong)


def test_buffers_must_agree_with_the_config(tmp_path):
    path = write_safetensors(tmp_path / "a.safetensors", random_weights() | BUFFERS)
    assert find_config(TensorFile.open(path)) == CONFIG
    longer = {"feat_rope.freqs_cos": torch.ones(64 + 4, 10)}
    path = write_safetensors(tmp_path / "b.safetensors", random_weights() | BUFFERS | longer)
    with pytest.raises(CheckpointError, match=r"rows of freqs_cos .* 68 instead of 29"):
        find_config(TensorFile.open(path))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("double_blocks.0.img_attn.qkv.weight", "Flux"),
        ("joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("model.diffusion_model.input_blocks.0.0.weight", "Stable Diffusion checkpoint"),
        ("transformer_blocks.0.attn.to_q.weight", "a diffusion model"),
        ("blocks.0.self_attn.q.weight", "a diffusion model"),
        ("model.layers.0.self_attn.q_proj.weight", "a language model"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "T5"),
        ("decoder.upsamples.0.residual.2.weight", "a VAE"),
        ("decoder.up_blocks.0.resnets.0.conv1.weight", "a VAE"),
        ("lora_unet_down.lora_down.weight", "a LoRA"),
        ("classifier.weight", "something else"),
    ],
)
def test_other_architectures(tmp_path, name, kind):
    path = write_safetensors(tmp_path / "a.safetensors", {name: torch.ones(2)}, None)
    for use in (load_flow, lambda p: convert(p, tmp_path / "b.safetensors")):
        with pytest.raises(
            CheckpointError, match=f"a.safetensors isn't a STARFlow.*{kind}.*Expected .*sos_embed"
        ) as error:
            use(path)
        assert name in str(error.value)


@pytest.mark.skipif(SAFETENSORS < (0, 6), reason="older safetensors refuse types that they don't know")
def test_reading_formats_that_torch_lacks(tmp_path):
    """A 4-bit model is still recognised as a foreign one."""
    header = b'{"double_blocks.0.weight":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}'
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match="Flux"):
        load_flow(path)


# Keys


def test_check_keys_names_the_first_few(tmp_path):
    weights = random_weights()
    for name in list(weights)[:7]:
        del weights[name]
    weights["extra.weight"] = torch.ones(1)
    weights["blocks.1.sos_embed"] = torch.ones(1, 1, 4)
    weights["blocks.1.final_norm.weight"] = torch.ones(20, dtype=torch.int8)
    path = write_safetensors(tmp_path / "a.safetensors", weights)
    with pytest.raises(CheckpointError) as error:
        check_keys(TensorFile.open(path), CONFIG)
    message = str(error.value)
    missing = list(random_weights())[:7]
    assert f"7 missing ({', '.join(missing[:5])}, ..)" in message
    assert missing[5] not in message
    assert "1 unexpected (extra.weight)" in message
    assert "1 wrongly shaped (blocks.1.sos_embed (1, 1, 4) instead of (1, 1, 3))" in message
    assert "of a type other than bf16, fp16 and fp32 (blocks.1.final_norm.weight torch.int8)" in message


def test_ignored_buffers(tmp_path):
    path = write_safetensors(tmp_path / "a.safetensors", random_weights() | BUFFERS)
    assert check_keys(TensorFile.open(path), CONFIG) == expected_shapes(CONFIG)
    assert_loads(path)
    convert(path, tmp_path / "b.safetensors", "fp32")
    assert load_file(tmp_path / "b.safetensors").keys() == random_weights().keys()


# Loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_load_converts(tmp_path, kind, dtype):
    path = tmp_path / f"a.{kind}"
    write_safetensors(path) if kind == "safetensors" else write_pickle(path)
    flow = assert_loads(path, {n: w.to(dtype) for n, w in random_weights().items()}, dtype=dtype, config=CONFIG)
    assert flow.compute_dtype == dtype
    assert not flow.training
    assert not any(weight.requires_grad for weight in flow.parameters())


@pytest.mark.parametrize(("stored", "loaded"), [(torch.bfloat16, torch.bfloat16), (torch.float64, torch.float32)])
def test_load_takes_the_type_of_most_weights(tmp_path, stored, loaded):
    weights = {name: w if w.ndim == 1 else w.to(stored) for name, w in random_weights().items()}
    flow = load_flow(write_safetensors(tmp_path / "a.safetensors", weights))
    assert {weight.dtype for weight in flow.parameters()} == {loaded}


def test_loaded_flow_equals_the_saved_one(tmp_path):
    torch.manual_seed(0)
    flow = Flow(CONFIG)
    save_flow(flow, tmp_path / "a.safetensors", "fp32")
    loaded = load_flow(tmp_path / "a.safetensors")
    latents, text = torch.randn(1, 2, 3, 2, 2), torch.randn(1, 4, 6)
    with torch.no_grad():
        assert torch.equal(loaded.encode(latents, text).noise, flow.encode(latents, text).noise)


def test_load_in_inference_mode_gives_ordinary_weights(tmp_path):
    paths = (write_safetensors(tmp_path / "a.safetensors"), write_pickle(tmp_path / "b.pth"))
    for path in paths:
        with torch.inference_mode():
            flow = load_flow(path, config=CONFIG)
        assert not any(weight.is_inference() for weight in flow.parameters())
        latents = torch.randn(1, 1, 3, 2, 2, requires_grad=True)
        flow.loss(latents, torch.randn(1, 4, 6)).sum().backward()
        assert torch.isfinite(latents.grad).all()


def test_weights_do_not_follow_the_file(tmp_path):
    path = write_pickle(tmp_path / "a.pth")
    flow = load_flow(path, config=CONFIG)
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert all(torch.equal(flow.state_dict()[name], value) for name, value in random_weights().items())


def test_operations_make_the_layers(tmp_path):
    class Linear(torch.nn.Linear):
        pass

    class LayerNorm(torch.nn.LayerNorm):
        pass

    operations = types.SimpleNamespace(Linear=Linear, LayerNorm=LayerNorm)
    flow = assert_loads(write_safetensors(tmp_path / "a.safetensors"), operations=operations)
    assert isinstance(flow.deep.proj_txt, Linear)
    assert isinstance(flow.deep.attn_blocks[0].mlp.norm, LayerNorm)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_non_finite_weights_are_named(tmp_path, value, dtype):
    weights = {name: w.to(dtype) for name, w in random_weights().items()}
    weights["blocks.1.proj_out.weight"][3, 7] = value
    path = write_safetensors(tmp_path / "a.safetensors", weights)
    for use in (load_flow, lambda p: convert(p, tmp_path / "b.safetensors")):
        with pytest.raises(NonFiniteError, match=r"blocks\.1\.proj_out\.weight of a\.safetensors has NaN or infinity"):
            use(path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_unusable_type_and_device(tmp_path):
    path = write_safetensors(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="choose bfloat16, float16 or float32"):
        load_flow(path, dtype=torch.float64)
    with pytest.raises(InputError, match="device cuda:77 cannot be used"):
        load_flow(path, device="cuda:77")
    with pytest.raises(InputError, match="device toaster cannot be used"):
        load_flow(path, device="toaster")


def test_load_reports_bytes(tmp_path):
    seen = []
    load_flow(write_safetensors(tmp_path / "a.safetensors"), progress=seen.append)
    sizes = [weight.nbytes for weight in random_weights().values()]
    assert {(p.phase, p.total) for p in seen} == {("load", sum(sizes))}
    steps = [p.step for p in seen]
    assert sorted(after - before for before, after in zip([0, *steps], steps, strict=False)) == sorted(sizes)


# Converting and saving


@pytest.mark.parametrize("kind", ["safetensors", "pth", "shards"])
@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_convert_round_trip(tmp_path, kind, name, dtype):
    if kind == "shards":
        source = write_shards(tmp_path)
    else:
        source = tmp_path / f"a.{kind}"
        write_safetensors(source) if kind == "safetensors" else write_pickle(source)
    target = tmp_path / "converted.safetensors"
    convert(source, target, name, CONFIG)
    with safe_open(target, "pt") as file:
        assert set(file.keys()) == random_weights().keys()
        for key, value in random_weights().items():
            assert file.get_tensor(key).dtype == dtype
            assert torch.equal(file.get_tensor(key), value.to(dtype))
    assert_loads(target, {key: value.to(dtype) for key, value in random_weights().items()})
    assert target.read_bytes()[8:9] == b"{"
    assert int.from_bytes(target.read_bytes()[:8], "little") % 8 == 0


def test_metadata_of_a_conversion(tmp_path):
    source = write_pickle(tmp_path / "a.pth")
    convert(source, tmp_path / "b.safetensors", config=CONFIG)
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        metadata = file.metadata()
    assert FlowConfig.from_dict(json.loads(metadata.pop("starflow_config"))) == CONFIG
    assert metadata == {
        "format": "pt",
        "converter_version": "1",
        "source_name": "a.pth",
        "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "license": APPLE_LICENSE,
    }


def test_metadata_of_shards_has_a_hash_each(tmp_path):
    convert(write_shards(tmp_path), tmp_path / "b.safetensors")
    metadata = TensorFile.open(tmp_path / "b.safetensors").metadata
    assert metadata["source_name"] == "model.safetensors.index.json"
    assert json.loads(metadata["source_sha256"]) == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in tmp_path.glob("model-*.safetensors")
    }


def test_metadata_of_the_source_is_kept(tmp_path):
    """What states its own licence, or was trained here under none of Apple's, isn't relabelled."""
    source = tmp_path / "a.safetensors"
    for own in ({"license": "Apache-2.0", "title": "mine"}, {}):
        write_safetensors(source, metadata=METADATA | own)
        convert(source, tmp_path / "b.safetensors", overwrite=True)
        metadata = TensorFile.open(tmp_path / "b.safetensors").metadata
        assert metadata.get("license") == own.get("license")
        assert metadata.get("title") == own.get("title")
    convert(write_pickle(tmp_path / "c.pth"), tmp_path / "d.safetensors", config=CONFIG)
    convert(tmp_path / "d.safetensors", tmp_path / "e.safetensors", "fp16")
    assert TensorFile.open(tmp_path / "e.safetensors").metadata["license"] == APPLE_LICENSE


def test_fp16_overflow_is_refused(tmp_path):
    weights = random_weights()
    weights["blocks.0.proj_in.weight"][0, 0] = -7e4
    path = write_safetensors(tmp_path / "a.safetensors", weights)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.proj_in\.weight .* reaches 7e\+04.*use bf16 or fp32"):
        convert(path, tmp_path / "b.safetensors", "fp16")
    with pytest.raises(CheckpointError, match="use bf16 or fp32"):
        load_flow(path, torch.float16)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    convert(path, tmp_path / "b.safetensors", "bf16")


def test_overwriting(tmp_path):
    source, target = write_safetensors(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    target.write_text("precious")
    with pytest.raises(InputError, match=r"b\.safetensors exists"):
        convert(source, target)
    assert target.read_text() == "precious"
    convert(source, target, overwrite=True)
    assert_loads(target, {name: value.bfloat16() for name, value in random_weights().items()})


def test_the_source_is_never_the_target(tmp_path):
    source = write_safetensors(tmp_path / "a.safetensors")
    before = source.read_bytes()
    link = tmp_path / "link.safetensors"
    link.symlink_to(source)
    shard = write_shards(tmp_path).with_name("model-00001-of-00002.safetensors")
    for given, target in ((source, source), (source, link), (tmp_path / "model.safetensors.index.json", shard)):
        with pytest.raises(InputError, match="is the source itself"):
            convert(given, target, overwrite=True)
    assert source.read_bytes() == before


def test_impossible_targets(tmp_path):
    source = write_safetensors(tmp_path / "a.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for target, message in (
        (tmp_path / "b.pth", "does not end in .safetensors"),
        (source / "b.safetensors", "cannot be written .*choose another folder"),
        (tmp_path / "folder.safetensors", "is a folder"),
    ):
        with pytest.raises(InputError, match=message):
            convert(source, target, overwrite=True)
    with pytest.raises(InputError, match="dtype 'int4'; choose one of bf16, fp16, fp32, int8"):
        convert(source, tmp_path / "b.safetensors", "int4")


class Interruption:
    """Progress that does something after the first tensor."""

    def __init__(self, action):
        self.action = action

    def __call__(self, progress):
        if progress.phase == "convert":
            self.action()


def left_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture
def ctrl_c():
    """Ctrl-C interrupts, also where the tests run in the background: a shell has such jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_nothing_behind(tmp_path, ctrl_c):
    source = write_safetensors(tmp_path / "a.safetensors")
    seen = []

    def interrupt():
        seen.extend(left_in(tmp_path))
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "b.safetensors", progress=Interruption(interrupt))
    assert [re.fullmatch(r"b\.safetensors\.\w{8}-\d+-\d+\.part", name) is None for name in seen] == [True, False]
    assert left_in(tmp_path) == ["a.safetensors"]


def test_missing_folders_are_made(tmp_path):
    source = write_safetensors(tmp_path / "a.safetensors")
    convert(source, tmp_path / "new" / "folder" / "b.safetensors")
    assert left_in(tmp_path / "new" / "folder") == ["b.safetensors"]


def test_an_interrupted_conversion_keeps_the_earlier_one(tmp_path, ctrl_c):
    source, target = write_safetensors(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    convert(source, target)
    before = target.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        convert(
            source, target, "fp32", overwrite=True, progress=Interruption(lambda: signal.raise_signal(signal.SIGINT))
        )
    assert target.read_bytes() == before
    assert left_in(tmp_path) == ["a.safetensors", "b.safetensors"]


def test_a_source_that_breaks_leaves_nothing_behind(tmp_path):
    source = write_safetensors(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        convert(source, tmp_path / "b.safetensors", progress=Interruption(lambda: source.write_bytes(b"")))
    assert left_in(tmp_path) == ["a.safetensors"]


def test_write_that_fails_half_way(tmp_path):
    """The system refuses to let the file grow, as a full disk does."""
    resource = pytest.importorskip("resource")
    source = write_safetensors(tmp_path / "a.safetensors")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(InputError, match=r"b\.safetensors could not be written: File too large"):
            convert(source, tmp_path / "b.safetensors", "fp32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert left_in(tmp_path) == ["a.safetensors"]


def test_too_little_space_is_known_before(tmp_path, monkeypatch):
    source = write_safetensors(tmp_path / "a.safetensors")
    monkeypatch.setattr(tensorfiles.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=1000))
    seen = []
    with pytest.raises(InputError, match=r"needs 0\.00 GB, 0\.00 GB are free; make room"):
        convert(source, tmp_path / "b.safetensors", progress=seen.append)
    assert not seen
    assert left_in(tmp_path) == ["a.safetensors"]


def test_save_flow(tmp_path):
    flow, path = load_flow(write_safetensors(tmp_path / "a.safetensors")), tmp_path / "b.safetensors"
    path.write_text("an earlier state")
    save_flow(flow, path, "bf16", {"license": "Apache-2.0"})
    checkpoint = TensorFile.open(path)
    assert checkpoint.metadata["license"] == "Apache-2.0"
    assert find_config(checkpoint) == CONFIG
    assert_loads(path, {name: value.bfloat16() for name, value in random_weights().items()})
    assert left_in(tmp_path) == ["a.safetensors", "b.safetensors"]


def test_save_flow_refuses_nan(tmp_path):
    flow = Flow(CONFIG)
    with torch.no_grad():
        flow.deep.proj_in.bias[0] = math.nan
    with pytest.raises(NonFiniteError, match=r"blocks\.2\.proj_in\.bias"):
        save_flow(flow, tmp_path / "b.safetensors")
    assert left_in(tmp_path) == []


# File lists


def test_quick_look(tmp_path):
    assert quick_look(write_safetensors(tmp_path / "a.safetensors")) == "tiny"
    assert quick_look(str(write_shards(tmp_path))) == "tiny"
    assert quick_look(tmp_path / "model-00001-of-00002.safetensors") is None  # its index is listed
    bare = write_safetensors(tmp_path / "bare.safetensors", metadata=None)
    assert quick_look(bare) == "STARFlow without a configuration"


def test_damaged_files_are_shown(tmp_path):
    """Else a download that broke off would vanish from a list without a word."""
    whole = write_safetensors(tmp_path / "a.safetensors").read_bytes()
    index = write_shards(tmp_path)
    next(path for path in tmp_path.glob("*-of-*.safetensors")).unlink()
    for number, data in enumerate((whole[:-1], whole[:100], b"x", b"")):
        (tmp_path / f"{number}.safetensors").write_bytes(data)
        assert quick_look(tmp_path / f"{number}.safetensors") == "damaged file"
    assert quick_look(index) == "damaged file"


def test_quick_look_never_raises(tmp_path):
    other = write_safetensors(tmp_path / "other.safetensors", {"double_blocks.0.weight": torch.ones(1)}, None)
    pickled = write_pickle(tmp_path / "a.pth")
    (tmp_path / "folder.safetensors").mkdir()
    for path in (
        other,
        pickled,
        tmp_path / "folder.safetensors",
        tmp_path / "none.safetensors",
        "\0.safetensors",
    ):
        assert quick_look(path) is None
