"""Prompt wrapping, T5 loading and encoding, the demo's tokenizer."""

from __future__ import annotations

import json
import random
import string
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import starflow_core
from starflow_core.errors import CheckpointError, InputError, NonFiniteError
from starflow_core.jobs.prompts import wrap
from starflow_core.model.config import STARFLOW_3B, STARFLOW_V_7B
from starflow_core.model.int8 import Int8Linear, quantise
from starflow_core.training.demo.clips import caption, edit_caption, random_scene
from starflow_core.training.demo.tokenizer import build_tokenizer
from starflow_core.weights.int8 import mark
from starflow_core.weights.tensorfiles import TensorFile
from starflow_core.weights.text import (
    EMBEDDING,
    EMBEDDING_ALIAS,
    QUANTISED,
    T5_CONFIG_KEY,
    find_text_encoder,
    load_text_encoder,
    load_tokenizer,
)

VIDEO_TEXT = "Noise Level 500:\nA video with 16 fps:\na red ball\n\n in a 16:9 aspect ratio.\n"
TEXTS = ["a red circle moving left on a black background", "", "crimson"]


def tiny_config(**changes):
    from transformers import T5Config

    settings = {"vocab_size": 150, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 3}
    settings |= {"relative_attention_num_buckets": 8, "feed_forward_proj": "gated-gelu"}
    return T5Config(**{**settings, **changes})


def tiny_t5(**changes):
    from transformers import T5EncoderModel

    torch.manual_seed(0)
    return T5EncoderModel(tiny_config(**changes)).eval()


def weights(model, embedding=EMBEDDING):
    """The encoder's weights with one name for the embedding."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    both = [state.pop(name) for name in (EMBEDDING, EMBEDDING_ALIAS)]
    return {**state, embedding: both[0]}


@pytest.fixture
def tokenizer_folder(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    build_tokenizer(folder)
    return folder


@pytest.fixture
def single_file(tmp_path, tokenizer_folder):
    """A single file beside the tokenizer's folder."""
    path = tmp_path / "t5.safetensors"
    save_file(weights(tiny_t5()), path)
    return path


def replace_weights(path, **changes):
    """Save the tiny encoder with some tensors replaced, added, or (None) left out."""
    state = {**weights(tiny_t5()), **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)


# Wrapping


def test_video_prompt():
    assert wrap("a red ball", STARFLOW_V_7B, fps=16, aspect="16:9") == VIDEO_TEXT


@pytest.mark.parametrize(("fps", "shown"), [(16.0, "16"), (24, "24"), (23.976, "23.976"), (7.5, "7.5")])
def test_fps_is_shown_without_needless_decimals(fps, shown):
    text = wrap("a red ball", STARFLOW_V_7B, fps=fps, aspect="16:9")
    assert text == VIDEO_TEXT.replace("16 fps", f"{shown} fps")


def test_still_of_a_video_model():
    text = wrap("a red ball", STARFLOW_V_7B, fps=0, aspect="1:1")
    assert text == "Noise Level 500:\nAn image:\na red ball\n\n in a 1:1 aspect ratio.\n"


def test_each_part_of_the_wrapping_has_its_own_switch():
    def text(**switches):
        prompt = replace(STARFLOW_V_7B.prompt, **{"fps": False, "noise_level": False, "aspect": False, **switches})
        return wrap("x", replace(STARFLOW_V_7B, prompt=prompt, noise_std=0.2), fps=8, aspect="2:3")

    assert text() == "x"
    assert text(fps=True) == "A video with 8 fps:\nx\n"
    assert text(noise_level=True) == "Noise Level 200:\nx"
    assert text(aspect=True) == "x\n in a 2:3 aspect ratio.\n"


@pytest.mark.parametrize(
    ("task", "prefix"),
    [("text", ""), ("first_frame", ""), ("extend", "(extend) "), ("edit", "(v2v) "), ("last_frame", "(last) ")],
)
def test_task_prefix_goes_before_the_caption_only(task, prefix):
    text = wrap("a red ball", STARFLOW_V_7B, fps=16, aspect="16:9", task=task)
    assert text == VIDEO_TEXT.replace("a red", f"{prefix}a red")
    empty = wrap("", STARFLOW_V_7B, fps=16, aspect="16:9", task=task)
    assert empty == "Noise Level 500:\nA video with 16 fps:\n\n\n in a 16:9 aspect ratio.\n"


def test_image_model_takes_the_bare_caption():
    assert wrap("a red ball", STARFLOW_3B, fps=0, aspect="1:1") == "a red ball"
    assert wrap("", STARFLOW_3B, fps=0, aspect="1:1") == ""


def test_unknown_task():
    with pytest.raises(InputError, match="dance"):
        wrap("a red ball", STARFLOW_V_7B, fps=16, aspect="1:1", task="dance")


# Encoding


def test_embeddings_are_those_of_transformers(single_file, tokenizer_folder):
    """Padded to the full length and masked behind, as the reference does it."""
    from transformers import AutoTokenizer

    encoder = load_text_encoder(single_file)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    for tokens in (40, 5):
        batch = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=tokens, return_tensors="pt")
        mask = batch["attention_mask"]
        with torch.no_grad():
            hidden = tiny_t5()(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        embeddings = encoder.encode(TEXTS, tokens).embeddings
        assert embeddings.shape == (3, tokens, encoder.dim)
        torch.testing.assert_close(embeddings, hidden * mask[..., None], atol=1e-5, rtol=1e-5)


def test_padding_rows_are_zero(single_file):
    embeddings = load_text_encoder(single_file).encode(["a red circle", ""], 6).embeddings
    used = embeddings.abs().sum(-1) > 0
    assert used.tolist() == [[True] * 4 + [False] * 2, [True] + [False] * 5]


def test_a_text_in_a_batch_is_encoded_as_if_alone(single_file):
    encoder = load_text_encoder(single_file)
    batch = encoder.encode(TEXTS, 12).embeddings
    alone = torch.cat([encoder.encode([text], 12).embeddings for text in TEXTS])
    torch.testing.assert_close(batch, alone, atol=1e-5, rtol=1e-5)


def test_what_is_cut_off_is_reported(single_file):
    encoder = load_text_encoder(single_file)
    assert encoder.encode(["a red circle", "A red  circle\nmoving left", ""], 4).cut == ["", "moving left", ""]
    assert encoder.encode(["a red circle"], 1).cut == ["a red circle"]
    assert encoder.encode(["a red circle\n\n"], 4).cut == [""]


def test_end_of_text_survives_truncation(single_file):
    ids, mask, _ = load_text_encoder(single_file).tokenize(["a red circle moving left", "red"], 3)
    assert ids[:, -1].tolist() == [1, 0]
    assert ids[1, 1] == 1
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_no_text_at_all(single_file):
    with pytest.raises(InputError, match="no prompt"):
        load_text_encoder(single_file).encode([], 4)


def test_gradients_flow_in_training_only(single_file):
    encoder = load_text_encoder(single_file)
    encoder.embed(["a red circle"], 8).embeddings.square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.model.parameters())
    assert not encoder.encode(["a red circle"], 8).embeddings.requires_grad


def test_inference_mode_leaves_usable_tensors(single_file):
    with torch.inference_mode():
        encoder = load_text_encoder(single_file)
        embeddings = encoder.encode(["a red circle"], 8).embeddings
    assert not embeddings.is_inference()
    assert not any(parameter.is_inference() for parameter in encoder.model.parameters())
    scale = torch.ones(1, requires_grad=True)
    (embeddings * scale).sum().backward()
    assert scale.grad.isfinite().all()


@pytest.mark.parametrize(("dtype", "remedy"), [(torch.float16, "bfloat16 or float32"), (torch.float32, "damaged")])
def test_non_finite_embeddings_stop(single_file, dtype, remedy):
    encoder = load_text_encoder(single_file, dtype=dtype)
    red = encoder.tokenizer.encode("red", add_special_tokens=False).ids[0]
    encoder.model.shared.weight.data[red] = float("inf")
    with pytest.raises(NonFiniteError, match=rf"prompt 2.*{remedy}"):
        encoder.encode(["", "a red circle"], 8)


# Loading


def test_single_files_and_folders_agree(tmp_path, single_file, tokenizer_folder):
    expected = load_text_encoder(single_file).encode(TEXTS, 20).embeddings
    alias = tmp_path / "alias.safetensors"
    save_file(weights(tiny_t5(), EMBEDDING_ALIAS), alias)
    model = tiny_t5()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    model.save_pretrained(tmp_path / "pipeline" / "text_encoder")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    for path in (alias, tmp_path / "whole", tmp_path / "sharded", tmp_path / "pipeline"):
        encoder = load_text_encoder(path, tokenizer=tokenizer_folder)
        torch.testing.assert_close(encoder.encode(TEXTS, 20).embeddings, expected, atol=0, rtol=0)
        assert encoder.model.shared.weight is encoder.model.encoder.embed_tokens.weight


def test_tokenizer_of_a_pipeline_folder(tmp_path):
    tiny_t5().save_pretrained(tmp_path / "pipeline" / "text_encoder")
    (tmp_path / "pipeline" / "tokenizer").mkdir()
    build_tokenizer(tmp_path / "pipeline" / "tokenizer")
    assert load_text_encoder(tmp_path / "pipeline").encode([""], 4).embeddings[0, 0].any()


@pytest.mark.parametrize("projection", ["gated-gelu", "relu"])
def test_configuration_from_shapes(tmp_path, tokenizer_folder, projection):
    model = tiny_t5(feed_forward_proj=projection)
    save_file(weights(model), tmp_path / "t5.safetensors")
    encoder = load_text_encoder(tmp_path / "t5.safetensors")
    found, given = encoder.model.config.to_dict(), model.config.to_dict()
    for name in ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size", "feed_forward_proj"):
        assert found[name] == given[name]
    ids, mask, _ = encoder.tokenize(["a red circle"], 8)
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(encoder.encode(["a red circle"], 4).embeddings, hidden)


def test_configuration_from_metadata(tmp_path, tokenizer_folder):
    """What the shapes don't tell comes from the file."""
    settings = tiny_config(relative_attention_max_distance=5).to_diff_dict()
    metadata = {T5_CONFIG_KEY: json.dumps(settings)}
    save_file(weights(tiny_t5()), tmp_path / "t5.safetensors", metadata=metadata)
    config = load_text_encoder(tmp_path / "t5.safetensors").model.config
    assert config.relative_attention_max_distance == 5


def test_decoder_of_a_full_t5_is_skipped(tmp_path, single_file):
    from transformers import T5ForConditionalGeneration

    full = T5ForConditionalGeneration(tiny_config())
    state = {name: tensor.clone() for name, tensor in full.state_dict().items()}
    assert any(name.startswith("decoder.") for name in state)
    save_file({**state, **weights(tiny_t5())}, tmp_path / "full.safetensors")
    expected = load_text_encoder(single_file).encode(TEXTS, 20).embeddings
    found = load_text_encoder(tmp_path / "full.safetensors").encode(TEXTS, 20).embeddings
    torch.testing.assert_close(found, expected)


def test_types(tmp_path, single_file):
    save_file({name: tensor.bfloat16() for name, tensor in weights(tiny_t5()).items()}, tmp_path / "half.safetensors")
    expected = load_text_encoder(single_file).encode(TEXTS, 20).embeddings
    for encoder, dtype in (
        (load_text_encoder(tmp_path / "half.safetensors"), torch.bfloat16),
        (load_text_encoder(tmp_path / "half.safetensors", dtype=torch.float32), torch.float32),
        (load_text_encoder(single_file, dtype=torch.float16), torch.float16),
    ):
        embeddings = encoder.encode(TEXTS, 20).embeddings
        assert embeddings.dtype == dtype
        assert (embeddings.float() - expected).norm() < 0.03 * expected.norm()


def test_float64_is_loaded_as_float32(tmp_path, tokenizer_folder):
    save_file({name: tensor.double() for name, tensor in weights(tiny_t5()).items()}, tmp_path / "t5.safetensors")
    model = load_text_encoder(tmp_path / "t5.safetensors").model
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_what_is_found_is_not_read(single_file, monkeypatch):
    encoder = load_text_encoder(single_file)
    monkeypatch.setattr(TensorFile, "tensor", lambda *_: pytest.fail("weights were read"))
    found = find_text_encoder(single_file)
    assert found.dim == encoder.dim
    sizes = {name: weight.numel() for name, weight in encoder.model.named_parameters()}
    wide = sum(size for name, size in sizes.items() if name.endswith("wo.weight"))
    assert found.weight_bytes(torch.bfloat16) == 2 * sum(sizes.values())
    assert found.weight_bytes(torch.float16) == 2 * sum(sizes.values()) + 2 * wide


def test_one_find_serves_several_loads(single_file):
    found = find_text_encoder(single_file)
    first, second = found.load(torch.bfloat16), found.load()
    first.model.shared.weight.data.zero_()
    assert second.encode(TEXTS, 20).embeddings.any()
    assert (first.model.dtype, second.model.dtype) == (torch.bfloat16, torch.float32)
    assert first.model.shared.weight is first.model.encoder.embed_tokens.weight


def test_float16_keeps_the_layer_that_overflows_in_float32(tmp_path, single_file):
    name = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    replace_weights(tmp_path / "large.safetensors", **{name: weights(tiny_t5())[name] * 1e6})
    exact = load_text_encoder(tmp_path / "large.safetensors").encode(TEXTS, 20).embeddings
    half = load_text_encoder(tmp_path / "large.safetensors", dtype=torch.float16).encode(TEXTS, 20).embeddings
    assert (half.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("projection", ["gated-gelu", "relu"])
def test_in_8_bit(tmp_path, tokenizer_folder, dtype, projection):
    """The blocks' linear layers, but in float16 not the one that overflows in it."""
    path = tmp_path / "t5.safetensors"
    save_file(weights(tiny_t5(feed_forward_proj=projection)), path)
    expected = load_text_encoder(path).encode(TEXTS, 20).embeddings
    found = find_text_encoder(path, quantise=True)
    encoder = found.load(dtype)
    embeddings = encoder.encode(TEXTS, 20).embeddings
    assert embeddings.dtype == dtype
    assert (embeddings.float() - expected).norm() < 0.05 * expected.norm()
    model = encoder.model
    kinds = {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, Int8Linear)}
    wide = {"wi_0", "wi_1"} if projection == "gated-gelu" else {"wi"}
    assert kinds == {"q", "k", "v", "o", *wide, *(() if dtype == torch.float16 else ("wo",))}
    assert found.weight_bytes(dtype) == sum(weight.nbytes for weight in model.parameters())
    assert found.weight_bytes(dtype) < find_text_encoder(path).weight_bytes(dtype)


def test_a_file_in_8_bit(tmp_path, single_file):
    state, expected = load_file(single_file), load_text_encoder(single_file, quantise=True)
    for name in [name for name in state if QUANTISED.fullmatch(name)]:
        layer = name.removesuffix(".weight")
        state[name], state[f"{layer}.weight_scale"] = quantise(state[name])
        state[f"{layer}.comfy_quant"] = mark()
    save_file(state, tmp_path / "int8.safetensors", TensorFile.open(single_file).metadata)
    found = find_text_encoder(tmp_path / "int8.safetensors")
    assert torch.equal(found.load().encode(TEXTS, 20).embeddings, expected.encode(TEXTS, 20).embeddings)
    assert found.weight_bytes(torch.float32) == sum(weight.nbytes for weight in found.load().model.parameters())
    state.pop(f"{layer}.weight_scale")
    save_file(state, tmp_path / "int8.safetensors")
    with pytest.raises(CheckpointError, match=f"{layer} of int8.safetensors, a layer in 8 bit, has no weight_scale"):
        find_text_encoder(tmp_path / "int8.safetensors")


def test_width_is_checked_against_the_model(single_file):
    encoder = load_text_encoder(single_file)
    assert encoder.dim == 16
    replace(STARFLOW_V_7B, text_dim=16).check_text_encoder(encoder.dim)
    with pytest.raises(InputError, match=r"16 channels.*2048.*flan-t5-xl"):
        STARFLOW_V_7B.check_text_encoder(encoder.dim)


def test_sentencepiece_model(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    rng = random.Random(0)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(caption(random_scene(rng, 96, 96), rng) for _ in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "spiece"), vocab_size=45, character_coverage=1.0,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(str(tmp_path / "spiece.model"))
    text = "a red circle moving left on a black background"
    assert tokenizer.encode(text, add_special_tokens=False).ids == processor.encode(text)
    save_file(weights(tiny_t5()), tmp_path / "t5.safetensors")
    tokens = len(processor.encode(text))
    assert load_text_encoder(tmp_path / "t5.safetensors").encode([text], tokens).cut[0] in text


# Errors


def test_missing_tokenizer(tmp_path, single_file, tokenizer_folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tokenizer_folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json or spiece\.model.*google/flan-t5-xl"):
        load_text_encoder(single_file)
    with pytest.raises(CheckpointError, match="elsewhere"):
        load_text_encoder(single_file, tokenizer=tmp_path / "elsewhere")


def test_unusable_tokenizers(single_file, tokenizer_folder):
    file = tokenizer_folder / "tokenizer.json"
    text = file.read_text()
    for wrong, message in (
        (text[:300], "isn't a readable tokenizer"),
        (text.replace("</s>", "<|endoftext|>"), "not a T5's"),
    ):
        file.write_text(wrong)
        with pytest.raises(CheckpointError, match=message):
            load_text_encoder(single_file)
    file.unlink()
    (tokenizer_folder / "spiece.model").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"put the tokenizer\.json"):
        load_text_encoder(single_file)


@pytest.mark.parametrize("rows", [100, 5000])
def test_tokenizer_of_another_model(tmp_path, tokenizer_folder, rows):
    replace_weights(tmp_path / "t5.safetensors", shared__weight=torch.zeros(rows, 16))
    with pytest.raises(CheckpointError, match=f"135 tokens.*{rows}"):
        load_text_encoder(tmp_path / "t5.safetensors")


def test_missing_and_corrupt_files(tmp_path, single_file):
    with pytest.raises(CheckpointError, match=r"none\.safetensors"):
        load_text_encoder(tmp_path / "none.safetensors")
    data = single_file.read_bytes()
    for broken in (b"", data[:200], data[:-10], b"\xff" * 64):
        single_file.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"t5\.safetensors"):
            load_text_encoder(single_file)


@pytest.mark.parametrize(
    "name",
    [
        "text_model.encoder.layers.0.mlp.fc1.weight",  # CLIP
        "model.layers.0.self_attn.q_proj.weight",  # a language model
        "blocks.0.attn.q.weight",  # UMT5 as Wan keeps it
    ],
)
def test_files_that_are_no_t5(tmp_path, tokenizer_folder, name):
    save_file({name: torch.zeros(4, 4)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=rf"not a T5.*flan-t5-xl.*{name}"):
        load_text_encoder(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("encoder.final_layer_norm.weight", None, "1 missing .*final_layer_norm"),
        ("encoder.final_layer_norm.weight", torch.ones(5), "1 wrongly shaped .*final_layer_norm"),
        ("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight", torch.ones(8, 3), "1 unexpected"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", None, "incomplete"),
        ("encoder.final_layer_norm.weight", torch.ones(16).to(torch.float8_e4m3fn), "quantised"),
        ("encoder.final_layer_norm.weight", torch.ones(16, dtype=torch.int8), "quantised"),
    ],
)
def test_encoders_that_are_incomplete_or_of_another_kind(tmp_path, tokenizer_folder, name, tensor, message):
    replace_weights(tmp_path / "t5.safetensors", **{name: tensor})
    with pytest.raises(CheckpointError, match=message):
        find_text_encoder(tmp_path / "t5.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "umt5"}', "umt5"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "no JSON object"),
        ('{"model_type": ["t5"]}', r"describes a \['t5'\] model"),
        ('{"feed_forward_proj": "a-b-c"}', r"feed_forward_proj is 'a-b-c', expected one of \('relu'"),
        ('{"feed_forward_proj": "relu"}', "contradicts the tensors: feed_forward_proj is 'relu', not gated-gelu"),
        ('{"d_ff": 1e30}', r"contradicts the tensors: d_ff is 1e\+30, not"),
        ('{"layer_norm_epsilon": NaN}', "layer_norm_epsilon is nan, expected float .* from 1e-12 to 1"),
        ('{"relative_attention_max_distance": "far"}', "relative_attention_max_distance is 'far', expected int"),
        ('{"relative_attention_max_distance": 2}', "relative_attention_max_distance is too small"),
    ],
)
def test_wrong_configurations(tmp_path, tokenizer_folder, text, message):
    tiny_t5().save_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_text_encoder(tmp_path / "folder")
    save_file(weights(tiny_t5()), tmp_path / "t5.safetensors", metadata={T5_CONFIG_KEY: text})
    with pytest.raises(CheckpointError, match=message):
        load_text_encoder(tmp_path / "t5.safetensors")


# The demo's tokenizer


def demo_prompts():
    rng = random.Random(1)
    config = replace(STARFLOW_V_7B, noise_std=0.2)
    for number in range(60):
        scene = random_scene(rng, 96, 96, moving=number % 3 > 0)
        for task, text in (("extend", caption(scene, rng)), ("edit", edit_caption(scene.colour, rng)), ("text", "")):
            yield wrap(text, config, fps=16 if scene.direction else 0, aspect=rng.choice(("1:1", "16:9")), task=task)


def test_demo_tokenizer_round_trip(tokenizer_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    for text in (*demo_prompts(), "Crimson Circles, 2024!", string.printable.strip()):
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == 1
        assert ids == load_tokenizer(tokenizer_folder).encode(text).ids
        assert 2 not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == " ".join(text.lower().split())


def test_demo_vocabulary(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    assert [tokenizer.token_to_id(name) for name in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    assert len(tokenizer.get_vocab()) == tokenizer.get_vocab_size() < 300
    assert tokenizer.encode("☃", add_special_tokens=False).ids[-1] == 2
    pieces = tokenizer.encode("2024 crimson circle", add_special_tokens=False).tokens
    assert pieces == ["▁2", "0", "2", "4", "▁", *"crimson", "▁circle"]


def test_demo_prompts_are_short(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    assert max(len(tokenizer.encode(text).ids) for text in demo_prompts()) <= 28


def test_bundled_tokenizer_is_the_built_one(tokenizer_folder):
    bundled = Path(starflow_core.__file__).parent / "bundled"
    built, shipped = (json.loads((folder / "tokenizer.json").read_text()) for folder in (tokenizer_folder, bundled))
    assert shipped == built
