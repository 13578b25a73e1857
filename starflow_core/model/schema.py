"""Configurations that check themselves: the type and range of each field, before anything is built from it."""

from __future__ import annotations

import json
import math
import reprlib
from dataclasses import MISSING, asdict, field, fields, is_dataclass
from numbers import Integral, Real
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..errors import CheckpointError, InputError

WIDEST = 1 << 20  # channels, rows of an embedding: more than any model has
LARGEST = 1e9  # magnitude of a number whose field names no range
KINDS = {"int": (Integral, "a whole number"), "float": (Real, "a number"), "bool": (bool, "True or False")}
MAX_ENTRIES = 4096  # entries of a list, characters of a string


def number(low: float, high: float, default: Any = MISSING) -> Any:
    """A dataclass field whose numbers, all of them if it is a tuple, have to be in low .. high."""
    return field(default=default, metadata={"range": (low, high)})


def check_fields(config: Any) -> None:
    """Raise CheckpointError unless each field of a dataclass has its type and is within its range."""
    hints = get_type_hints(type(config))
    for entry in fields(config):
        value, (low, high) = getattr(config, entry.name), entry.metadata.get("range", (-LARGEST, LARGEST))
        if not _fits(value, hints[entry.name], low, high):
            limits = f" from {low:g} to {high:g}" if "range" in entry.metadata else ""
            raise CheckpointError(f"{entry.name} is {shown(value)}, expected {entry.type}{limits}")


def check_kinds(settings: Any) -> None:
    """Raise InputError unless the numbers and switches of a dataclass, which a caller fills in, are such."""
    for entry in fields(settings):
        kind, _, optional = entry.type.partition(" | ")
        value, (types, words) = getattr(settings, entry.name), KINDS.get(kind, (object, ""))
        missing = optional and value is None
        if not missing and (not isinstance(value, types) or (types in (Integral, Real) and isinstance(value, bool))):
            raise InputError(f"{entry.name} is {shown(value)}; expected {words}")


def read_json(text: str, where: str) -> Any:
    """What a configuration's text says. Raises CheckpointError if it isn't JSON, or nested too deeply."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} isn't JSON: {error}; download the file again") from None


def read_object(text: str, where: str) -> dict[str, Any]:
    """As `read_json`, of text that has to be a JSON object."""
    values = read_json(text, where)
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} isn't a JSON object; download the file again")
    return values


def completed(derived: dict[str, Any], given: dict[str, Any], options: type, where: str) -> dict[str, Any]:
    """Constructor arguments: those `derived` from a file's tensors, and of those `given` beside them the fields of
    `options`, a dataclass of what tensors can't tell. None counts as not given, other names are passed over.

    Raises CheckpointError where an option has a wrong type or range, or what is given contradicts the tensors.
    """
    given = {name: value for name, value in given.items() if value is not None}
    try:
        chosen = options(**{f.name: tuples(given[f.name]) for f in fields(options) if f.name in given})
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    for name in derived.keys() & given.keys():
        if given[name] != derived[name]:
            raise CheckpointError(
                f"{where} contradicts the tensors: {name} is {shown(given[name])}, not {derived[name]}"
            )
    return {**derived, **{name: value for name, value in asdict(chosen).items() if value is not None}}


def tuples(value: Any, depth: int = 2) -> Any:
    """JSON's lists as tuples, two deep: a table is the most that a field holds."""
    if depth and isinstance(value, (list, tuple)):
        return tuple(tuples(entry, depth - 1) for entry in value)
    return value


def shown(value: Any) -> str:
    """A value of a file, short enough for a message."""
    text = reprlib.repr(value)
    return text if text.isprintable() else ascii(text)


def _fits(value: Any, kind: Any, low: float, high: float) -> bool:
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, option, low, high) for option in get_args(kind))
    if origin is tuple:
        return _fits_tuple(value, get_args(kind), low, high)
    if is_dataclass(kind) or kind in (bool, type(None)):
        return isinstance(value, kind)
    if kind is str:
        return isinstance(value, str) and len(value) <= MAX_ENTRIES and value.isprintable()
    numbers = (int, float) if kind is float else (int,)
    # A comparison turns NaN down, and whole numbers too large for a float.
    return isinstance(value, numbers) and not isinstance(value, bool) and low <= value <= high < math.inf


def _fits_tuple(value: Any, kinds: tuple, low: float, high: float) -> bool:
    if not isinstance(value, tuple) or len(value) > MAX_ENTRIES:
        return False
    if kinds[-1] is Ellipsis:
        return all(_fits(entry, kinds[0], low, high) for entry in value)
    return len(value) == len(kinds) and all(_fits(*pair, low, high) for pair in zip(value, kinds, strict=True))
