"""What defines a model: its shapes, latent format, prompt wrapping, and the defaults for its jobs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from ..errors import CheckpointError, InputError
from .latent import SD_VAE, WAN22_VAE, LatentFormat
from .schema import WIDEST, check_fields, number, shown, tuples

CONFIG_SCHEMA = 1  # version of the dictionary form, raised when a field changes its meaning
ROUNDINGS = ("exact", "angles", "positions")
TASKS = ("text", "first_frame", "extend", "edit", "last_frame")
ASPECTS = ("1:1", "2:3", "3:2", "16:9", "9:16", "4:5", "5:4", "21:9", "9:21")


@dataclass(frozen=True)
class PromptFormat:
    """How a caption is wrapped before tokenising, and its length in tokens."""

    tokens: int = number(1, 4096)
    fps: bool = False
    noise_level: bool = False
    aspect: bool = False

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class Denoiser:
    """The learned denoiser: `look_ahead` + 1 is the reference's `temporal_causal`."""

    width: int = number(1, WIDEST)
    layers: int = number(1, 1024)
    window: int = number(0, 1024)
    look_ahead: int = number(0, 1024, 1)

    def __post_init__(self):
        check_fields(self)
        if self.look_ahead > self.window:
            raise CheckpointError(f"look_ahead is {self.look_ahead}, more than the denoiser's window of {self.window}")

    @property
    def reach(self) -> int:
        """How many later latent frames a denoised frame depends on, through all layers."""
        return self.layers * self.look_ahead


@dataclass(frozen=True)
class Defaults:
    """A job's settings unless the user chooses others. `size` is the side of a square of equal area."""

    guidance: float = number(0, 100)
    size: int = number(1, 16384)
    aspect: str = "1:1"
    frames: int = number(1, 1 << 20, 1)
    fps: int = number(0, 1000, 0)

    def __post_init__(self):
        check_fields(self)
        _check_aspect(self.aspect)


@dataclass(frozen=True)
class FlowConfig:
    """One STARFlow model. `layers` lists the blocks in order, the deep one last."""

    kind: str
    latent: LatentFormat
    prompt: PromptFormat
    layers: tuple[int, ...] = number(1, 1024)
    width: int = number(1, WIDEST)
    deep_width: int = number(1, WIDEST)
    text_dim: int = number(1, WIDEST)
    rope_length: float = number(1e-3, 1e6)
    noise_std: float = number(0, 100)
    head_dim: int = number(20, WIDEST, 64)
    patch_size: int = number(1, 64, 1)
    soft_clip: float = number(0, 1e6, 4.0)
    seq_order: str = "L2R"
    rounding: str = "angles"
    window: int = number(0, 1 << 20, 0)
    denoiser: Denoiser | None = None
    tasks: tuple[str, ...] = ("text",)
    aspects: tuple[str, ...] = ASPECTS
    defaults: Defaults = field(default_factory=lambda: Defaults(0.0, 256))
    name: str = "STARFlow"

    def __post_init__(self):
        check_fields(self)
        problems = [
            (self.kind not in ("image", "video"), f"kind is {self.kind!r}, expected image or video"),
            (self.seq_order not in ("L2R", "R2L"), f"seq_order is {self.seq_order!r}, expected L2R or R2L"),
            (self.rounding not in ROUNDINGS, f"rounding is {self.rounding!r}, expected one of {ROUNDINGS}"),
            (self.head_dim % 4, f"head_dim is {self.head_dim}, expected a multiple of 4"),
            (self.width % self.head_dim or self.deep_width % self.head_dim, "widths are not multiples of head_dim"),
            (not self.soft_clip, "soft_clip is 0; released models have 4"),
            (len(self.layers) < 2, "a flow has at least one shallow and one deep block"),
            (self.kind == "video" and self.window < 1, "a video model needs a window"),
            (not set(self.tasks) <= set(TASKS), f"tasks are {shown(self.tasks)}, known are {TASKS}"),
            (not self.aspects, "a model has at least one aspect ratio"),
        ]
        for wrong, message in problems:
            if wrong:
                raise CheckpointError(message)
        for aspect in self.aspects:
            _check_aspect(aspect)

    @property
    def token_channels(self) -> int:
        return self.latent.channels * self.patch_size**2

    @property
    def cell(self) -> int:
        """Pixels that a token covers in each direction."""
        return self.latent.spatial * self.patch_size

    def sliding_window(self, frames: int, window: int | None = None, keep: int | None = None) -> tuple[int, int]:
        """Latent frames that the deep block attends to at once, and how many of them stay when the window slides.

        None stands for the model's own number (the reference keeps 16 of 21). Raises InputError for numbers
        that cannot make `frames` latent frames.
        """
        window = (self.window or 1) if window is None else window
        if window < 1:
            raise InputError(f"window is {window} latent frames; the minimum is 1")
        if keep is None:
            keep = min(max(round(16 * window / 21), 1), max(window - 1, 1))
        if keep < 1:
            raise InputError(f"keep is {keep} latent frames; the minimum is 1")
        if frames > window and not 1 <= keep < window:
            raise InputError(
                f"keep is {keep}; a window of {window} latent frames keeps 1 to {window - 1} when it slides"
            )
        return window, keep

    def size(self, aspect: str | None = None, side: int | None = None) -> tuple[int, int]:
        """Height and width in pixels for a ratio "w:h" at the area of side x side."""
        ratio = float(parse_aspect(aspect or self.defaults.aspect))
        side = side or self.defaults.size
        if side < self.cell:
            raise InputError(f"size {side} is smaller than one token; the minimum is {self.cell}")
        height, width = side / math.sqrt(ratio), side * math.sqrt(ratio)
        return tuple(max(1, math.floor(v / self.cell + 0.5)) * self.cell for v in (height, width))

    def check_size(self, height: int, width: int) -> None:
        """Raise InputError unless the model has whole tokens at this size."""
        for name, value in (("height", height), ("width", width)):
            if value < self.cell or value % self.cell:
                if value < self.cell:
                    raise InputError(f"{name} {value} is less than one token; the smallest is {self.cell}")
                low = value // self.cell * self.cell
                raise InputError(
                    f"{name} {value} is not a multiple of {self.cell}; nearest are {low} and {low + self.cell}"
                )

    def check_text_encoder(self, dim: int) -> None:
        """Raise InputError unless the model reads embeddings of `dim` channels."""
        if dim == self.text_dim:
            return
        wanted = "flan-t5-xl" if self.text_dim == 2048 else "the text encoder that came with it (others: flan-t5-xl)"
        raise InputError(f"the text encoder gives {dim} channels, {self.name} reads {self.text_dim}: use {wanted}")

    def check_vae(self, channels: int, spatial: int, temporal: int) -> None:
        """Raise InputError unless the model samples latents of a VAE with these channels and compression factors."""
        latent = self.latent
        if (channels, spatial, temporal) != (latent.channels, latent.spatial, latent.temporal):
            raise InputError(
                f"this VAE has {channels} channels, 1/{spatial} of the size and 1/{temporal} of the frames; "
                f"{self.name} needs {latent.channels}, 1/{latent.spatial} and 1/{latent.temporal}: load the VAE that "
                "goes with it"
            )

    def nearest_aspect(self, height: int, width: int) -> str:
        """The trained ratio nearest to a size, for its prompt."""
        target = math.log(width / height)
        return min(self.aspects, key=lambda a: abs(math.log(parse_aspect(a)) - target))

    def to_dict(self) -> dict[str, Any]:
        return {"schema": CONFIG_SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FlowConfig:
        """The inverse of `to_dict`. Raises CheckpointError for a newer schema or unknown fields."""
        values = dict(values)
        schema = values.pop("schema", None)
        if schema != CONFIG_SCHEMA:
            raise CheckpointError(
                f"configuration has schema {shown(schema)}, this version reads {CONFIG_SCHEMA}; "
                "update the pack or convert again"
            )
        parts = {"latent": LatentFormat, "prompt": PromptFormat, "defaults": Defaults, "denoiser": Denoiser}
        for name, part in parts.items():
            if values.get(name) is not None:
                values[name] = _build(part, values[name])
        return _build(cls, values)

    @classmethod
    def from_reference(cls, arguments: dict[str, Any], noise_std: float = 0.3, **overrides) -> FlowConfig:
        """From the reference's constructor arguments; refuses options no released model uses.

        Angles are rounded as for the released weights, unless `rounding` says otherwise.
        """
        known = {f.name for f in dataclasses.fields(Reference)}
        given = _build(Reference, {name: arguments[name] for name in arguments if name in known})
        video = given.temporal_causal > 0
        _refuse_options({**arguments, "soft_clip": given.soft_clip}, video)
        denoiser = None
        if given.learnable_self_denoiser:
            denoiser = Denoiser(given.channels, 8, given.denoiser_window, given.temporal_causal - 1)
        settings = {
            "kind": "video" if video else "image",
            "latent": LatentFormat(given.in_channels, 16 if video else 8, 4 if video else 1),
            "prompt": PromptFormat(given.txt_size, fps=video, noise_level=video, aspect=video),
            "layers": given.layers_per_block,
            "width": given.channels,
            "deep_width": given.top_block_channels or given.channels,
            "text_dim": given.txt_dim,
            "rope_length": given.pt_seq_len or (given.img_size or 0) // given.patch_size,
            "noise_std": noise_std,
            "head_dim": given.head_dim,
            "patch_size": given.patch_size,
            "soft_clip": given.soft_clip,
            "seq_order": given.seq_order,
            "window": (given.local_attn_window or 21) if video else 0,
            "denoiser": denoiser,
        }
        return cls(**{**settings, **overrides})


@dataclass(frozen=True)
class Reference:
    """The constructor arguments of the reference that say what a model is; 0 and None stand for none."""

    in_channels: int = number(1, WIDEST)
    patch_size: int = number(1, 64)
    channels: int = number(1, WIDEST)
    layers_per_block: tuple[int, ...] = number(1, 1024)
    head_dim: int = number(1, WIDEST)
    txt_size: int = number(1, 4096)
    txt_dim: int = number(1, WIDEST)
    top_block_channels: int | None = number(0, WIDEST, None)
    img_size: int | None = number(0, 1 << 16, None)
    pt_seq_len: float | None = number(0, 1e6, None)
    soft_clip: float = number(0, 1e6, 0)
    seq_order: str = "L2R"
    temporal_causal: int = number(0, 1024, 0)
    local_attn_window: int | None = number(0, 1 << 20, None)
    learnable_self_denoiser: int | bool | None = number(0, 1, None)
    denoiser_window: int = number(1, 1024, 10)

    def __post_init__(self):
        check_fields(self)


def _refuse_options(arguments: dict[str, Any], video: bool) -> None:
    """Raise CheckpointError for an option of the reference that no released model uses."""
    wanted = dict.fromkeys(("rope", "sos", "cond_top_only", "use_softplus", "use_final_norm"), 1)
    wanted |= dict.fromkeys(("use_qk_norm", "use_swiglu", "use_post_norm", "hf_style_rope", "use_rms_norm"), 0)
    wanted |= {"shallow_block_local": 1} if video else {}
    wanted |= dict.fromkeys(("num_kv_heads", "use_1d_rope"), 0)  # grouped heads, 1-D rotary positions
    for name, value in wanted.items():
        if (arguments.get(name, value) or 0) != value:
            raise CheckpointError(f"unsupported option {name}={shown(arguments[name])}; released models have {value}")


def parse_aspect(text: str) -> Fraction:
    """Width over height of "16:9". Raises InputError for anything else."""
    try:
        width, height = (int(part) for part in text.split(":"))
        ratio = Fraction(width, height)
    except (ValueError, ZeroDivisionError, AttributeError):
        raise InputError(f"aspect ratio {text!r}: expected width:height, such as 16:9") from None
    if not Fraction(1, 8) <= ratio <= 8:
        raise InputError(f"aspect ratio {text} is too extreme; trained ratios are {', '.join(ASPECTS)}")
    return ratio


def _check_aspect(text: str) -> None:
    try:
        parse_aspect(text)
    except InputError as error:
        raise CheckpointError(str(error)) from None


def _build(part, values: dict[str, Any]):
    if not isinstance(values, dict):
        raise CheckpointError(f"{part.__name__} is {shown(values)}, expected a JSON object")
    known = {f.name for f in dataclasses.fields(part)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise CheckpointError(f"configuration has unknown fields {shown(unknown)}; update the pack")
    required = (dataclasses.MISSING, dataclasses.MISSING)
    missing = [
        f.name for f in dataclasses.fields(part) if f.name not in values and (f.default, f.default_factory) == required
    ]
    if missing:
        raise CheckpointError(f"configuration lacks {', '.join(missing)}")
    return part(**{name: tuples(value) for name, value in values.items()})


STARFLOW_3B = FlowConfig(
    name="STARFlow 3B text-to-image",
    kind="image",
    latent=SD_VAE,
    prompt=PromptFormat(tokens=128),
    layers=(2, 2, 2, 2, 2, 24),
    width=3072,
    deep_width=3072,
    text_dim=2048,
    rope_length=32,
    noise_std=0.3,
    defaults=Defaults(guidance=3.6, size=256),
)
STARFLOW_V_7B = FlowConfig(
    name="STARFlow-V 7B video",
    kind="video",
    latent=WAN22_VAE,
    prompt=PromptFormat(tokens=256, fps=True, noise_level=True, aspect=True),
    layers=(2, 2, 2, 2, 2, 24),
    width=3072,
    deep_width=4096,
    text_dim=2048,
    rope_length=32,
    noise_std=0.5,
    window=21,
    denoiser=Denoiser(width=3072, layers=8, window=10),
    tasks=("text", "first_frame", "extend"),
    defaults=Defaults(guidance=3.5, size=640, aspect="16:9", frames=81, fps=16),
)
KNOWN_MODELS = {"starflow-3b": STARFLOW_3B, "starflow-v-7b": STARFLOW_V_7B}
