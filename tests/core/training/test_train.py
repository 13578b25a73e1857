"""Training from settings: every kind of subject on tiny models, going on, refusals, what is written."""

from __future__ import annotations

import json
import random
import shutil
import signal
from dataclasses import replace

import pytest
import torch

from starflow_core.bundled import FLOW_FILE, TEXT_FILE, VAE_FILE
from starflow_core.errors import InputError, NonFiniteError, OutOfMemoryForecast
from starflow_core.jobs import memory
from starflow_core.media import write_video
from starflow_core.model.flow import Flow
from starflow_core.pipeline import load_pipeline
from starflow_core.training.processes import Processes
from starflow_core.training.settings import Settings
from starflow_core.training.train import find_sources, train
from starflow_core.weights.flow import load_flow
from starflow_core.weights.lora import LoraFile
from starflow_core.weights.vae import load_vae
from tests.core import models, tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Twelve pictures and clips with captions, and a tiny model of each kind."""
    root = tmp_path_factory.mktemp("training")
    for number in range(12):
        pixels = models.randn(9, 3, 4, 4, seed=number).repeat_interleave(8, -1).repeat_interleave(8, -2).clamp(-1, 1)
        for kind, name, frames in (("image", f"{number}.png", 1), ("video", f"{number}.mp4", 9)):
            (root / kind).mkdir(exist_ok=True)
            write_video(root / kind / name, pixels[:frames], 16)
            (root / kind / f"{number}.txt").write_text(f"a picture of {number}")
    for kind in ("image", "video"):
        tiny.write_model(root / f"{kind}-model", kind)
    return root


def settings(folders, work, kind="video", **changes) -> Settings:
    model = folders / f"{kind}-model"
    files = {"model": FLOW_FILE, "text_encoder": TEXT_FILE, "vae": VAE_FILE}
    chosen = {name: str(model / file) for name, file in files.items()}
    chosen |= {"data": (str(folders / kind),), "work": str(work), "steps": 6, "batch": 4, "warmup": 2}
    chosen |= {"rank": 2} if changes.get("train", "lora") == "lora" else {}
    return Settings(**chosen | {"save_every": 2, "evaluate_every": 3, "device": "cpu"} | changes)


def run(chosen: Settings, **options):
    return train(chosen, find_sources(chosen), CPU, Processes(), **options)


def figures(work) -> list[dict]:
    return [json.loads(line) for line in (work / "logs" / "figures.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_lora_learns_and_is_used(folders, tmp_path, kind):
    chosen = settings(folders, tmp_path, kind, steps=30, learning_rate=0.02, trigger_words="of twelve", license="mine")
    path = run(chosen)
    told = figures(tmp_path)
    assert [line["step"] for line in told] == list(range(1, 31))
    held = [line["held out bits/dim"] for line in told if "held out bits/dim" in line]
    assert len(held) == 10
    assert held[-1] < held[0]
    last = told[-1]
    nats = last["held out noise"] + sum(last[f"held out block {i}"] for i in range(3))
    assert last["held out bits/dim"] == pytest.approx((nats + 0.918939) / 0.693147, rel=1e-4)
    file = LoraFile.open(path)
    assert set(file.ranks.values()) == {2}
    assert file.metadata["trigger_words"] == "of twelve"
    assert file.metadata["license"] == "none mine"
    assert json.loads(file.metadata["settings"])["steps"] == 30
    model = folders / f"{kind}-model"
    files = (model / FLOW_FILE, model / TEXT_FILE, model / VAE_FILE)
    plain, taught = (load_pipeline(*files, device="cpu", loras=loras) for loras in ([], [str(path)]))
    job = plain.job(seed=1, guidance=0.0)
    assert not torch.equal(plain.generate("a picture", job).pixels, taught.generate("a picture", job).pixels)


@pytest.mark.parametrize(("subject", "kept"), [("full", "learnable_self_denoiser."), ("denoiser", "blocks.")])
def test_whole_weights_are_trained_and_the_others_stay(folders, tmp_path, subject, kept):
    path = run(settings(folders, tmp_path, train=subject))
    before, after = (
        load_flow(file, torch.float32).state_dict() for file in (folders / "video-model" / FLOW_FILE, path)
    )
    for name, weight in before.items():
        stays = name.startswith(kept)
        assert torch.equal(weight.bfloat16().float(), after[name]) == stays or not stays, name
    assert any(not torch.equal(before[name].bfloat16().float(), after[name]) for name in before)


def test_the_decoder_learns_to_show_noisy_latents(folders, tmp_path):
    options = {"train": "vae", "steps": 30, "learning_rate": 0.01, "evaluate_every": 10}
    path = run(settings(folders, tmp_path, "image", **options))
    errors = [line["error"] for line in figures(tmp_path)]
    assert sum(errors[-5:]) < sum(errors[:5])
    assert "held out error" in figures(tmp_path)[-1]
    before, after = (load_vae(file).module.state_dict() for file in (folders / "image-model" / VAE_FILE, path))
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_a_flow_from_scratch(folders, tmp_path):
    config = load_flow(folders / "video-model" / FLOW_FILE).config
    (tmp_path / "config.json").write_text(json.dumps(replace(config, layers=(1, 1)).to_dict()))
    path = run(settings(folders, tmp_path, train="scratch", config=str(tmp_path / "config.json"), model=None))
    assert load_flow(path).config.layers == (1, 1)


def test_a_run_that_is_killed_at_random_is_as_one_that_is_not(folders, tmp_path):
    """Five times at random steps: some states are written, others are not."""
    options = {"steps": 24, "save_every": 3, "dropout": 0.1, "rehearse": ("a picture of 3",), "rehearsal": 0.4}
    whole = run(settings(folders, tmp_path / "whole", **options))
    rng, broken = random.Random(5), settings(folders, tmp_path / "broken", **options)
    for moment in sorted(rng.sample(range(1, 24), 5)):

        def kill(step, _, moment=moment):
            if step == moment:
                raise SystemError("killed")

        with pytest.raises(SystemError, match="killed"):
            run(broken, report=kill)
    resumed = run(broken)
    names = ("loss", "gradient")
    assert [{n: line[n] for n in names} for line in figures(tmp_path / "broken")] == [
        {n: line[n] for n in names} for line in figures(tmp_path / "whole")
    ]
    assert resumed.read_bytes() == whole.read_bytes().replace(b"whole", b"broken")


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(folders, tmp_path, kind):
    before, lines = signal.signal(signal.SIGTERM, signal.default_int_handler), []

    def stop(step, _):
        if step == 3:
            signal.raise_signal(kind)

    try:
        with pytest.raises(KeyboardInterrupt):
            run(settings(folders, tmp_path, save_every=100), report=stop, log=lines.append)
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "stopped after step 3, which is saved" in lines[-1]
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["lora-0000003"]


def test_micro_batches_and_recomputing_change_nothing(folders, tmp_path):
    run(settings(folders, tmp_path / "a", batch=5))
    run(settings(folders, tmp_path / "b", batch=5, micro_batch=2, recompute=False))
    for one, two in zip(figures(tmp_path / "a"), figures(tmp_path / "b"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


def test_rehearsals_are_the_models_own_and_come_in_their_share(folders, tmp_path, monkeypatch):
    from starflow_core.training import rehearsal

    seen, plan = [], rehearsal.Rehearsal.plan
    monkeypatch.setattr(
        rehearsal.Rehearsal, "plan", lambda self, index, *rest: seen.append(index) or plan(self, index, *rest)
    )
    captions = ("a picture of 1", "a picture of 2", "a picture of 3")
    chosen = settings(folders, tmp_path, steps=8, rehearse=captions, rehearsal=0.25)
    run(chosen)
    assert set(seen) == {0, 1}
    drawn = list((tmp_path / "cache" / "drawn").rglob("*.safetensors"))
    assert len(drawn) == 3
    times = [path.stat().st_mtime_ns for path in drawn]
    shutil.rmtree(tmp_path / "states")
    run(chosen)
    assert [path.stat().st_mtime_ns for path in drawn] == times


def test_edits_and_last_frames_are_rehearsed_as_they_are_learned(folders, tmp_path, monkeypatch):
    """An edit begins with a clip that was drawn before, a last frame with a still."""
    from starflow_core.training import rehearsal

    seen, load = {}, rehearsal.Rehearsal.load

    def loaded(self, plan, rows):
        latents, text = load(self, plan, rows)
        for row, latent in zip(rows, latents, strict=True):
            seen[plan.picks[row]] = plan.given, latent
        return latents, text

    monkeypatch.setattr(rehearsal.Rehearsal, "load", loaded)
    captions = ("(v2v) make it 3", "a picture of 1", "(last) a picture of 2", "(v2v) make it 4", "a picture of 5")
    run(settings(folders, tmp_path, steps=24, rehearse=captions, rehearsal=0.75, caption_drop=0.0))
    for number, source in ((0, 1), (3, 4)):
        given, edited = seen[number]
        assert given == 2  # a source fits the window of 5 beside its edit
        torch.testing.assert_close(edited[:given], seen[source][1][:given])
        assert edited.shape[0] == 2 * given
    assert seen[1][0] == 0
    assert seen[2][0] == 1
    assert seen[2][1].shape[0] == 1 + 3


@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_what_is_drawn_at_once_has_seeds_that_follow_one_another(most):
    from starflow_core.training import rehearsal

    wishes = [rehearsal.Wish("text", "", number) for number in (0, 1, 2, 4, 5, 9)]
    chunks = list(rehearsal._chunks(wishes, most))
    assert [wish for chunk in chunks for wish in chunk] == wishes
    for chunk in chunks:
        assert len(chunk) <= most
        assert [wish.number - chunk[0].number for wish in chunk] == list(range(len(chunk)))
    assert len(chunks) == {1: 6, 2: 4, 3: 3, 8: 3}[most]


@pytest.mark.parametrize(
    ("kind", "captions", "message"),
    [
        ("image", ("a", "(v2v) make it 3"), r"\(v2v\) needs clips, of which there are none"),
        ("video", ("(last) a picture",), "edits and last frames need captions of clips beside them"),
    ],
)
def test_what_cannot_be_rehearsed(folders, tmp_path, kind, captions, message):
    with pytest.raises(InputError, match=message):
        run(settings(folders, tmp_path, kind, rehearse=captions))


def test_samples_are_drawn_on_a_sheet(folders, tmp_path):
    run(settings(folders, tmp_path, sample_every=4, prompts=("a picture", "another")))
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-0000004.png", "step-0000006.png"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"int8": True, "train": "full"}, "int8 is for train = lora, not full; leave it out"),
    ({"train": "denoiser", "blocks": "all"}, "blocks is for train = lora, not denoiser"),
    ({"optimizer": "muon", "weight_decay": 0.1}, "weight_decay is for optimizer = adamw, not muon"),
    ({"blocks": "3"}, "there is no block 3; this flow has the blocks 0 to 2, the last is deep"),
    ({"blocks": "first"}, "blocks is 'first': expected deep, all, or numbers"),
    ({"train": "vae"}, "the model given is tiny video"),
    ({"kind": "image", "train": "denoiser"}, "tiny image has no learned denoiser"),
    ({"kind": "image", "tasks": ("extend:1",)}, "tiny image makes pictures"),
    ({"train": "scratch", "rehearse": ("a",), "config": "none.json"}, "config|rehearse"),
    ({"data": ("nowhere",)}, "nowhere"),
])  # fmt: skip
def test_what_cannot_be_is_refused(folders, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        run(settings(folders, tmp_path, **changes))
    assert not (tmp_path / "states").exists()


def test_other_settings_do_not_go_on_from_a_state(folders, tmp_path):
    run(settings(folders, tmp_path))
    with pytest.raises(InputError, match=r"lora-0000006 belongs to a run with rank 2 \(this one: 3\)"):
        run(settings(folders, tmp_path, rank=3))


def test_a_finished_run_takes_more_steps_but_not_fewer(folders, tmp_path):
    lines = []
    run(settings(folders, tmp_path))
    path = run(settings(folders, tmp_path, steps=9), log=lines.append)
    assert "lora: goes on after step 6 of 9" in lines
    assert [line["step"] for line in figures(tmp_path)] == list(range(1, 10))
    assert json.loads(LoraFile.open(path).metadata["settings"])["steps"] == 9
    with pytest.raises(InputError, match="has step 9 of lora already"):
        run(settings(folders, tmp_path, steps=8))


def test_steps_tell_their_rate_and_throughput(folders, tmp_path):
    run(settings(folders, tmp_path, learning_rate=0.02))
    told, tokens = figures(tmp_path), 4 * 3 * 4  # samples, frames, tokens of a frame
    assert [line["learning rate"] for line in told] == pytest.approx([0.01, 0.02, 0.02, 0.02, 0.02 * 2 / 3, 0.02 / 3])
    assert all(line["tokens a second"] * line["seconds a step"] == pytest.approx(tokens) for line in told)


def test_what_does_not_fit_is_refused_before_it_is_loaded(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free", lambda device: 1000)
    with pytest.raises(OutOfMemoryForecast, match="micro_batch 1"):
        run(settings(folders, tmp_path))


@pytest.mark.parametrize("subject", ["lora", "full", "denoiser"])
def test_what_learns_is_in_float32(folders, tmp_path, subject):
    """Also where products are in bfloat16, where most of an average's changes would be lost."""
    chosen = settings(folders, tmp_path, train=subject, dtype="bf16", steps=1)
    run(chosen)
    kinds = {entry.properties.dtype for entry in _described(tmp_path).values()}
    assert kinds == {torch.float32}


def _described(folder):
    from starflow_core.training.states import _Reader

    (state,) = (folder / "states").iterdir()
    return _Reader(state).read_metadata().state_dict_metadata


def test_another_model_does_not_go_on_from_a_state(folders, tmp_path):
    run(settings(folders, tmp_path / "run"))
    tiny.write_flow(tmp_path / "other.safetensors", "video", name="another")
    with pytest.raises(InputError, match="belongs to a run with model "):
        run(settings(folders, tmp_path / "run", model=str(tmp_path / "other.safetensors")))


@pytest.mark.parametrize("name", ["out.bin", "file/out.safetensors"])
def test_where_nothing_can_be_written_nothing_is_learned(folders, tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError):
        run(settings(folders, tmp_path / "run", output=str(tmp_path / name)))
    assert not (tmp_path / "run").exists()


def test_numbers_that_go_bad_are_named(folders, tmp_path, monkeypatch):
    loss = Flow.loss

    def broken(self, latents, text, given=0):
        if len(seen) == 4:
            latents = latents / 0
        seen.append(1)
        return loss(self, latents, text, given)

    seen = []
    monkeypatch.setattr(Flow, "loss", broken)
    with pytest.raises(NonFiniteError, match=r"step 5, batch of \d+\.mp4, .*: NaN or infinity in the given latents"):
        run(settings(folders, tmp_path))
    assert [path.name for path in sorted((tmp_path / "states").iterdir())] == ["lora-0000002", "lora-0000004"]
