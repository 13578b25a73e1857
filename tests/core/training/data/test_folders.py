"""What is found in folders, and what is said of the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from starflow_core.errors import InputError
from starflow_core.training.data import folders
from starflow_core.training.data.folders import Item, find_items
from tests.core.training.data.files import write


def touch(path: Path, text: str | None = None) -> Path:
    """An empty file with a caption: nothing is opened here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    if text is not None:
        path.with_suffix(".txt").write_text(text, encoding="utf-8")
    return path


def listing(folder: Path, *entries) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries), encoding="utf-8")


def test_captions_beside_files_in_the_order_of_names(tmp_path):
    b, a, c = (
        touch(tmp_path / "b.PNG", " two\n"),
        touch(tmp_path / "a.mp4", "\ufeffone"),
        touch(tmp_path / "x/c.gif", "3"),
    )
    found = find_items([(tmp_path, 2), (tmp_path / "x", 1)])
    assert found.items == [Item(a, "one", 2), Item(b, "two", 2), Item(c, "3", 2), Item(c, "3", 1)]
    assert not any(found.left_out.values())


def test_a_list_comes_first_and_is_relative_to_its_folder(tmp_path):
    a, b, c = touch(tmp_path / "x/a.png", "beside"), touch(tmp_path / "x/y/b.png"), touch(tmp_path / "c.png", "c")
    before = touch(tmp_path / "x/before/b.png")
    listing(
        tmp_path / "x", {"file_name": "a.png", "text": "listed"}, {"file_name": "gone.png", "text": "g"},
        {"file_name": "y/b.png", "text": "b", "source": "before/b.png"},
        {"file_name": "../c.png", "text": "another folder's"},
    )  # fmt: skip
    found = find_items([(tmp_path, 1)])
    assert found.items == [Item(c, "c"), Item(a, "listed"), Item(b, "b", 1, before)]
    assert found.left_out[folders.NOT_THERE] == [tmp_path / "x/gone.png", tmp_path / "x/../c.png"]


def test_an_edit_without_its_listed_source_is_left_out(tmp_path):
    touch(tmp_path / "a.png", "make it red")
    listing(tmp_path, {"file_name": "a.png", "text": "make it red", "source": "b.png"})
    touch(tmp_path / "c.png", "c")
    found = find_items([(tmp_path, 1)])
    assert [item.path.name for item in found.items] == ["c.png"]
    assert found.left_out[folders.NOT_THERE] == [tmp_path / "b.png"]


def test_pairs_by_their_names(tmp_path):
    a, source = touch(tmp_path / "a.mp4", "turn it red"), touch(tmp_path / "a.source.webm")
    lonely = touch(tmp_path / "b.source.mp4")
    found = find_items([(tmp_path, 1)])
    assert found.items == [Item(a, "turn it red", 1, source)]
    assert found.left_out == {folders.NO_TARGET: [lonely]}


def test_what_is_left_out_is_named(tmp_path):
    touch(tmp_path / "good.png", "good")
    wanted = {
        folders.NO_CAPTION: [touch(tmp_path / "bare.png")],
        folders.EMPTY_CAPTION: [touch(tmp_path / "blank.png", " \n")],
        folders.OTHER_KIND: [touch(tmp_path / "notes.pdf")],
        folders.NO_MEDIA: [tmp_path / "words.txt"],
    }
    (tmp_path / "words.txt").write_text("of nothing")
    touch(tmp_path / ".hidden.png", "hidden")
    touch(tmp_path / ".cache/a.png", "hidden")
    found = find_items([(tmp_path, 1)])
    assert [item.path.name for item in found.items] == ["good.png"]
    assert found.left_out == wanted


def test_links_in_a_circle_end(tmp_path):
    touch(tmp_path / "x/a.png", "a")
    (tmp_path / "x/again").symlink_to(tmp_path, target_is_directory=True)
    assert len(find_items([(tmp_path, 1)]).items) == 1


BROKEN = {
    "not json": ("{", r"line 2 is no JSON"),
    "a list": ("[1]", r"line 2 is no JSON object"),
    "no text": ('{"file_name": "a.png"}', r"line 2 has no text 'text'"),
    "another type": ('{"file_name": "a.png", "text": 3}', r"line 2 has no text 'text'"),
    "no name": ('{"text": "a"}', r"line 2 has no text 'file_name'"),
    "twice": ('{"file_name": "a.png", "text": "b"}', r"line 2: .*a.png has a caption already"),
    "endless": ('{"file_name": "b.png", "text": "' + "x" * 20_001 + '"}', r"line 2: a prompt has 20001 characters"),
    "half a character": ('{"file_name": "b.png", "text": "\\ud800"}', r"line 2: .*invalid character"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_list_is_named_with_its_line(tmp_path, case):
    line, message = BROKEN[case]
    touch(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n' + line)
    with pytest.raises(InputError, match=message):
        find_items([(tmp_path, 1)])


def test_captions_have_to_be_text(tmp_path):
    touch(tmp_path / "a.png").with_suffix(".txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"a.txt isn't UTF-8 \(byte 3\)"):
        find_items([(tmp_path, 1)])
    touch(tmp_path / "a.png", "x" * 20_001)
    with pytest.raises(InputError, match=r"a.txt: a prompt has 20001 characters"):
        find_items([(tmp_path, 1)])


def test_nothing_found_says_what_was_left_out(tmp_path):
    with pytest.raises(InputError, match="give at least one folder"):
        find_items([])
    with pytest.raises(InputError, match=r"there is no folder .*missing"):
        find_items([(tmp_path / "missing", 1)])
    with pytest.raises(InputError, match=r"no picture or clip with a caption in .*; put NAME.txt"):
        find_items([(tmp_path, 1)])
    for name in "abcd":
        touch(tmp_path / f"{name}.png")
    with pytest.raises(InputError, match=r"\(left out: no caption: 4, .*a.png, .*b.png, .*c.png, \.\.\)"):
        find_items([(tmp_path, 1)])


def test_a_file_is_no_folder(tmp_path):
    with pytest.raises(InputError, match=r"a\.png is a file; give the folder that it is in"):
        find_items([(write(tmp_path / "a.png", "a"), 1)])
