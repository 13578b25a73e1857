"""Several processes follow one process's losses, also across a resume on another number of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from starflow_core.bundled import FLOW_FILE, TEXT_FILE, VAE_FILE
from starflow_core.media import write_video
from starflow_core.weights.lora import LoraFile
from tests.core import models, tiny
from tests.core.spread import spread
from tests.core.training import together

ROOT = Path(__file__).parents[3]


def losses(count: int, folder: Path, steps: int, **options) -> dict[str, float]:
    """By step, of a run of several processes, that may go on from another one's state."""
    folder.mkdir(exist_ok=True)
    spread(together.started, count, folder, steps, options)
    return json.loads((folder / "losses.json").read_text())


def test_several_processes_prepare_sample_and_write(tmp_path):
    """From a folder, with nothing in the cache yet; what one has encoded meanwhile doesn't leave a gap."""
    data = tmp_path / "data"
    for number in range(9):
        pixels = models.randn(9, 3, 4, 4, seed=number).repeat_interleave(8, -1).repeat_interleave(8, -2).clamp(-1, 1)
        write_video(data / f"{number}.mp4", pixels, 16)
        (data / f"{number}.txt").write_text(f"number {number}")
    files = {"model": FLOW_FILE, "text_encoder": TEXT_FILE, "vae": VAE_FILE}
    model = tiny.write_model(tmp_path / "model")
    options = {name: str(model / file) for name, file in files.items()} | {"batch": 3, "steps": 4, "rank": 2}
    options |= {"prompts": ("number 3",), "sample_every": 2, "rehearse": ("number 1", "number 2"), "held_out": 0.3}
    found = {}
    for count in (2, 1):
        spread(together.trained, count, tmp_path / str(count), data, options)
        lines = (tmp_path / str(count) / "logs" / "figures.jsonl").read_text().splitlines()
        found[count] = [json.loads(line)["loss"] for line in lines]
        assert len(list((tmp_path / str(count) / "samples").iterdir())) == 2
        assert LoraFile.open(tmp_path / str(count) / "lora.safetensors").ranks
    assert found[2] == pytest.approx(found[1], rel=1e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return losses(1, tmp_path_factory.mktemp("alone"), 30, train="full")


def test_two_processes_then_three_follow_one(tmp_path, alone):
    """Stopped after step 10, the run goes on from the state of step 7. A batch of 4 doesn't divide by 3."""
    first = losses(2, tmp_path / "run", 10, train="full")
    assert list(first) == [str(step) for step in range(1, 11)]
    both = losses(3, tmp_path / "run", 30, train="full")
    assert both == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("options", [{"train": "lora", "rank": 3, "micro_batch": 1}, {"train": "denoiser"}])
def test_what_is_trained_beside_frozen_weights(tmp_path, options):
    one, two = (losses(count, tmp_path / str(count), 6, **options) for count in (1, 2))
    assert two == pytest.approx(one, rel=1e-5)


def test_a_process_that_dies_stops_the_others(tmp_path):
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", together.__file__]
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", *command, str(tmp_path / "run"), str(10**6), json.dumps({"train": "full"})],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    states = tmp_path / "run" / "states"
    while not (states.exists() and any(path.suffix != ".part" for path in states.iterdir())):
        time.sleep(0.05)
        assert time.monotonic() - began < 120
        assert process.poll() is None, process.stderr.read()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        pytest.skip("children are found through /proc")
    os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
    began = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "SIGKILL" in said
    assert time.monotonic() - began < 30
    done = int(max(path.name for path in states.iterdir()).removeprefix("fit-").removesuffix(".part"))
    assert str(done + 1) in losses(1, tmp_path / "run", done + 1, train="full")
