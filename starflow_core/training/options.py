"""The settings of a run as options of a command. Imports nothing heavy: the command's help reads it."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re

from .settings import Settings, fields, kind_of, read_settings


def add_settings(parser: argparse.ArgumentParser) -> None:
    """A settings file to start from, and an option for every setting, which overrides the file's. What isn't given
    isn't in the parsed arguments either."""
    parser.usage = "%(prog)s [FILE.toml] [--OPTION VALUE ..]"  # all of them would fill a page
    parser.add_argument("settings", nargs="?", metavar="FILE.toml", help="settings; options below override them")
    groups = {}
    for field in fields():
        name = field.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        groups[name].add_argument(_flag(field), dest=field.name, default=argparse.SUPPRESS, **_options(field))


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings of the file that was named, if any, under the options that were given. Raises InputError."""
    given = {field.name: getattr(args, field.name) for field in fields() if hasattr(args, field.name)}
    return read_settings(args.settings, given)


class NearestNameParser(argparse.ArgumentParser):
    """A parser that names the nearest option for one that doesn't exist."""

    def parse_known_args(self, args=None, namespace=None):
        found, rest = super().parse_known_args(args, namespace)
        for word in rest:
            option = word.partition("=")[0]
            near = difflib.get_close_matches(option, self._option_string_actions, 1) if word.startswith("--") else []
            if near:
                self.error(f"unrecognized arguments: {option} (is {near[0]} meant?)")
        return found, rest


def _flag(field: dataclasses.Field) -> str:
    return "--" + field.name.replace("_", "-")


def _options(field: dataclasses.Field) -> dict:
    """What argparse is told of a field."""
    kind, choices = kind_of(field), field.metadata["choices"]
    told = {"help": _help(field)}
    if kind is bool:
        return {**told, "action": argparse.BooleanOptionalAction}
    if choices:
        return {**told, "choices": choices}
    if kind is tuple:
        return {**told, "nargs": "+", "metavar": "TEXT"}
    parse = {int: whole, float: _number, str: str}[kind]
    return {**told, "type": parse, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}


def _help(field: dataclasses.Field) -> str:
    """The field's own help, with its default where that doesn't speak of one."""
    text, default = field.metadata["help"], field.default
    if isinstance(default, tuple):
        default = " ".join(default)
    if default not in (None, "") and "(default" not in text:
        shown = {True: "on", False: "off"}[default] if isinstance(default, bool) else default
        text = f"{text} (default: {shown})"
    return text.replace("%", "%%")


def whole(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,20}", text):  # longer ones overflow where they are compared
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number of at most 20 digits")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number") from None
