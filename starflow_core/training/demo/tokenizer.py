"""The demo's tokenizer: the words of its captions and of their wrapping, characters for the rest."""

from __future__ import annotations

import json
import os
import string
from pathlib import Path
from typing import TYPE_CHECKING

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
SPACE = "▁"  # as in SentencePiece, it begins a word


def build_tokenizer(folder: str | Path) -> Tokenizer:
    """Make the tokenizer and write it to `folder` as tokenizer.json and tokenizer_config.json."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    pieces = [*SPECIAL, SPACE, *CHARACTERS, *(SPACE + text.replace(" ", SPACE) for text in (*WORDS, *WRAPPING))]
    # With one score for all pieces the best split of a text is the one with the fewest.
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=SPECIAL.index("<unk>")))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    tokenizer.add_special_tokens(list(SPECIAL))
    _write(Path(folder) / "tokenizer.json", tokenizer.to_str(pretty=True))
    # The class that transformers 4 and 5 both know by this name.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    _write(Path(folder) / "tokenizer_config.json", json.dumps(settings, indent=2))
    return tokenizer


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
