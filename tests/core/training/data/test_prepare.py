"""From folders to encoded samples: once, resumable, by several processes, and the command that does it."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from starflow_core.bundled import FLOW_FILE, TEXT_FILE, VAE_FILE
from starflow_core.cli import main
from starflow_core.errors import InputError, NonFiniteError
from starflow_core.media import fit, read_image, read_video
from starflow_core.training.data import prepare as data
from starflow_core.training.data import preview
from starflow_core.training.data.buckets import Bucket, Sample
from starflow_core.training.data.cache import Cache
from starflow_core.training.data.encoders import Encoders
from starflow_core.training.data.folders import Item
from starflow_core.training.settings import Settings
from tests.core import tiny
from tests.core.training.data.files import numbers, write

TASKS = ("text:2", "extend:1", "last_frame:1", "first_frame:1", "edit:1")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A clip of two windows, a still and a pair, and files that can't be used."""
    folder = tmp_path_factory.mktemp("data")
    write(folder / "clip.gif", "a clip", 20, 32, 40, 20)
    write(folder / "x/still.png", "a still", 1, 48, 24)
    write(folder / "pair.gif", "make it dark", 5, 16, 16, 20)
    write(folder / "pair.source.gif", None, 6, 16, 16, 20)
    (folder / "bad.png").write_bytes(b"no picture")
    (folder / "bad.txt").write_text("bad")
    write(folder / "lonely.png")
    return folder


@pytest.fixture(scope="module")
def cached(model, pictures, tmp_path_factory):
    """The cache of these files, once; not to be changed."""
    run = Run(model, pictures, tmp_path_factory.mktemp("cached"))
    return run, run.prepare()


class Averaging:
    """Stands in for a VAE: quick, and tells frames from each other."""

    channels = tiny.CHANNELS

    def __init__(self, kind: str):
        self.kind, self.spatial, self.temporal = kind, *((16, 4) if kind == "video" else (8, 1))

    def encode(self, pixels):
        clip = pixels if self.kind == "video" else pixels.unsqueeze(2)
        side, later = (self.spatial, self.spatial), clip[:, :, 1:]
        parts = [F.avg_pool3d(clip[:, :, :1], (1, *side))]
        parts += [F.avg_pool3d(later, (self.temporal, *side))] if later.shape[2] else []
        latents = torch.cat(parts, 2)[:, [0, 1, 2, 0]]
        return latents if self.kind == "video" else latents.squeeze(2)


class Run:
    """Settings of a run on a tiny model, that counts what it loads."""

    def __init__(self, model: Path, folder: Path, cache: Path, **settings):
        parts = {"model": model / FLOW_FILE, "text_encoder": model / TEXT_FILE, "vae": model / VAE_FILE}
        parts = {name: str(path) for name, path in parts.items()}
        self.settings = Settings(**{**parts, "data": (str(folder),), "tasks": TASKS, "fps": 20.0, **settings})
        self.encoders, self.cache = Encoders.find(self.settings), Cache(cache)
        self.loaded, self.alive = [], []

    def load(self, name):
        def act():
            self.loaded.append(name)
            found = Averaging(self.encoders.config.kind) if name == "vae" else self.encoders.load_text(CPU)
            self.alive.append(weakref.ref(found))
            return found

        return act

    def prepare(self, rank=0, world=1, **options):
        self.loaded.clear()
        return data.prepare(
            self.settings, self.encoders.config, self.load("vae"), self.load("text"), self.cache, rank, world, **options
        )


@pytest.fixture
def run(model, cached, tmp_path):
    """A run with a cache of its own that is complete, and a copy of the files."""
    folder = shutil.copytree(cached[0].settings.data[0], tmp_path / "data")
    shutil.copytree(cached[0].cache.folder, tmp_path / "cache")
    return lambda **settings: Run(model, folder, tmp_path / "cache", **settings)


def entries(cache: Cache) -> dict[str, bytes]:
    return {str(path.relative_to(cache.folder)): path.read_bytes() for path in cache.folder.rglob("*.safetensors")}


def test_all_that_can_be_drawn_is_encoded(cached):
    run, dataset = cached
    assert run.loaded == ["vae", "text"]
    assert not any(reference() for reference in run.alive)
    assert [(sample.item.path.name, sample.bucket.frames, sample.start) for sample in dataset.samples] == [
        ("clip.gif", 9, 0),
        ("clip.gif", 9, 9),
        ("pair.gif", 5, 0),
        ("still.png", 1, 0),
    ]
    tasks = set()
    for index in range(120):
        plan = dataset.plan(index, 0, 2)
        tasks.add(plan.task)
        latents, text = dataset.load(plan)
        assert latents.isfinite().all()
        assert text.shape == (2, 48, tiny.TEXT_DIM)
    assert tasks == {"text", "extend", "last_frame", "first_frame", "edit"}


def test_latents_are_those_of_the_window(cached):
    _, dataset = cached
    sample = dataset.samples[1]
    pixels = read_video(sample.item.path).pixels[9:18]
    vae = Averaging("video")
    wanted = vae.encode(fit(pixels, sample.bucket.height, sample.bucket.width).transpose(0, 1)[None])[0]
    assert torch.equal(dataset.cache.get(dataset.window(sample), "x"), wanted)
    last = vae.encode(fit(pixels[8:], sample.bucket.height, sample.bucket.width).transpose(0, 1)[None])[0]
    assert torch.equal(dataset.cache.get(dataset.window(sample, "last"), "x"), last)


def test_embeddings_are_those_of_the_prompt_alone(cached):
    run, dataset = cached
    encoder = run.encoders.load_text(CPU)
    for prompt in dataset.prompts():
        assert torch.equal(dataset.embedding(prompt), encoder.encode([prompt], 48).embeddings[0])


def test_nothing_is_encoded_twice(run):
    again = run()
    again.prepare()
    assert again.loaded == []


def test_an_interruption_keeps_what_is_finished(model, pictures, cached, tmp_path):
    broken, done = Run(model, pictures, tmp_path), []

    def stop(progress):
        if progress.phase == "encode" and progress.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken.prepare(progress=stop)
    kept = set(entries(broken.cache))
    assert len(kept) == 2
    broken.prepare(progress=lambda progress: done.append(progress))
    assert entries(broken.cache) == entries(cached[0].cache)
    assert max(p.total for p in done if p.phase == "encode") == 5  # of 2 clips, 2 last frames, pair, source, still


def test_a_changed_caption_is_read_anew(run):
    changed = run()
    (Path(changed.settings.data[0]) / "clip.txt").write_text("another clip")
    dataset = changed.prepare()
    assert changed.loaded == ["text"]
    assert any("another clip" in prompt for index in range(50) for prompt in dataset.plan(index, 0, 1).prompts)
    assert all(dataset.cache.has(dataset.text(prompt)) for prompt in dataset.prompts())


def test_a_changed_file_is_encoded_anew(run):
    changed = run()
    before = changed.prepare()
    write(Path(changed.settings.data[0]) / "x/still.png", None, 1, 48, 25)
    after = changed.prepare()
    assert changed.loaded == ["vae"]
    assert after.window(after.samples[-1]) != before.window(before.samples[-1])


def test_other_settings_are_encoded_anew(run):
    assert prepared(run(noise=0.4)) == ["text"]
    assert prepared(run(fps=10.0)) == ["vae", "text"]
    assert prepared(run(caption_drop=0.0)) == []


def prepared(run: Run) -> list[str]:
    run.prepare()
    return run.loaded


def test_another_vae_is_another_entry(run, tmp_path):
    torch.manual_seed(1)
    tiny.write_vae(tmp_path / "vae.safetensors")
    torch.manual_seed(0)
    other = bytearray((tmp_path / "vae.safetensors").read_bytes())
    other[-4:] = b"\0\0\0\0"
    (tmp_path / "vae.safetensors").write_bytes(other)
    assert prepared(run(vae=str(tmp_path / "vae.safetensors"))) == ["vae"]


def test_a_damaged_entry_is_made_again(run):
    damaged = run()
    before = entries(damaged.cache)
    for kind in ("latents", "text"):
        path = next((damaged.cache.folder / kind).rglob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-5])
    damaged.prepare()
    assert damaged.loaded == ["vae", "text"]
    assert entries(damaged.cache) == before


def test_several_processes_share_the_work(model, pictures, cached, tmp_path):
    parts = []
    for rank in range(2):
        share = Run(model, pictures, tmp_path / str(rank))
        dataset = share.prepare(rank, 2)
        parts.append(entries(share.cache))
        assert dataset.samples == cached[1].samples
        assert [dataset.plan(i, 1, 2) for i in range(20)] == [cached[1].plan(i, 1, 2) for i in range(20)]
    whole = entries(cached[0].cache)
    assert {name: content for part in parts for name, content in part.items()} == whole
    assert sum(map(len, parts)) == len(whole)
    assert all(len(part) < len(whole) for part in parts)


def test_extra_prompts_are_encoded(run):
    more = run()
    dataset = more.prepare(extra=lambda dataset: ["as it is"])
    assert more.loaded == ["text"]
    assert dataset.embedding("as it is").any()


def test_long_captions_are_told(run):
    long = run()
    (Path(long.settings.data[0]) / "x/still.txt").write_text("a red circle " * 40)
    for _ in range(2):
        assert "prompts longer than 48 tokens: 1, the first loses 'circle a red" in long.prepare().report()[-1]


def test_pixels_are_those_of_the_window(cached):
    _, dataset = cached
    plan = next(plan for plan in (dataset.plan(i, 0, 2) for i in range(50)) if plan.bucket.frames == 9)
    found = dataset.pixels(plan, [1])
    assert found.shape == (1, 3, 9, plan.bucket.height, plan.bucket.width)
    assert numbers(found[0].transpose(0, 1)) == [dataset.samples[plan.picks[1]].start + i for i in range(9)]


def test_a_file_that_changes_meanwhile_is_not_stored(model, pictures, tmp_path):
    folder = shutil.copytree(pictures, tmp_path / "data")
    changing = Run(model, folder, tmp_path / "cache", tasks=("text",))
    load = changing.load

    def change(name):
        return lambda: (write(folder / "clip.gif", None, 19, 32, 40, 20), load(name)())[1]

    changing.load = change
    with pytest.raises(InputError, match=r"clip.gif has changed while it was read"):
        changing.prepare()


def test_latents_that_are_not_finite_are_named(run, monkeypatch):
    def fail(*_):
        raise NonFiniteError("encoded latent frame 0 has NaN")

    monkeypatch.setattr(Averaging, "encode", fail)
    with pytest.raises(NonFiniteError, match=r"clip.gif: encoded latent frame 0"):
        run(size=64).prepare()


def test_an_image_model(model, pictures, tmp_path):
    image = tiny.write_model(tmp_path / "image", "image")
    found = Run(image, pictures, tmp_path / "cache", tasks=("text",), fps=None).prepare()
    assert {sample.bucket.frames for sample in found.samples} == {1}
    assert found.notes.left_out[data.NO_TASK] == [pictures / "pair.gif"]
    plan = found.plan(0, 0, 2)
    assert found.load(plan)[0].shape[:3] == (2, 1, tiny.CHANNELS)
    for settings, message in (({"tasks": ("extend",)}, "makes pictures; extend needs"), ({"frames": 5}, "frames is 5")):
        with pytest.raises(InputError, match=message):
            Run(image, pictures, tmp_path / "cache", **{"tasks": ("text",), **settings}).prepare()


def test_a_task_that_suits_no_file_is_refused(model, tmp_path):
    write(tmp_path / "data/a.png", "a")
    for task, message in (("extend", "needs clips of 5 frames"), ("edit", "needs pairs: NAME.source.EXT")):
        with pytest.raises(InputError, match=message):
            Run(model, tmp_path / "data", tmp_path, tasks=("text:1", f"{task}:1")).prepare()


# Holding out


def held(share: float, contents: list[str]) -> tuple[int, set[str]]:
    """How many samples are held out, and of which content, for a list with the content of each sample's file."""
    samples = [Sample(Item(Path(content), "x"), Bucket("1:1", 16, 16, 1)) for content in contents]
    learned, out = data.split(samples, share, lambda sample: sample.item.path.name)
    assert sorted(map(id, [*learned, *out])) == sorted(map(id, samples))
    sides = [{sample.item.path for sample in side} for side in (learned, out)]
    assert not sides[0] & sides[1]
    return len(out), {path.name for path in sides[1]}


def place(share: float, number: int = 0) -> str:
    """A hash that lies at a share of all hashes."""
    return f"{int(share * 16**12):012x}{number:052x}"


def test_whole_files_are_held_out_by_their_content():
    contents = [place(i / 20, i) for i in range(20)] * 2
    assert held(0.25, contents) == (10, set(contents[:5]))
    assert held(0, contents)[0] == 0
    assert held(0.25, contents[6:20]) == (1, {contents[6]})  # at least a file
    assert held(0.001, [place(0.5 + i / 50, i) for i in range(12)]) == (1, {place(0.5, 0)})
    assert held(0.9, [place(i / 100, i) for i in range(12)])[0] == 11  # but not all
    assert held(0.5, [place(0, i) for i in range(9)])[0] == 0
    assert held(0.5, [place(0.1)] * 12)[0] == 0


# The command


@pytest.fixture
def command(model, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = ["--model", model / FLOW_FILE, "--text-encoder", model / TEXT_FILE, "--vae", model / VAE_FILE]

    def call(*words):
        code = main([str(word) for word in ("prepare", *words, *options, "--work", "w", "--device", "cpu")])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return call


def test_the_command_prepares_tells_and_draws(command, cached, pictures, tmp_path):
    (tmp_path / "run.toml").write_text(f"data = ['{pictures}']\nfps = 20.0\nbatch = 2\n")
    code, out, err = command("run.toml", "--tasks", *TASKS, "--preview", "sheet.png")
    assert (code, err) == (0, "")
    assert out == [
        "4 files with captions, 3 used: 4 samples",
        "  1:1, 32 x 32, 5 frames: 1",
        "  5:4, 32 x 32, 9 frames: 2",
        "  9:16, 32 x 48, stills: 1",
        "cropped: 2 of 3 files, by 22% of their area on average, 25% at most",
        "trimmed at the ends of clips: 2 of 25 frames (8%)",
        f"enlarged: 2, {pictures}/pair.gif, {pictures}/x/still.png",
        f"left out, can't be read: 1, {pictures}/bad.png",
        f"left out, no caption: 1, {pictures}/lonely.png",
        "practised: text 45%, edit 25%, extend 10%, last_frame 10%, first_frame 10%; 2 steps of 2 an epoch",
        "sheet.png",
    ]
    with Image.open("sheet.png") as sheet:
        assert sheet.width == preview.WIDTH
        assert sheet.height > 400
    cache, (run, dataset) = Cache(tmp_path / "w/cache"), cached
    assert entries(cache).keys() == entries(run.cache).keys()
    still = dataset.samples[-1]
    pixels = fit(read_image(still.item.path), still.bucket.height, still.bucket.width)
    wanted = run.encoders.load_vae(CPU).encode(pixels[None, :, None])[0]
    assert torch.equal(cache.get(dataset.window(still), "x"), wanted)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "missing"], "there is no folder missing"),
        ([], "give at least one folder"),
        (["none.toml"], "none.toml can't be read as settings"),
        (["--data", ".", "--preview", "sheet.jpg"], "ends in .png"),
        (["--data", ".", "--tasks", "edits"], "is 'edit' meant"),
        (["--data", ".", "--train", "scratch"], "give a JSON file"),
        (["--data", ".", "--train", "scratch", "--config", "none.json"], "none.json can't be read"),
        (["--data", "."], "no picture or clip with a caption"),
    ],
)
def test_the_command_refuses_in_a_line(command, tmp_path, words, message):
    code, out, err = command(*words)
    assert (code, out) == (2, [])
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.rglob("*"))


def test_from_scratch_with_a_configuration(model, cached, pictures, tmp_path):
    config = replace(cached[0].encoders.config, name="new")
    (tmp_path / "new.json").write_text(json.dumps(config.to_dict()))
    parts = {"text_encoder": str(model / TEXT_FILE), "vae": str(model / VAE_FILE)}
    found = Encoders.find(Settings(train="scratch", config=str(tmp_path / "new.json"), **parts))
    assert found.config == config


# The sheet


def test_a_sheet_shows_every_bucket_evenly(cached, monkeypatch):
    _, dataset = cached
    monkeypatch.setattr(preview, "MOST", 3)
    found = preview.chosen(dataset)
    assert [(bucket.frames, [sample.start for sample in samples]) for bucket, samples in found.items()] == [
        (5, [0]), (9, [0]), (1, [0]),
    ]  # fmt: skip


def test_a_sheet_tells_what_is_held_out(cached, monkeypatch, tmp_path):
    _, dataset = cached
    told = {}

    def captioned(picture, sample, held):
        told[sample] = held
        return picture

    monkeypatch.setattr(preview, "_captioned", captioned)
    monkeypatch.setattr(preview, "_decoded", lambda dataset, sample, vae: dataset.frames(sample))
    preview.write_sheet(tmp_path / "sheet.png", replace(dataset, held=1), None)
    assert [sample for sample, held in told.items() if held] == [dataset.samples[-1]]


def test_names_that_are_no_text(model, tmp_path):
    name = os.fsdecode(b"caf\xe9")
    try:
        write(tmp_path / f"data/{name}.png", "a still")
    except OSError:
        pytest.skip("file names are text here")
    dataset = Run(model, tmp_path / "data", tmp_path / "cache", tasks=("text",)).prepare()
    vae = Averaging("video")
    vae.decode = lambda latents: torch.zeros(1, 3, 1, 32, 32)
    preview.write_sheet(tmp_path / "sheet.png", dataset, vae)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 200


def test_captions_are_wrapped_to_their_card():
    font = preview.TEXT
    lines = list(preview._wrapped("a red circle moving left on a black background " + "w" * 100, font, 120))
    assert len(lines) > 3
    assert all(font.getlength(line) <= 120 for line in lines)
    assert lines[-1].endswith("..")
    assert " ".join(lines).startswith("a red circle moving left")
