"""Settings from TOML: every field, its bounds, and names that are nearly right."""

from __future__ import annotations

import dataclasses
import math

import pytest

from starflow_core.errors import InputError
from starflow_core.training.settings import Settings, example, fields, kind_of, read_settings

tomllib = pytest.importorskip("tomllib")  # Python 3.11


def test_the_example_shows_every_field_with_its_default():
    text = example()
    assert Settings(**tomllib.loads(text)) == Settings()
    for field in fields():
        assert f"\n{field.name} = " in text or f"\n# {field.name} = " in text
        assert f"# {field.metadata['help']}\n" in text


def test_options_override_a_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('rank = 4\ndata = ["clips", "stills:3"]\nlearning_rate = 1\n')
    found = read_settings(file, {"rank": 8})
    assert (found.rank, found.learning_rate) == (8, 1.0)
    assert [(str(path), repeats) for path, repeats in found.folders] == [("clips", 1), ("stills", 3)]


@pytest.mark.parametrize("field", fields(), ids=lambda field: field.name)
def test_bounds_and_kinds_are_kept(field):
    kind, least, most = kind_of(field), field.metadata["least"], field.metadata["most"]
    wrong = {bool: [1, "yes"], int: [1.5, True, "1"], float: [math.nan, math.inf, True], str: [1], tuple: ["a", [1]]}[
        kind
    ]
    if kind in (int, float):
        wrong += [
            kind(bound + sign * (1 if kind is int else 0.5))
            for bound, sign in ((least, -1), (most, 1))
            if bound is not None
        ]
        wrong += [10**400] if kind is int else []
    wrong += ["nonsense"] if field.metadata["choices"] else []
    for value in wrong:
        with pytest.raises(InputError, match=f"^{field.name} is "):
            Settings(**{field.name: value})


@pytest.mark.parametrize(("values", "message"), [
    ({"learnig_rate": 1}, "no setting 'learnig_rate' \\(is 'learning_rate' meant\\?\\)"),
    ({"data": {"size": 3}}, "\\[data\\] begins a section, but settings have none: leave the line out"),
    ({"train": "laura"}, "train is 'laura' \\(is 'lora' meant\\?\\)"),
    ({"tasks": ["txt:1"]}, "no 'txt' \\(is 'text' meant\\?\\)"),
    ({"tasks": ["text:0"]}, "nothing is to be practised"),
    ({"frames": 30}, "frames is 30: clips have 4n \\+ 1 frames, the nearest is 29"),
    ({"data": ["clips:0.5"]}, "a whole number of repeats"),
    ({"data": ["clips:-1"]}, "a number from 0 on"),
])  # fmt: skip
def test_what_is_wrong_is_said(values, message):
    with pytest.raises(InputError, match=message):
        read_settings(None, values)


def test_paths_may_have_colons():
    found = Settings(data=("C:\\clips", "C:\\clips:2"))
    assert [(str(path), repeats) for path, repeats in found.folders] == [("C:\\clips", 1), ("C:\\clips", 2)]


@pytest.mark.parametrize("content", [b"rank = ", b"\xff\xfe", None])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    file = tmp_path / "run.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=r"run\.toml can't be read as settings .*--example"):
        read_settings(file, {})


def test_rates_suit_what_is_trained():
    assert (Settings().rate, Settings(train="full").rate) == (1e-3, 1e-5)
    assert Settings(optimizer="muon").rate == pytest.approx(1e-2)
    assert Settings(train="full", learning_rate=0.5).rate == 0.5


def test_settings_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().rank = 3
