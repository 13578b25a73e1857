"""LoRA on the command line, in-process, on a tiny model."""

from __future__ import annotations

import json
import re

import pytest
import torch

from starflow_core import pipeline
from starflow_core.cli import arguments, main
from starflow_core.media import read_metadata, read_video
from starflow_core.model.lora import adapt
from starflow_core.weights.flow import convert, find_config, load_flow
from starflow_core.weights.lora import base_metadata, save_lora
from starflow_core.weights.tensorfiles import TensorFile
from tests.core import models, tiny

SMALL = ("a red circle", "--frames", "1", "--seed", "3", "--device", "cpu")
OTHER = r"^warning: unknown\.safetensors doesn't say of which weights it is; .*\n$"


@pytest.fixture(scope="module", autouse=True)
def demo(tmp_path_factory):
    """A tiny model in the bundled one's place, with two LoRAs of it and one that doesn't say what it is of."""
    folder = tiny.write_model(tmp_path_factory.mktemp("video"))
    checkpoint = TensorFile.open(folder / pipeline.FLOW_FILE)
    known = {**base_metadata(checkpoint), "trigger_words": "xyz", "license": "mine"}
    write_lora(folder / "a.safetensors", 2, "deep", known)
    write_lora(folder / "b.safetensors", 1, "all", known)
    write_lora(folder / "unknown.safetensors", 1, "all", {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "BUNDLED", folder)
        yield folder


def write_lora(path, rank, blocks, metadata):
    source = TensorFile.open(path.with_name(pipeline.FLOW_FILE))
    loras = adapt(load_flow(source), rank, 2.0, blocks=blocks, generator=torch.Generator().manual_seed(rank))
    for number, lora in enumerate(loras.values()):
        lora.lora_B.data = 0.3 * models.randn(*lora.lora_B.shape, seed=number)
    save_lora(loras, path, find_config(source), metadata)


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs a command in an empty folder; gives stdout's lines. On stderr but for the plan there has to be `err`."""
    monkeypatch.chdir(tmp_path)

    def call(*argv, code=0, err="^$"):
        found = main([str(word) for word in argv])
        out, errors = capsys.readouterr()
        errors = re.sub(r"^memory: weights [^\n]*\n", "", errors, flags=re.MULTILINE)
        assert found == code, errors
        assert re.search(err, errors), errors
        return out.splitlines()

    return call


def pixels(path) -> torch.Tensor:
    return read_video(path).pixels


def test_results_differ_and_say_by_what(run, demo):
    a, b = demo / "a.safetensors", demo / "b.safetensors"
    for name, options in {
        "base": (), "zero": ("--lora", f"{a}:0"), "one": ("--lora", a), "half": ("--lora", f"{a}:0.5"),
        "both": ("--lora", a, "--lora", f"{b}:-1"),
    }.items():  # fmt: skip
        run("generate", *SMALL, *options, "-o", f"{name}.png")
    made = {name: pixels(f"{name}.png") for name in ("base", "zero", "one", "half", "both")}
    assert torch.equal(made["base"], made["zero"])
    different = [made[name] for name in ("base", "one", "half", "both")]
    assert all(not torch.equal(x, y) for i, x in enumerate(different) for y in different[:i])
    assert read_metadata("both.png")["loras"] == "a.safetensors:1, b.safetensors:-1"
    assert "loras" not in read_metadata("base.png")


def test_a_merged_model_makes_the_same(run, demo):
    a, model = demo / "a.safetensors", demo / pipeline.FLOW_FILE
    others = ("--text-encoder", demo / pipeline.TEXT_FILE, "--vae", demo / pipeline.VAE_FILE)
    run("generate", *SMALL, "--lora", f"{a}:0.7", "-o", "beside.png")
    assert run("merge", model, f"{a}:0.7", "-o", "m.safetensors", "--dtype", "fp32") == ["m.safetensors"]
    run("generate", *SMALL, "--model", "m.safetensors", *others, "-o", "merged.png")
    assert (pixels("beside.png") - pixels("merged.png")).abs().max() < 0.02
    run("merge", model, a, "-o", "m.safetensors", code=2, err="^error: m.safetensors exists")
    run("merge", model, demo / "unknown.safetensors", "-o", "m.safetensors", "--overwrite", err=OTHER)


def test_inverting_uses_them(run, demo):
    run("generate", *SMALL, "-o", "x.png")
    scores = [
        json.loads(run("score", "x.png", "--json", *more)[0]) for more in ((), ("--lora", demo / "b.safetensors"))
    ]
    assert scores[0]["log_likelihood"] != scores[1]["log_likelihood"]
    assert scores[1]["loras"] == "b.safetensors:1"
    run("encode", "x.png", "--lora", demo / "b.safetensors", "-o", "n.safetensors")
    run("decode", "n.safetensors", "--lora", demo / "b.safetensors", "-o", "y.png")
    run("decode", "n.safetensors", "-o", "bare.png")
    run("encode", "x.png", "-o", "n.safetensors")
    run("decode", "n.safetensors", "-o", "z.png")  # what the VAE leaves
    assert (pixels("z.png") - pixels("y.png")).abs().max() < 0.02
    assert (pixels("z.png") - pixels("bare.png")).abs().max() > 0.05
    made = read_metadata("y.png")
    assert (made["loras"], made["noise"][1]) == ("b.safetensors:1", "with b.safetensors:1")


def test_of_other_weights(run, demo):
    run("generate", *SMALL, "--lora", demo / "unknown.safetensors", "-o", "x.png", err=OTHER)
    run("generate", *SMALL, "--lora", f"{demo / 'unknown.safetensors'}:0", "-o", "x.png")


def test_conversions_are_the_same_base(run, demo):
    others = ("--text-encoder", demo / pipeline.TEXT_FILE, "--vae", demo / pipeline.VAE_FILE)
    convert(demo / pipeline.FLOW_FILE, "int8.safetensors", "int8")
    run("generate", *SMALL, "--model", "int8.safetensors", *others, "--lora", demo / "a.safetensors", "-o", "x.png")
    run("merge", "int8.safetensors", demo / "a.safetensors", "-o", "m.safetensors", code=2, err="^error: .*in 8 bit")


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ("missing.safetensors:0.5", "no LoRA at missing.safetensors; check the path"),
        ("{demo}/flow.safetensors", "flow.safetensors is a whole model, not a LoRA"),
        ("{demo}/other.safetensors", "other.safetensors doesn't fit tiny video: .*it was trained on STARFlow"),
    ],
)
def test_refused_before_anything_is_loaded(run, demo, monkeypatch, lora, words):
    small = models.flow(layers=(1, 1, 1))
    save_lora(adapt(small, 1, 1.0, blocks=[0]) | adapt(models.flow(deep_width=48), 1, 1.0),
              demo / "other.safetensors", small.config, {})  # fmt: skip
    monkeypatch.setattr(pipeline.Parts, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    run("generate", *SMALL, "--lora", lora.format(demo=demo), code=2, err=f"^error: .*{words}")


def test_inspect(run, demo):
    text = "\n".join(run("inspect", demo / "b.safetensors"))
    for words in (r"kind +LoRA", "base +tiny video", "rank +1", "layers +16 in block 0, 1, 2", "trigger words +xyz",
                  "license +mine"):  # fmt: skip
        assert re.search(words, text), text
    found = json.loads(run("inspect", demo / "a.safetensors", "--json")[0])
    assert (found["kind"], found["ranks"], found["blocks"], found["layers"]) == ("lora", [2], [2], 8)
    assert found["metadata"]["base_name"] == "flow.safetensors"


def test_inspect_tells_how_a_lora_was_trained(run, demo):
    settings = {"rank": 2, "data": ["pets"], "int8": False, "size": None, "rehearse": ["a", "b", "c", "d"]}
    for name, told in (("c", json.dumps(settings)), ("d", "by hand")):
        write_lora(demo / f"{name}.safetensors", 2, "deep", {"settings": told})
    text = "\n".join(run("inspect", demo / "c.safetensors"))
    assert re.search(r"settings +rank 2, data pets, rehearse a, \.\. \(4\)", text), text
    assert re.search("settings +by hand", "\n".join(run("inspect", demo / "d.safetensors")))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.5", ("a.safetensors", 0.5)),
        ("a.safetensors:-2e-1", ("a.safetensors", -0.2)),
        (r"C:\x.safetensors", (r"C:\x.safetensors", 1.0)),
        (r"C:\x.safetensors:0.5", (r"C:\x.safetensors", 0.5)),
        ("C:/x.safetensors:1", ("C:/x.safetensors", 1.0)),
        ("there:2", ("there:2", 1.0)),  # as a file of that name is there
        ("new:2", ("new", 2.0)),
        ("a:b", ("a:b", 1.0)),
    ],
)
def test_files_with_strengths(tmp_path, monkeypatch, text, found):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there:2").touch()
    assert arguments.parser().parse_args(["generate", "x", "--lora", text]).lora == [found]


@pytest.mark.parametrize("strength", ["nan", "inf", "-inf", "1e999", "strong", ""])
def test_strengths_that_are_none(demo, capsys, strength):
    with pytest.raises(SystemExit):
        arguments.parser().parse_args(["generate", "x", "--lora", f"{demo / 'a.safetensors'}:{strength}"])
    assert f"'{strength}' is not a strength" in capsys.readouterr().err
