"""`batch`: many jobs, on tiny models: alone, by torchrun, into folders of other file systems."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from starflow_core import pipeline
from starflow_core.cli import generate, main
from starflow_core.cli.batch.folders import folder_of
from starflow_core.jobs import memory
from starflow_core.media import read_metadata, read_video, write_video
from starflow_core.weights.lora import LoraFile
from starflow_core.weights.tensorfiles import TensorFile
from tests.core import models, tiny
from tests.core.cli.test_cli import parts
from tests.core.cli.test_lora import write_lora

STILL = {"prompt": "a red circle", "frames": 1}


@pytest.fixture(scope="module", autouse=True)
def demo(tmp_path_factory):
    """A tiny model in the bundled one's place, with two LoRAs, and one that only loading finds damaged."""
    folder = tiny.write_model(tmp_path_factory.mktemp("video"))
    known = {"base_sha256": "", "base_name": ""}
    write_lora(folder / "a.safetensors", 2, "deep", known)
    write_lora(folder / "b.safetensors", 1, "all", known)
    weights = load_file(folder / "a.safetensors")
    next(weight for name, weight in weights.items() if "lora_B" in name)[0] = float("nan")
    save_file(weights, folder / "nan.safetensors", TensorFile.open(folder / "a.safetensors").metadata)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "BUNDLED", folder)
        yield folder


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs a command in an empty folder; gives what it said on stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*argv, code=0):
        found = main([str(word) for word in argv])
        out, errors = capsys.readouterr()
        assert found == code, errors
        return out.splitlines(), re.sub(r"^memory: weights [^\n]*\n", "", errors, flags=re.MULTILINE)

    return call


@pytest.fixture
def batch(run):
    """Runs a batch of these rows into the folder `out`."""

    def call(*rows, options=(), code=0, folder="out"):
        Path("jobs.jsonl").write_text("".join(f"{json.dumps(row)}\n" if row else "\n" for row in rows))
        return run("batch", "jobs.jsonl", "-o", folder, *options, code=code)

    return call


@pytest.fixture
def counted(monkeypatch):
    """Counts the loads of models, text encoders and LoRAs."""
    counts = dict.fromkeys(("model", "text", "lora"), 0)

    def counting(owner, name):
        load = getattr(owner, "load")  # noqa: B009

        def count(*args, **options):
            counts[name] += 1
            return load(*args, **options)

        monkeypatch.setattr(owner, "load", count)

    for owner, name in ((pipeline.Parts, "model"), (pipeline.TextEncoderFiles, "text"), (LoraFile, "lora")):
        counting(owner, name)
    return counts


def made() -> list[str]:
    return sorted(path.relative_to("out").as_posix() for path in Path("out").rglob("*") if path.is_file())


# Rows


def test_a_row_is_what_generate_makes(batch, run, tmp_path, demo, counted):
    write_video(tmp_path / "clip.mp4", models.randn(9, 3, 32, 32).clamp(-1, 1), 12)
    rows = {
        "still.png": (STILL | {"seed": 3}, ["a red circle", "--frames", 1, "--seed", 3]),
        "clip.mp4": ({"prompt": "-a ring", "denoise": False}, ["--no-denoise", "--", "-a ring"]),
        "joined.mp4": (
            {"prompt": "a ring", "video": "clip.mp4", "task": "extend", "join": True, "fps": 20.5},
            ["a ring", "--video", "clip.mp4", "--task", "extend", "--join", "--fps", 20.5],
        ),
        "times.mp4": (
            {"timeline": "0s: a ring | 0.3s: a square", "keep_at_change": 1, "change_kept": False, "join": False},
            ["--timeline", "0s: a ring | 0.3s: a square", "--keep-at-change", 1, "--no-change-kept"],
        ),
        "lora.png": (
            STILL | {"lora": [f"{demo}/a.safetensors:0.5", f"{demo}/b.safetensors"]},
            ["a red circle", "--frames", 1, "--lora", f"{demo}/a.safetensors:0.5", "--lora", demo / "b.safetensors"],
        ),
    }  # fmt: skip
    common = ("--guidance", 2, "--quality", 70)
    out, _ = batch(*({**row, "output": name} for name, (row, _) in rows.items()), options=common)
    assert out[:-1] == [f"out/{name}" for name in rows]
    assert re.fullmatch(r"5 made, 0 were there, 0 failed; [\d.]+ s", out[-1])
    assert counted == {"model": 1, "text": 1, "lora": 2}
    for name, (_, words) in rows.items():
        run("generate", *common, "-o", name.replace("clip", "other"), *words)
        assert Path("out", name).read_bytes() == Path(name.replace("clip", "other")).read_bytes()


def test_loras_come_and_go_beside_one_model(batch, demo, counted):
    a, b = f"{demo}/a.safetensors", f"{demo}/b.safetensors"
    loras = [None, a, None, [a, b], f"{a}:0.5", f"{a}:0", a]
    batch(*(STILL | {"lora": lora, "output": f"{i}.png"} for i, lora in enumerate(loras)))
    assert counted == {"model": 1, "text": 1, "lora": 4}
    shown = [read_video(f"out/{i}.png").pixels for i in range(len(loras))]
    same = [[j for j in range(len(loras)) if torch.equal(shown[i], shown[j])] for i in range(len(loras))]
    assert same == [[0, 2, 5], [1, 6], [0, 2, 5], [3], [4], [0, 2, 5], [1, 6]]
    assert [read_metadata(f"out/{i}.png").get("loras") for i in (0, 1, 2)] == [None, "a.safetensors:1", None]


def test_jobs_are_fitted_as_if_nothing_were_loaded(batch, monkeypatch):
    """To what was free before, whatever the model takes of it."""
    free, told = iter(range(10**12, 0, -(10**9))), []
    monkeypatch.setattr(memory, "free", lambda device: next(free))
    plan = pipeline.Parts.plan

    def planning(*args):
        told.append(plan(*args).free)
        return plan(*args)

    monkeypatch.setattr(pipeline.Parts, "plan", planning)
    batch(*(STILL | {"seed": seed} for seed in range(3)))
    checked, made = told[:3], told[3:]
    assert len(set(checked)) == 3
    assert len(set(made)) == 1


def test_rows_may_name_another_model(batch, tmp_path, counted):
    words = parts(tiny.write_model(tmp_path / "image", "image"))
    other = {"prompt": "a ring", **dict(zip(("model", "text_encoder", "vae"), words[1::2], strict=True))}
    out, _ = batch(other, STILL, other, STILL | {"dtype": "int8"})
    assert out[0] == "out/0001-a-ring.png"  # that model makes pictures
    assert [read_metadata(f"out/{name}")["model"] for name in made()] == ["tiny image", "tiny video"] * 2
    assert read_metadata("out/0004-a-red-circle.png")["weights"] == "int8"
    assert counted["model"] == 4


def test_a_row_that_is_fitted_otherwise_has_the_model_loaded_so(batch, monkeypatch, counted):
    plan = pipeline.Parts.plan

    def planning(self, job, *options):
        found = plan(self, job, *options)
        return replace(found, means=replace(found.means, int8=job.seed == 1))

    monkeypatch.setattr(pipeline.Parts, "plan", planning)
    batch(*(STILL | {"seed": seed, "output": f"{i}.png"} for i, seed in enumerate((0, 1, 0))))
    assert counted["model"] == 3
    assert torch.equal(read_video("out/0.png").pixels, read_video("out/2.png").pixels)


def test_options_of_the_command_count_for_rows_that_say_nothing_else(batch, demo):
    options = ("--seed", 7, "--frames", 1, "--lora", demo / "a.safetensors")
    batch({"prompt": "a"}, {"prompt": "b", "seed": 8, "lora": [f"{demo}/b.safetensors"]}, {"prompt": "c", "seed": None,
          "lora": []}, options=options)  # fmt: skip
    found = [read_metadata(f"out/{name}") for name in made()]
    assert [each["seed"] for each in found] == [7, 8, 0]
    assert [each.get("loras") for each in found] == ["a.safetensors:1", "b.safetensors:1", None]


def test_names_that_rows_do_not_give_stay(batch):
    batch(STILL, None, {"prompt": "A ring, moving!"}, STILL | {"output": "deep/in/x/"})
    assert made() == ["0001-a-red-circle.png", "0003-a-ring-moving.mp4", "deep/in/x/00000.png",
                      "deep/in/x/metadata.json"]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), [
    ('{"promt": "x"}', r"there is no field 'promt' \(is prompt meant\?\)"),
    ('{"prompt": "x", "no-such": 1}', "there is no field 'no-such'"),
    ('{"prompt": "x", "device": "cpu"}', "device is no field of a row; each worker has its own"),
    ('{"prompt_file": "x"}', "prompt_file is no field of a row; give each prompt a row"),
    ('{"prompt": ["x"]}', r'prompt is \["x"\]; it is a text or a number'),
    ('{"prompt": "x", "frames": true}', "frames is true; it is a text or a number"),
    ('{"prompt": "x", "join": 1}', "join is 1; it is true or false"),
    ('{"prompt": "x", "frames": "many"}', "--frames: 'many' is not a whole number"),
    ('{"prompt": "x", "task": "dance"}', "--task: invalid choice: 'dance'"),
    ('{"prompt": "x", "frames": 10}', "nearest are 9 and 13"),
    ('{"prompt": "x", "batch": 2}', "batch 2 makes 2 results; a row makes one"),
    ('{"prompt": "x", "output": "../a.mp4"}', r"output is '\.\./a\.mp4'; give a name inside"),
    ('{"prompt": "x", "output": "..\\\\a.mp4"}', "give a name inside"),
    ('{"prompt": "x", "output": "C:a.mp4"}', "give a name inside"),
    ('{"prompt": "x", "output": "%03d.png"}', r"%03d\.png would fill the batch's own folder"),
    ('{"prompt": "x", "devices": "cpu"}', "devices is no field of a row; a row is made on one device"),
    ('{"prompt": "x", "frames": 1, "output": "good.png/a.png"}', "is in the folder of pictures of line 1"),
    ('{"prompt": "x", "output": "/a.mp4"}', "output is '/a.mp4'; give a name inside"),
    ('{"prompt": "x", "output": "a.xyz"}', "unknown format '.xyz'"),
    ('{"prompt": "x", "output": "./good.png"}', "the output ./good.png is that of line 1, too"),
    ('{"prompt": "x", "image": "none.png"}', "none.png: no such file"),
    ('{"prompt": "x", "lora": "none.safetensors"}', "no LoRA at none.safetensors"),
    ('{"frames": 1}', "no prompt; give one"),
    ("[1]", "this is not an object"),
    ("{", "this is not JSON"),
])  # fmt: skip
def test_bad_rows_are_refused_by_line_before_any_work(run, monkeypatch, tmp_path, row, message):
    monkeypatch.setattr(pipeline.Parts, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    good = json.dumps(STILL | {"output": "good.png"})
    (tmp_path / "jobs.jsonl").write_text(f"{good}\n\n{row}\n")
    out, errors = run("batch", "jobs.jsonl", "-o", "out", code=2)
    assert not out
    assert re.fullmatch(rf"error: jobs\.jsonl, line 3: [^\n]*{message}[^\n]*\n", errors), errors
    assert os.listdir() == ["jobs.jsonl"]


@pytest.mark.parametrize(("words", "message"), [
    (("none.jsonl", "-o", "out"), "none.jsonl cannot be read"),
    (("empty.jsonl", "-o", "out"), "empty.jsonl has no rows"),
    (("latin.jsonl", "-o", "out"), "latin.jsonl is not UTF-8 text"),
    (("empty.jsonl", "-o", "warp://x"), "warp://x cannot be reached"),
    (("empty.jsonl", "-o", "out", "--retries", "-1"), "--retries is -1"),
    (("empty.jsonl", "-o", "out", "--workers", "2"), "--workers is for --ray"),
    (("empty.jsonl", "-o", "out", "--device", "warp"), "device 'warp' isn't there"),
])  # fmt: skip
def test_what_is_wrong_is_said_in_a_line(run, tmp_path, words, message):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b"caf\xe9\n")
    _, errors = run("batch", *words, code=2)
    assert re.fullmatch(rf"error: [^\n]*{message}[^\n]*\n", errors), errors


def test_ray_that_is_missing(batch, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    _, errors = batch(STILL, options=("--ray", "local"), code=2)
    assert "pip install 'ray[data]'" in errors


# What is there, what fails, what is stopped


def test_what_is_there_is_left_alone(batch, counted):
    rows = [STILL | {"seed": seed} for seed in range(3)]
    batch(*rows)
    before = {name: Path("out", name).read_bytes() for name in made()}
    out, _ = batch(*rows)
    assert out[0].startswith("0 made, 3 were there, 0 failed")
    assert counted["model"] == 1
    Path("out/0002-a-red-circle.png").unlink()
    out, _ = batch(*rows)
    assert [out[0], out[1][:20]] == ["out/0002-a-red-circle.png", "1 made, 2 were there"]
    assert {name: Path("out", name).read_bytes() for name in made()} == before


def failing(monkeypatch, error: BaseException, times: int) -> list[str]:
    """Has prompts with the word bad fail so often; gives the list of all prompts that were tried."""
    tried, start = [], generate.start

    def fail(pipeline, captions, *args, **options):
        tried.append(captions[0])
        if "bad" in captions[0] and sum("bad" in each for each in tried) <= times:
            raise error
        return start(pipeline, captions, *args, **options)

    monkeypatch.setattr(generate, "start", fail)
    return tried


@pytest.mark.parametrize(("error", "told"), [
    (ValueError("no such thing"), "ValueError: no such thing"),
    (torch.OutOfMemoryError("CUDA out of memory"), "out of memory; use fewer frames"),
])  # fmt: skip
def test_a_row_that_fails_is_listed_and_stops_no_other(batch, monkeypatch, error, told):
    bad = {"prompt": "a bad circle", "frames": 1}
    with monkeypatch.context() as patch:
        tried = failing(patch, error, 9)
        out, errors = batch(bad, STILL, code=3)
    assert tried == ["a bad circle"] * 3 + ["a red circle"]
    assert out[1].startswith("1 made, 0 were there, 1 failed")
    assert f"warning: line 1, 0001-a-bad-circle.png: {told}" in errors
    assert "error: 1 of 2 rows failed; out/failed.jsonl lists them" in errors
    assert made() == ["0002-a-red-circle.png", "failed.jsonl"]
    listed = json.loads(Path("out/failed.jsonl").read_text())
    assert (listed["line"], listed["row"]) == (1, bad)
    assert listed["error"].startswith(told)
    batch(bad, STILL)
    assert made() == ["0001-a-bad-circle.png", "0002-a-red-circle.png"]


def test_a_row_that_fails_once_is_made(batch, monkeypatch):
    tried = failing(monkeypatch, ValueError("once"), 1)
    batch({"prompt": "a bad ring", "frames": 1}, options=("--retries", 1))
    assert len(tried) == 2
    batch({"prompt": "a bad ring", "frames": 1}, options=("--retries", 0), folder="other")


def test_a_lora_that_cannot_be_put_on_leaves_the_others(batch, demo):
    loras = [f"{demo}/a.safetensors", f"{demo}/nan.safetensors", f"{demo}/a.safetensors", None]
    _, errors = batch(*(STILL | {"lora": lora, "output": f"{i}.png"} for i, lora in enumerate(loras)), code=3)
    assert "NaN" in errors
    shown = [read_video(f"out/{i}.png").pixels for i in (0, 2, 3)]
    assert torch.equal(shown[0], shown[1])
    assert not torch.equal(shown[0], shown[2])


def test_interruption(batch, monkeypatch):
    rows = [STILL, {"prompt": "a bad ring"}, STILL]
    with monkeypatch.context() as patch:
        failing(patch, KeyboardInterrupt(), 1)
        _, errors = batch(*rows, code=130)
    assert errors == "interrupted; no partial files were left\n"
    assert made() == ["0001-a-red-circle.png"]
    out, _ = batch(*rows)
    assert out[-1].startswith("2 made, 1 were there")


# Folders


@pytest.fixture
def bucket():
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def no_room(system, source, target):
    assert source == f"{target}.part"
    raise OSError("no room")


def test_a_folder_of_another_file_system(run, batch, bucket, monkeypatch):
    bucket.pipe("/b/jobs.jsonl", "\n".join(json.dumps(STILL | {"seed": i}) for i in range(2)).encode())
    bucket.pipe("/b/out/0002-a-red-circle.png", b"there")
    out, _ = run("batch", "memory://b/jobs.jsonl", "-o", "memory://b/out/")
    assert out[0] == "memory://b/out/0001-a-red-circle.png"
    assert out[1].startswith("1 made, 1 were there")
    run("generate", "a red circle", "--frames", 1, "-o", "x.png")
    assert bucket.cat("/b/out/0001-a-red-circle.png") == Path("x.png").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(type(bucket), "mv", no_room)
        _, errors = batch(STILL | {"output": "new/a.png"}, folder="memory://b/out", code=2)
    assert "line 1, new/a.png: memory://b/out/new/a.png cannot be written (no room)" in errors
    assert "error: memory://b/out/failed.jsonl cannot be written (no room)" in errors
    assert not [name for name in bucket.find("/b/out") if "000" not in name]
    batch(STILL | {"output": "new/a.png"}, folder="memory://b/out")
    assert [name for name in bucket.find("/b/out") if "000" not in name] == ["/b/out/new/a.png"]


def test_failures_are_listed_in_such_a_folder(batch, bucket, demo):
    batch(STILL | {"lora": f"{demo}/nan.safetensors"}, folder="memory://b", code=3)
    assert json.loads(bucket.cat("/b/failed.jsonl"))["line"] == 1
    batch(STILL, folder="memory://b")
    assert bucket.find("/b") == ["/b/0001-a-red-circle.png"]


@pytest.mark.parametrize(("fields", "message"), [
    ({"output": "x/"}, "x/ is a folder of pictures"), ({"resume": True}, "resume needs a folder of this machine"),
])  # fmt: skip
def test_what_such_a_folder_cannot_do(batch, bucket, fields, message):
    _, errors = batch(STILL | fields, folder="memory://b", code=2)
    assert f"line 1: {message}" in errors


def test_a_local_address_is_a_folder(tmp_path):
    folder = folder_of(f"file://{tmp_path}/x")
    assert folder.path("a.png") == f"{tmp_path}/x/a.png"
    assert folder.key("a/%03d.png") == folder.key("a/") != folder.key("b/")


# Several processes


def test_processes_share_rows_and_wait_for_each_other(run, tmp_path, demo, cache_home):
    """The first fails its row at once; torchrun would stop the second if it left."""
    nan = STILL | {"lora": f"{demo}/nan.safetensors", "output": "0.png"}
    rows = [nan, *({"prompt": "a ring", "seed": i, "output": f"{i}.mp4"} for i in range(1, 4))]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = [*parts(demo), "--device", "cpu"]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "starflow_core", "batch", "jobs.jsonl"]
    done = subprocess.run(
        [sys.executable, *command, "-o", "out", *options, "--retries", "0"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert made() == ["1.mp4", "2.mp4", "3.mp4", "failed.jsonl"]
    assert "3 made, 0 were there, 1 failed" in done.stdout
    assert "error: 1 of 4 rows failed" in done.stderr
    assert json.loads(Path("out/failed.jsonl").read_text())["row"] == nan
    run("generate", "a ring", "--seed", 2, *options, "-o", "2.mp4")
    assert torch.equal(read_video("2.mp4").pixels, read_video("out/2.mp4").pixels)


def test_each_process_has_its_rows(batch, monkeypatch):
    monkeypatch.setattr("starflow_core.training.processes.Processes.gathered", lambda self, found: found)
    rows = [STILL | {"seed": seed} for seed in range(5)]
    for rank, names in ((1, ["0002", "0004"]), (0, ["0001", "0003", "0005"])):
        for name, value in (("WORLD_SIZE", 2), ("RANK", rank), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, str(value))
        before = set(made())
        out, _ = batch(*rows)
        assert sorted(name[:4] for name in set(made()) - before) == names
        assert out[len(names) :] == [] if rank else out[len(names)].startswith("3 made")
    _, errors = batch(*rows, options=("--ray", "local"), code=2)
    assert "--ray starts its own workers" in errors
