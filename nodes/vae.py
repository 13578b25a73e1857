"""A VAE for the host's sockets: the same encode and decode that core's own nodes call, as a stream.

Every layout loads through one path, so that cancelling, progress and memory are the same for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..starflow_core.control import Control
from ..starflow_core.errors import InputError, OutOfMemoryForecast
from ..starflow_core.model.vae.codec import VAE
from ..starflow_core.model.vae.tiles import LEAST_TILE
from . import host


class HostVAE:
    """What core's VAEEncode, VAEDecode and their tiled forms expect of a VAE.

    Pixels are (F, H, W, 3), or (B, F, H, W, 3), in 0..1; latents are raw VAE space, (B, C, T, h, w) of
    a video VAE and (B, C, h, w) of an image VAE. `source` is the VAE's file.
    """

    def __init__(self, core: VAE, source: Path | None = None):
        self.core, self.source = core, source
        self.patcher = host.vae_patcher(core.module)
        self.latent_channels = core.channels
        self.latent_dim = 3 if core.kind == "video" else 2
        self.downscale_ratio = self.upscale_ratio = core.spatial
        self.first_stage_model = core.module

    def throw_exception_if_invalid(self) -> None:
        """Core asks; a HostVAE always has its weights."""

    def get_sd(self) -> dict[str, Tensor]:
        return self.core.module.state_dict()

    def spacial_compression_decode(self) -> int:
        return self.core.spatial

    def spacial_compression_encode(self) -> int:
        return self.core.spatial

    def temporal_compression_decode(self) -> int | None:
        return self.core.temporal if self.core.kind == "video" else None

    def temporal_compression_encode(self) -> int | None:
        return self.temporal_compression_decode()

    def decode(self, samples: Tensor, vae_options: dict | None = None) -> Tensor:
        """(B, F, H, W, 3) of a video VAE, (B, H, W, 3) of an image VAE."""
        return self._joined(self.stream(samples))

    def decode_tiled(
        self, samples: Tensor, tile_x: int | None = None, tile_y: int | None = None, overlap: int | None = None,
        tile_t: int | None = None, overlap_t: int | None = None,
    ) -> Tensor:  # fmt: skip
        """As `decode`, in square tiles whose halves overlap; time is streamed whatever `tile_t` says."""
        return self._joined(self.stream(samples, _tile(tile_x, tile_y, 1)))

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents of pictures or of one clip; edges that fill no latent cell are cut off."""
        return self._encode(pixels, None)

    def encode_tiled(
        self, pixels: Tensor, tile_x: int | None = None, tile_y: int | None = None, overlap: int | None = None,
        tile_t: int | None = None, overlap_t: int | None = None,
    ) -> Tensor:  # fmt: skip
        return self._encode(pixels, _tile(tile_x, tile_y, self.core.spatial))

    def stream(self, samples: Tensor, tile: int | None = None) -> Iterator[Tensor]:
        """Frames (B, f, H, W, 3) in 0..1, as many as a latent frame makes, one after the other.

        Where memory is short the whole is decoded in tiles, half as large until they fit.
        """
        self._check(samples)
        height, width = samples.shape[-2:]
        done = False
        while True:
            try:
                self._load(len(samples), height, width, tile, "decoding this")
                for frames in self.core.decode_frames(samples, tile=tile):
                    host.check_interrupted()
                    done = True
                    yield _to_images(frames)
                return
            except (host.OUT_OF_MEMORY, OutOfMemoryForecast) as error:
                # A clip that was forecast not to fit wouldn't fit in tiles.
                refused = self.core.kind == "video" and isinstance(error, OutOfMemoryForecast)
                if done or refused or (tile or max(height, width)) <= LEAST_TILE:
                    raise
            tile = max(LEAST_TILE, (tile or max(height, width)) // 2)
            host.log.warning("VAE: out of memory, decoding in tiles of %d latent cells", tile)
            host.release()

    def _check(self, samples: Tensor) -> None:
        """Raise InputError for latents of another model."""
        kinds = {4: "an image", 5: "a clip"}
        wanted = f"{kinds[2 + self.latent_dim]} of {self.latent_channels} channels"
        found = f"{kinds.get(samples.ndim, f'{samples.ndim}-dimensional')} of {samples.shape[1]} channels"
        if found != wanted:
            raise InputError(
                f"this latent is {found}, but this VAE decodes {wanted}; load the VAE that goes with the model"
            )

    def _encode(self, pixels: Tensor, tile: int | None) -> Tensor:
        clip = self._clip(pixels[..., :3])
        cells = [side // self.core.spatial for side in clip.shape[-2:]]
        self._load(len(clip), *cells, tile, "encoding this")
        control = Control(lambda _: host.check_interrupted())
        return self.core.encode(clip * 2 - 1, tile, control).to(host.result_device())

    def _clip(self, pixels: Tensor) -> Tensor:
        """The host's images as this VAE's input, cropped to whole latents."""
        s, t = self.core.spatial, self.core.temporal
        height, width = (side // s * s for side in pixels.shape[-3:-1])
        if not height or not width:
            raise InputError(
                f"an image of {pixels.shape[-2]} x {pixels.shape[-3]} is smaller than one latent cell of {s} x {s}; "
                "use a larger one"
            )
        top, left = (pixels.shape[-3] - height) // 2, (pixels.shape[-2] - width) // 2
        pixels = pixels[..., top : top + height, left : left + width, :]
        if self.core.kind == "image":
            return pixels.movedim(-1, 1)
        clip = (pixels if pixels.ndim == 5 else pixels.unsqueeze(0)).movedim(-1, 1)
        return clip[:, :, : (clip.shape[2] - 1) // t * t + 1]

    def _load(self, batch: int, height: int, width: int, tile: int | None, what: str) -> None:
        host.load(self.patcher, self.core.step_bytes(height, width, batch, tile), what, whole=True)

    def _joined(self, stream: Iterator[Tensor]) -> Tensor:
        frames = torch.cat(list(stream), 1)
        return frames if self.core.kind == "video" else frames.squeeze(1)


def _to_images(frames: Tensor) -> Tensor:
    """(B, 3, F, H, W) in [-1, 1] to the host's (B, F, H, W, 3) in 0..1."""
    return ((frames + 1) / 2).movedim(1, -1).to(host.result_device())


def _tile(tile_x: int | None, tile_y: int | None, cell: int) -> int | None:
    sides = [side // cell for side in (tile_x, tile_y) if side]
    return max(LEAST_TILE, min(sides)) if sides else None
