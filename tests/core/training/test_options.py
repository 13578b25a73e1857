"""Every setting as an option."""

from __future__ import annotations

import subprocess
import sys

import pytest

from starflow_core.errors import InputError
from starflow_core.training.options import NearestNameParser, add_settings, settings_of
from starflow_core.training.settings import Settings, fields


def parse(*words):
    parser = NearestNameParser(allow_abbrev=False)
    add_settings(parser)
    return parser.parse_args([str(word) for word in words])


def test_nothing_given_is_the_defaults():
    assert settings_of(parse()) == Settings()


def test_options_override_the_file(tmp_path):
    (tmp_path / "run.toml").write_text('steps = 7\nrank = 3\nrecompute = true\ndata = ["a"]\n')
    args = parse(
        tmp_path / "run.toml", "--steps", 9, "--no-recompute", "--int8", "--data", "b:2", "c", "--alpha", "0.5",
        "--optimizer", "muon", "--trigger-words", "a cross",
    )  # fmt: skip
    found = settings_of(args)
    assert (found.steps, found.rank, found.recompute, found.int8) == (9, 3, False, True)
    assert found.data == ("b:2", "c")
    assert (found.alpha, found.optimizer, found.trigger_words) == (0.5, "muon", "a cross")


def test_every_setting_is_an_option():
    words = {"bool": [], "tuple": ["text"]}
    for field in fields():
        kind = type(field.default).__name__
        usual = field.default if field.default is not None else (*field.metadata["choices"], 1)[0]
        value = words.get(kind, [usual])
        args = parse("--" + field.name.replace("_", "-"), *value)
        assert hasattr(args, field.name)
        assert sum(hasattr(args, other.name) for other in fields()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning-rat", "1"], "--learning-rat (is --learning-rate meant?)"),
        (["--stepz=1"], "--stepz (is --steps meant?)"),
        (["--steps", "many"], "'many' is not a whole number"),
        (["--steps", "9" * 30], "is not a whole number of at most 20 digits"),
        (["--clip", "x"], "'x' is not a number"),
        (["--dtype", "fp8"], "invalid choice"),
    ],
)
def test_bad_options_are_refused(capsys, words, message):
    with pytest.raises(SystemExit):
        parse(*words)
    assert message in capsys.readouterr().err


def test_bad_values_are_refused_as_in_a_file():
    with pytest.raises(InputError, match="frames is 6: clips have 4n"):
        settings_of(parse("--frames", 6))


def test_nothing_heavy_is_imported():
    code = "import sys, starflow_core.training.options as o; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "numpy", "PIL"} & set(out.split())
