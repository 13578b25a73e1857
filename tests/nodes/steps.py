"""The nodes as functions: a test is a graph, written down step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import pack

NODES = pack.load()
DEMO = "bundled demo"
PROMPT = "a red circle moving right on a black background"
SMALL = {"width": 48, "height": 32}  # 6 tokens a frame


def run(name: str, **inputs) -> tuple:
    """A node's results; widgets that aren't named have their defaults."""
    return pack.run(NODES[name], **inputs).args


@dataclass(frozen=True)
class Loaded:
    """What the three loaders gave, and the steps that need it."""

    model: Any
    text_encoder: Any
    vae: Any

    @classmethod
    def of(cls, model: str = DEMO, text_encoder: str = DEMO, vae: str = DEMO) -> Loaded:
        return cls(
            *run("STARFlowLoadModel", model_name=model),
            *run("STARFlowLoadTextEncoder", encoder_name=text_encoder),
            *run("STARFlowLoadVAE", vae_name=vae),
        )

    @property
    def flow(self):
        """The core's, behind the host's handle."""
        return pack.module("nodes.host").flow_of(self.model)

    def empty(self, **inputs) -> dict:
        return run("STARFlowEmptyLatent", model=self.model, **{"frames": 9, **inputs})[0]

    def encode(self, latent: dict, prompt: str = PROMPT, **inputs) -> tuple:
        """Positive, negative and the report."""
        given = {"model": self.model, "text_encoder": self.text_encoder, "latent": latent, "prompt": prompt}
        return run("STARFlowTextEncode", **given, **inputs)

    def sample(self, latent: dict, prompt: str = PROMPT, context=None, negative_prompt: str = "", **inputs) -> tuple:
        """Latent, report and convergence, of a prompt with default words around it."""
        positive, negative, _ = self.encode(latent, prompt, context=context, negative_prompt=negative_prompt)
        return self.sampler(positive, negative, latent, context=context, **inputs)

    def sampler(self, positive: list, negative: list, latent: dict, **inputs) -> tuple:
        given = {"model": self.model, "positive": positive, "negative": negative, "latent": latent}
        return run("STARFlowSampler", **given, **inputs)

    def inverted(self, positive: list, negative: list, latent: dict, **inputs) -> tuple:
        """Noise, bits per dimension and the report."""
        given = {"model": self.model, "positive": positive, "negative": negative, "latent": latent}
        return run("STARFlowInvert", **given, **inputs)

    def decode(self, samples: dict, **inputs):
        return run("STARFlowVAEDecode", samples=samples, vae=self.vae, **inputs)[0]


class PlainVAE:
    """A VAE as core's loader makes it: in one piece, one clip of colours at a time, and not always in float."""

    def __init__(self, ours):
        self.ours, self.tiles = ours, []
        self.latent_channels = ours.latent_channels
        self.spacial_compression_decode = ours.spacial_compression_decode
        self.temporal_compression_decode = ours.temporal_compression_decode
        self.decode = ours.decode

    def encode(self, pixels):
        assert pixels.ndim == 4
        assert pixels.shape[-1] == 3
        return self.ours.encode(pixels).bfloat16()

    def decode_tiled(self, samples, tile_x, tile_y, overlap):
        self.tiles.append((tile_x, tile_y, overlap))
        return self.decode(samples)
