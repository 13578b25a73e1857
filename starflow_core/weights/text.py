"""T5 text encoders and their tokenizers: find, check and load them in any layout they are published in."""

from __future__ import annotations

import copy
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..model.int8 import replace_linear
from ..model.schema import WIDEST, check_fields, completed, number, read_object, shown
from ..model.text import EOS, PAD, TextEncoder
from . import int8
from .keys import Shapes, check_tensors, count_numbers, loading_dtype, module_shapes
from .tensorfiles import TensorFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import T5Config

T5_CONFIG_KEY = "starflow_t5_config"  # metadata of a single file: T5Config's arguments as JSON
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
EMBEDDING, EMBEDDING_ALIAS = "shared.weight", "encoder.embed_tokens.weight"
FIRST_BLOCK = "encoder.block.0.layer."
# What may be in 8 bit: the linear layers of the blocks.
QUANTISED = re.compile(
    r"encoder\.block\.\d+\.layer\.\d+\.(SelfAttention\.[qkvo]|DenseReluDense\.(wi|wi_0|wi_1|wo))\.weight"
)
EXPECTED_ENCODER = "expected the encoder of flan-t5-xl or another T5"
REMEDY = "Use the whole encoder of flan-t5-xl or another T5, in bf16, fp16 or fp32."
# T5 pads its embedding to a round number of rows; beyond this it is another model's tokenizer.
MOST_SPARE_ROWS = 1024
GATED = "gated-gelu"  # unless a configuration names another
PROJECTIONS = ("relu", "gelu", "silu", "gated-relu", "gated-gelu", "gated-silu")


@dataclass(frozen=True)
class T5Options:
    """What a T5's tensors don't tell of its configuration."""

    feed_forward_proj: str | None = None
    relative_attention_max_distance: int | None = number(2, 1 << 20, None)
    layer_norm_epsilon: float | None = number(1e-12, 1, None)
    dropout_rate: float | None = number(0, 0.999, None)

    def __post_init__(self):
        check_fields(self)
        if self.feed_forward_proj not in (None, *PROJECTIONS):
            raise CheckpointError(
                f"feed_forward_proj is {shown(self.feed_forward_proj)}, expected one of {PROJECTIONS}"
            )


def load_text_encoder(
    path: str | Path,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    quantise: bool = False,
) -> TextEncoder:
    """The T5 encoder that `find_text_encoder` finds; `dtype` None keeps the file's type."""
    return find_text_encoder(path, tokenizer, quantise).load(dtype, device)


@dataclass(frozen=True)
class TextEncoderFiles:
    """A T5 encoder that was inspected, not loaded: the `weights` in their file, by T5EncoderModel's names, the
    `outline` of the model, without memory, and the tokenizer. `quantise` brings the large weights to 8 bit when they
    are loaded; those that are in 8 bit stay so."""

    weights: TensorFile
    outline: nn.Module
    tokenizer: Tokenizer
    quantise: bool = False

    @property
    def dim(self) -> int:
        """Channels of an embedding."""
        return self.outline.config.d_model

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Memory that the weights will take."""
        eight, shapes = self._in_int8(dtype), self.weights.shapes
        others = sum(_weight_dtype(name, dtype).itemsize * math.prod(shapes[name]) for name in shapes.keys() - eight)
        return others + int8.weight_bytes({name: shapes[name] for name in eight}, dtype, QUANTISED)

    def _in_int8(self, dtype: torch.dtype | None) -> set[str]:
        """The weights that will be in 8 bit; the layer that overflows in float16 is none of them."""
        return {
            name
            for name, stored in self.weights.tensors.items()
            if (stored.int8 or self.quantise) and QUANTISED.fullmatch(name) and not _overflows(name, dtype)
        }

    def load(self, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> TextEncoder:
        """Read the weights; `dtype` None keeps the file's type."""
        # Weights outlive the caller's inference mode: training may go on from them.
        with torch.inference_mode(False), torch.no_grad():
            model, state, eight = copy.deepcopy(self.outline), {}, self._in_int8(dtype)
            for name in self.weights.tensors:
                if name in eight:
                    layer = name.removesuffix(int8.WEIGHT)
                    replace_linear(model, layer)
                    values, scales = int8.int8_weight(self.weights, name)
                    state |= {name: values.to(device), layer + int8.SCALE: scales.to(device)}
                else:
                    weight = self.weights.tensor(name)
                    state[name] = weight.to(device, _weight_dtype(name, dtype or loading_dtype(weight.dtype)))
            state[EMBEDDING_ALIAS] = state[EMBEDDING]
            model.load_state_dict(state, assign=True)
        return TextEncoder(model.eval(), self.tokenizer)


def find_text_encoder(
    path: str | Path, tokenizer: str | Path | None = None, quantise: bool = False
) -> TextEncoderFiles:
    """A T5 encoder in a transformers folder (or one with `text_encoder/` and `tokenizer/`) or a single file.

    The decoder of a full T5 is skipped. `tokenizer` is a folder with tokenizer.json or spiece.model,
    by default the weights' own or a folder `tokenizer` in or beside it. `quantise` as in
    `TextEncoderFiles`. Nothing is downloaded, no weights are read. Raises CheckpointError for anything
    else, and for missing, unexpected or wrongly shaped tensors and quantised ones that can't be read.
    """
    path = Path(path)
    if os.path.isdir(path) and os.path.isdir(path / "text_encoder"):
        path = path / "text_encoder"
    weights = int8.joined(_encoder_weights(TensorFile.open(path)), QUANTISED)
    outline = _make_t5(_find_t5_config(path, weights))
    expected = {name: shape for name, shape in module_shapes(outline).items() if name != EMBEDDING_ALIAS}
    check_tensors(weights.tensors, expected, weights.path.name, "a T5 encoder", REMEDY)
    folder = _find_tokenizer(path if os.path.isdir(path) else path.parent, tokenizer)
    loaded_tokenizer = load_tokenizer(folder)
    rows = weights.shapes[EMBEDDING][0]
    spare = rows - loaded_tokenizer.get_vocab_size()
    if not 0 <= spare <= MOST_SPARE_ROWS:
        raise CheckpointError(
            f"the tokenizer in {folder} knows {loaded_tokenizer.get_vocab_size()} tokens, {weights.path.name} "
            f"{rows}: give the tokenizer that belongs to it"
        )
    return TextEncoderFiles(weights, outline, loaded_tokenizer, quantise)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """T5's tokenizer from tokenizer.json or, where there is none, spiece.model.

    Raises CheckpointError if it can't be read, or isn't a T5's.
    """
    file = Path(folder) / "tokenizer.json"
    tokenizer = _read_tokenizer(file) if os.path.isfile(file) else _convert_spiece(file.with_name("spiece.model"))
    missing = [name for name in (PAD, EOS) if tokenizer.token_to_id(name) is None]
    if missing:
        raise CheckpointError(f"the tokenizer in {folder} is not a T5's: it has no {', '.join(missing)}")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_tokenizer(file: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more specific
        raise CheckpointError(f"{file} isn't a readable tokenizer ({error}); download it again") from error


def _convert_spiece(file: Path) -> Tokenizer:
    try:
        import google.protobuf  # noqa: F401
        import sentencepiece  # noqa: F401
        from transformers import T5TokenizerFast

        return T5TokenizerFast.from_pretrained(file.parent, local_files_only=True).backend_tokenizer
    except Exception as error:  # as many kinds as packages take part
        raise CheckpointError(
            f"{file} could not be converted, it is damaged or the packages sentencepiece and protobuf are missing; "
            "put the tokenizer.json of the same model beside it"
        ) from error


def _find_tokenizer(folder: Path, given: str | Path | None) -> Path:
    places = [folder, folder / "tokenizer", folder.parent / "tokenizer"] if given is None else [Path(given)]
    for place in places:
        if any(os.path.isfile(place / name) for name in TOKENIZER_FILES):
            return place
    raise CheckpointError(
        f"no {' or '.join(TOKENIZER_FILES)} in {', '.join(map(str, places))}: put the tokenizer.json of the "
        "encoder (google/flan-t5-xl has one) beside its weights, or give its folder"
    )


def _encoder_weights(file: TensorFile) -> TensorFile:
    """The file with T5EncoderModel's names and without a decoder, once it looks like a T5's."""
    tensors = {
        EMBEDDING if name == EMBEDDING_ALIAS else name: tensor
        for name, tensor in file.tensors.items()
        if not name.startswith(("decoder.", "lm_head."))
    }
    if EMBEDDING not in tensors or not any(name.startswith(FIRST_BLOCK) for name in tensors):
        found = ", ".join(list(tensors)[:3]) or "no encoder"
        raise CheckpointError(f"{file.path.name} is not a T5 text encoder: {EXPECTED_ENCODER}, found {found}")
    return replace(file, tensors=tensors)


def _find_t5_config(path: Path, weights: TensorFile) -> T5Config:
    """The configuration that the tensors tell, with what they don't from the file's metadata or the folder's
    config.json."""
    from transformers import T5Config

    file, derived = path / "config.json", _config_from_shapes(weights.shapes)
    if T5_CONFIG_KEY in weights.metadata:
        where, text = f"metadata {T5_CONFIG_KEY} of {weights.path.name}", weights.metadata[T5_CONFIG_KEY]
    elif os.path.isfile(file):
        where, text = str(file), file.read_text(encoding="utf-8", errors="replace")
    else:
        return T5Config(**derived)
    values = read_object(text, where)
    if values.get("model_type", "t5") != "t5":
        raise CheckpointError(f"{where} describes a {shown(values['model_type'])} model: {EXPECTED_ENCODER}")
    gated, projection = derived["feed_forward_proj"] == GATED, values.get("feed_forward_proj")
    if isinstance(projection, str) and projection in PROJECTIONS and projection.startswith("gated-") == gated:
        derived["feed_forward_proj"] = projection
    values = completed(derived, values, T5Options, where)
    if values.get("relative_attention_max_distance", 128) <= values["relative_attention_num_buckets"] // 4:
        raise CheckpointError(
            f"{where}: relative_attention_max_distance is too small for its table; download the file again"
        )
    return T5Config(**values)


def _config_from_shapes(shapes: Shapes) -> dict[str, Any]:
    try:
        vocabulary, width = shapes[EMBEDDING]
        buckets, heads = shapes[FIRST_BLOCK + "0.SelfAttention.relative_attention_bias.weight"]
        inner, _ = shapes[FIRST_BLOCK + "0.SelfAttention.q.weight"]
        _, hidden = shapes[FIRST_BLOCK + "1.DenseReluDense.wo.weight"]
        head_dim = inner // heads
    except (KeyError, ValueError, ZeroDivisionError):
        raise CheckpointError(f"the text encoder's weights are incomplete or not a T5's: {EXPECTED_ENCODER}") from None
    if buckets < 4 or not 0 < max(vocabulary, width, hidden, head_dim) <= WIDEST:
        raise CheckpointError(f"the text encoder's weights have impossible shapes: {EXPECTED_ENCODER}")
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": head_dim,
        "d_ff": hidden,
        "num_layers": count_numbers(shapes, r"encoder\.block\.(\d+)\."),  # a gap shows as missing tensors
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": GATED if FIRST_BLOCK + "1.DenseReluDense.wi_0.weight" in shapes else "relu",
    }


def _make_t5(config: T5Config) -> nn.Module:
    """The encoder, without memory for its weights."""
    from transformers import T5EncoderModel

    with torch.device("meta"):
        model = T5EncoderModel(config)
    model.set_input_embeddings(model.shared)  # one parameter, also where transformers ties two later
    return model


def _weight_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if _overflows(name, dtype) else dtype


def _overflows(name: str, dtype: torch.dtype | None) -> bool:
    """T5 leaves float16's range in this layer; transformers keeps it in float32 too."""
    return dtype == torch.float16 and name.endswith(".wo.weight")
