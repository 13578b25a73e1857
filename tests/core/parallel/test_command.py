"""`generate --parallel` by several processes: who speaks and writes, what is refused, and how all stop."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from starflow_core.bundled import FLOW_FILE, TEXT_FILE, VAE_FILE
from starflow_core.cli import main
from starflow_core.media import read_metadata, read_video, write_video
from starflow_core.model.lora import Lora, linear_names
from starflow_core.weights.lora import save_lora
from starflow_core.weights.tensorfiles import TensorFile
from tests.core import models, tiny
from tests.core.parallel.cases import commanded
from tests.core.spread import begun, codes

ROOT = Path(__file__).parents[3]
OPTIONS = {"--model": FLOW_FILE, "--text-encoder": TEXT_FILE, "--vae": VAE_FILE}
QKV = "blocks.2.attn_blocks.0.attention.qkv.weight"  # of the deep block
GONE = "another process has stopped; it says why"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with 4 heads."""
    return tiny.write_model(tmp_path_factory.mktemp("model"), deep_width=96)


def words(folder: Path, *more, **files) -> list[str]:
    parts = [str(word) for option, file in OPTIONS.items() for word in (option, files.get(option[2:], folder / file))]
    return ["generate", "a red circle", *parts, "--device", "cpu", *map(str, more)]


def changed(folder: Path, path: Path, change) -> Path:
    """The flow with its first deep layer's queries, keys and values changed."""
    tensors = load_file(folder / FLOW_FILE)
    change(tensors[QKV])
    save_file(tensors, path, TensorFile.open(folder / FLOW_FILE).metadata)
    return path


def said(folder: Path) -> list[str]:
    """On stderr, by each process."""
    return [path.read_text() for path in sorted(folder.glob("*.err"))]


def test_one_process_writes_and_speaks(folder, tmp_path):
    """Two results, one after the other, with an adapter and given frames."""
    write_video(tmp_path / "first.png", models.randn(1, 3, 32, 32).clamp(-1, 1), 0)
    flow = models.flow(deep_width=96, text_dim=tiny.TEXT_DIM)
    loras = {
        name: Lora(0.1 * models.randn(2, layer.in_features), models.randn(layer.out_features, 2), 2.0)
        for name in linear_names(flow, "all")
        for layer in [flow.get_submodule(name)]
    }
    save_lora(loras, tmp_path / "lora.safetensors", flow.config, {})
    more = ("--image", tmp_path / "first.png", "--preset", "exact", "--lora", f"{tmp_path / 'lora.safetensors'}:0.5")
    more = (*more, "--dtype", "int8", "--prompt-file", tmp_path / "prompts.txt")
    (tmp_path / "prompts.txt").write_text("a blue ring\na red circle\n")
    command = [word for word in words(folder, *more) if word != "a red circle"]
    assert main([*command, "-o", str(tmp_path / "one") + "/"]) == 0
    together = [*command, "--parallel", "tensor", "-o", str(tmp_path / "all") + "/"]
    assert codes(begun(commanded, 2, together, tmp_path)) == [0, 0]
    for number in range(2):
        one, all_ = (read_video(f"{tmp_path / name}-{number}/").pixels for name in ("one", "all"))
        torch.testing.assert_close(all_, one, atol=1 / 127, rtol=0)
    assert read_metadata(f"{tmp_path / 'all-1'}/") == read_metadata(f"{tmp_path / 'one-1'}/")
    spoken = [path.read_text() for path in sorted(tmp_path.glob("*.out"))]
    assert re.search(r"deep sweeps", spoken[0])
    assert spoken[1] == ""
    assert "on each other device" in said(tmp_path)[0]
    assert said(tmp_path)[1] == ""


def test_numbers_that_are_not_finite_stop_all_with_the_place(folder, tmp_path):
    """Wherever they begin: here in the second process's heads, which the first has not. It names the place, once."""
    flow = changed(folder, tmp_path / "flow.safetensors", lambda weight: weight[48 + 24 : 96].mul_(1e38))
    command = words(folder, "--parallel", "tensor", "-o", tmp_path / "a/", model=flow)
    began = time.monotonic()
    assert codes(begun(commanded, 2, command, tmp_path)) == [2, 2]
    assert time.monotonic() - began < 60
    first, second = said(tmp_path)
    assert re.search(r"error: NaN or infinity in the deep block: batch element 0, latent frame 0, token 0", first)
    assert second == f"error: {GONE}\n"
    assert not (tmp_path / "a").exists()


def test_a_signal_to_the_leader_stops_all(folder, tmp_path):
    command = words(
        folder, "--parallel", "tensor", "--solver", "autoregressive", "--frames", 641, "-o", tmp_path / "a.mp4"
    )
    processes = begun(commanded, 2, command, tmp_path)
    began = time.monotonic()
    while not list(tmp_path.glob("*.part*")):
        time.sleep(0.05)
        assert time.monotonic() - began < 60
        assert processes[0].is_alive(), said(tmp_path)
    os.kill(processes[0].pid, signal.SIGTERM)
    began = time.monotonic()
    assert codes(processes) == [143, 2]
    assert time.monotonic() - began < 20
    assert said(tmp_path)[0].endswith("interrupted; no partial files were left\n")
    assert said(tmp_path)[1] == f"error: {GONE}\n"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("a.mp4")]


def test_a_process_that_fails_says_why_and_stops_all(folder, tmp_path):
    """Under torchrun itself; here a weight is damaged that only the second process reads."""
    flow = changed(folder, tmp_path / "flow.safetensors", lambda weight: weight[48].fill_(torch.nan))
    command = words(folder, "--parallel", "tensor", "-o", tmp_path / "a/", model=flow)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "starflow_core", *command], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert re.search(rf"^error: {QKV} of flow.safetensors has NaN or infinity", done.stderr, re.MULTILINE)
    assert done.stderr.count("has NaN or infinity") == 1
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("more", "message"), [
    (("--parallel", "tensor", "--best-of", 2), "--best-of doesn't go with --parallel"),
    (("--parallel", "tensor", "--resume"), "--resume doesn't go with --parallel"),
    (("--parallel", "tensor", "--offload", "weights"), "offload is 'weights', but over several processes all stays"),
    (("--parallel", "tensor", "--devices", "cpu,cpu"), "--devices is for one process, --parallel for several"),
    (("--parallel", "guidance", "--guidance", 0), "guidance is 0, so that there are no halves"),
    (("--parallel", "tensor", "--frames", 3), "3 frames: a clip has 4n"),
    ((), "torchrun has started 2 processes, each of which would make everything; add --parallel"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused_before_joining(folder, monkeypatch, capsys, more, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: pytest.fail("it has joined"))
    command = words(folder, *more)
    if "--devices" in more:
        command = [word for word in command if word not in ("--device", "cpu")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert re.search(rf"^error: {message}[^\n]*\n$", error), error


def test_images_are_denoised_by_one_process_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    folder = tiny.write_model(tmp_path, "image", deep_width=96)
    assert main(words(folder, "--parallel", "tensor")) == 2
    assert "tiny image is denoised by a gradient of the whole flow" in capsys.readouterr().err


def test_several_processes_have_to_be_started(folder, capsys):
    assert main(words(folder, "--parallel", "tensor")) == 2
    assert (
        "--parallel tensor is for several processes; start them by torchrun --nproc-per-node N"
        in capsys.readouterr().err
    )
