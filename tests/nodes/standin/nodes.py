"""Core's own nodes, as far as they call a VAE. Where hosts differ, this asks more of the VAE."""

from __future__ import annotations


class VAEDecode:
    def decode(self, vae, samples):
        return (_frames(vae.decode(samples["samples"])),)


class VAEDecodeTiled:
    """Sizes are in pixels and frames, the VAE's in latent cells and frames."""

    def decode(self, vae, samples, tile_size, overlap, temporal_size, temporal_overlap):
        cell, rate = vae.spacial_compression_decode(), vae.temporal_compression_decode()
        tile = tile_size // cell
        images = vae.decode_tiled(
            samples["samples"], tile_x=tile, tile_y=tile, overlap=overlap // cell,
            tile_t=rate and temporal_size // rate, overlap_t=rate and temporal_overlap // rate,
        )  # fmt: skip
        return (_frames(images),)


class VAEEncode:
    def encode(self, vae, pixels):
        return ({"samples": vae.encode(pixels)},)


class VAEEncodeTiled:
    """All sizes are in pixels and frames."""

    def encode(self, vae, pixels, tile_size, overlap, temporal_size, temporal_overlap):
        tiles = {"tile_x": tile_size, "tile_y": tile_size, "tile_t": temporal_size}
        latents = vae.encode_tiled(pixels, **tiles, overlap=overlap, overlap_t=temporal_overlap)
        return ({"samples": latents},)


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (VAEDecode, VAEDecodeTiled, VAEEncode, VAEEncodeTiled)}


def _frames(images):
    """The frames of all clips, one after the other."""
    return images.flatten(0, 1) if images.ndim == 5 else images
