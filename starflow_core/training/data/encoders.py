"""The parts of a model that data is encoded with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...bundled import BUNDLED, TEXT_FILE, VAE_FILE
from ...errors import InputError
from ...model.config import FlowConfig
from ...model.placement import default_dtype
from ...model.schema import read_object
from ...model.text import TextEncoder
from ...model.vae.codec import VAE
from ...pipeline import find_parts
from ...weights.text import TextEncoderFiles, find_text_encoder
from ...weights.vae import VAEFile, find_vae
from ..settings import Settings


@dataclass(frozen=True)
class Encoders:
    """A flow's configuration, with the settings' noise, its text encoder and its VAE, inspected, not loaded."""

    config: FlowConfig
    text: TextEncoderFiles
    vae: VAEFile

    @classmethod
    def find(cls, settings: Settings) -> Encoders:
        """Those that settings name, or the bundled demo's. Raises a StarflowError for parts that don't fit."""
        if settings.train != "scratch":
            parts = find_parts(settings.model, settings.text_encoder, settings.vae, tokenizer=settings.tokenizer)
            return cls(with_noise(parts.config, settings), parts.text, parts.vae)
        if settings.config is None:
            raise InputError("scratch needs a new flow's configuration; give a JSON file, as --config FILE")
        text = find_text_encoder(settings.text_encoder or BUNDLED / TEXT_FILE, settings.tokenizer)
        config = with_noise(read_config(Path(settings.config)), settings)
        found = cls(config, text, find_vae(settings.vae or BUNDLED / VAE_FILE))
        found.config.check_text_encoder(text.dim)
        outline = found.vae.outline
        found.config.check_vae(outline.channels, outline.spatial, outline.temporal)
        return found

    def load_vae(self, device: torch.device) -> VAE:
        """In float32: what it makes is kept."""
        return self.vae.load(torch.float32, device)

    def load_text(self, device: torch.device) -> TextEncoder:
        """In the type that prompts are read with later."""
        return self.text.load(default_dtype(device, self.config), device)


def with_noise(config: FlowConfig, settings: Settings) -> FlowConfig:
    """The configuration with the noise that is trained with, of which prompts speak."""
    return config if settings.noise is None else replace(config, noise_std=settings.noise)


def read_config(path: Path) -> FlowConfig:
    """A configuration as `FlowConfig.to_dict` gives it, in JSON. Raises InputError, CheckpointError for bad content."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} can't be read ({getattr(error, 'strerror', None) or error}); check --config"
        ) from None
    return FlowConfig.from_dict(read_object(text, str(path)))
