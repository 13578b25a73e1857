"""The flow: an exactly invertible map between latents and noise, block by block.

Module names are those of the reference's checkpoints. Latents are (B, T, C, H, W) in flow space, an
image has T = 1; tokens are (B, T, N, c) in row-major order, N = H W / patch_size^2.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from ..control import Control, Progress
from ..errors import InputError, NonFiniteError
from .compiled import Evaluate, compiled, evaluate, whole
from .config import FlowConfig
from .denoiser import DenoiserNet, DenoiserRun
from .parallel import ALONE, Team
from .rope import Rotary, joined, text_rotary, token_rotary
from .transformer import Attend, FinalNorm, Layer, causal

UNIT = 0.541324854612918  # softplus(UNIT) = 1
SHALLOW_TOKENS = 4096  # tokens that pass a shallow block at once, to bound its activations


@dataclass(frozen=True)
class Grid:
    """Frames, rows and columns of tokens."""

    frames: int
    height: int
    width: int

    @property
    def frame_tokens(self) -> int:
        return self.height * self.width

    def with_frames(self, frames: int) -> Grid:
        return Grid(frames, self.height, self.width)


@dataclass(frozen=True)
class Encoding:
    """The noise of some latents, and the log-determinants of the map to it.

    `noise` has the latents' shape. `logdets` holds one log-determinant for each element and block, (B, T, N, c)
    in row-major order whatever the block's own order is.
    """

    noise: Tensor
    logdets: list[Tensor]

    @property
    def log_likelihood(self) -> Tensor:
        """log p(x | text) in nats, summed over a sample's elements: (B,)."""
        gauss = -0.5 * (self.noise.square() + math.log(2 * math.pi))
        return gauss.flatten(1).sum(1) + sum(d.flatten(1).sum(1) for d in self.logdets)

    @property
    def bits_per_dim(self) -> Tensor:
        """Negative log-likelihood in bits per latent element: (B,)."""
        return -self.log_likelihood / (self.noise[0].numel() * math.log(2))


class Block(nn.Module):
    """One autoregressive affine map (STARFlow, section 3.1); the deep block also reads text."""

    def __init__(self, config: FlowConfig, index: int, operations, team: Team = ALONE, **factory):
        super().__init__()
        self.index = index
        deep = index == len(config.layers) - 1
        width = config.deep_width if deep else config.width
        team = team if deep else ALONE
        self.heads = width // config.head_dim // team.mesh.tensor  # that are computed here
        channels = config.token_channels
        self.width, self.channels, self.soft_clip = width, channels, config.soft_clip
        self.recompute = False  # for a gradient: keep one hidden state a layer, not its activations
        self.reverses = (index % 2 == 0) == (config.seq_order == "L2R")
        self.sos_embed = nn.Parameter(torch.zeros(1, 1, channels, **factory))
        self.proj_in = operations.Linear(channels, width, **factory)
        self.proj_out = operations.Linear(width, 2 * channels, **factory)
        if deep:
            self.proj_txt = operations.Linear(config.text_dim, width, **factory)
        self.attn_blocks = nn.ModuleList(
            Layer(width, config.head_dim, operations, team, **factory) for _ in range(config.layers[index])
        )
        self.final_norm = FinalNorm(width, **factory)

    def ordered(self, tokens: Tensor) -> Tensor:
        """Tokens (..., N, c) into this block's order, or back: reversal is its own inverse."""
        return tokens.flip(-2) if self.reverses else tokens

    def forward(
        self, before: Tensor, rotary: Rotary, attend: Callable[[int], Attend] = lambda layer: causal,
        text: Tensor | None = None, first: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Scale a > 0 and shift b, float32 (rows, n, c), of n slots (STARFlow, section 3.1).

        `before` (rows, n, c) are the tokens before each slot, in the compute type. If the slots are the `first` of
        their sequence, it is (rows, n - 1, c): nothing is before the first slot, which reads the start token. `text`
        (rows, L, D) goes in front in the same causal sequence. `attend(i)` is layer i's attention.
        """
        inputs = self.started(before) if first else before
        hidden = self.proj_in(inputs)
        if text is not None:
            hidden = torch.cat((self.proj_txt(text), hidden), 1)
        for index, layer in enumerate(self.attn_blocks):
            if self.recompute:
                hidden = checkpoint(layer, hidden, rotary, attend(index), use_reentrant=False)
            else:
                hidden = layer(hidden, rotary, attend(index))
        return self._affine(hidden[:, hidden.shape[1] - inputs.shape[1] :])

    def started(self, before: Tensor) -> Tensor:
        """The tokens before each of a sequence's first slots: the start token, then these."""
        return torch.cat((self.sos_embed.to(before).expand(len(before), 1, -1), before), 1)

    def _affine(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        out = self.proj_out(self.final_norm(hidden)).float()
        raw, shift = (self.soft_clip * torch.tanh(out / self.soft_clip)).chunk(2, -1)
        return softplus(raw + UNIT), shift


class Flow(nn.Module):
    """STARFlow or STARFlow-V.

    `operations` provides the layers with large weights (`torch.nn`, or a host's namespace that casts and offloads).
    `compute_dtype` is the type the network runs in; the affine maps, the noise and the likelihood are always float32.
    Of the deep block each process of a `team` has a share.
    """

    def __init__(
        self, config: FlowConfig, operations=torch.nn, dtype=torch.float32, device=None, team: Team = ALONE
    ):  # fmt: skip
        super().__init__()
        self.config, self.team = config, team
        self.compute_dtype = dtype
        factory = {"dtype": dtype, "device": device}
        self.blocks = nn.ModuleList(Block(config, i, operations, team, **factory) for i in range(len(config.layers)))
        if config.denoiser:
            self.learnable_self_denoiser = DenoiserNet(config, operations, **factory)
        self.copies: dict[torch.device, Block | None] = {}  # of the deep block; they aren't among the flow's modules
        self.evaluate: Evaluate = evaluate  # or, as long as the flow is compiled, that

    def compile(self) -> None:
        """Evaluate sweeps by compiled graphs from now on. The first of each kind takes long. Weights have to be on the
        device, where they stay, and all keys and values there in the compute type: other runs are as they were."""
        self.evaluate = compiled()

    @property
    def compiled(self) -> bool:
        return self.evaluate is not evaluate

    @property
    def deep(self) -> Block:
        return self.blocks[-1]

    def copy_deep(self, devices: Iterable[torch.device]) -> None:
        """Have copies of the deep block on these devices, in place of those there are. One that its own weights are on
        needs none. Each is made when it is first asked for: what is added to the block until then is copied once."""
        home = self.deep.sos_embed.device
        self.copies = dict.fromkeys(device for device in devices if device != home)

    def deep_on(self, device: torch.device) -> Block:
        """The deep block, or its copy, for a run on a device."""
        if device not in self.copies:
            return self.deep
        self.copies[device] = self.copies[device] or _copied(self.deep, device)
        return self.copies[device]

    @property
    def shallow(self) -> list[Block]:
        return list(self.blocks[:-1])

    def grid(self, latents: Tensor) -> Grid:
        frames, channels, height, width = latents.shape[1:]
        patch = self.config.patch_size
        if channels != self.config.latent.channels or height % patch or width % patch:
            raise InputError(
                f"latents of {channels} channels, {height} x {width}: {self.config.name} takes "
                f"{self.config.latent.channels} channels and sizes divisible by {patch}"
            )
        return Grid(frames, height // patch, width // patch)

    def tokens(self, latents: Tensor) -> Tensor:
        """(B, T, C, H, W) -> (B, T, N, c), float32."""
        p = self.config.patch_size
        return rearrange(latents.float(), "b t c (h p1) (w p2) -> b t (h w) (p1 p2 c)", p1=p, p2=p)

    def latents(self, tokens: Tensor, grid: Grid) -> Tensor:
        """The inverse of `tokens`."""
        p = self.config.patch_size
        return rearrange(tokens, "b t (h w) (p1 p2 c) -> b t c (h p1) (w p2)", h=grid.height, p1=p, p2=p)

    def rotary(self, grid: Grid, device) -> Rotary:
        c = self.config
        return token_rotary(
            grid.frames, grid.height, grid.width,
            length=c.rope_length, head_dim=c.head_dim, rounding=c.rounding, device=device,
        )  # fmt: skip

    def frame_rotary(self, grid: Grid, device) -> Rotary:
        """For shallow blocks, where every frame is at time 0."""
        return self.rotary(grid.with_frames(1), device)

    def text_rotary(self, tokens: int, device) -> Rotary:
        c = self.config
        return text_rotary(tokens, length=c.rope_length, head_dim=c.head_dim, rounding=c.rounding, device=device)

    def denoiser_run(self, text: Tensor, grid: Grid, net: DenoiserNet | None = None) -> DenoiserRun:
        """A pass of the denoiser, or of another `net` in its place, over text (B, L, D) and at most the grid's
        frames."""
        rotary = joined(self.text_rotary(text.shape[1], text.device), self.rotary(grid, text.device))
        net = net or self.learnable_self_denoiser
        return DenoiserRun(net, self.config.denoiser, text, grid.frame_tokens, rotary, self.compute_dtype)

    def shallow_affine(
        self, block: Block, tokens: Tensor, rotary: Rotary, control: Control | None = None
    ) -> tuple[Tensor, Tensor]:
        """a, b of frames (rows, N, c) in the block's order, each frame a sequence of its own."""
        rows, attend = max(1, SHALLOW_TOKENS // tokens.shape[1]), self._reporting(block, control)
        before = tokens[:, :-1].to(self.compute_dtype)
        if self.compiled and not (control or torch.is_grad_enabled()):
            parts = [whole(self.evaluate, block, block.started(part), rotary) for part in before.split(rows)]
        else:
            parts = [block(part, rotary, attend, first=True) for part in before.split(rows)]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(p) for p in zip(*parts, strict=True))

    def deep_affine(
        self, tokens: Tensor, text: Tensor, grid: Grid, control: Control | None = None
    ) -> tuple[Tensor, Tensor]:
        """a, b of a whole clip (B, T N, c) in the deep block's order, after text (B, L, D)."""
        block, device = self.deep, tokens.device
        rotary = joined(self.text_rotary(text.shape[1], device), self.rotary(grid, device))
        before, text = tokens[:, :-1].to(self.compute_dtype), text.to(self.compute_dtype)
        return block(before, rotary, self._reporting(block, control), text, first=True)

    def _reporting(self, block: Block, control: Control | None) -> Callable[[int], Attend]:
        """Causal attention in each layer; the layers that are done are reported before."""
        layers = self.config.layers
        done, total = sum(layers[: block.index]), sum(layers)

        def attend(layer: int) -> Attend:
            if control:
                control.report(Progress("invert", done + layer, total))
            return causal

        return attend

    def encode_shallow(self, latents: Tensor, control: Control | None = None) -> tuple[Tensor, list[Tensor]]:
        """Latents to the deep block's input, tokens (B, T, N, c) in row-major order, and the
        log-determinants of the shallow blocks."""
        grid = self.grid(latents)
        rotary = self.frame_rotary(grid, latents.device)
        tokens, logdets = self.tokens(latents), []
        require_finite(tokens, "the given latents", grid)
        for block in self.shallow:
            x = block.ordered(tokens).flatten(0, 1)
            tokens, logdet = _encoded(block, x, self.shallow_affine(block, x, rotary, control), tokens.shape)
            logdets.append(logdet)
            require_finite(tokens, f"block {block.index}", grid)
        return tokens, logdets

    def forward(self, latents: Tensor, text: Tensor, control: Control | None = None) -> Encoding:
        """Data to noise. Latents (B, T, C, H, W) or (B, C, H, W), text (B, L, D) embeddings.

        The shallow blocks compute where the latents are, the deep block where the text is; the result is with the
        latents. `control` is told of each layer. Raises NonFiniteError that names the block and the token where NaN or
        infinity began.
        """
        clip = latents if latents.ndim == 5 else latents.unsqueeze(1)
        grid, block = self.grid(clip), self.deep
        tokens, logdets = self.encode_shallow(clip, control)
        x = block.ordered(tokens).flatten(1, 2).to(text.device)
        noise, logdet = _encoded(block, x, self.deep_affine(x, text, grid, control), tokens.shape)
        noise, logdet = noise.to(latents.device), logdet.to(latents.device)
        require_finite(noise, f"block {block.index}", grid)
        if control:
            control.report(Progress("invert", sum(self.config.layers), sum(self.config.layers)))
        return Encoding(self.latents(noise, grid).view_as(latents), [*logdets, logdet])

    def encode(self, latents: Tensor, text: Tensor, control: Control | None = None) -> Encoding:
        """As `forward`, under the name it has in the literature."""
        return self(latents, text, control)

    def loss(self, latents: Tensor, text: Tensor, given: int = 0) -> Tensor:
        """Training loss of each sample, in nats per element: (B,).

        The mean over elements of 0.5 z^2 + sum over blocks of log a, which is the negative log-likelihood without
        its constant 0.5 log 2 pi. The first `given` frames are a context: what follows sees them, but they don't count.
        """
        encoding = self(latents, text)
        z = encoding.noise[:, given:]
        logdet = sum(d[:, given:].flatten(1).sum(1) for d in encoding.logdets)
        return 0.5 * z.flatten(1).square().mean(1) - logdet / z[0].numel()


def _copied(block: Block, device: torch.device) -> Block:
    """A copy of a block whose weights go to a device one by one, without a second copy of all where they are."""
    with torch.inference_mode(False), torch.no_grad():
        moved = {id(weight): nn.Parameter(weight.to(device), weight.requires_grad) for weight in block.parameters()}
        moved |= {id(buffer): buffer.to(device) for buffer in block.buffers()}
        return copy.deepcopy(block, moved)


def _encoded(block: Block, x: Tensor, affine: tuple[Tensor, Tensor], shape: torch.Size) -> tuple[Tensor, Tensor]:
    """(x - b) / a and -log a of tokens in the block's order, as (B, T, N, c) in row-major order."""
    a, b = affine
    return tuple(block.ordered(part.view(shape)) for part in ((x - b) / a, -a.log()))


def require_finite(tokens: Tensor, where: str, grid: Grid, first: int = 0) -> None:
    """Raise NonFiniteError, naming the first bad token, unless tokens (B, T, N, c) are finite. `first` is the index of
    their first frame in the clip."""
    bad = ~torch.isfinite(tokens).all(-1)
    if not bad.any():
        return
    element, frame, token = bad.nonzero()[0].tolist()
    row, col = divmod(token, grid.width)
    raise NonFiniteError(
        f"NaN or infinity in {where}: batch element {element}, latent frame {first + frame}, token {token} "
        f"(row {row}, column {col}). Check the weights, or run in float32 or bfloat16."
    )
