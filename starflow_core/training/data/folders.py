"""Pictures and clips in folders, each with its caption."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...jobs.prompts import check_text
from ...media import PICTURES

CLIPS = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv")
KINDS = (*PICTURES, *CLIPS)
LIST = "metadata.jsonl"
SOURCE = ".source"  # NAME.source.EXT is what an edit to NAME.EXT begins with
SHOWN = 3  # files that are named of many

NO_CAPTION = "no caption"
EMPTY_CAPTION = "an empty caption"
OTHER_KIND = "neither a picture nor a clip"
NO_MEDIA = "a caption without a picture or clip"
NO_TARGET = "the source of an edit that isn't there"
NOT_THERE = f"listed in {LIST}, but not there"


@dataclass(frozen=True)
class Item:
    """A picture or clip with its caption, shown `repeats` times an epoch. With a `source` it is the result of an edit,
    and the caption says what to do."""

    path: Path
    caption: str
    repeats: int = 1
    source: Path | None = None


@dataclass
class Found:
    """The items of some folders, in an order that depends on their names alone, and the files that were left out, by
    reason."""

    items: list[Item] = field(default_factory=list)
    left_out: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True)
class Listed:
    """A line of a `metadata.jsonl`."""

    text: str
    source: Path | None


def find_items(folders: Sequence[tuple[Path, int]]) -> Found:
    """The pictures and clips below some folders, with what each is to be repeated.

    A caption is in NAME.txt beside the file, or in a metadata.jsonl of its folder or one above, with the fields
    `file_name`, `text` and perhaps `source`, paths relative to it; the latter comes first. Raises InputError for a
    folder that can't be read, a broken list or caption, and if nothing is found.
    """
    if not folders:
        raise InputError("data: there is nothing to learn from; give at least one folder, as --data FOLDER")
    found = Found()
    for folder, repeats in folders:
        _find_in(Path(folder), repeats, found)
    if not found.items:
        raise InputError(
            f"data: no picture or clip with a caption in {_names(folders)}{told(found.left_out)}; put NAME.txt with a "
            "caption beside each NAME.png or NAME.mp4"
        )
    return found


def told(left_out: dict[str, list[Path]]) -> str:
    """What was left out and why, in brackets; empty if nothing was."""
    parts = [f"{reason}: {shortened(paths)}" for reason, paths in left_out.items() if paths]
    return f" (left out: {'; '.join(parts)})" if parts else ""


def shortened(paths: Sequence[Path]) -> str:
    """The number of files, and the names of the first."""
    names = ", ".join(map(str, paths[:SHOWN]))
    return f"{len(paths)}, {names}{', ..' if len(paths) > SHOWN else ''}"


def _find_in(folder: Path, repeats: int, found: Found) -> None:
    files = set(_files_below(folder))
    listed = _read_lists(files, found)
    sources = _paired(files)
    passed = {line.source for line in listed.values()} | set(sources.values())
    passed |= {path for path, line in listed.items() if line.source and line.source not in files}
    for path in sorted(files - passed):
        if path.name == LIST:
            continue
        if path.suffix.lower() in KINDS:
            _take(path, repeats, listed.get(path), sources.get(path), found)
        elif path.suffix.lower() != ".txt":
            found.left_out[OTHER_KIND].append(path)
        elif not any(path.with_suffix(kind) in files for kind in _spellings()):
            found.left_out[NO_MEDIA].append(path)


def _take(path: Path, repeats: int, listed: Listed | None, source: Path | None, found: Found) -> None:
    """Add a picture or clip to the items, or to what is left out."""
    caption = listed.text if listed else _caption_beside(path)
    if path.stem.endswith(SOURCE) and caption is None:
        found.left_out[NO_TARGET].append(path)
    elif not caption:
        found.left_out[NO_CAPTION if caption is None else EMPTY_CAPTION].append(path)
    else:
        found.items.append(Item(path, caption, repeats, (listed.source if listed else None) or source))


def _files_below(folder: Path) -> Iterator[Path]:
    """All files but hidden ones, also through links to folders. Raises InputError for what can't be read."""

    def refuse(error: OSError) -> None:
        raise InputError(f"data: {error.filename} can't be read ({error.strerror}); check the path") from None

    if os.path.isfile(folder):
        raise InputError(f"data: {folder} is a file; give the folder that it is in, with captions beside the files")
    if not os.path.isdir(folder):
        raise InputError(f"data: there is no folder {folder}; check the path")
    seen = set()
    for place, inner, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link in a circle
            inner.clear()
            continue
        seen.add(real)
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _paired(files: set[Path]) -> dict[Path, Path]:
    """The source of each file that has one by its name."""
    stems = defaultdict(list)
    for path in files:
        if path.suffix.lower() in KINDS:
            stems[path.with_suffix("")].append(path)
    return {
        target: path
        for stem, paths in stems.items()
        if stem.name.endswith(SOURCE)
        for path in paths
        for target in stems.get(stem.with_name(stem.name.removesuffix(SOURCE)), ())
    }


def _spellings() -> Iterator[str]:
    """The suffixes of pictures and clips as they are usually written."""
    for kind in KINDS:
        yield from (kind, kind.upper())


def _caption_beside(path: Path) -> str | None:
    file = path.with_suffix(".txt")
    return _checked(_read_text(file).strip(), str(file)) if file.is_file() else None


def _read_lists(files: set[Path], found: Found) -> dict[Path, Listed]:
    """What all lists say, by file. Raises InputError for a broken line."""
    listed = {}
    for list_file in sorted(path for path in files if path.name == LIST):
        for number, line in enumerate(_read_text(list_file).splitlines(), 1):
            if line.strip():
                where = f"{list_file}, line {number}"
                path, entry = _read_line(line, list_file.parent, where)
                if path in listed:
                    raise InputError(f"{where}: {path} has a caption already; keep one of them")
                missing = [file for file in (path, entry.source) if file and file not in files]
                found.left_out[NOT_THERE] += missing
                listed[path] = entry
    return listed


def _read_line(line: str, folder: Path, where: str) -> tuple[Path, Listed]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is no JSON ({error}); expected {_EXAMPLE}") from None
    if not isinstance(entry, dict):
        raise InputError(f"{where} is no JSON object; expected {_EXAMPLE}")
    source = entry.get("source")
    source = None if source is None else folder / _text_field(entry, "source", where)
    text = _checked(_text_field(entry, "text", where).strip(), where)
    return folder / _text_field(entry, "file_name", where), Listed(text, source)


_EXAMPLE = '{"file_name": "a.png", "text": "a red circle"}'


def _text_field(entry: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(entry.get(name), str):
        raise InputError(f"{where} has no text {name!r}; expected {_EXAMPLE}")
    return entry[name]


def _checked(caption: str, where: str) -> str:
    try:
        check_text(caption)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return caption


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} isn't UTF-8 (byte {error.start}); save it as UTF-8 text") from None
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}); check its permissions") from None


def _names(folders: Sequence[tuple[Path, int]]) -> str:
    return ", ".join(str(folder) for folder, _ in folders)
