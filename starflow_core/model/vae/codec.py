"""Image and video VAEs of diffusers behind one class.

All tensors are in VAE space: pixels (B, 3, F, H, W) in [-1, 1] and raw latents (B, C, T, h, w) of a
video VAE, (B, 3, H, W) and (B, C, h, w) of an image VAE. Mean, deviation and scale are the caller's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ...control import Control, Progress
from ...errors import InputError, NonFiniteError
from ..latent import LatentFormat
from .tiles import Stream, TiledStream

STEP_COPIES = {"video": 28, "image": 16}  # measured: activations of the widest layer that are held at once


class VAE:
    """A diffusers `AutoencoderKL` ("image") or `AutoencoderKLWan` ("video"), kept as `module`.

    `channels` are the latent's, `spatial` and `temporal` the pixels and frames per latent. Inputs
    are moved to the module's device and type chunk by chunk; results are float32 on its device.
    """

    def __init__(self, module: nn.Module):
        from diffusers import AutoencoderKLWan

        config = module.config
        self.module = module
        if isinstance(module, AutoencoderKLWan):
            self.kind = "video"
            self.channels = config.z_dim
            self.spatial = (config.patch_size or 1) * 2 ** (len(config.dim_mult) - 1)
            self.temporal = 2 ** sum(config.temperal_downsample)
        else:
            self.kind = "image"
            self.channels = config.latent_channels
            self.spatial = 2 ** (len(config.block_out_channels) - 1)
            self.temporal = 1

    def encode(self, pixels: Tensor, tile: int | None = None, control: Control | None = None) -> Tensor:
        """Latents of a picture or clip: the posterior's mean, where the reference draws a sample.

        A clip (B, 3, 4n + 1, H, W) goes through the causal encoder `temporal` frames at a time, so
        that activations don't grow with its length; `tile` (in latent cells) bounds them in space.
        `control` is told of every latent frame.
        Raises InputError for impossible sizes and frame counts, NonFiniteError for bad pixels.
        """
        clip = self._with_frames(pixels, 3, "pixels")
        self._check_size(*clip.shape[2:])
        stream = TiledStream(self._encoder, tile, self.spatial, 1)
        latents, start, control = [], 0, control or Control()
        total = (clip.shape[2] - 1) // self.temporal + 1
        while start < clip.shape[2]:
            control.report(Progress("encode", len(latents), total))
            stop = start + self.temporal if start else 1  # the first frame is a latent of its own
            chunk = clip[:, :, start:stop]
            _check_finite(chunk, start, "pixel frame", "check the picture or clip")
            latent = stream(self._to_module(chunk)).float()
            _check_finite(latent, len(latents), "encoded latent frame", "encode in float32")
            latents.append(latent)
            start = stop
        control.report(Progress("encode", total, total))
        return self._without_frames(torch.cat(latents, 2))

    def decode(self, latents: Tensor, tile: int | None = None, clamp: bool = True) -> Tensor:
        """Pixels of `latents`: exactly what `decode_frames` yields, in one tensor."""
        return self._without_frames(torch.cat(list(self.decode_frames(latents, tile, clamp)), 2))

    def decode_frames(
        self, latents: Tensor | Iterable[Tensor], tile: int | None = None, clamp: bool = True
    ) -> Iterator[Tensor]:
        """Yield the pixel frames (B, 3, f, H, W) of each latent frame as soon as it is decoded.

        `latents` is a whole tensor or pieces of it in order, of one or more latent frames each. In a clip f is 1 for
        the first latent frame and `temporal` for later ones; a picture is f = 1. Memory doesn't grow with length.
        `tile` bounds activations to tiles of that many latent cells a side, whose seams are blended. The causal layers'
        memory is kept for every tile, overlaps included, so in a clip tiles smaller than about 32 cells save little
        more. Without `clamp` values may leave [-1, 1], and gradients pass. Raises InputError for wrong shapes,
        NonFiniteError naming the latent frame.
        """
        stream = TiledStream(self._decoder, tile, 1, self.spatial)
        index, seen = 0, None
        for piece in [latents] if isinstance(latents, Tensor) else latents:
            piece = self._with_frames(piece, self.channels, "latents")
            batch_and_size = (piece.shape[0], *piece.shape[3:])
            if seen not in (None, batch_and_size):
                raise InputError(f"latents of (B, H, W) {batch_and_size} after {seen}: only the length may differ")
            seen = batch_and_size
            for frame in piece.split(1, 2):
                _check_finite(frame, index, "latent frame", "check the file they are from, or sample in float32")
                pixels = stream(self._to_module(frame)).float()
                if not torch.isfinite(pixels).all():
                    raise NonFiniteError(f"latent frame {index} decodes to NaN or infinity; decode in float32")
                yield pixels.clamp(-1, 1) if clamp else pixels
                index += 1

    def step_bytes(self, height: int, width: int, batch: int = 1, tile: int | None = None) -> int:
        """Roughly the bytes that encoding or decoding one latent frame of height x width cells needs on top of the
        weights, for a batch. `tile` matters only for pictures: in a clip, the causal layers' memory of every tile is
        kept, and that is most of it."""
        return self.step_values(height, width, batch, tile) * next(self.module.parameters()).element_size()

    def step_values(self, height: int, width: int, batch: int = 1, tile: int | None = None) -> int:
        """As `step_bytes`, in numbers of the module's type."""
        config = self.module.config
        if self.kind == "video":
            patch = config.patch_size or 1
            width_inside = max(config.base_dim, config.decoder_base_dim or config.base_dim)
        else:
            patch, width_inside, batch = 1, config.block_out_channels[0], 1  # one picture after the other
            height, width = (min(side, tile or side) for side in (height, width))
        values = batch * height * width * (self.spatial // patch) ** 2 * self.temporal * width_inside
        return STEP_COPIES[self.kind] * values

    def _encoder(self) -> Stream:
        """A fresh stream from pixel chunks to the latent's mean."""
        module = self.module
        if self.kind == "image":
            return _one_by_one(lambda pixels: module.encode(pixels[:, :, 0]).latent_dist.mean.unsqueeze(2))
        from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

        cache = _empty_cache(module.encoder)

        def encode(pixels: Tensor) -> Tensor:
            patches = patchify(pixels, module.config.patch_size or 1)
            moments = module.quant_conv(module.encoder(patches, feat_cache=cache, feat_idx=[0]))
            return moments.chunk(2, 1)[0]

        return encode

    def _decoder(self) -> Stream:
        """A fresh stream from single latent frames to pixel frames, not clamped."""
        module = self.module
        if self.kind == "image":
            return _one_by_one(lambda latent: module.decode(latent[:, :, 0]).sample.unsqueeze(2))
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        cache = _empty_cache(module.decoder)

        def decode(latent: Tensor) -> Tensor:
            first = cache[0] is None  # the first convolution fills its slot in every call
            hidden = module.post_quant_conv(latent)
            patches = module.decoder(hidden, feat_cache=cache, feat_idx=[0], first_chunk=first)
            return unpatchify(patches, module.config.patch_size or 1)

        return decode

    def _to_module(self, x: Tensor) -> Tensor:
        parameter = next(self.module.parameters())
        return x.to(parameter.device, parameter.dtype)

    def _with_frames(self, x: Tensor, channels: int, name: str) -> Tensor:
        """`x` as (B, C, T, H, W) once its shape and type are those of `name`."""
        axes, layout = (5, "(B, {}, T, H, W)") if self.kind == "video" else (4, "(B, {}, H, W)")
        if x.ndim != axes or x.shape[1] != channels or 0 in x.shape:
            raise InputError(f"{name} of shape {tuple(x.shape)}; this {self.kind} VAE takes {layout.format(channels)}")
        if not x.is_floating_point():
            raise InputError(f"{name} are {x.dtype}; expected floating point (pixels in [-1, 1])")
        return x if self.kind == "video" else x.unsqueeze(2)

    def _without_frames(self, x: Tensor) -> Tensor:
        return x if self.kind == "video" else x.squeeze(2)

    def _check_size(self, frames: int, height: int, width: int) -> None:
        LatentFormat(self.channels, self.spatial, self.temporal).latent_frames(frames)
        for name, value in (("height", height), ("width", width)):
            if value % self.spatial:
                low = value - value % self.spatial
                nearest = f"{low} and {low + self.spatial}" if low else str(self.spatial)
                raise InputError(f"{name} {value} is not a multiple of {self.spatial}; nearest: {nearest}")


def _one_by_one(stream: Stream) -> Stream:
    """The pictures of a batch one after the other, so that a large batch needs no more memory than a small one."""
    return lambda batch: torch.cat([stream(one) for one in batch.split(1)])


def _empty_cache(coder: nn.Module) -> list[Tensor | None]:
    """One slot per causal convolution, as many as the coder can fill."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    return [None] * sum(isinstance(layer, WanCausalConv3d) for layer in coder.modules())


def _check_finite(frames: Tensor, first: int, name: str, remedy: str) -> None:
    """Raise NonFiniteError naming the first bad frame of (B, C, T, H, W), counted from `first`."""
    if torch.isfinite(frames).all():
        return
    bad = next(i for i in range(frames.shape[2]) if not torch.isfinite(frames[:, :, i]).all())
    raise NonFiniteError(f"{name} {first + bad} has NaN or infinity; {remedy}")
