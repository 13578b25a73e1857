"""How the demo is made: clips, VAE, banks, batches, the learning of flow and denoiser, the files."""

from __future__ import annotations

import json
import random
import runpy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from starflow_core.bundled import FLOW_FILE, TEXT_FILE, VAE_FILE
from starflow_core.errors import InputError
from starflow_core.model.config import Denoiser
from starflow_core.model.flow import Flow
from starflow_core.pipeline import find_parts
from starflow_core.training.demo import batches, bundle, clips, flow, recipe, vae
from starflow_core.training.demo.bank import EDIT_FRAMES, FRAMES, LAST_FRAMES, Bank, make_banks
from starflow_core.training.demo.batches import draw_batch
from starflow_core.training.demo.tokenizer import build_tokenizer
from starflow_core.training.loop import Loop
from starflow_core.weights.tensorfiles import TensorFile
from starflow_core.weights.vae import METADATA_KEY
from tests.core import models, tiny

CPU = torch.device("cpu")
CONFIG = models.config(window=10, denoiser=Denoiser(48, 2, 3), text_dim=128)
LATENT_FRAMES, EDIT_LATENTS = (FRAMES - 1) // 4 + 1, (EDIT_FRAMES - 1) // 4 + 1


# Clips


@pytest.mark.parametrize("direction", clips.DIRECTIONS)
def test_shapes_move_as_named_and_stop(direction):
    rng = random.Random(1)
    scene = clips.random_scene(rng, 96, 96, late=0)
    while scene.direction != direction:
        scene = clips.random_scene(rng, 96, 96, late=0)
    path = clips.centres(scene, torch.arange(200.0), 96, 96)
    moved, (dx, dy) = path[30] - path[0], clips.DIRECTIONS[direction]
    assert moved[0] * dx + moved[1] * dy > 15
    assert abs(moved[0] * dy) + abs(moved[1] * dx) < 1e-3
    assert torch.equal(path[-1], path[-50])
    reach = scene.radius + clips.MARGIN
    assert ((path >= reach - 1e-3) & (path <= 96 - reach + 1e-3)).all()


def test_captions_say_what_is_drawn():
    rng = random.Random(2)
    for _ in range(50):
        scene = clips.random_scene(rng, 96, 96)
        text = clips.caption(scene, rng)
        assert {scene.kind, scene.colour, scene.direction} <= set(text.split())
        still = clips.caption(replace(scene, direction=None), rng)
        assert not set(clips.DIRECTIONS) & set(still.split())


def test_colours_are_those_named():
    scene = clips.Scene("circle", "orange", "grey", None, 40.0, 24.0, 15.0)
    pixels = clips.render([scene], 1, 48, 80)[0, :, 0]
    torch.testing.assert_close(pixels[:, 24, 40], 2 * torch.tensor(clips.COLOURS["orange"]) - 1)
    torch.testing.assert_close(pixels[:, 2, 2], 2 * torch.tensor(clips.BACKGROUNDS["grey"]) - 1)


@pytest.mark.parametrize("kind", clips.KINDS)
def test_every_kind_keeps_its_margin(kind):
    """And fills about as much of the picture as the others."""
    reach = 20.0 + clips.MARGIN
    scene = clips.Scene(kind, "red", "white", None, reach, reach, 20.0)
    shape = (clips.render([scene], 1, 46, 46)[0, :, 0] != clips.render([scene], 1, 46, 46)[0, :, 0, :1, :1]).any(0)
    rows, columns = shape.nonzero().unbind(1)
    assert min(rows.min(), columns.min()) >= clips.MARGIN - 1
    assert max(rows.max(), columns.max()) <= 46 - clips.MARGIN
    assert 0.6 < shape.sum() / 1000 < 1.4


def test_recolouring_changes_only_the_colour():
    scene = replace(clips.random_scene(random.Random(3), 64, 64), colour="red", background="black")
    red, blue = clips.render([scene, scene.recoloured("blue")], 5, 64, 64)
    outside = (red == red[:, :1, :1, :1]).all(0)
    assert torch.equal(red[:, outside], blue[:, outside])
    assert not torch.allclose(red, blue)
    assert torch.equal(clips.render([scene.later(1).later(1)], 3, 64, 64)[0], red[:, 2:])


# VAE


def tiny_vae():
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(**tiny.WAN)


def test_stills_stand_and_clips_move():
    still, clip = (vae.draw_clips(random.Random(5), frames, 8) for frames in (1, 5))
    assert still.shape[:3] == (8, 3, 1)
    assert clip.shape[:3] == (8, 3, 5)
    assert (clip[:, :, 0] != clip[:, :, -1]).flatten(1).any(1).sum() > 4  # some have stopped
    sizes = {vae.draw_clips(random.Random(seed), 1, 1).shape[-2:] for seed in range(20)}
    assert sizes == set(clips.SIZES.values())


def test_the_decoder_learns_from_disturbed_latents():
    torch.manual_seed(0)
    module, pixels = tiny_vae(), vae.draw_clips(random.Random(0), 1, 2)
    first, again, other = (
        vae.reconstruction_loss(module, pixels, torch.Generator().manual_seed(seed))[0].item() for seed in (0, 0, 1)
    )
    assert first == again
    assert first != pytest.approx(other, rel=1e-6)


def test_saturated_pixels_have_a_gradient():
    torch.manual_seed(0)
    module = tiny_vae()
    output = module.decoder.conv_out
    output.bias.data.fill_(-9.0)
    vae.reconstruction_loss(module, torch.ones(1, 3, 1, 32, 32), torch.Generator())[0].backward()
    assert output.bias.grad.abs().max() > 0


def test_the_seed_decides_the_first_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "fresh_vae", tiny_vae)
    monkeypatch.setattr(vae, "STAGES", (vae.Stage(1, 1, 1),))
    monkeypatch.setattr(vae, "with_statistics", lambda module: module)

    def weights(folder, seed):
        torch.manual_seed(99)
        return vae.train_vae(Loop(tmp_path / folder, CPU, torch.float32, seed)).decoder.conv_in.weight

    first = weights("a", 0)
    torch.testing.assert_close(weights("b", 0), first)
    assert not torch.allclose(weights("c", 1), first, atol=0.05)


class StandIn(nn.Module):
    """In a VAE's place: the mean colours of 16 x 16 pixels in every fourth frame."""

    def __init__(self):
        super().__init__()
        self.config, self.scale = {}, nn.Parameter(torch.ones(()))

    def encode(self, pixels):
        mean = nn.functional.avg_pool3d(pixels[:, :, ::4], (1, 16, 16)) * self.scale
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean))

    def register_to_config(self, **values):
        self.config |= values


def test_statistics_are_those_of_the_latents():
    module = vae.with_statistics(StandIn(), count=16)
    rng = random.Random(1)
    parts = [StandIn().encode(vae.draw_clips(rng, 33, 8)).latent_dist.mean for _ in range(2)]
    for channel in range(3):
        values = torch.cat([part[:, channel].flatten() for part in parts])
        assert module.config["latents_mean"][channel] == pytest.approx(values.mean().item(), abs=1e-5)
        assert module.config["latents_std"][channel] == pytest.approx(values.std().item(), abs=1e-5)


# Banks


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Small banks of the stand-in's latents, and the loop that made them."""
    loop = Loop(tmp_path_factory.mktemp("banks"), CPU, torch.float32, scale=0.0025)
    return make_banks(StandIn(), loop), loop


def test_banks_hold_clips_edits_and_last_frames(made):
    banks, loop = made
    assert [(bank.aspect, len(bank.scenes)) for bank in banks] == [("1:1", 9), ("16:9", 1), ("9:16", 1)]
    for bank in banks:
        size = clips.SIZES[bank.aspect]
        recoloured = [s.recoloured(c) for s, c in zip(bank.scenes, bank.colours, strict=True)]
        for scenes, frames, found in ((bank.scenes, FRAMES, bank.clips), (recoloured, EDIT_FRAMES, bank.edits)):
            torch.testing.assert_close(found, StandIn().encode(clips.render(scenes, frames, *size)).latent_dist.mean)
        assert torch.equal(bank.lasts, bank.clips[:, :, 1 : 1 + len(LAST_FRAMES)])  # every fourth frame
        assert all(scene.colour != colour for scene, colour in zip(bank.scenes, bank.colours, strict=True))
    assert not list(loop.folder.glob("*.part"))


def test_banks_are_made_once(made):
    banks, loop = made
    for found, bank in zip(make_banks(None, loop), banks, strict=True):
        assert found.scenes == bank.scenes
        assert torch.equal(found.clips, bank.clips)
    for other in (replace(loop, seed=1), replace(loop, scale=0.005)):
        with pytest.raises(InputError, match=r"bank-1-1\.pt has \(seed, clips\) \(0, 9\), this run needs"):
            make_banks(None, other)


# Batches


def marked_bank():
    """Latents that tell what they are: a clip's first frame 0, later ones 1, edits 2, last frames 3, 4, ..; scenes that
    start late are red."""
    scene = clips.Scene("circle", "blue", "black", "left", 60.0, 40.0, 16.0, speed=1.0)
    scenes = [replace(scene, colour="red").later(9) if i % 2 else scene for i in range(80)]
    lasts = torch.arange(3.0, 3 + len(LAST_FRAMES)).view(1, 1, -1, 1, 1).expand(80, 4, -1, 3, 3)
    ones = torch.ones(80, 4, LATENT_FRAMES, 3, 3)
    shown = torch.cat((0 * ones[:, :, :1], ones[:, :, 1:]), 2)
    return Bank("16:9", scenes, ["green"] * 80, shown, 2 * ones[:, :, :EDIT_LATENTS], lasts)


@pytest.fixture(scope="module")
def drawn():
    """Many batches of the end of training, by task, each with the mark of every frame."""
    found = {}
    for seed in range(400):
        batch = draw_batch(CONFIG, [marked_bank()], random.Random(seed), progress=1.0)
        values = batch.latents[0, :, 0, 0, 0]
        assert torch.equal(batch.latents, values.view(1, -1, 1, 1, 1).expand_as(batch.latents))
        assert len(batch.prompts) == len(batch.latents)
        task = {EDIT_LATENTS: "edit", 1: "last_frame"}.get(batch.given) or told(values)
        factors = torch.full_like(values, 0.6)
        factors[[0, batch.given] if task != "extend" else []] = 1.0
        found.setdefault(task, []).append((batch, (values / factors * 1.3 + 0.1).round(decimals=4).tolist()))
    assert found.keys() == batches.TASK_SHARES.keys()
    return found


def told(values):
    """Whether a batch without given frames is of stills, clips or continuations: those have no first frame."""
    if len(values) == 1:
        return "still"
    return "extend" if values[0] == values[1] else "text"


def test_tasks_come_in_their_shares(drawn):
    total = sum(batches.TASK_SHARES.values())
    for task, share in batches.TASK_SHARES.items():
        assert len(drawn[task]) / 400 == pytest.approx(share / total, abs=0.06)


def test_frames_of_every_task(drawn):
    """Each clip's first frame at full scale, the later ones at 0.6 of it."""
    clip = [0.0] + [1.0] * (LATENT_FRAMES - 1)
    assert all(marks == clip[: len(marks)] for _, marks in drawn["text"])
    assert all(marks == clip[1 : len(marks) + 1] for _, marks in drawn["extend"])
    assert all(marks == clip[:EDIT_LATENTS] + [2.0] * EDIT_LATENTS for _, marks in drawn["edit"])
    assert all(marks[1:] == clip[: len(marks) - 1] for _, marks in drawn["last_frame"])


def test_lengths_of_batches(drawn):
    def lengths(task):
        return {batch.latents.shape[1] for batch, _ in drawn[task]}

    assert lengths("still") == {1}
    assert lengths("text") == lengths("extend") == {5, 9, 10}
    assert lengths("edit") == {10}
    assert lengths("last_frame") == {3, 4, 5, 10}


def test_short_clips_come_first(drawn):
    for seed in range(40):
        batch = draw_batch(CONFIG, [marked_bank()], random.Random(seed), progress=0.0)
        assert batch.latents.shape[1] <= (10 if batch.given == EDIT_LATENTS else 3)
    lengths = {draw_batch(CONFIG, [marked_bank()], random.Random(i), 0.15).latents.shape[1] for i in range(40)}
    assert lengths == {1, 3, 4, 5, 6, 10}


def test_last_frames_end_their_clips(drawn):
    """The mark n + 1 is that of a clip of n latent frames: at least those in the batch, mostly the longest."""
    ends = [(marks[0] - 1, len(marks) - 1) for _, marks in drawn["last_frame"]]
    assert all(frames <= end for end, frames in ends)
    assert sum(end == 9 for end, _ in ends) / len(ends) == pytest.approx(0.85, abs=0.08)
    assert len({end for end, _ in ends}) > 6


def test_stills_are_frames_of_any_moment(drawn):
    moments = {marks[0] for _, marks in drawn["still"]}
    assert moments <= {0, *range(3, 11)}
    assert len(moments) > 6


def test_captions_of_every_task(drawn):
    for task, found in drawn.items():
        prompts = [prompt for batch, _ in found for prompt in batch.prompts]
        assert all("in a 16:9 aspect ratio." in prompt for prompt in prompts)
        assert all(("An image:" in prompt) == (task == "still") for prompt in prompts)
        assert all(("A video with 16 fps:" in prompt) == (task != "still") for prompt in prompts)
        captioned = [prompt for prompt in prompts if {"red", "blue", "green"} & set(prompt.split())]
        assert len(captioned) / len(prompts) == pytest.approx(0.9, abs=0.03)
        assert all(("left" in prompt) == (task in ("text", "extend", "last_frame")) for prompt in captioned)
        assert all(("green" in prompt) == (task == "edit") for prompt in captioned)
        assert any("red" in prompt for prompt in captioned) == (task == "extend")
        prefixes = {"extend": ("(extend) ", 0.75), "edit": ("(v2v) ", 1.0), "last_frame": ("(last) ", 1.0)}
        prefix, share = prefixes.get(task, ("(", 0.0))
        assert sum(prefix in prompt for prompt in captioned) / len(captioned) == pytest.approx(share, abs=0.1)


# Flow and denoiser


@pytest.fixture(scope="module")
def banks():
    rng = random.Random(4)
    scenes = [clips.random_scene(rng, 96, 96) for _ in range(16)]
    colours = [rng.choice(list(clips.COLOURS)) for _ in scenes]
    latents = models.randn(16, 4, LATENT_FRAMES, 1, 1) * torch.ones(1, 1, 1, 3, 3)  # flat: easily predicted
    return [Bank("1:1", scenes, colours, latents, latents[:, :, :EDIT_LATENTS] + 1, latents[:, :, :8])]


def test_flow_and_denoiser_learn(banks, tmp_path, monkeypatch):
    monkeypatch.setattr(flow, "FLOW_STEPS", 60)
    monkeypatch.setattr(flow, "DENOISER_STEPS", 60)
    lines, contexts, levels = [], [], []

    def loss(self, latents, text, given=0):
        contexts.append(given)
        levels.append(latents.var((-2, -1)).mean())
        return plain(self, latents, text, given)

    plain = Flow.loss
    monkeypatch.setattr(Flow, "loss", loss)
    loop = Loop(tmp_path, CPU, torch.float32, log=lines.append)
    model = flow.train_flow(loop, CONFIG, banks, build_tokenizer(tmp_path))
    assert set(contexts) == {0, 1, EDIT_LATENTS}
    assert torch.stack(levels).mean().sqrt() == pytest.approx(CONFIG.noise_std, rel=0.05)
    flow.train_denoiser(loop, model, banks)

    def figures(name, key):
        found = [line.split() for line in lines if line.startswith(name)]
        return [float(words[words.index(key) + 1]) for words in found]

    losses = figures("flow", "loss")
    assert losses[-1] < losses[0] - 0.2
    errors = figures("denoiser", "error")
    assert errors[-1] < 0.7 * errors[0]


# The finished files


def test_preview_factors_turn_latents_into_colours(made):
    """The stand-in's latents are the colours."""
    latent = replace(CONFIG.latent, channels=3, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0), later_factor=1.0)
    found = bundle.with_preview(replace(CONFIG, latent=latent), made[0][0]).latent
    torch.testing.assert_close(torch.tensor(found.rgb), torch.diag(torch.tensor(latent.std)), atol=1e-4, rtol=0)
    assert found.rgb_bias == pytest.approx(latent.mean, abs=1e-4)


def test_the_files_are_a_demo(made, tmp_path):
    module = vae.fresh_vae()
    module.register_to_config(latents_mean=[0.5] * 16, latents_std=[2.0] * 16)
    bank = replace(made[0][0], clips=models.randn(9, 16, LATENT_FRAMES, 6, 6))
    model = flow.FlowWithText(flow.demo_config(module), build_tokenizer(tmp_path))
    bundle.write_bundle(tmp_path / "demo", module, model, [bank])
    files = [tmp_path / "demo" / name for name in (FLOW_FILE, TEXT_FILE, VAE_FILE)]
    found = find_parts(*files)
    assert found.config.name == "STARFlow demo"
    assert found.config.latent.mean == (0.5,) * 16
    assert found.config.latent.std == (2.0,) * 16
    assert len(found.config.latent.rgb) == 16
    assert (tmp_path / "demo" / "tokenizer.json").is_file()
    for file, owner in zip(files, (model.flow, model.text, module), strict=True):
        stored = TensorFile.open(file)
        assert stored.metadata["license"] == "Apache-2.0"
        weights = owner.state_dict()
        assert all(torch.equal(stored.tensor(name), weights[name].bfloat16()) for name in stored.shapes)
    shape = json.loads(TensorFile.open(files[2]).metadata[METADATA_KEY])
    assert (shape["latents_mean"], shape["latents_std"]) == ([0.5] * 16, [2.0] * 16)


# The command


def command() -> int:
    """Its exit code, with the options in sys.argv."""
    with pytest.raises(SystemExit) as leaving:
        runpy.run_module("starflow_core.training", run_name="__main__")
    return leaving.value.code


def test_the_command_trains_the_demo(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(recipe, "train_demo", lambda loop, output: started.append((loop, output)))
    options = ["--work", str(tmp_path), "--output", "demo", "--device", "cpu", "--dtype", "fp32", "--seed", "3"]
    monkeypatch.setattr("sys.argv", ["training", *options, "--scale", "0.5"])
    monkeypatch.chdir(tmp_path)
    assert command() == 0
    ((loop, output),) = started
    assert (loop.folder, loop.device, loop.dtype, loop.seed, loop.scale) == (tmp_path, CPU, torch.float32, 3, 0.5)
    assert str(output) == "demo"


def test_a_shortened_schedule_does_not_replace_the_demo(monkeypatch, capsys):
    monkeypatch.setattr(recipe, "train_demo", lambda *_: pytest.fail("it was started"))
    monkeypatch.setattr("sys.argv", ["training", "--scale", "0.5"])
    with pytest.raises(SystemExit) as leaving:
        recipe.main()
    assert leaving.value.code == 2
    assert "would replace the shipped demo; give --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--scale", "nan", "--output", "a"), "--scale is nan: expected a number above 0, up to 100"),
        (("--scale", "0", "--output", "a"), "--scale is 0.0: expected"),
        (("--seed", "-1"), "--seed is -1: expected 0 to 9223372036854775807"),
        (("--seed", "9" * 400), "at most 20 digits"),
        (("--output", "file"), "error: file can't be a folder to write to (File exists); choose another"),
        (("--work", "file/a", "--output", "a"), "can't be a folder to write to (Not a directory)"),
    ],
)
def test_bad_options_are_told_in_a_line(tmp_path, monkeypatch, capsys, options, message):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "train_demo", lambda *_: pytest.fail("it was started"))
    monkeypatch.setattr("sys.argv", ["training", *options])
    assert command() == 2
    assert message in capsys.readouterr().err


def test_an_interruption_is_told_in_a_line(tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "train_demo", stop)
    monkeypatch.setattr("sys.argv", ["training", "--work", str(tmp_path), "--output", str(tmp_path / "demo")])
    assert command() == 130
    assert capsys.readouterr().err == "interrupted; no partial files were left\n"
