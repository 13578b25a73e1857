"""A VAE's tensors, from every layout they are published in to that of diffusers."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .keys import count_numbers
from .tensorfiles import StoredTensor

# From original names to those of diffusers; all rules are applied, in this order.
WAN_RULES = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"coder\.conv1\.", "coder.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.(down|up)samples\.(\d+)\.\1samples\.\d+\.(resample|time_conv)\.", r".\1_blocks.\2.\1sampler.\3."),
    (r"\.(down|up)samples\.(\d+)\.\1samples\.(\d+)\.", r".\1_blocks.\2.resnets.\3."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)

LDM_RULES = (
    (r"\.(down|up)\.(\d+)\.block\.(\d+)\.", r".\1_blocks.\2.resnets.\3."),
    (r"\.(down|up)\.(\d+)\.\1sample\.", r".\1_blocks.\2.\1samplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
)

# Older diffusers called the attention's layers so; the folder of sd-vae-ft-ema still does.
OLD_DIFFUSERS_RULES = (
    (r"\.attentions\.0\.query\.", ".attentions.0.to_q."),
    (r"\.attentions\.0\.key\.", ".attentions.0.to_k."),
    (r"\.attentions\.0\.value\.", ".attentions.0.to_v."),
    (r"\.attentions\.0\.proj_attn\.", ".attentions.0.to_out.0."),
)

PREFIX = "first_stage_model."  # of the VAE in a whole Stable Diffusion checkpoint
TRAINING_ONLY = ("loss.", "model_ema.")


def with_diffusers_names(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The VAE's tensors under the names and in the shapes that diffusers gives them."""
    if any(name.startswith(PREFIX) for name in tensors):
        tensors = {name[len(PREFIX) :]: t for name, t in tensors.items() if name.startswith(PREFIX)}
    tensors = {name: t for name, t in tensors.items() if not name.startswith(TRAINING_ONLY)}
    if any(name.startswith("encoder.downsamples.0.downsamples.") for name in tensors):
        return _apply(WAN_RULES, tensors)
    if any(name.startswith("encoder.down.0.block.") for name in tensors):
        return _from_ldm(_apply(LDM_RULES, tensors))
    return _apply(OLD_DIFFUSERS_RULES, tensors)


def _apply(rules: Iterable[tuple[str, str]], tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _from_ldm(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors of latent diffusion, already renamed: its decoder's blocks and its attention differ, too."""
    last = count_numbers(tensors, r"decoder\.up_blocks\.(\d+)\.") - 1
    result = {}
    for name, tensor in tensors.items():
        # there the finest block is the first, in diffusers the coarsest
        name = re.sub(r"(\.up_blocks\.)(\d+)", lambda match: f"{match[1]}{last - int(match[2])}", name)
        attention = ".attentions." in name and len(tensor.shape) == 4  # there a 1 x 1 convolution, in diffusers linear
        result[name] = tensor.flatten() if attention else tensor
    return result
