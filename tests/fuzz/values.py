"""JSON and bytes with something wrong in them."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

WRONG = [
    None, True, False, "", "7", "x" * 5000, "\ud800", [], [1], [[[]]], {}, {"a": 1}, 0, -1, 1, 2, 3, 5, 7, 255,
    2**31, 2**63, 10**30, 10**400, -(10**12), 0.5, 1e-300, 1e300, float("nan"), float("inf"), float("-inf"), [0] * 1000,
]  # fmt: skip
NESTED = "[" * 5000 + "]" * 5000


def wrong_json(value: Any, rng: random.Random) -> str:
    """The text of `value` with one to three of its parts replaced, lost or renamed; now and then no JSON at all."""
    if rng.random() < 0.05:
        return rng.choice(["", "{", NESTED, "null", "7", '"x"', "[]", "{}", "\x00", '{"a": ' * 3000, "1" * 6000])
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        holder, key = rng.choice(list(_places(value)) or [({"": 0}, "")])
        action = rng.random()
        if action < 0.7:
            holder[key] = copy.deepcopy(rng.choice(WRONG))
        elif action < 0.8 and isinstance(holder[key], (int, float)):
            holder[key] *= rng.choice((-1, 2, 10, 1000, 10**9, 0.5))
        elif action < 0.9:
            del holder[key]
        elif isinstance(holder, dict):
            holder[rng.choice((key * 2, "wings", "", "__class__"))] = holder[key]
    text = json.dumps(value)
    return text.replace(": 7", f": {NESTED}", 1) if rng.random() < 0.03 else text


def wrong_bytes(data: bytes, rng: random.Random, within: int | None = None) -> bytes:
    """Cut, overwritten, doubled or emptied in places among the first `within` bytes."""
    data, end = bytearray(data), min(within or len(data), len(data))
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        place, length = rng.randrange(max(end, 1)), rng.choice((1, 1, 1, 2, 4, 8, 64))
        action = rng.random()
        if action < 0.5:
            data[place : place + length] = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
        elif action < 0.65:
            del data[place:]
        elif action < 0.75:
            del data[place : place + length]
        elif action < 0.9:
            data[place:place] = data[place : place + length]
        else:
            data[place : place + 1] = bytes([data[place] ^ 1 << rng.randrange(8)]) if place < len(data) else b""
        end = min(end, len(data))
    return bytes(data)


def _places(value: Any):
    """Every entry of nested lists and dictionaries, as its holder and key."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])
