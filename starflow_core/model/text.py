"""The text encoder: a T5 and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError, NonFiniteError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, EOS = "<pad>", "</s>"


@dataclass(frozen=True)
class EncodedText:
    """`embeddings` (B, tokens, dim), zero after the end of a text, and what was `cut` off each text."""

    embeddings: Tensor
    cut: list[str]


class TextEncoder:
    """A `T5EncoderModel` and its tokenizer. Dropping the object frees it."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer

    @property
    def dim(self) -> int:
        """Channels of an embedding."""
        return self.model.shared.weight.shape[1]

    def encode(self, texts: list[str], tokens: int) -> EncodedText:
        """Embeddings of wrapped prompts, in the encoder's type; "" is a valid text, the unconditional one.

        Raises InputError if there are no texts, and NonFiniteError if the encoder overflows.
        """
        # The embeddings outlive the caller's inference mode: a score step differentiates through them.
        with torch.inference_mode(False), torch.no_grad():
            encoded = self.embed(texts, tokens)
            self._check_finite(encoded.embeddings)
        return encoded

    def embed(self, texts: list[str], tokens: int) -> EncodedText:
        """As `encode`, but with gradients and without the check, for training."""
        ids, mask, cut = self.tokenize(texts, tokens)
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
        return EncodedText(F.pad(hidden, (0, 0, 0, tokens - ids.shape[1])), cut)

    def tokenize(self, texts: list[str], tokens: int) -> tuple[Tensor, Tensor, list[str]]:
        """Token ids and mask, both (B, n) for a longest text of n <= `tokens`, and what was cut off each text."""
        if not texts:
            raise InputError("no prompt to encode; the empty prompt is a text of length 0")
        eos, pad = (self.tokenizer.token_to_id(name) for name in (EOS, PAD))
        rows, cut = [], []
        for text in texts:
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
            rows.append([*encoding.ids[: tokens - 1], eos])
            rest = encoding.offsets[tokens - 1 :]
            cut.append(text[rest[0][0] :].strip() if rest else "")
        length = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        device = self.model.shared.weight.device
        return ids.to(device), mask.to(device), cut

    def _check_finite(self, embeddings: Tensor) -> None:
        bad = (~embeddings.isfinite()).any(-1).nonzero()
        if not len(bad):
            return
        text, token = (int(i) + 1 for i in bad[0])
        if self.model.shared.weight.dtype == torch.float16:
            remedy = "T5 overflows in float16: load it in bfloat16 or float32"
        else:
            remedy = "its weights are damaged: get its file again"
        raise NonFiniteError(f"the text encoder gave NaN or infinity in prompt {text}, token {token}; {remedy}")
