"""Training a LoRA in a graph: what comes out, that it is the core's, Cancel and going on, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from starflow_core.media import read_image, read_video
from starflow_core.model.lora import attach
from starflow_core.training import train as training
from starflow_core.training.processes import Processes
from starflow_core.training.settings import Settings
from starflow_core.weights.lora import LoraFile
from tests.core import models

from . import pack
from .steps import NODES, run

host, node, errors = (pack.module(f) for f in ("nodes.host", "nodes.training", "starflow_core.errors"))
real = pytest.mark.skipif(not pack.COMFYUI, reason="COMFYUI_PATH names no ComfyUI checkout")
QUICK = {"steps": 3, "batch": 2, "rank": 2, "size": 48, "captions": "a red cross", "seed": 5}


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """The host's folders: loras, output and input."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "filename_list_cache", {}, raising=False)
    for name in ("loras", "output", "input"):
        (tmp_path / name).mkdir()
    loras = ([str(tmp_path / "loras")], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", loras)
    for kind in ("output", "temp"):
        monkeypatch.setattr(folder_paths, f"get_{kind}_directory", lambda: str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path / "input"))
    return tmp_path


@pytest.fixture
def train(folders, demo):
    """The node on the demo, quick unless told otherwise."""

    def trained(**given):
        parts = {"model": demo.model, "text_encoder": demo.text_encoder, "vae": demo.vae}
        return run("STARFlowTrainLoRA", **{**parts, **QUICK, **given})

    return trained


def pictures(count=3, seed=0, side=48):
    return torch.rand(count, side, side, 3, generator=torch.Generator().manual_seed(seed)).mul(255).round() / 255


def work(folders, kind="run"):
    return sorted((folders / "output" / "starflow_training").glob(f"{kind}-*"))


def test_what_comes_out(folders, train, demo, told):
    lora, losses, model, name = train(images=pictures(), lora_name="mine")
    file = LoraFile.open(folders / "loras" / name)
    assert name == "mine_00001_.safetensors"
    assert len(losses["loss"]) == 3
    assert all(isinstance(loss, float) for loss in losses["loss"])
    assert set(lora) == set(file.file.tensors)
    assert all(key.startswith("diffusion_model.blocks.2.") for key in lora)
    assert all(not value.is_inference() for value in lora.values())
    assert host.has_lora(model)
    assert not host.has_lora(demo.model)
    assert any("what learns" in text for text in told.texts)
    assert any(text.startswith("step ") and "loss" in text for text in told.texts)
    assert told.steps[-1] == (3, 3)
    assert told.nodes >= {pack.NODE_ID}


def test_the_same_as_the_cores(folders, train, demo):
    """Also of one that no node has had a hand in."""
    lora, _, model, _ = train(images=pictures())
    (data,) = work(folders, "data")
    settings = Settings(
        work=str(folders / "core"), data=(str(data),), frames=1, held_out=0.0, warmup=0, steps=3, batch=2, rank=2,
        size=48, seed=5, recompute=False,
    )  # fmt: skip
    result = training.train(settings, training.find_sources(settings), torch.device("cpu"), Processes())
    wanted = LoraFile.open(result)
    assert all(torch.equal(lora[key], stored.read()) for key, stored in wanted.file.tensors.items())
    assert json.loads(wanted.metadata["settings"])["rank"] == 2
    clip, text = models.randn(1, 2, demo.flow.config.latent.channels, 3, 3), models.text(demo.flow)
    flow = training.find_sources(settings).load_flow(torch.float32, torch.device("cpu"))
    attach(flow, wanted.load())
    host.load(model, 0, "a test")
    with torch.no_grad():
        assert models.relative_error(host.flow_of(model).loss(clip, text), flow.loss(clip, text)) < 1e-9
    host.load(demo.model, 0, "a test")


def test_pixels_are_kept_exactly(folders, train):
    images = pictures(10, side=64)
    train(images=images[:2] - 0.4 / 255, captions="a\n\nb", steps=1)  # rounded, not cut off
    (stills,) = work(folders, "data")
    lines = [json.loads(line) for line in (stills / "metadata.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == ["a", "b"]
    found = torch.stack([read_image(stills / line["file_name"]) for line in lines])
    assert torch.equal(((found + 1) / 2 * 255).round(), (images[:2] * 255).round().movedim(-1, 1))
    train(images=images, frames=5, steps=1)
    (clips,) = set(work(folders, "data")) - {stills}
    first, second = (read_video(clips / f"0000{i}.tiff") for i in range(2))
    assert first.fps == 0  # taken frame by frame
    found = torch.cat((first.pixels, second.pixels))
    assert torch.equal(((found + 1) / 2 * 255).round(), (images * 255).round().movedim(-1, 1))


def test_clips_that_a_node_has_marked_are_clips(folders, train, told):
    train(images=host.mark_clips(pictures(12), 6), captions="a\nb", steps=1)
    assert any("48 x 48, 5 frames: 2" in text for text in told.texts)


def test_a_folder_of_files_with_captions(folders, train, told):
    from PIL import Image

    for name in "ab":
        Image.new("RGB", (48, 48), "red").save(folders / "input" / f"{name}.png")
        (folders / "input" / f"{name}.txt").write_text("a red picture")
    train(folder=str(folders / "input"), captions="", steps=1)
    assert any("2 files with captions, 2 used" in text for text in told.texts)
    with pytest.raises(errors.InputError, match=r"there is no folder .*input.gone"):
        train(folder="gone")
    with pytest.raises(errors.InputError, match="both images and a folder"):
        train(folder="x", images=pictures())


def test_a_folder_whose_files_change_is_another(folders):
    state = NODES["STARFlowTrainLoRA"].fingerprint_inputs
    assert state(folder="", steps=3) == ""
    empty = state(folder="mine")
    (folders / "input" / "mine" / "below").mkdir(parents=True)
    (folders / "input" / "mine" / "below" / "a.txt").write_text("a cross")
    first = state(folder="mine")
    assert first == state(folder=str(folders / "input" / "mine"), steps=4)
    (folders / "input" / "mine" / "below" / "a.txt").write_text("a ring")
    assert len({empty, first, state(folder="mine")}) == 3


class Cancelled:
    """Cancel, pressed while a step is computed; `steps` are those that are told, `shown` what the bar shows."""

    def __init__(self, monkeypatch, step):
        import comfy.model_management as management

        self.steps, self.shown, self.on = [], [], True
        watch, tell, update = node._Watch, node._Watch.step, host.NodeProgress.update

        def told(watched, index, figures):
            self.steps.append(index)
            if self.on and index == step:
                self.on = False
                management.interrupt_current_processing()
            tell(watched, index, figures)

        def updated(bar, *given):
            host.check_interrupted()  # as a server's bar does
            self.shown.append(given[:2])
            update(bar, *given)

        monkeypatch.setattr(watch, "step", told)
        monkeypatch.setattr(host.NodeProgress, "update", updated)


def test_cancel_saves_and_the_same_inputs_go_on(folders, train, monkeypatch):
    """To what a run gives that nothing has stopped."""
    import comfy.model_management as management

    cancelled = Cancelled(monkeypatch, 2)
    with pytest.raises(management.InterruptProcessingException):
        train(images=pictures(), steps=4)
    assert not management.processing_interrupted()
    assert not list((folders / "loras").iterdir())
    (one,) = work(folders)
    cancelled.steps.clear()
    lora, losses, _, _ = train(images=pictures(), steps=4)
    assert cancelled.steps == [3, 4]  # the second was saved
    assert cancelled.shown[-2:] == [(3, 4), (4, 4)]
    assert work(folders) == [one]
    cancelled.steps.clear()
    _, again, _, _ = train(images=pictures(), steps=4)
    assert not cancelled.steps  # nothing was left to do
    one.rename(folders / "elsewhere")
    whole, unbroken, _, _ = train(images=pictures(), steps=4)
    assert losses == again == unbroken
    assert len(losses["loss"]) == 4
    assert all(torch.equal(whole[key], lora[key]) for key in whole)


def test_cancel_while_encoding(folders, train, monkeypatch):
    import comfy.model_management as management

    encode = training.VAE.encode
    core = pack.module("starflow_core.training.train").VAE

    def cancelled(*args, **given):
        management.interrupt_current_processing()
        return encode(*args, **given)

    monkeypatch.setattr(core, "encode", cancelled)
    with pytest.raises(management.InterruptProcessingException):
        train(images=pictures())
    assert not management.processing_interrupted()
    assert len(list((folders / "output" / "starflow_training" / "cache" / "latents").rglob("*.safetensors"))) == 1


def test_names_are_numbered_and_the_same_lora_is_kept_once(folders, train):
    names = [train(images=pictures(), steps=1, seed=seed, lora_name="a/mine")[-1] for seed in (0, 1, 0)]
    assert names == ["a/mine_00001_.safetensors", "a/mine_00002_.safetensors", "a/mine_00001_.safetensors"]
    listed = [str(path.relative_to(folders / "loras")) for path in (folders / "loras").rglob("*.safetensors")]
    assert sorted(listed) == names[:2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"images": None}, "connect images, or name a folder"),
        ({"captions": "a\nb"}, "2 captions for 3 pictures or clips; write a line for each, or one for all"),
        ({"captions": " \n"}, "0 captions for 3 pictures or clips"),
        ({"frames": 2}, "3 images can't be split into clips of 2 frames"),
        ({"frames": 3}, "clips have 4n . 1 frames, the nearest is"),
        ({"blocks": "9"}, "there is no block 9; this flow has the blocks 0 to"),
        ({"blocks": "deepest"}, "expected deep, all, or numbers"),
        ({"lora_name": "../x"}, "give a file's name in models/loras"),
    ],
)
def test_what_is_refused(folders, train, told, given, message):
    with pytest.raises(errors.InputError, match=message):
        train(**{"images": pictures(), **given})
    assert not work(folders)
    assert "\n" not in message


def test_a_model_with_a_lora_and_a_stock_vae_are_refused(folders, train, monkeypatch):
    _, _, model, _ = train(images=pictures(), steps=1)
    with pytest.raises(errors.InputError, match="has a LoRA already"):
        train(images=pictures(), model=model)
    monkeypatch.setattr(host, "has_int8", lambda flow: True)
    loras = LoraFile.open(next((folders / "loras").iterdir())).load()
    beside = host.with_lora(run("STARFlowLoadModel")[0], loras)
    with pytest.raises(errors.InputError, match="has a LoRA already"):
        train(images=pictures(), model=beside)
    with pytest.raises(errors.InputError, match="isn't from STARFlow Load VAE"):
        train(images=pictures(), vae=object())


def test_wrong_inputs_are_known_before_the_run():
    refusal = NODES["STARFlowTrainLoRA"].validate_inputs
    assert refusal() is True
    assert "expected deep, all, or numbers" in refusal(blocks="shallow")
    for name in ("", "/tmp/x", "a/../../b", "a/"):
        assert "give a file's name in models/loras" in refusal(lora_name=name)


def test_where_memory_is_short_it_goes_slower_or_not_at_all(folders, train, told, monkeypatch):
    memory = pack.module("starflow_core.jobs.memory")
    needs = []
    fits = memory.fits
    monkeypatch.setattr(memory, "fits", lambda need, there: needs.append(need) or len(needs) > 3)
    train(images=pictures(), steps=1, batch=8)
    assert len(needs) == 5  # the last one again, before the first step
    assert needs[:4] == sorted(set(needs), reverse=True)
    assert needs[0] > 2 * needs[1]  # nothing is computed again where that fits
    monkeypatch.setattr(memory, "fits", fits)
    monkeypatch.setattr(memory, "free", lambda device: 10)
    with pytest.raises(errors.OutOfMemoryForecast, match=r"training on 1:1, 48 x 48, stills needs about"):
        train(images=pictures(), steps=1, seed=9)


def test_the_hosts_models_make_room(folders, train, demo):
    import comfy.model_management as management

    host.load(demo.model, 0, "a test")
    assert any(other is demo.model for other in management.loaded_models())
    train(images=pictures(), steps=1)
    assert not any(other is demo.model for other in management.loaded_models())


def test_8_bit_is_trained_on_in_8_bit(folders, train, monkeypatch):
    _, _, _, name = train(images=pictures(), steps=1)
    monkeypatch.setattr(host, "has_int8", lambda flow: True)
    _, _, _, other = train(images=pictures(), steps=1, lora_name="int8")
    told = [json.loads(LoraFile.open(folders / "loras" / n).metadata["settings"])["int8"] for n in (name, other)]
    assert told == [False, True]


def test_signals_of_the_host_stay_its_own(folders, train, monkeypatch):
    """It runs prompts in a thread, where no handler can be set."""
    import threading

    failed = []

    def go():
        try:
            train(images=pictures(), steps=1)
        except BaseException as error:  # of whatever kind
            failed.append(error)

    thread = threading.Thread(target=go)
    thread.start()
    thread.join()
    assert not failed


@real
def test_the_hosts_own_loader_and_graph_take_it(folders, train, demo):
    import comfy.sd
    from comfy_extras import nodes_train

    lora, losses, model, _ = train(images=pictures(), steps=2)
    handle, _ = comfy.sd.load_lora_for_models(demo.model, None, lora, 1.0, 0.0)
    assert len(handle.patches) == len(lora) // 3
    assert set(handle.patches) == set(model.patches)
    drawn = nodes_train.LossGraphNode
    method = getattr(drawn, "execute", None) or drawn().plot_loss
    method(losses, "loss")
    assert list((folders / "output").rglob("*.png"))
