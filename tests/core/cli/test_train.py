"""`train`: the command, its example, its forecast, and what it refuses."""

from __future__ import annotations

import pytest

from starflow_core.cli import main
from starflow_core.media import write_video
from starflow_core.training.data import encoders
from starflow_core.training.settings import Settings, read_settings
from tests.core import models, tiny


@pytest.fixture(scope="module", autouse=True)
def demo(tmp_path_factory):
    """A tiny model in the bundled one's place."""
    folder = tiny.write_model(tmp_path_factory.mktemp("model"))
    with pytest.MonkeyPatch.context() as patch:
        for module in ("pipeline", "training.train", "training.data.prepare", "training.data.encoders"):
            patch.setattr(f"starflow_core.{module}.BUNDLED", folder)
        yield folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for number in range(3):
        write_video(folder / f"{number}.mp4", models.randn(9, 3, 32, 32, seed=number).clamp(-1, 1), 16)
        (folder / f"{number}.txt").write_text(f"number {number}")
    return folder


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*words, code=0):
        assert main(["train", *map(str, words)]) == code
        return capsys.readouterr()

    return call


def test_from_a_folder_to_a_lora(run, clips, tmp_path):
    options = ("--steps", 3, "--batch", 2, "--rank", 2, "--device", "cpu", "--work", "run")
    said = run("--data", clips, *options).out
    assert "3 files with captions, 3 used: 3 samples" in said
    assert "lora 3/3  loss " in said
    assert said.endswith("run/lora.safetensors\n")
    assert (tmp_path / "run" / "lora.safetensors").is_file()
    assert "lora 1/3" not in run("--data", clips, *options).out  # it is done


def test_a_file_of_settings_is_overridden_by_options(run, clips, tmp_path):
    (tmp_path / "run.toml").write_text(f'data = ["{clips}"]\nsteps = 9\nbatch = 1\nrank = 2\nwork = "run"\n')
    assert "lora 2/2" in run("run.toml", "--steps", 2, "--device", "cpu").out


def test_the_example_can_be_read_again(run, tmp_path):
    pytest.importorskip("tomllib")  # Python 3.11
    (tmp_path / "run.toml").write_text(run("--example").out)
    assert read_settings(tmp_path / "run.toml", {}) == Settings()


def test_a_dry_run_loads_and_writes_no_model(run, clips, tmp_path, monkeypatch):
    for load in ("load_vae", "load_text"):
        monkeypatch.setattr(encoders.Encoders, load, lambda *_: pytest.fail("something was loaded"))
    said = run("--data", clips, "--work", "run", "--dry-run", "--device", "cpu").out
    assert "1:1, 32 x 32, 9 frames: " in said.partition("learning:")[2]
    assert "on each device" in said
    assert not (tmp_path / "run" / "states").exists()


@pytest.mark.parametrize(("words", "message"), [
    ((), "nothing to learn from; give --data FOLDER"),
    (("--data", "nowhere"), "nowhere"),
    (("none.toml",), "none.toml can't be read as settings"),
    (("--data", ".", "--blocks", "9"), "there is no block 9"),
    (("--data", ".", "--tasks", "edits:1"), "is 'edit' meant"),
    (("--data", ".", "--device", "warp"), "device 'warp' isn't there"),
])  # fmt: skip
def test_what_is_wrong_is_said_in_a_line(run, tmp_path, words, message):
    error = run(*words, code=2).err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_unknown_option_has_a_neighbour(run, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--learnig-rate", "1"])
    assert "is --learning-rate meant?" in capsys.readouterr().err
