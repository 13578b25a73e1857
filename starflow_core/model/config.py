"""What defines a model: its shapes, latent format, prompt wrapping, and the defaults for its jobs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from ..errors import CheckpointError, InputError
from .latent import SD_VAE, WAN22_VAE, LatentFormat

CONFIG_SCHEMA = 1  # version of the dictionary form, raised when a field changes its meaning
ROUNDINGS = ("exact", "angles", "positions")
TASKS = ("text", "first_frame", "extend", "edit", "last_frame")
ASPECTS = ("1:1", "2:3", "3:2", "16:9", "9:16", "4:5", "5:4", "21:9", "9:21")


@dataclass(frozen=True)
class PromptFormat:
    """How a caption is wrapped before tokenising, and its length in tokens."""

    tokens: int
    fps: bool = False
    noise_level: bool = False
    aspect: bool = False


@dataclass(frozen=True)
class Denoiser:
    """The learned denoiser: `look_ahead` + 1 is the reference's `temporal_causal`."""

    width: int
    layers: int
    window: int
    look_ahead: int = 1

    @property
    def reach(self) -> int:
        """How many later latent frames a denoised frame depends on, through all layers."""
        return self.layers * self.look_ahead


@dataclass(frozen=True)
class Defaults:
    """A job's settings unless the user chooses others. `size` is the side of a square of equal area."""

    guidance: float
    size: int
    aspect: str = "1:1"
    frames: int = 1
    fps: int = 0


@dataclass(frozen=True)
class FlowConfig:
    """One STARFlow model. `layers` lists the blocks in order, the deep one last."""

    kind: str
    latent: LatentFormat
    prompt: PromptFormat
    layers: tuple[int, ...]
    width: int
    deep_width: int
    text_dim: int
    rope_length: float
    noise_std: float
    head_dim: int = 64
    patch_size: int = 1
    soft_clip: float = 4.0
    seq_order: str = "L2R"
    rounding: str = "angles"
    window: int = 0
    denoiser: Denoiser | None = None
    tasks: tuple[str, ...] = ("text",)
    aspects: tuple[str, ...] = ASPECTS
    defaults: Defaults = field(default_factory=lambda: Defaults(0.0, 256))
    name: str = "STARFlow"

    def __post_init__(self):
        problems = [
            (self.kind not in ("image", "video"), f"kind is {self.kind!r}, expected image or video"),
            (self.seq_order not in ("L2R", "R2L"), f"seq_order is {self.seq_order!r}"),
            (self.rounding not in ROUNDINGS, f"rounding is {self.rounding!r}, expected one of {ROUNDINGS}"),
            (self.head_dim % 4 or self.head_dim < 20, f"head_dim is {self.head_dim}, expected a multiple of 4 from 20"),
            (self.width % self.head_dim or self.deep_width % self.head_dim, "widths are not multiples of head_dim"),
            (not 0 < self.rope_length < math.inf, f"rope_length is {self.rope_length}, expected a number above 0"),
            (self.soft_clip <= 0, f"soft_clip is {self.soft_clip}; released models have 4"),
            (len(self.layers) < 2, "a flow has at least one shallow and one deep block"),
            (self.kind == "video" and self.window < 1, "a video model needs a window"),
            (not set(self.tasks) <= set(TASKS), f"tasks are {self.tasks}, known are {TASKS}"),
        ]
        for wrong, message in problems:
            if wrong:
                raise CheckpointError(f"configuration of {self.name}: {message}")

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
                low = max(self.cell, value // self.cell * self.cell)
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
                f"{self.name} needs {latent.channels}, 1/{latent.spatial} and 1/{latent.temporal}"
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
                f"configuration has schema {schema}, this version reads {CONFIG_SCHEMA}; "
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
        get = arguments.get
        wanted = {"rope": 1, "sos": 1, "cond_top_only": 1, "use_softplus": 1, "use_final_norm": 1}
        wanted |= dict.fromkeys(("use_qk_norm", "use_swiglu", "use_post_norm", "hf_style_rope", "use_rms_norm"), 0)
        video = get("temporal_causal", 0) > 0
        if video:
            wanted["shallow_block_local"] = 1
        for name, value in wanted.items():
            if int(get(name, value) or 0) != value:
                raise CheckpointError(f"unsupported option {name}={get(name)}; released models have {value}")
        if get("num_kv_heads") or get("use_1d_rope"):
            raise CheckpointError("unsupported option: grouped key/value heads or 1-D rotary positions")
        layers = tuple(arguments["layers_per_block"])
        channels, patch = arguments["in_channels"], arguments["patch_size"]
        denoiser = None
        if get("learnable_self_denoiser"):
            denoiser = Denoiser(arguments["channels"], 8, get("denoiser_window", 10), get("temporal_causal", 0) - 1)
        settings = {
            "kind": "video" if video else "image",
            "latent": LatentFormat(channels, 16 if video else 8, 4 if video else 1),
            "prompt": PromptFormat(arguments["txt_size"], fps=video, noise_level=video, aspect=video),
            "layers": layers,
            "width": arguments["channels"],
            "deep_width": get("top_block_channels") or arguments["channels"],
            "text_dim": arguments["txt_dim"],
            "rope_length": get("pt_seq_len") or arguments["img_size"] // patch,
            "noise_std": noise_std,
            "head_dim": arguments["head_dim"],
            "patch_size": patch,
            "soft_clip": get("soft_clip", 0),
            "seq_order": get("seq_order", "L2R"),
            "window": (get("local_attn_window") or 21) if video else 0,
            "denoiser": denoiser,
        }
        return cls(**{**settings, **overrides})


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


def _build(part, values: dict[str, Any]):
    known = {f.name for f in dataclasses.fields(part)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise CheckpointError(f"configuration has unknown fields {', '.join(unknown[:5])}; update the pack")
    try:
        return part(**{k: _tuples(v) for k, v in values.items()})
    except TypeError as error:
        raise CheckpointError(f"configuration is incomplete: {error}") from None


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


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
