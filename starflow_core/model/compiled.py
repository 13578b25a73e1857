"""Blocks as graphs that PyTorch's compiler takes whole: what a sweep evaluates, as a function of tensors alone.

Nothing is written within a graph, since a compiler may copy a whole cache for each write into it: new keys and values
come out, and are stored at once for all layers. The text prefix and the first pass over known tokens run as they are:
they come once, and are wide. Lengths and offsets are symbolic, so that a job takes at most four graphs: one for the
deep block, one or two for shallow blocks (one row is a case of its own to a compiler), and one more where a length and
an offset happen to be equal at first. For that reason graphs aren't recorded for CUDA either: a record has fixed shapes
and addresses, and the deep block's change with every sweep.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import InputError
from .attention import kernel, merge
from .rope import Rotary

if TYPE_CHECKING:
    from .flow import Block

BUCKET = 4  # lengths are brought to multiples of it; a single slot would be a case of its own
WIDEST = 256  # slots that are evaluated at once by a graph; wider ones have nothing to gain, and hold more at once
OLDEST = (2, 5)  # PyTorch that takes weights for inputs of a graph
FORMS = 64  # of graphs that PyTorch keeps: a session may see many sizes, models and LoRAs
COMPILERS = {"Darwin": "clang++", "Windows": "cl"}

Evaluate = Callable[..., tuple[Tensor, Tensor, Tensor | None]]


def evaluate(
    block: Block, inputs: Tensor, rotary: Rotary, earlier: Tensor | None = None, attend: Callable | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scale a and shift b (rows, n, c) for `inputs` (rows, n, c), as of `Block.forward`.

    With `earlier` keys and values (2, layers, rows, heads, m, head_dim), m > 1, it also gives those of the n slots, in
    the same form; `attend` is the kernel for them. Without, the inputs are whole sequences.
    """
    if earlier is None:
        return *block(inputs, rotary), None
    new = []

    def attention(layer: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def act(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            new.append(torch.stack((keys, values)))
            before = attend(queries, earlier[0, layer], earlier[1, layer], False)
            return merge([before, attend(queries, keys, values, True)])

        return act

    a, b = block(inputs, rotary, attention)
    return a, b, torch.stack(new, 1)


def compiled() -> Evaluate:
    """`evaluate`, compiled as a whole at its first use."""
    keep_many_forms()
    return torch.compile(evaluate, fullgraph=True)


def keep_many_forms() -> None:
    import torch._dynamo

    limits = torch._dynamo.config
    limits.cache_size_limit = max(limits.cache_size_limit, FORMS)


def whole(graph: Evaluate, block: Block, inputs: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """a, b of whole sequences by a compiled `evaluate`."""
    # Rows stop one by one.
    return _run(graph, block, _symbolic(inputs, 0), rotary)[:2]


def swept(graph: Evaluate, block: Block, inputs: Tensor, rotary: Rotary, earlier: Tensor):
    """a, b and keys and values of n slots by a compiled `evaluate`; of the slots' angles `rotary` may have more."""
    slots = inputs.shape[1]
    length = slots + -slots % BUCKET
    inputs = _symbolic(_padded(inputs, 1, length), 1)
    angles = Rotary(*(_symbolic(_padded(part[:length], 0, length), 0) for part in (rotary.cos, rotary.sin)))
    attend = kernel(inputs.device, inputs.dtype, earlier.shape[-1])
    a, b, new = _run(graph, block, inputs, angles, _symbolic(earlier, 4), attend)
    # What follows the slots doesn't change them.
    return a[:, :slots], b[:, :slots], new[..., :slots, :]


def _run(graph: Evaluate, *inputs):
    from torch._dynamo import exc

    try:
        return graph(*inputs)
    except getattr(exc, "FailOnRecompileLimitHit", ()):  # more forms in a session than PyTorch keeps
        warnings.warn(f"more than {FORMS} kinds of sweeps were compiled; the others aren't", stacklevel=2)
        return evaluate(*inputs)
    except exc.TorchDynamoException as error:
        reason = " ".join(str(error).split("\n")[:2])  # a page follows
        raise InputError(f"the flow could not be compiled here; leave that out ({reason})") from error


def _padded(x: Tensor, axis: int, length: int) -> Tensor:
    """A copy, since a graph depends on where in its memory a tensor begins, with zeros at the end of an axis."""
    return pad(x, (0, 0) * (x.ndim - 1 - axis) + (0, length - x.shape[axis]))


def _symbolic(x: Tensor, axis: int) -> Tensor:
    """A tensor, the length of whose axis no graph is to depend on."""
    import torch._dynamo

    x = x[:]  # the mark stays with what is marked
    torch._dynamo.maybe_mark_dynamic(x, axis)
    return x


def require_compiler(device: torch.device, *others: torch.device) -> None:
    """Raise InputError, with the remedy, where PyTorch lacks what it compiles with for a device, or there are more."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST:
        raise InputError(f"compiling needs PyTorch 2.5 or newer, not {torch.__version__}: blocks share a graph there")
    if others:
        raise InputError("a flow is compiled for one device, not for several; leave out either")
    if device.type == "cpu":
        name = os.environ.get("CXX") or COMPILERS.get(platform.system(), "g++")
        if shutil.which(name) is None:
            raise InputError(f"compiling for the CPU needs the C++ compiler {name}; install it, or name one in CXX")
    elif device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise InputError("compiling for a graphics card needs the package triton (on Windows: triton-windows)")
    else:
        raise InputError(f"compiling for {device} is not supported; leave it out")
