"""What a training run is told: one TOML file, every field of which is also an option of the command.

Imports nothing heavy: the command's help reads it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from ..errors import InputError

LARGEST = (1 << 63) - 1  # whole number
TASKS = ("text", "first_frame", "extend", "last_frame", "edit")


def setting(
    default: Any, group: str, text: str, least: float | None = None, most: float | None = None, choices=(), only=(),
):  # fmt: skip
    """A field with its group, its help, and what it may be; `least` and `most` may be reached. It says something of
    what is trained `only` as these, where they are given."""
    told = {"group": group, "help": text, "least": least, "most": most, "choices": tuple(choices), "only": only}
    return dataclasses.field(default=default, metadata=told)


@dataclass(frozen=True)
class Settings:
    """All fields with their defaults. Raises InputError for a value that can't be."""

    train: str = setting(
        "lora", "What is trained",
        "lora: small additions to a model; full: all weights of its flow; scratch: a new flow; denoiser: the learned "
        "denoiser, on a flow that stays; vae: an image VAE's decoder, on noisy latents",
        choices=("lora", "full", "scratch", "denoiser", "vae"),
    )  # fmt: skip
    model: str | None = setting(None, "What is trained", "the flow's checkpoint (default: the bundled demo)")
    text_encoder: str | None = setting(None, "What is trained", "the text encoder that goes with it")
    tokenizer: str | None = setting(None, "What is trained", "folder of its tokenizer (default: the encoder's own)")
    vae: str | None = setting(None, "What is trained", "the VAE that goes with it")
    config: str | None = setting(
        None, "What is trained", "for scratch: a JSON file with the new flow's configuration", only=("scratch",)
    )
    work: str = setting("runs/lora", "What is trained", "folder for states to resume from, logs and samples")
    output: str | None = setting(None, "What is trained", "the finished file (default: WORK/TRAIN.safetensors)")
    data_cache: str | None = setting(
        None, "What is trained", "folder of encoded data, which runs can share (default: WORK/cache)"
    )

    data: tuple[str, ...] = setting(
        (), "Data", "folders of pictures or clips with captions; FOLDER:3 shows what is in it three times as often"
    )
    size: int | None = setting(None, "Data", "side in pixels of a square of the same area (default: the model's)", 16)
    frames: int | None = setting(None, "Data", "longest clip, 4n + 1 frames; 1 for pictures (default: the model's)", 1)
    stride: int | None = setting(None, "Data", "frames between a clip's windows (default: the window's length)", 1)
    fps: float | None = setting(None, "Data", "clips are brought to this rate (default: the model's)", 0.1, 1000)
    tasks: tuple[str, ...] = setting(
        ("text:1",), "Data",
        f"what is practised, with shares, as text:3 extend:1; of {', '.join(TASKS)}; edit needs pairs",
    )  # fmt: skip
    caption_drop: float = setting(0.1, "Data", "share of captions left empty, which guidance needs", 0, 1)
    noise: float | None = setting(None, "Data", "deviation of the noise on latents (default: the model's)", 0, 10)
    held_out: float = setting(0.05, "Data", "share of the samples that is kept for measuring", 0, 0.9)
    rehearse: tuple[str, ...] = setting(
        (),
        "Data",
        "captions of what it is to go on knowing; the model draws these itself, and sees them in between. After (v2v) "
        "it edits what it drew of others, after (last) the last frame is given",
    )
    rehearsal: float = setting(0.5, "Data", "share of the steps that rehearse, where there is something to", 0, 0.95)

    rank: int = setting(16, "LoRA", "rank of the additions", 1, 4096, only=("lora",))
    alpha: float | None = setting(
        None, "LoRA", "they are scaled by alpha / rank (default: the rank)", 1e-6, only=("lora",)
    )
    dropout: float = setting(0.0, "LoRA", "share of their inputs that is dropped", 0, 0.99, only=("lora",))
    blocks: str = setting("deep", "LoRA", "deep: the block that reads text; all; or numbers, as 4,5", only=("lora",))
    int8: bool = setting(False, "LoRA", "keep the frozen weights in 8 bit: half the memory of bf16", only=("lora",))
    trigger_words: str = setting("", "LoRA", "words that call up what it has learned, for its users")
    license: str = setting("", "LoRA", "the licence of what is trained, beside the model's own")

    steps: int = setting(1000, "Optimisation", "steps of the optimizer", 1, 10**9)
    batch: int = setting(8, "Optimisation", "samples in a step, on all devices together", 1, 1 << 20)
    micro_batch: int | None = setting(
        None, "Optimisation", "samples at once on a device (default: all of its share)", 1
    )
    optimizer: str = setting("adamw", "Optimisation", "which one", choices=("adamw", "muon"))
    learning_rate: float | None = setting(
        None, "Optimisation", "the highest (default: 1e-3, of weights that were trained before 1e-5; muon ten times)",
        1e-12, 10,
    )  # fmt: skip
    weight_decay: float = setting(0.0, "Optimisation", "of adamw", 0, 10)
    warmup: int = setting(50, "Optimisation", "steps in which the rate rises", 0)
    decay: float = setting(0.5, "Optimisation", "share of the steps, the last ones, in which it falls", 0, 1)
    clip: float = setting(1.0, "Optimisation", "largest norm of a gradient", 1e-9)
    ema: float = setting(0.99, "Optimisation", "decay of the average of the weights, which is the result", 0, 0.999999)
    dtype: str | None = setting(
        None,
        "Optimisation",
        "type of the matrix products (default: bf16; for small models on a CPU fp32); what learns is kept in float32",
        choices=("bf16", "fp32"),
    )
    recompute: bool = setting(
        True,
        "Optimisation",
        "keep one hidden state a layer and compute the rest again: slower, a fraction of the memory",
    )
    seed: int = setting(0, "Optimisation", "of weights, order and noise", 0, LARGEST)
    device: str | None = setting(None, "Optimisation", "cpu, cuda, mps, .. (default: the best available)")

    save_every: int = setting(200, "Watching", "steps from state to state; a run goes on from the last one", 1)
    log_every: int = setting(20, "Watching", "steps from line to line", 1)
    evaluate_every: int = setting(200, "Watching", "steps from measurement to measurement of what is held out", 1)
    sample_every: int = setting(500, "Watching", "steps from sheet to sheet of samples", 1)
    prompts: tuple[str, ...] = setting((), "Watching", "what the samples show, each from its own fixed noise")
    guidance: float | None = setting(None, "Watching", "of the samples (default: the model's)", 0, 100)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        if self.frames is not None and self.frames % 4 != 1:
            raise InputError(
                f"frames is {self.frames}: clips have 4n + 1 frames, the nearest is {_nearest_length(self.frames)}"
            )
        self._check_use()
        _ = self.shares, self.folders

    def _check_use(self) -> None:
        """Raise InputError for what was set, but has no part in what is trained."""
        for field in dataclasses.fields(self):
            only = field.metadata["only"]
            if only and self.train not in only and getattr(self, field.name) != field.default:
                raise InputError(f"{field.name} is for train = {' or '.join(only)}, not {self.train}; leave it out")
        if self.weight_decay and self.optimizer != "adamw":
            raise InputError(f"weight_decay is for optimizer = adamw, not {self.optimizer}; leave it out")

    @property
    def rate(self) -> float:
        """The learning rate."""
        usual = 1e-3 if self.train in ("lora", "scratch") else 1e-5
        return self.learning_rate or usual * (10 if self.optimizer == "muon" else 1)

    @property
    def result(self) -> Path:
        """Where the finished file goes."""
        return Path(self.output or Path(self.work) / f"{self.train}.safetensors")

    @property
    def cached(self) -> Path:
        """The folder of encoded data."""
        return Path(self.data_cache or Path(self.work) / "cache")

    @property
    def shares(self) -> dict[str, float]:
        """The tasks and their shares. Raises InputError for unknown ones."""
        shares = dict(_with_number(text, "tasks") for text in self.tasks)
        for name in shares:
            if name not in TASKS:
                raise InputError(f"tasks: there is no {name!r}{_nearest(name, TASKS)}; known are {', '.join(TASKS)}")
        if not shares or not sum(shares.values()) > 0:
            raise InputError("tasks: nothing is to be practised; give at least one, as text:1")
        return shares

    @property
    def folders(self) -> list[tuple[Path, int]]:
        """The data's folders, and how often each is shown. Raises InputError for broken numbers."""
        found = [_with_number(text, "data") for text in self.data]
        for (_, repeats), text in zip(found, self.data, strict=True):
            if repeats != int(repeats) or repeats < 1:
                raise InputError(f"data: {text!r} has to end in a whole number of repeats, 1 or more")
        return [(Path(name), int(repeats)) for name, repeats in found]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


WANTED = {tuple: "a list of texts", bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
HINTS = get_type_hints(Settings)


def read_settings(path: str | Path | None, given: Mapping[str, Any]) -> Settings:
    """The settings of a TOML file, and those `given` in its place. Raises InputError, with the nearest name for a field
    that doesn't exist."""
    values = dict(_read_toml(Path(path))) if path is not None else {}
    values |= given
    names = [field.name for field in dataclasses.fields(Settings)]
    for name, value in values.items():
        if isinstance(value, dict):
            raise InputError(f"[{name}] begins a section, but settings have none: leave the line out")
        if name not in names:
            raise InputError(f"there is no setting {name!r}{_nearest(name, names)}; --example shows all")
    return Settings(**values)


def example() -> str:
    """A TOML file with every field, its default and a comment; those without a default are commented out."""
    lines, group = ["# A training run. What is left out has the value shown; every field is also an option."], None
    for field in dataclasses.fields(Settings):
        if field.metadata["group"] != group:
            group = field.metadata["group"]
            lines += ["", f"# {group}"]
        value = field.default
        shown = f"{field.name} = {_toml(value)}" if value is not None else f"# {field.name} = {_placeholder(field)}"
        lines += [f"# {field.metadata['help']}", shown]
    return "\n".join(lines) + "\n"


def kind_of(field: dataclasses.Field) -> type:
    """bool, int, float, str or tuple (of str)."""
    hint = str(HINTS[field.name])
    return next(kind for kind in (bool, int, float, tuple, str) if kind.__name__ in hint)


def _read_toml(path: Path) -> Mapping[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # what tomllib and decoding raise are ValueErrors
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path} can't be read as settings ({reason}); `train --example` prints a file to start from"
        ) from None


def _checked(field: dataclasses.Field, value: Any) -> Any:
    kind, told, name = kind_of(field), field.metadata, field.name
    if value is None and field.default is None:
        return None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    if type(value) is not kind or (kind is tuple and not all(isinstance(part, str) for part in value)):
        raise InputError(f"{name} is {value!r}: expected {WANTED[kind]}")
    if told["choices"] and value not in told["choices"]:
        raise InputError(
            f"{name} is {value!r}{_nearest(value, told['choices'])}: expected {', '.join(told['choices'])}"
        )
    if kind in (int, float):
        least, most = told["least"], told["most"]
        finite = abs(value) <= LARGEST if kind is int else math.isfinite(value)
        if not finite or (least is not None and value < least) or (most is not None and value > most):
            raise InputError(f"{name} is {value}: expected {_range(least, most)}")
    return value


def _range(least: float | None, most: float | None) -> str:
    if least is None:
        return "a finite number"
    return f"{least} or more" if most is None else f"{least} to {most}"


def _with_number(text: str, name: str) -> tuple[str, float]:
    """What stands before the last colon and the number after it; 1 without one."""
    head, colon, tail = text.rpartition(":")
    try:
        number = float(tail) if colon else 1.0
    except ValueError:  # a colon of a path
        return text, 1.0
    if not colon:
        return text, 1.0
    if not (math.isfinite(number) and number >= 0 and head):
        raise InputError(f"{name}: {text!r} has to end in a number from 0 on, or in none")
    return head, number


def _nearest(name: str, names) -> str:
    found = difflib.get_close_matches(str(name), list(names), 1)
    return f" (is {found[0]!r} meant?)" if found else ""


def _nearest_length(frames: int) -> int:
    return max(1, 4 * round((frames - 1) / 4) + 1)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=False)  # numbers, texts and lists of texts are written alike


def _placeholder(field: dataclasses.Field) -> str:
    return {int: "0", float: "0.0", str: '""'}[kind_of(field)]


def fields() -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(Settings)
