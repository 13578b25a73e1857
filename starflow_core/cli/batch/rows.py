"""The rows of a batch: a JSON object each, with the options of `generate` as fields, checked before any work."""

from __future__ import annotations

import argparse
import difflib
import json
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from ...errors import InputError, OutOfMemoryForecast, StarflowError
from ...jobs.planner import Free
from ..arguments import RowParser
from ..plan import Plan
from ..settings import Setup, slug, with_ending
from .folders import Folder, read_text

NOT_IN_ROWS = {
    "device": "each worker has its own; give --device to the command",
    "devices": "a row is made on one device",
    "parallel": "a row is made on one device",
    "prompt_file": "give each prompt a row of its own",
}
ANYWHERE = {"device": "cpu", "offload": "auto", "memory": None}  # in place of what is known only where a row is made


@dataclass(frozen=True)
class Row:
    """A job: its line in the file, its fields, what `generate` reads them as, and the name of its result."""

    line: int
    fields: dict[str, Any]
    args: Namespace
    name: str

    def at(self, **options) -> Namespace:
        """What `generate` reads, with other options in place of its own."""
        return Namespace(**{**vars(self.args), **options})


class Models:
    """The models that rows name, each looked at once. `free` as of `Setup`."""

    def __init__(self, free: Free | None = None):
        self._free, self._found = free, {}

    def setup(self, args: Namespace) -> Setup:
        """As `Setup.find`."""
        key = args.model, args.text_encoder, args.vae, args.dtype, args.device, args.compile
        if key not in self._found:
            self._found[key] = Setup.find(Namespace(**{**vars(args), "lora": []}))
        setup = self._found[key]
        return replace(setup, parts=setup.parts.with_loras(args.lora), free=self._free)


def read_rows(path: str, defaults: Namespace, folder: Folder, models: Models) -> list[Row]:
    """The rows of a file; `defaults` holds for all of them. Raises InputError that names the line."""
    parser, rows, lines = RowParser(), [], {}
    for line, text in enumerate(read_text(path).split("\n"), 1):
        if not text.strip():
            continue
        with naming(path, line):
            fields = _fields(text, parser)
            args = _parsed(parser, fields, defaults)
            row = Row(line, fields, args, args.output or _name(args, line, models))
            first = lines.setdefault(folder.key(row.name), line)
            if first != line:
                raise InputError(f"the output {row.name} is that of line {first}, too; give each row its own")
            if args.resume and not folder.keeps:
                raise InputError(f"resume needs a folder of this machine, and {folder} is none; leave it out")
        rows.append(row)
    _check_nested(path, lines)
    if not rows:
        raise InputError(f"{path} has no rows; write a JSON object into each line")
    return rows


def _check_nested(path: str, lines: dict[PurePath, int]) -> None:
    """Raise InputError for a result in what is another row's folder of pictures."""
    for place, line in lines.items():
        for outer in place.parents:
            if outer in lines:
                raise InputError(
                    f"{path}, line {line}: the output is in the folder of pictures of line {lines[outer]}; give each "
                    "row its own"
                )


def check_row(row: Row, path: str, models: Models, here: bool) -> None:
    """Raise StarflowError for anything that cannot work, here or, as far as it can be known, on another machine."""
    args = row.at(output=path) if here else row.at(output=path, **ANYWHERE)
    try:
        plan = Plan.make(args, models.setup(args), keep_text_encoder=True)
    except OutOfMemoryForecast:
        if here:
            raise
        return
    if len(plan.paths) > 1:
        raise InputError(f"batch {args.batch} makes {len(plan.paths)} results; a row makes one: give each a row")


@contextmanager
def naming(path: str, line: int) -> Iterator[None]:
    """Errors say which line they are about."""
    try:
        yield
    except StarflowError as error:
        raise InputError(f"{path}, line {line}: {error}") from None


def _fields(text: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f'this is not JSON ({error}); write an object such as {{"prompt": "a red circle"}}') from None
    if not isinstance(fields, dict):
        raise InputError('this is not an object; write one such as {"prompt": "a red circle"}')
    known = {action.dest for action in parser._actions} - NOT_IN_ROWS.keys()
    for name in fields.keys() - known:
        if name in NOT_IN_ROWS:
            raise InputError(f"{name} is no field of a row; {NOT_IN_ROWS[name]}")
        near = difflib.get_close_matches(name.replace("-", "_"), known, 1)
        advice = f"is {near[0]} meant?" if near else f"known are {', '.join(sorted(known))}"
        raise InputError(f"there is no field {name!r} ({advice})")
    return fields


def _parsed(parser: argparse.ArgumentParser, fields: dict[str, Any], defaults: Namespace) -> Namespace:
    """A row's fields as words of `generate`, parsed. A field takes the place of its default, also where it is null."""
    actions = {action.dest: action for action in parser._actions}
    given = {name: value for name, value in fields.items() if value is not None}
    prompt = [_text("prompt", given.pop("prompt"))] if "prompt" in given else []
    words = [word for name, value in given.items() for word in _words(actions[name], value)]
    others = {name: value for name, value in vars(defaults).items() if name not in fields}
    return parser.parse_args([*words, "--", *prompt], Namespace(**others))


def _words(action: argparse.Action, value: Any) -> list[str]:
    """An option with its value, as on a command line."""
    name, options = action.dest, action.option_strings
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise InputError(f"{name} is {json.dumps(value)}; it is true or false")
        return options[:1] if value else options[1:]  # the second one, where there is one, says no
    several = isinstance(value, list) and isinstance(action, argparse._AppendAction)
    return [f"{options[-1]}={_text(name, each)}" for each in (value if several else [value])]


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(f"{name} is {json.dumps(value)}; it is a text or a number")
    return str(value)


def _name(args: Namespace, line: int, models: Models) -> str:
    """A result's name where the row has none: the same whatever the other rows are."""
    frames = args.frames if args.frames is not None else models.setup(args).config.defaults.frames
    return with_ending(f"{line:04}-{slug(args.timeline or ' '.join(args.prompt))}", frames)
