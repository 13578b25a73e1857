"""LoRA in the host: what its patches give, that handles leave each other alone, what is listed, refused and doubted."""

from __future__ import annotations

import copy
import gc
import logging

import pytest
import torch
from safetensors.torch import save_file

from starflow_core import load_flow, load_pipeline
from starflow_core.bundled import BUNDLED, FLOW_FILE
from starflow_core.model.lora import adapt, attach
from starflow_core.weights.lora import LoraFile, base_metadata, save_lora
from starflow_core.weights.tensorfiles import TensorFile
from tests.core import models

from . import pack
from .steps import DEMO, NODES, PROMPT, run

host, errors = pack.module("nodes.host"), pack.module("starflow_core.errors")
KEEPS = host.int8_linear(torch.float32) is not None
keeps = pytest.mark.skipif(not KEEPS, reason="this host has no layers for weights in 8 bit")
real = pytest.mark.skipif(not pack.COMFYUI, reason="COMFYUI_PATH names no ComfyUI checkout")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """LoRAs of the demo: one of the deep block, one of all that doesn't say so, and one of another model."""
    folder, checkpoint = tmp_path_factory.mktemp("loras"), TensorFile.open(BUNDLED / FLOW_FILE)
    flow, known = load_flow(checkpoint, torch.float32), base_metadata(checkpoint)
    save_lora(filled(flow, 2, "deep", 0.3), folder / "deep.safetensors", flow.config, known)
    save_lora(filled(flow, 1, "all", 0.3), folder / "all.safetensors", flow.config, {})
    save_lora(filled(flow, 2, "deep", 1e-3), folder / "small.safetensors", flow.config, known)
    small = models.flow()
    save_lora(filled(small, 1, "deep", 0.3), folder / "other.safetensors", small.config, {})
    save_file({"transformer.a.lora_A.weight": torch.ones(1, 1)}, folder / "flux.safetensors")
    return folder


def filled(flow, rank, blocks, size):
    loras = adapt(copy.deepcopy(flow), rank, 2.0 * rank, blocks=blocks, generator=torch.Generator().manual_seed(rank))
    for number, lora in enumerate(loras.values()):
        lora.lora_B.data = size * models.randn(*lora.lora_B.shape, seed=number)
    return loras


@pytest.fixture
def loras(monkeypatch, written):
    """The host's folder of LoRAs, with these."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "filename_list_cache", {}, raising=False)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(written)], {".safetensors"}))
    return written


@pytest.fixture(params=["patched", pytest.param("int8", marks=keeps), "beside"])
def loaded(request, monkeypatch):
    """The host's handle on the demo: its weights as they are, in 8 bit, or as if they were in 8 bit."""
    if request.param == "beside":
        monkeypatch.setattr(host, "has_int8", lambda flow: True)
    return run("STARFlowLoadModel", weight_type="int8" if request.param == "int8" else "fp32")[0]


def core_flow(folder, *chosen, quantise=False):
    """The core's flow, with pairs of a LoRA and its strength."""
    flow = load_flow(BUNDLED / FLOW_FILE, torch.float32, quantise=quantise)
    for name, strength in chosen:
        attach(flow, LoraFile.open(folder / f"{name}.safetensors").load(strength))
    return flow


def with_loras(model, *chosen):
    for name, strength in chosen:
        (model,) = run("STARFlowLoadLoRA", model=model, lora_name=f"{name}.safetensors", strength=strength)
    return model


def encoded(flow) -> torch.Tensor:
    """A clip's noise and log-determinants."""
    clip, text = models.randn(1, 3, flow.config.latent.channels, 4, 4), models.text(flow)
    with torch.no_grad():
        encoding = flow.encode(clip, text)
    return torch.cat([part.flatten() for part in (encoding.noise, *encoding.logdets)])


def at_work(handle) -> torch.Tensor:
    """The same of a handle's flow, when the host has it at work."""
    host.load(handle, 0, "a test")
    return encoded(host.flow_of(handle))


def in_8_bit(handle) -> bool:
    return any(name.endswith("weight_scale") for name in host.flow_of(handle).state_dict())


def test_the_same_as_the_cores(loras, loaded):
    """One, and several in a row; whichever handle is at work, the others' LoRAs aren't there."""
    bare, quantise = at_work(loaded), in_8_bit(loaded)
    one, both = [("deep", 1.0)], [("deep", -0.5), ("all", 2.0), ("deep", 0.25)]
    handles = {0: with_loras(loaded), 1: with_loras(loaded, *one), 2: with_loras(loaded, *both)}
    wanted = {0: bare, 1: encoded(core_flow(loras, *one, quantise=quantise)),
              2: encoded(core_flow(loras, *both, quantise=quantise))}  # fmt: skip
    assert models.relative_error(wanted[1], bare) > 1e-4
    for turn in (1, 2, 0, 2, 1, 1, 0):
        assert models.relative_error(at_work(handles[turn]), wanted[turn]) < 1e-9
    assert torch.equal(at_work(loaded), bare)


def test_a_handle_that_is_forgotten_leaves_nothing(loras, loaded):
    bare = at_work(loaded)
    handle = with_loras(loaded, ("all", 1.0))
    assert not torch.equal(at_work(handle), bare)
    del handle
    gc.collect()
    assert torch.equal(at_work(loaded), bare)


def test_strength_0_is_the_model_itself(loras, demo):
    assert with_loras(demo.model, ("deep", 0.0)) is demo.model


def test_sampling_is_the_cores(loras, demo):
    model = with_loras(demo.model, ("deep", 1.0))
    empty = demo.empty(width=48, height=32)
    positive, negative, _ = demo.encode(empty)
    settings = {"positive": positive, "negative": negative, "latent": empty, "seed": 3}
    (settings["settings"],) = run("STARFlowJacobiSettings", preset="exact")
    found = run("STARFlowSampler", model=model, **settings)[0]["samples"]
    bare = run("STARFlowSampler", model=demo.model, **settings)[0]["samples"]
    core = load_pipeline(loras=[loras / "deep.safetensors"], device="cpu")
    job = core.job(height=32, width=48, frames=9, seed=3, solver=settings["settings"])
    wanted = core.start(PROMPT, job)[0].run()
    assert models.relative_error(found, wanted) < 1e-6
    assert models.relative_error(bare, wanted) > 1e-3


@keeps
@pytest.mark.parametrize("memory", [1, 10**9])
def test_small_differences_survive_8_bit(loras, memory):
    """Wherever the weights are. The host's own patches are rounded to 8 bit again: see what that leaves of them."""
    (loaded,) = run("STARFlowLoadModel", weight_type="int8")
    bare = encoded(core_flow(loras, quantise=True))
    gained = encoded(core_flow(loras, ("small", 1.0), quantise=True)) - bare
    handle = with_loras(loaded, ("small", 1.0))
    handle.patch_model(torch.device("cpu"), lowvram_model_memory=memory)
    assert models.relative_error(encoded(host.flow_of(handle)) - bare, gained) < 1e-3
    handle.detach()


@keeps
def test_a_gradient_passes_beside_8_bit(loras):
    """As the score step needs one."""
    (loaded,) = run("STARFlowLoadModel", weight_type="int8")
    handle = with_loras(loaded, ("all", 1.0))
    with torch.inference_mode():
        host.load(handle, 0, "a test")
    flow, exact = host.flow_of(handle), core_flow(loras, ("all", 1.0), quantise=True)
    clip, text = models.randn(1, 2, flow.config.latent.channels, 4, 4), models.text(flow)
    found, wanted = (
        torch.autograd.grad(each.loss(given, text).sum(), given)[0]
        for each, given in ((flow, clip.clone().requires_grad_()), (exact, clip.clone().requires_grad_()))
    )
    assert models.relative_error(found, wanted) < 1e-9


@real
def test_the_hosts_own_code_finds_all_layers(loras, demo):
    import comfy.sd
    import comfy.utils

    tensors = comfy.utils.load_torch_file(str(loras / "all.safetensors"))
    handle, _ = comfy.sd.load_lora_for_models(demo.model, None, tensors, 1.0, 0.0)
    assert len(handle.patches) == len(LoraFile.open(loras / "all.safetensors").parts)
    assert models.relative_error(at_work(handle), encoded(core_flow(loras, ("all", 1.0)))) < 1e-9
    host.load(demo.model, 0, "a test")


def test_layers_that_the_host_leaves_out_are_not_passed_over(loras, demo, monkeypatch):
    import comfy.lora

    monkeypatch.setattr(comfy.lora, "load_lora", lambda tensors, keys: {})
    with pytest.raises(errors.InputError, match=r"ComfyUI left out (\d+) of the LoRA's \1 layers"):
        with_loras(demo.model, ("deep", 1.0))


def test_memory_beside_weights_in_8_bit_is_counted(loras, demo, monkeypatch):
    import comfy.model_management as management

    monkeypatch.setattr(management, "get_free_memory", lambda device: 10**9)
    before = host.room(demo.model)
    assert host.room(with_loras(demo.model, ("all", 1.0))) == before
    monkeypatch.setattr(host, "has_int8", lambda flow: True)
    found = host.room(with_loras(demo.model, ("all", 1.0), ("deep", 1.0)))
    files = [LoraFile.open(loras / f"{name}.safetensors") for name in ("all", "deep")]
    assert before.free - found.free == sum(file.nbytes for file in files)


def test_only_its_own_are_listed(loras):
    options = NODES["STARFlowLoadLoRA"].GET_NODE_INFO_V1()["input"]["required"]["lora_name"]
    listed = options[1].get("options") or options[0]
    assert listed == ["all.safetensors", "deep.safetensors", "other.safetensors", "small.safetensors"]


def test_without_a_folder_nothing_is_listed(monkeypatch):
    import folder_paths

    monkeypatch.delitem(folder_paths.folder_names_and_paths, "loras", raising=False)
    assert host.own_files("loras", lambda path: True) == []
    assert "is not in models/loras" in NODES["STARFlowLoadLoRA"].validate_inputs(lora_name="a.safetensors")


def test_what_is_wrong_with_a_choice(loras, demo, tmp_path):
    refusal = NODES["STARFlowLoadLoRA"].validate_inputs
    assert refusal() is True
    assert refusal(lora_name="deep.safetensors") is True
    assert refusal(lora_name="gone.safetensors") == (
        "'gone.safetensors' is not in models/loras; put a STARFlow LoRA there and refresh"
    )
    assert refusal(lora_name=3).startswith("3 is not in models/loras")
    assert "is a LoRA of another family of models" in refusal(lora_name="flux.safetensors")
    (loras / "cut.safetensors").write_bytes((loras / "deep.safetensors").read_bytes()[:-9])
    assert "cut.safetensors is truncated" in refusal(lora_name="cut.safetensors")
    (loras / "cut.safetensors").unlink()
    with pytest.raises(errors.CheckpointError, match=r"other\.safetensors doesn't fit .*it was trained on STARFlow"):
        with_loras(demo.model, ("other", 1.0))


@real
def test_a_real_host_blames_only_the_wrong_widget(loras):
    for wrong, inputs in (("lora_name", {"lora_name": "gone"}), ("strength", {"strength": 11.0}), (None, {})):
        prompt = {
            "1": {"class_type": "STARFlowLoadModel", "inputs": {"model_name": DEMO, "weight_type": "auto"}},
            "2": {"class_type": "STARFlowLoadLoRA",
                  "inputs": {"model": ["1", 0], "lora_name": "deep.safetensors", "strength": 1.0, **inputs}},
        }  # fmt: skip
        assert pack.complaints(prompt, "2") == ([wrong] if wrong else [])


def test_other_weights_are_doubted(loras, demo, told, caplog):
    with caplog.at_level(logging.WARNING, "starflow"):
        with_loras(demo.model, ("deep", 1.0))
        assert not caplog.records
        with_loras(demo.model, ("all", 1.0))
    assert "all.safetensors doesn't say of which weights" in caplog.records[0].getMessage()
    assert "all.safetensors doesn't say of which weights" in told.texts[-1]
    assert told.nodes >= {pack.NODE_ID}
