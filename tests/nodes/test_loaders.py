"""The loaders: what their lists show, what they refuse, and how they load."""

from __future__ import annotations

import shutil
from inspect import signature

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.core import weightfiles

from . import pack
from .steps import DEMO, NODES, run

host = pack.module("nodes.host")
LOADERS = {
    "STARFlowLoadModel": ("model_name", "get_torch_device", "unet_offload_device"),
    "STARFlowLoadTextEncoder": ("encoder_name", "text_encoder_device", "text_encoder_offload_device"),
    "STARFlowLoadVAE": ("vae_name", "vae_device", "vae_offload_device"),
}


def listed(name: str) -> list[str]:
    (given,) = (g for g in NODES[name].define_schema().inputs if g.id == LOADERS[name][0])
    return list(given.options["options"] if isinstance(given.options, dict) else given.options)


def refusal(name: str, **inputs):
    return NODES[name].validate_inputs(**inputs)


def parts(loaded):
    """The patcher and the module of what a loader gave."""
    patcher = getattr(loaded, "patcher", loaded)
    return patcher, patcher.model


def test_lists_show_what_can_be_loaded(model_folders):
    flows, texts, vaes = (model_folders / name for name in ("diffusion_models", "text_encoders", "vae"))
    (flows / "below").mkdir()
    weightfiles.write_safetensors(flows / "below" / "ours.safetensors")
    save_file({"weight": torch.zeros(1)}, flows / "another.safetensors")
    (flows / "apple.pth").write_bytes(b"looked into when it is loaded")
    (flows / "broken.safetensors").write_bytes(b"x")
    for name in ("sharded", "empty"):
        (flows / name).mkdir()
    weightfiles.write_shards(flows / "sharded")
    for name, file in (("flan", "config.json"), ("whole", "text_encoder/config.json"), ("none", "readme.txt")):
        (texts / name / file).parent.mkdir(parents=True)
        (texts / name / file).write_text("{}")
    (texts / "t5.safetensors").write_bytes(b"")
    (vaes / "wan.pth").write_bytes(b"")
    (vaes / "notes.txt").write_bytes(b"")
    found = listed("STARFlowLoadModel")
    assert found[0] == DEMO
    shards = [name for name in found if name.startswith("sharded/")]
    assert set(found) - set(shards) == {DEMO, "below/ours.safetensors", "apple.pth", "broken.safetensors", "sharded"}
    assert listed("STARFlowLoadTextEncoder") == [DEMO, "t5.safetensors", "flan", "whole"]
    assert listed("STARFlowLoadVAE") == [DEMO, "wan.pth"]
    for name, (given, _, _) in LOADERS.items():
        for option in listed(name):
            assert refusal(name, **{given: option}) is True or option == "broken.safetensors"


def test_a_truncated_model_is_listed_and_says_so(model_folders):
    file = model_folders / "diffusion_models" / "cut.safetensors"
    weightfiles.write_safetensors(file)
    file.write_bytes(file.read_bytes()[:-1])
    assert listed("STARFlowLoadModel") == [DEMO, "cut.safetensors"]
    assert "cut.safetensors is truncated: expected" in refusal("STARFlowLoadModel", model_name="cut.safetensors")
    with pytest.raises(Exception, match=r"cut\.safetensors is truncated: expected \d+ bytes, found \d+; download it"):
        NODES["STARFlowLoadModel"].execute("cut.safetensors", "fp32")


def test_a_file_that_was_exchanged_is_looked_at_again(model_folders):
    file = model_folders / "diffusion_models" / "a.safetensors"
    save_file({"weight": torch.zeros(1)}, file)
    assert listed("STARFlowLoadModel") == [DEMO]
    weightfiles.write_safetensors(file)
    assert listed("STARFlowLoadModel") == [DEMO, "a.safetensors"]


def test_hosts_without_such_folders_have_the_demo(monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "filename_list_cache", {}, raising=False)
    for name in ("diffusion_models", "text_encoders", "vae"):
        monkeypatch.delitem(folder_paths.folder_names_and_paths, name)
    assert [listed(name) for name in LOADERS] == [[DEMO]] * 3


def test_refusals_name_the_file_and_the_remedy(model_folders):
    (model_folders / "vae" / "notes.txt").write_bytes(b"")
    (model_folders / "text_encoders" / "none").mkdir()
    save_file({"weight": torch.zeros(1)}, model_folders / "diffusion_models" / "another.safetensors")

    def message(name: str, problem: str, what: str) -> str:
        return f"{name!r} {problem}; put a {what} there and refresh, or choose 'bundled demo'"

    for name, problem in (
        ("a.pth", "is not in models/diffusion_models"),
        ("another.safetensors", "in models/diffusion_models is not a model"),
    ):
        assert refusal("STARFlowLoadModel", model_name=name) == message(name, problem, "model")
    problem = "in models/text_encoders is not a text encoder"
    assert refusal("STARFlowLoadTextEncoder", encoder_name="none") == message("none", problem, "text encoder")
    for name, problem in (("notes.txt", "in models/vae is not a VAE"), ("", "is not in models/vae")):
        assert refusal("STARFlowLoadVAE", vae_name=name) == message(name, problem, "VAE")


@pytest.mark.parametrize("name", LOADERS)
def test_each_widget_of_a_loader_answers_for_itself(name):
    """The host blames every input that validate_inputs names, and 0.3.64 checks only lists that are types."""
    assert list(signature(NODES[name].validate_inputs).parameters) == [LOADERS[name][0]]
    kind, options = NODES[name].GET_NODE_INFO_V1()["input"]["required"]["weight_type"]
    eight = [] if name == "STARFlowLoadVAE" else ["int8"]
    assert kind == options["options"] == ["auto", "bf16", "fp16", "fp32", *eight]


@pytest.mark.skipif(not pack.COMFYUI, reason="COMFYUI_PATH names no ComfyUI checkout")
@pytest.mark.parametrize("name", LOADERS)
def test_a_real_host_blames_only_the_wrong_widget(name):
    given = LOADERS[name][0]
    for wrong, inputs in ((given, {given: "gone.pth"}), ("weight_type", {"weight_type": "int4"})):
        prompt = {"1": {"class_type": name, "inputs": {given: DEMO, "weight_type": "auto", **inputs}}}
        assert pack.complaints(prompt, "1") == [wrong]


def test_files_and_folders_of_those_names_are_loaded(image_model, tiny_image):
    flow = load_file(tiny_image / "flow.safetensors")
    loaded = image_model.flow.state_dict()
    assert loaded.keys() == flow.keys()
    assert all(torch.equal(loaded[name], flow[name].float()) for name in flow)
    assert image_model.text_encoder.encoder.dim == 12
    assert image_model.vae.core.kind == "image"


def test_sharded_models_are_loaded_from_their_folder(model_folders):
    folder = model_folders / "diffusion_models" / "sharded"
    folder.mkdir()
    weightfiles.write_shards(folder)
    (model,) = run("STARFlowLoadModel", model_name="sharded", weight_type="bf16")
    assert host.flow_of(model).config.to_dict() == weightfiles.CONFIG.to_dict()
    assert {weight.dtype for weight in model.model.parameters()} == {torch.bfloat16}


def test_an_encoder_without_a_tokenizer_takes_the_hosts(monkeypatch, model_folders, tiny_image):
    import comfy.utils

    texts = model_folders / "text_encoders"
    shutil.copy(tiny_image / "text.safetensors", texts / "t5.safetensors")
    monkeypatch.setattr(comfy.utils, "__file__", str(model_folders / "comfy" / "utils.py"))
    assert host.tokenizer_for(texts / "t5.safetensors") is None
    theirs = model_folders / "comfy" / "text_encoders" / "t5_tokenizer"
    theirs.mkdir(parents=True)
    shutil.copy(tiny_image / "tokenizer.json", theirs)
    assert host.tokenizer_for(texts / "t5.safetensors") == theirs
    (loaded,) = run("STARFlowLoadTextEncoder", encoder_name="t5.safetensors")
    assert loaded.encoder.dim == 12
    for place in (texts, texts / "tokenizer"):
        place.mkdir(exist_ok=True)
        (place / "tokenizer.json").write_text("{}")
        assert host.tokenizer_for(texts / "t5.safetensors") is None
        (place / "tokenizer.json").unlink()


def test_a_folders_tokenizer_is_looked_for_in_and_beside_it(monkeypatch, tmp_path):
    import comfy.utils

    theirs = tmp_path / "comfy" / "text_encoders" / "t5_tokenizer"
    theirs.mkdir(parents=True)
    monkeypatch.setattr(comfy.utils, "__file__", str(tmp_path / "comfy" / "utils.py"))
    encoder = tmp_path / "flan" / "text_encoder"
    encoder.mkdir(parents=True)
    assert host.tokenizer_for(encoder) == theirs
    (tmp_path / "flan" / "tokenizer").mkdir()
    (tmp_path / "flan" / "tokenizer" / "spiece.model").write_bytes(b"")
    assert host.tokenizer_for(encoder) is None


@pytest.mark.parametrize("name", LOADERS)
def test_each_goes_to_its_device_in_the_type_that_suits_it(monkeypatch, name):
    """Only this loader's device is a card with bf16, only its weights wait on another."""
    import comfy.model_management as management

    _, device, offload = LOADERS[name]
    card, shelf = torch.device("meta"), torch.device("cuda")
    for _, *both in LOADERS.values():
        for other in both:
            monkeypatch.setattr(management, other, lambda: torch.device("cpu"))
    monkeypatch.setattr(management, device, lambda: card)
    monkeypatch.setattr(management, offload, lambda: shelf)
    monkeypatch.setattr(management, "should_use_bf16", lambda device=None: device == card)
    patcher, module = parts(run(name)[0])
    assert (patcher.load_device, patcher.offload_device) == (card, shelf)
    assert torch.bfloat16 in {weight.dtype for weight in module.parameters()}
    _, module = parts(run(name, weight_type="fp32")[0])
    assert {weight.dtype for weight in module.parameters()} == {torch.float32}


def test_auto_is_what_the_device_can(monkeypatch):
    """On a CPU fp32 whatever it can: the others are slow there."""
    import comfy.model_management as management

    card, able = torch.device("cuda"), {"bf16": True, "fp16": True}
    monkeypatch.setattr(management, "should_use_bf16", lambda device=None: able["bf16"])
    monkeypatch.setattr(management, "should_use_fp16", lambda device=None: able["fp16"])
    assert host.best_dtype(torch.device("cpu")) == torch.float32
    assert host.best_dtype(card) == torch.bfloat16
    able["bf16"] = False
    assert host.best_dtype(card) == torch.float16
    able["fp16"] = False
    assert host.best_dtype(card) == torch.float32


def test_weights_are_the_hosts_to_move(demo):
    """Layers of the flow come from the host, and what it loads whole it can set a device on."""
    import comfy.model_management as management

    flow = demo.flow
    layers = [layer for layer in flow.modules() if type(layer).__name__ == "Linear"]
    assert layers
    assert all(isinstance(layer, host.OPERATIONS.Linear) for layer in layers)
    for patcher in (demo.model, demo.text_encoder.patcher, demo.vae.patcher):
        management.load_models_gpu([patcher], force_full_load=True)
        assert patcher.model.device == torch.device("cpu")


def test_newer_hosts_have_a_patcher_of_their_own(monkeypatch):
    """0.3.64 has neither."""
    import comfy.model_management as management
    import comfy.model_patcher

    archived = []

    class CoreModelPatcher(comfy.model_patcher.ModelPatcher):
        pass

    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", CoreModelPatcher, raising=False)
    monkeypatch.setattr(management, "archive_model_dtypes", archived.append, raising=False)
    module, cpu = torch.nn.Linear(1, 1), torch.device("cpu")
    assert isinstance(host.patcher(module, cpu, cpu), CoreModelPatcher)
    assert archived == [module]
    monkeypatch.delattr(comfy.model_patcher, "CoreModelPatcher")
    monkeypatch.delattr(management, "archive_model_dtypes")
    assert not isinstance(host.patcher(module, cpu, cpu), CoreModelPatcher)


def test_loading_is_shown_in_bytes(demo, told):
    run("STARFlowLoadModel")
    values, totals = zip(*told.steps, strict=True)
    assert list(values) == sorted(values)
    assert set(totals) == {values[-1]}
    assert values[-1] == sum(w.numel() * 2 for w in demo.model.model.parameters())
