"""LoRA files: what is written, read, refused, doubted, and merged."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from starflow_core.errors import CheckpointError, InputError, NonFiniteError
from starflow_core.model.config import KNOWN_MODELS
from starflow_core.model.lora import ALL, Lora, adapt, attach, linear_names, merge
from starflow_core.weights import lora as lorafiles
from starflow_core.weights.flow import convert, load_flow, save_flow
from starflow_core.weights.lora import (
    Chosen,
    LoraFile,
    base_hash,
    base_metadata,
    linear_shapes,
    merge_loras,
    quick_look,
    save_lora,
)
from starflow_core.weights.tensorfiles import TensorFile
from tests.core import models
from tests.core.models import randn, relative_error

LAYER = "blocks.2.attn_blocks.0.attention.qkv"
KEY = f"diffusion_model.{LAYER}"
CONFIG = models.config()


def adapters(flow=None, rank=2, blocks="deep", seed=0) -> dict[str, Lora]:
    found = adapt(flow or models.flow(), rank, 3.0, blocks=blocks, generator=torch.Generator().manual_seed(seed))
    for number, lora in enumerate(found.values()):
        lora.lora_B.data = 0.3 * randn(*lora.lora_B.shape, seed=seed + number)
    return found


@pytest.fixture
def saved(tmp_path):
    """A LoRA's path, for the flow of `models.flow()`."""
    path = tmp_path / "a.safetensors"
    save_lora(adapters(), path, CONFIG, {"base_name": "tiny.pth", "trigger_words": "xyz"})
    return path


def changed(path, change, metadata=None):
    """The file with its tensors changed by a function."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)
    return path


@pytest.fixture
def base(tmp_path):
    """A checkpoint, and its two conversions."""
    path, bf16, int8 = (tmp_path / f"{name}.safetensors" for name in ("base", "bf16", "int8"))
    save_flow(models.flow(), path, "fp32")
    convert(path, bf16)
    convert(bf16, int8, "int8")
    return path, bf16, int8


@pytest.mark.parametrize("seed", range(6))
def test_what_is_saved_comes_back(tmp_path, seed):
    """For random flows, ranks and blocks; two saves are the same bytes."""
    rng = random.Random(seed)
    flow, _ = models.random_case(seed)
    written = adapters(flow, rng.randint(1, 4), rng.choice((ALL, "deep", [0])), seed)
    for path in (tmp_path / "a.safetensors", tmp_path / "b.safetensors"):
        save_lora(written, path, flow.config, {"settings": "{}"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    found = LoraFile.open(tmp_path / "a.safetensors")
    found.check(flow.config)
    assert found.config == flow.config
    assert found.nbytes == 4 * sum(lora.lora_A.numel() + lora.lora_B.numel() for lora in written.values())
    loaded = found.load(-0.5)
    assert loaded.keys() == written.keys()
    for name, lora in loaded.items():
        assert torch.equal(lora.lora_A, written[name].lora_A)
        assert torch.equal(lora.lora_B, written[name].lora_B)
        assert (lora.alpha, lora.strength) == (3.0, -0.5)
        assert not lora.lora_A.requires_grad


def test_names_and_metadata_in_the_file(saved):
    tensors = load_file(saved)
    assert {name for name in tensors if LAYER in name} == {
        f"{KEY}.lora_A.weight", f"{KEY}.lora_B.weight", f"{KEY}.alpha",
    }  # fmt: skip
    assert len(tensors) == 3 * len(linear_names(models.flow()))
    assert tensors[f"{KEY}.lora_A.weight"].shape == (2, 72)
    assert tensors[f"{KEY}.lora_B.weight"].shape == (216, 2)
    assert tensors[f"{KEY}.alpha"].shape == ()
    metadata = TensorFile.open(saved).metadata
    assert json.loads(metadata["starflow_config"]) == json.loads(json.dumps(CONFIG.to_dict()))
    assert metadata["trigger_words"] == "xyz"


def test_16_bit_files(tmp_path):
    written = adapters()
    save_lora(written, tmp_path / "a.safetensors", CONFIG, {}, "bf16")
    lora = LoraFile.open(tmp_path / "a.safetensors").load()[LAYER]
    assert torch.equal(lora.lora_B, written[LAYER].lora_B.bfloat16().float())
    assert lora.alpha == 3.0


def test_other_names_and_no_alpha(saved):
    """As other trainers have them; without alpha the scale is the strength."""

    def renamed(tensors):
        for name in list(tensors):
            tensor = tensors.pop(name)
            if not name.endswith("alpha"):
                name = name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
                tensors[name.removeprefix("diffusion_model.")] = tensor.bfloat16()

    loras = LoraFile.open(changed(saved, renamed)).load(2.0)
    assert {lora.scale for lora in loras.values()} == {2.0}
    assert torch.equal(loras[LAYER].lora_A, adapters()[LAYER].lora_A.bfloat16().float())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{KEY}.lora_B.weight"), r"of its 8 layers 1 lack lora_A or lora_B \(blocks.2.*qkv\)"),
        (lambda t: t.update({f"{KEY}.dora_scale": torch.ones(3)}), r"1 tensors are not .* plain LoRA \(.*dora_scale\)"),
        (lambda t: t.update({f"{KEY}.lora_B.weight": torch.ones(216, 3)}), r"qkv A \(2, 72\), B \(216, 3\)"),
        (lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(2, 72, 1, 1)}), "don't go together"),
        (lambda t: t.update({f"{KEY}.alpha": torch.ones(2)}), "don't go together"),
        (lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(2, 72, dtype=torch.int8)}), "1 are of a type other"),
        (lambda t: t.update({f"{KEY}.lora_up.weight": torch.ones(216, 2)}), "1 tensors are not"),
    ],
)
def test_incomplete_files(saved, change, words):
    with pytest.raises(CheckpointError, match=words):
        LoraFile.open(changed(saved, change))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_tensors_that_are_not_finite(saved, value):
    def spoil(tensors):
        tensors[f"{KEY}.lora_B.weight"][1, 1] = value

    with pytest.raises(NonFiniteError, match=rf"{LAYER}\.lora_B\.weight of a\.safetensors has NaN or infinity"):
        LoraFile.open(changed(saved, spoil)).load()
    assert quick_look(saved)


def test_files_that_are_something_else(tmp_path):
    path = tmp_path / "x.safetensors"
    cases = {
        "transformer.single_blocks.0.attn.lora_A.weight": "x.safetensors is a LoRA of another family of models",
        "lora_unet_blocks_0_attn.lora_down.weight": "another family",
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": "another family",
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight": "another family",
        "blocks.0.attn_blocks.0.attention.qkv.weight": "a whole model, not a LoRA; give it as the model",
        "encoder.conv_in.weight": r"isn't a LoRA \(1 tensors: encoder.conv_in.weight\); expected names such as",
    }
    for name, words in cases.items():
        save_file({name: torch.ones(2, 2)}, path)
        assert not quick_look(path)
        with pytest.raises(CheckpointError, match=words):
            LoraFile.open(path)
    with pytest.raises(CheckpointError, match=r"no LoRA at .*missing"):
        LoraFile.open(tmp_path / "missing.safetensors")


def test_what_lists_show(saved, tmp_path):
    assert quick_look(saved)
    saved.write_bytes(saved.read_bytes()[:-100])
    assert quick_look(saved)  # whoever chooses it is told that it is damaged
    (tmp_path / "a.txt").write_text("text")
    assert not quick_look(tmp_path / "a.txt")
    assert not quick_look(tmp_path / "missing.safetensors")


def test_it_has_to_fit(saved):
    found = LoraFile.open(saved)
    found.check(CONFIG)
    words = r"a\.safetensors doesn't fit .*: of its 8 layers 8 have another shape \(.*qkv \(216, 72\) instead of "
    words += r"\(144, 48\), .*\.\.\)\. Use it with its own model: it was trained on .* \(tiny\.pth\)"
    with pytest.raises(CheckpointError, match=words):
        found.check(replace(CONFIG, deep_width=48))
    narrow = changed(saved, lambda tensors: tensors.update({f"{KEY}.lora_A.weight": torch.ones(2, 70)}))
    with pytest.raises(CheckpointError, match=r"of its 8 layers 1 have another shape \(.*qkv \(216, 70\) instead of"):
        LoraFile.open(narrow).check(CONFIG)
    with pytest.raises(CheckpointError, match="of its 8 layers 4 aren't there"):
        found.check(replace(CONFIG, layers=(1, 1, 1)))
    with pytest.raises(CheckpointError, match="doesn't say on which model"):
        LoraFile(replace(found.file, metadata={}), found.parts).check(replace(CONFIG, layers=(1, 1, 1)))


def test_the_layers_are_those_that_can_be_adapted():
    assert list(linear_shapes(CONFIG)) == linear_names(models.flow(), ALL)
    assert len(linear_shapes(KNOWN_MODELS["starflow-v-7b"])) == 4 * sum(KNOWN_MODELS["starflow-v-7b"].layers)


def test_conversions_are_one_base(base, tmp_path, monkeypatch):
    files = [TensorFile.open(path) for path in base]
    hashed = []
    monkeypatch.setattr(lorafiles, "_hashes", {})
    assert len({base_hash(file, hashed.append) for file in files}) == 1
    assert [progress.phase for progress in hashed] == ["hash"]
    base_hash(files[0], lambda _: pytest.fail("hashed again"))
    path = tmp_path / "lora.safetensors"
    save_lora(adapters(), path, CONFIG, base_metadata(files[1]))
    assert all(LoraFile.open(path).doubt(file) is None for file in files)
    save_flow(models.flow(seed=1), tmp_path / "other.safetensors", "fp32")
    other = TensorFile.open(tmp_path / "other.safetensors")
    assert "is of other weights than other.safetensors" in LoraFile.open(path).doubt(other)
    assert "(base.safetensors)" in LoraFile.open(path).doubt(other)


def test_an_unknown_base_is_doubted_without_reading_it(base, saved):
    file = TensorFile.open(base[0])
    doubt = LoraFile.open(saved).doubt(file, lambda _: pytest.fail("hashed in vain"))
    assert "doesn't say of which weights" in doubt


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_merging_a_file(base, saved, tmp_path, dtype):
    """As merging in memory in float32: rounded once. What becomes of it is a model of its own."""
    second = tmp_path / "second.safetensors"
    save_lora(adapters(rank=1, blocks=ALL, seed=9), second, CONFIG, {"license": "mine"})
    chosen = [(saved, 0.5), second, (saved, 0.0)]
    target, phases = tmp_path / "merged.safetensors", set()
    doubts = merge_loras(base[0], chosen, target, dtype, progress=lambda progress: phases.add(progress.phase))
    assert (len(doubts), phases) == (3, {"hash", "merge"})
    exact = load_flow(base[0])
    for each in chosen:
        attach(exact, Chosen.open(each).load())
    merge(exact)
    found, wanted = load_flow(target).state_dict(), exact.state_dict()
    assert all(torch.equal(found[name], wanted[name].to(found[name].dtype)) for name in wanted)
    assert not torch.equal(found[f"{LAYER}.weight"].float(), models.flow().state_dict()[f"{LAYER}.weight"])
    file = TensorFile.open(target)
    assert json.loads(file.metadata["loras"]) == [
        {"name": "a.safetensors", "strength": 0.5, "trigger_words": "xyz"},
        {"name": "second.safetensors", "strength": 1.0, "license": "mine"},
        {"name": "a.safetensors", "strength": 0.0, "trigger_words": "xyz"},
    ]
    assert file.metadata["base_sha256"] == base_hash(TensorFile.open(base[1])) != base_hash(file)


def test_a_conversion_merges_to_a_model_of_its_own(base, saved, tmp_path):
    merge_loras(base[1], [saved], tmp_path / "merged.safetensors")
    file = TensorFile.open(tmp_path / "merged.safetensors")
    assert file.metadata["base_name"] == "base.safetensors"
    assert base_hash(file) != base_hash(TensorFile.open(base[0]))


def test_merging_that_cannot_work(base, saved, tmp_path):
    target = tmp_path / "merged.safetensors"
    with pytest.raises(InputError, match=r"int8\.safetensors is in 8 bit.*original or its bf16"):
        merge_loras(base[2], [saved], target)
    with pytest.raises(InputError, match="is the source itself"):
        merge_loras(base[0], [saved], base[0], overwrite=True)
    small = tmp_path / "small.safetensors"
    save_flow(models.flow(layers=(1, 1, 1)), small)
    with pytest.raises(CheckpointError, match="4 aren't there"):
        merge_loras(small, [saved], target)
    assert not target.exists()


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_strengths_that_are_no_numbers(saved, strength):
    with pytest.raises(InputError, match=r"strength of a LoRA is (nan|inf); give a finite number"):
        LoraFile.open(saved).load(strength)
    with pytest.raises(InputError, match="finite"):
        Chosen.open((saved, strength))


def test_loaded_ones_compute_as_those_saved(saved):
    flow, latents = models.flow(), randn(1, 2, 4, 3, 3)
    trained = copy.deepcopy(flow)
    attach(trained, adapters())
    attach(flow, LoraFile.open(saved).load())
    found, exact = (f(latents, models.text(f)).noise.detach() for f in (flow, trained))
    assert relative_error(found, exact) < 1e-12
