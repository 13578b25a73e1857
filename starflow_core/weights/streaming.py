"""Weights that stay in main memory and come to the device layer by layer, by diffusers' group offloading, which
needs the package accelerate."""

from __future__ import annotations

from ..model.flow import Flow
from ..model.placement import Placement


def stream_layers(flow: Flow, placement: Placement) -> None:
    """Bring each transformer layer of a flow that is in main memory to its part's device when it computes, and the rest
    of each block when the block does. On CUDA the next layer is brought in meanwhile."""
    from diffusers.hooks import apply_group_offloading

    parts = [(block, placement.shallow) for block in flow.shallow] + [(flow.deep, placement.deep[0])]
    if flow.config.denoiser:
        parts.append((flow.learnable_self_denoiser, placement.denoiser))
    for part, device in parts:
        apply_group_offloading(
            part, device, offload_type="block_level", num_blocks_per_group=1, use_stream=device.type == "cuda"
        )
