"""What a process of several has of a flow's weights: see `model.parallel`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..model.config import FlowConfig
from ..model.lora import Lora
from ..model.parallel import Team, is_added_once, shared_axis
from .int8 import WEIGHT
from .tensorfiles import TensorFile


def own_rows(file: TensorFile, config: FlowConfig, team: Team) -> TensorFile:
    """A file with this process's rows alone of the weights, scales and biases that are shared out by rows."""
    if team.mesh.tensor == 1:
        return file
    axes = {name: shared_axis(name, config) for name in file.tensors}
    own = {
        name: file.tensors[name].rows(team.ranges(file.shapes[name][0], axis[1]))
        for name, axis in axes.items()
        if axis and axis[0] == 0
    }
    return replace(file, tensors=file.tensors | own)


def own_columns(tensor: Tensor, name: str, config: FlowConfig, team: Team) -> Tensor:
    """This process's columns of a weight that is shared out by columns, and a bias that is added once where it is."""
    if team.mesh.tensor == 1:
        return tensor
    if is_added_once(name, config):
        return torch.zeros_like(tensor) if team.share else tensor
    axis = shared_axis(name, config)
    return tensor[:, team.ranges(tensor.shape[1])[0]].clone() if axis and axis[0] == 1 else tensor


def own_lora(lora: Lora, layer: str, config: FlowConfig, team: Team) -> Lora:
    """This process's share of what a LoRA adds to a layer: the outputs or inputs that the layer has here."""
    axis = shared_axis(layer + WEIGHT, config)
    if team.mesh.tensor == 1 or axis is None:
        return lora
    down, up = lora.lora_A.detach(), lora.lora_B.detach()
    if axis[0] == 0:
        up = torch.cat([up[rows] for rows in team.ranges(len(up), axis[1])])
    else:
        down = down[:, team.ranges(down.shape[1])[0]].clone()
    return Lora(down, up, lora.alpha, lora.dropout, lora.strength).requires_grad_(False)
