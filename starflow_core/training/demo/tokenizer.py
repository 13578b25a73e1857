"""The demo's tokenizer: a piece for each word of its captions and of their wrapping, characters for the rest."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import TYPE_CHECKING

from ...parts import replacing
from .clips import BACKGROUNDS, COLOURS, DIRECTIONS, KINDS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL = ("<pad>", "</s>", "<unk>")  # T5's, with T5's numbers 0, 1, 2
# The fixed phrases of a wrapped prompt are one token each.
WRAPPING = ("noise level", "a video with", "fps:", "an image:", "aspect ratio.", "(extend)", "(v2v)", "(last)")
WORDS = (
    *COLOURS, *KINDS, *DIRECTIONS, *BACKGROUNDS,
    "a", "an", "moving", "moves", "that", "on", "over", "background",
    "make", "it", "turn", "recolour", "the", "shape",
    "noise", "level", "video", "with", "fps", "image", "in", "aspect", "ratio", "extend", "v2v", "last",
    *string.digits,
)  # fmt: skip
CHARACTERS = string.digits + string.ascii_lowercase + string.punctuation
SPACE = "▁"  # begins a word, as in SentencePiece


def build_tokenizer(folder: str | Path) -> Tokenizer:
    """Make the tokenizer and write it to `folder` as tokenizer.json and tokenizer_config.json."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    pieces = [*SPECIAL, SPACE, *CHARACTERS, *(SPACE + text.replace(" ", SPACE) for text in (*WORDS, *WRAPPING))]
    # All pieces have one score, so that the best split of a text is the one with the fewest pieces.
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=SPECIAL.index("<unk>")))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    tokenizer.add_special_tokens(list(SPECIAL))
    _write_text(Path(folder) / "tokenizer.json", tokenizer.to_str(pretty=True))
    # transformers 4 and 5 both know the class by this name.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    _write_text(Path(folder) / "tokenizer_config.json", json.dumps(settings, indent=2))
    return tokenizer


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text + "\n", encoding="utf-8")
