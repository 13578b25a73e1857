"""The command line, in-process, on tiny models: every task, every refusal, what is left behind."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from starflow_core import __version__, cli, pipeline
from starflow_core.cli import arguments, generate, main, progress, settings
from starflow_core.cli import fill as cli_fill
from starflow_core.cli.progress import Meter, SamplingBar
from starflow_core.control import Progress
from starflow_core.errors import OutOfMemoryForecast
from starflow_core.jobs import memory
from starflow_core.media import fit, read_metadata, read_video, write_video, writing
from starflow_core.model.compiled import evaluate
from starflow_core.model.vae.codec import VAE
from starflow_core.solve import solvers
from starflow_core.weights.flow import CONFIG_KEY, load_flow
from starflow_core.weights.tensorfiles import TensorFile
from starflow_core.weights.vae import load_vae
from tests.core import models, tiny

PROMPT = "a red circle moving left"
# The settings of a training run.
SETTINGS = (
    "alpha batch blocks caption-drop clip config data data-cache decay device dropout dtype ema evaluate-every fps "
    "frames guidance held-out int8 learning-rate license log-every micro-batch model no-int8 no-recompute noise "
    "optimizer output prompts rank recompute rehearsal rehearse sample-every save-every seed size steps stride tasks "
    "text-encoder tokenizer train trigger-words vae warmup weight-decay work"
)
# What to make and how, of `generate` and of `batch`.
JOB = (
    "aspect batch best-of cache change-kept compile denoise device dtype first-span fps frames guidance height image "
    "image-span join keep keep-at-change last-image lora max-sweeps memory model negative no-change-kept no-denoise "
    "offload output preset quality resume seed shallow-tolerance size solver span task text-encoder tile timeline "
    "tolerance vae video width window"
)
FLAGS = {
    "generate": f"{JOB} devices parallel prompt-file",
    "batch": f"{JOB} ray retries workers",
    "encode": "aspect device dtype fps frames guidance height keep lora model negative output prompt seed size "
    "text-encoder vae width window",
    "mix": "amount keep-frames output seed",
    "reprompt": "aspect candidates compile device dtype first-span fps frames guidance height hold image-span lora "
    "max-sweeps model negative output preset quality seed shallow-tolerance size solver span strength text-encoder "
    "tile tolerance vae was width",
    "fill": "aspect compile device dtype first-span fps frames guidance height image-span keep lora mask max-sweeps "
    "missing model negative outpaint output particles preset quality seed shallow-tolerance size solver span "
    "text-encoder tile tolerance vae width window",
    "decode": "cache compile device dtype first-span guidance image-span lora max-sweeps memory model offload output "
    "preset prompt quality shallow-tolerance solver span text-encoder tile tolerance vae",
    "score": "aspect choose device dtype fps frames height json keep lora map model prompt size text-encoder vae width "
    "window",
    "convert": "dtype overwrite",
    "merge": "dtype output overwrite",
    "prepare": f"{SETTINGS} preview",
    "train": f"{SETTINGS} dry-run example",
    "inspect": "aspect batch cache device dtype frames guidance height json memory offload size width",
}


@pytest.fixture(scope="module", autouse=True)
def demo(tmp_path_factory):
    """A tiny model in the bundled one's place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "BUNDLED", tiny.write_model(tmp_path_factory.mktemp("video")))
        yield pipeline.BUNDLED


@pytest.fixture(scope="module")
def image_model(tmp_path_factory):
    return parts(tiny.write_model(tmp_path_factory.mktemp("image"), "image"))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A picture, a short and a long clip, and files that are none."""
    folder = tmp_path_factory.mktemp("given")
    pixels = models.randn(21, 3, 8, 8).repeat_interleave(4, -1).repeat_interleave(4, -2).mul(0.4).clamp(-1, 1)
    write_video(folder / "picture.png", pixels[:1], 0)
    write_video(folder / "other.png", pixels[1:2], 0)
    write_video(folder / "clip.mp4", pixels[:9], 12)
    write_video(folder / "long.mp4", pixels, 12)
    (folder / "noise.png").write_bytes(b"no picture")
    (folder / "cut.mp4").write_bytes((folder / "clip.mp4").read_bytes()[:-300])
    (folder / "empty.txt").write_text("")
    (folder / "gap.txt").write_text("one\n \nthree\n")
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    return folder


def parts(folder: Path) -> list[str]:
    """Options that name a model's three files."""
    files = {"--model": pipeline.FLOW_FILE, "--text-encoder": pipeline.TEXT_FILE, "--vae": pipeline.VAE_FILE}
    return [word for option, file in files.items() for word in (option, str(folder / file))]


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs a command in an empty folder; gives stdout's lines, and demands silence on stderr, but for the plan, unless
    `err` says what has to be there."""
    monkeypatch.chdir(tmp_path)

    def call(*argv, code=0, err=""):
        found = main([str(word) for word in argv])
        out, errors = capsys.readouterr()
        errors = re.sub(r"^memory: weights [^\n]*\n", "", errors, flags=re.MULTILINE)
        assert found == code, errors
        assert re.search(err, errors) if err else not errors, errors
        return out.splitlines()

    return call


@pytest.fixture
def refused(run, tmp_path, monkeypatch):
    """Runs a command that must fail with one line, before anything is loaded, leaving nothing."""

    def call(*argv, err):
        with monkeypatch.context() as patch:
            patch.setattr(pipeline.Parts, "load", lambda *_, **__: pytest.fail("the model was loaded"))
            before = sorted(tmp_path.rglob("*"))
            assert run(*argv, code=2, err=rf"^error: [^\n]*{err}[^\n]*\n$") == []
            assert sorted(tmp_path.rglob("*")) == before

    return call


def pixels(path) -> torch.Tensor:
    return read_video(path).pixels


# The whole


def test_help_is_quick():
    """No heavy import."""
    code = "import sys; from starflow_core.cli import main\ntry: main(['generate', '-h'])\nfinally: print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--guidance" in out
    assert not {"torch", "numpy", "transformers", "diffusers", "av", "PIL"} & set(out.splitlines()[-1].split())


def test_runs_as_a_module():
    result = subprocess.run([sys.executable, "-m", "starflow_core"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "COMMAND" in result.stderr


def test_flags_are_stable():
    commands = arguments.parser()._subparsers._group_actions[0].choices
    found = {
        name: sorted(o[2:] for a in command._actions for o in a.option_strings if o.startswith("--") and o != "--help")
        for name, command in commands.items()
    }
    assert found == {name: sorted(flags.split()) for name, flags in FLAGS.items()}


def test_choices_are_the_cores():
    args = arguments.parser().parse_args(["generate", "x"])
    assert settings.solver(args) == solvers.PRESETS["balanced"]
    for preset, numbers in solvers.PRESETS.items():
        assert settings.solver(arguments.parser().parse_args(["generate", "x", "--preset", preset])) == numbers
    given = [
        "--image-span",
        "2",
        "--first-span",
        "3",
        "--span",
        "4",
        "--tolerance",
        "0.1",
        "--shallow-tolerance",
        "0.2",
        "--max-sweeps",
        "5",
    ]
    found = settings.solver(arguments.parser().parse_args(["generate", "--preset", "fast", *given, "x"]))
    assert found == solvers.SolverSettings(2, 3, 4, 0.1, 0.2, 5)


# Tasks


TASKS = {
    "text": ([], "text", 9),
    "still": (["--frames", 1], "text", 1),
    "sliding": (["--frames", 25, "--keep", 2], "text", 25),
    "plain": (["--no-denoise", "--guidance", 0, "--solver", "autoregressive"], "text", 9),
    "first frame": (["--image", "picture.png"], "first_frame", 9),
    "last frame": (["--last-image", "picture.png", "--tile", 4], "last_frame", 9),
    "first and last": (["--image", "picture.png", "--last-image", "other.png"], "last_frame", 9),
    "extend": (["--video", "clip.mp4", "--task", "extend"], "extend", 9),
    "joined": (["--video", "clip.mp4", "--task", "extend", "--join"], "extend", 13),
    "joined after one frame": (["--video", "clip.mp4", "--task", "extend", "--join", "--keep", 1], "extend", 17),
    "edit": (["--video", "clip.mp4", "--task", "edit", "--window", 6], "edit", 9),
    "edit of a part": (["--video", "long.mp4", "--task", "edit", "--frames", 5], "edit", 5),
    "picture sequence": (["-o", "frames/"], "text", 9),
}


@pytest.mark.parametrize("case", TASKS)
def test_every_task(run, given, case):
    options, task, frames = TASKS[case]
    options = [given / o if str(o).endswith((".png", ".mp4")) else o for o in options]
    out = run("generate", PROMPT, *options)
    clip = read_video(out[0])
    assert clip.pixels.shape == (frames, 3, 32, 32)
    assert frames == 1 or clip.fps == (12 if task in ("extend", "edit") else 16)
    assert re.fullmatch(r"[\d.]+ s, [1-9]\d* deep sweeps \(\d+ token evaluations\), \d+ shallow sweeps", out[1])
    assert read_metadata(out[0])["task"] == task
    assert len(out) == 2
    assert not list(Path().rglob("*.part"))


@pytest.fixture
def three_devices(monkeypatch):
    """The CPU under three names."""
    there = {"cpu": torch.device("cpu"), "cpu:0": torch.device("cpu", 0), "cpu:1": torch.device("cpu", 1)}

    def pick(name=None):
        if name and name not in there:
            raise settings.InputError(f"device {name!r} isn't there")
        return there[name or "cpu"]

    monkeypatch.setattr(settings, "pick_device", pick)


@pytest.mark.parametrize(("devices", "guidance"), [("cpu,cpu:0", 1.5), ("cpu, cpu:0, cpu:1", 1.5), ("cpu,cpu:1", 0)])
def test_several_devices_make_the_same(run, three_devices, given, devices, guidance, monkeypatch):
    placements, load = [], pipeline.Parts.load
    monkeypatch.setattr(
        pipeline.Parts,
        "load",
        lambda self, placement, *rest: placements.append(placement) or load(self, placement, *rest),
    )
    words = ("a ring", "a square", "--image", given / "picture.png", "--guidance", guidance, "--preset", "exact")
    run("generate", *words, "--batch", 2, "-o", "one/")
    run("generate", *words, "--batch", 2, "-o", "two/", "--devices", devices)
    assert [len(placement.devices) for placement in placements] == [1, devices.count(",") + 1]
    for index in range(2):
        torch.testing.assert_close(pixels(f"one-{index}/"), pixels(f"two-{index}/"), atol=2.1 / 255, rtol=0)  # in 8 bit


def test_compiled_it_makes_the_same(run, monkeypatch):
    """What would be compiled runs as PyTorch finds it."""
    monkeypatch.setattr(settings, "require_compiler", lambda *devices: None)
    monkeypatch.setattr(
        "starflow_core.model.flow.compiled", lambda: torch.compile(evaluate, fullgraph=True, backend="eager")
    )
    words = ("generate", "a ring", "--frames", 1, "--preset", "exact")
    run(*words, "-o", "as-it-is.png")
    run(*words, "-o", "compiled.png", "--compile", err="compiling what sweeps compute")
    torch.testing.assert_close(pixels("as-it-is.png"), pixels("compiled.png"), atol=1.1 / 255, rtol=0)
    run(
        *words, "-o", "left-out.png", "--compile", "--cache", "int8", err="the flow isn't compiled: its keys and values"
    )
    told = [read_metadata(f"{name}.png").get("compiled") for name in ("as-it-is", "compiled", "left-out")]
    assert told == [None, True, None]


def test_without_a_compiler_nothing_is_loaded(run, monkeypatch):
    monkeypatch.setenv("CXX", "nothing-like-it")
    monkeypatch.setattr(pipeline.Parts, "load", None)
    for command in (
        ("generate", "a ring"),
        ("reprompt", "a.png", "a ring"),
        ("fill", "a.png", "a ring", "--missing", "0-1"),
    ):
        run(*command, "--compile", code=2, err="needs the C[+][+] compiler nothing-like-it")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--devices", "cpu,cpu:0", "--compile"), "compiled for one device"),
        (("--devices", "cpu,cpu"), "names a device twice"),
        (("--devices", "cpu,gpu"), "'gpu' isn't there"),
        (("--devices", "cpu,cpu:0", "--device", "cpu"), "--device and --devices say the same"),
        (("--devices", "cpu,cpu:0,cpu:1", "--guidance", "0"), "3 devices, but without guidance 2 are used"),
        (("--devices", "cpu,cpu:0", "--offload", "weights"), "offload is 'weights', but several devices are given"),
        (("--devices", "cpu,cpu:0", "--memory", "0.00001GB"), "on cpu, but 10 kB are free there"),
    ],
)
def test_devices_that_cannot_be_used(refused, three_devices, words, message):
    refused("generate", "x", *words, err=message)


def test_the_given_frames_are_shown(run, given):
    """A joined clip is its source and then what the clip alone shows after the overlap."""
    options = ("--video", given / "clip.mp4", "--task", "extend", "--window", 5)
    run("generate", PROMPT, *options, "-o", "alone/%05d.png")
    run("generate", PROMPT, *options, "--join", "-o", "joined/%05d.png")
    alone, joined = pixels("alone/%05d.png"), pixels("joined/%05d.png")
    source = fit(pixels(given / "clip.mp4"), 32, 32)
    assert len(alone) == 9
    torch.testing.assert_close(joined[:9], source, atol=1 / 127, rtol=0)
    assert torch.equal(joined[9:], alone[5:])
    told = read_metadata("joined/")
    assert told["joined"] is True
    assert told["frames"] == len(joined)
    assert read_metadata("alone/")["frames"] == len(alone)


def test_size_follows_what_is_given(run, tmp_path):
    write_video(tmp_path / "wide.png", torch.zeros(1, 3, 90, 160), 0)
    out = run("generate", PROMPT, "--image", "wide.png", "--size", 64)
    assert pixels(out[0]).shape[-2:] == (48, 80)
    out = run("generate", PROMPT, "--image", "wide.png", "--height", 48, "--width", 32)
    assert pixels(out[0]).shape[-2:] == (48, 32)


def test_size_and_rate_of_a_clip_can_be_changed(run, given):
    out = run("generate", PROMPT, "--video", given / "clip.mp4", "--task", "extend", "--fps", 20, "--size", 48)
    assert read_video(out[0]).fps == 20
    assert pixels(out[0]).shape[-2:] == (48, 48)


def test_guidance_steers_away_from_the_negative_prompt(run):
    for name, guidance, negative in (("a", 2, ""), ("b", 2, "blue"), ("c", 0, ""), ("d", 0, "blue")):
        options = ("--guidance", guidance, "--negative", negative)
        run("generate", PROMPT, "--frames", 1, *options, "-o", f"{name}.png")
    assert not torch.equal(pixels("a.png"), pixels("b.png"))
    assert torch.equal(pixels("c.png"), pixels("d.png"))


def test_the_text_encoder_stays_until_the_last_batch(run, monkeypatch):
    """It is read once, and the forecast counts it as long as it stays."""
    kept, forecasts, loads = [], [], []
    start, forecast, load = pipeline.Pipeline.start, pipeline.Parts.forecast, pipeline.TextEncoderFiles.load

    def starting(self, captions, job, **options):
        kept.append((captions, options["keep_text_encoder"]))
        return start(self, captions, job, **options)

    def forecasting(self, job, means, *, keep_text_encoder, **options):
        forecasts.append((job.batch, keep_text_encoder))
        return forecast(self, job, means=means, keep_text_encoder=keep_text_encoder, **options)

    monkeypatch.setattr(pipeline.Pipeline, "start", starting)
    monkeypatch.setattr(pipeline.Parts, "forecast", forecasting)
    monkeypatch.setattr(pipeline.TextEncoderFiles, "load", lambda *a, **b: loads.append(1) or load(*a, **b))
    run("generate", "one", "two", "three", "--frames", 1, "--batch", 2)
    assert kept == [(["one", "two"], True), (["three"], False)]
    assert len(loads) == 1
    run("generate", "one", "two", "--frames", 1, "--batch", 5)
    assert kept[2:] == [(["one", "two"], False)]
    assert set(forecasts) == {(2, True), (2, False)}


def test_tiles_reach_the_decoder(run, given, monkeypatch):
    tiles = []
    frames = pipeline.Pipeline.frames
    monkeypatch.setattr(
        pipeline.Pipeline, "frames", lambda self, job, tile=None: tiles.append(tile) or frames(self, job, tile)
    )
    run("generate", PROMPT, "--frames", 1, "--tile", 4)
    run("encode", given / "picture.png", "-o", "n.safetensors")
    run("decode", "n.safetensors", "--tile", 5)
    assert tiles == [4, 5]


def test_sweeps_of_all_batches_are_counted(run):
    def sweeps(*prompts):
        out = run("generate", *prompts, "--frames", 1)
        return [int(n) for n in re.findall(r"(\d+) deep .*?(\d+) token.*?(\d+) shallow", out[-1])[0]]

    one, two, both = sweeps("one"), sweeps("two", "--seed", 1), sweeps("one", "two")
    assert both == [a + b for a, b in zip(one, two, strict=True)]


def test_image_model(run, image_model):
    out = run("generate", "a red circle", *image_model, "--aspect", "3:2", "--batch", 2, "--guidance", 2)
    assert out[:2] == ["outputs/a-red-circle-0.png", "outputs/a-red-circle-1.png"]
    assert pixels(out[1]).shape == (1, 3, 24, 40)


def test_batch_is_each_alone(run):
    run("generate", PROMPT, "--seed", 5, "--batch", 2, "--preset", "exact", "-o", "many/")
    run("generate", PROMPT, "--seed", 6, "--preset", "exact", "-o", "one/")
    assert (pixels("many-1/") - pixels("one/")).abs().max() <= 1.01 / 127.5
    assert not torch.equal(pixels("many-0/"), pixels("one/"))
    assert [read_metadata(f"many-{i}/")["seed"] for i in (0, 1)] == [5, 6]


def test_prompt_file(run, tmp_path):
    """Three prompts, two at a time; each as it would be alone."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\r\nsomething green\n", encoding="utf-8-sig")
    common = ("--frames", 1, "--preset", "exact")
    out = run("generate", "--prompt-file", "prompts.txt", "--batch", 2, "--seed", 7, *common, "-o", "x.png")
    assert out[:3] == ["x-0.png", "x-1.png", "x-2.png"]
    found = [(read_metadata(p)["prompt"], read_metadata(p)["seed"]) for p in out[:3]]
    assert found == [("a red circle", 7), ("a blue square", 8), ("something green", 9)]
    run("generate", "something green", "--seed", 9, *common, "-o", "alone.png")
    assert (pixels("x-2.png") - pixels("alone.png")).abs().max() <= 1.01 / 127.5
    names = run("generate", "a red circle", "a blue square", "--frames", 1)[:2]
    assert names == ["outputs/a-red-circle-0.png", "outputs/a-blue-square-1.png"]


def test_metadata_tells_how_to_make_it_again(run, given):
    first = ("--image", given / "picture.png", "--negative", "blue", "--guidance", 1.5, "--window", 4, "--keep", 2)
    numbers = ("--preset", "fast", "--span", 7, "--no-denoise", "--fps", "23.976", "--frames", 13)
    run("generate", PROMPT, "--seed", 11, *first, *numbers, "-o", "a/")
    found = read_metadata("a/")
    solver = found.pop("solver")
    assert solver == {
        "image_span": 48, "first_span": 48, "span": 7, "tolerance": 3e-3, "shallow_tolerance": 3e-4,
        "max_sweeps": 64, "method": "jacobi",
    }  # fmt: skip
    assert found == {
        "prompt": PROMPT, "negative": "blue", "seed": 11, "task": "first_frame", "height": 32, "width": 32,
        "frames": 13, "fps": 23.976, "guidance": 1.5, "denoise": False, "window": 4, "keep": 2, "image": "picture.png",
        "model": "tiny video", "dtype": "float32", "noise_version": 1, "version": __version__,
    }  # fmt: skip
    again = [f"--{name.replace('_', '-')}={solver[name]}" for name in settings.NUMBERS]
    again += [
        f"--{name}={found[name]}" for name in ("negative", "seed", "height", "width", "frames", "fps", "guidance")
    ]
    again += [f"--{name}={found[name]}" for name in ("window", "keep")]
    run("generate", found["prompt"], *again, "--no-denoise", "--image", given / found["image"], "-o", "b/")
    assert torch.equal(pixels("a/"), pixels("b/"))


def test_seeds(run):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("generate", PROMPT, "--frames", 1, "--seed", seed, "-o", f"{name}.png")
    assert torch.equal(pixels("a.png"), pixels("b.png"))
    assert not torch.equal(pixels("a.png"), pixels("c.png"))


@pytest.mark.parametrize(("text", "name"), [
    ("A red circle, moving LEFT!", "a-red-circle-moving-left"), ("word " * 30, "-".join(["word"] * 8)),
    ("x" * 99, "x" * 40), ("../../etc", "etc"), ("?!", "clip"), ("été", "été"),
])  # fmt: skip
def test_slug(text, name):
    assert settings.slug(text) == name


@pytest.mark.parametrize(("path", "name"), [
    ("a/b.mp4", "a/b-3.mp4"), ("a/b", "a/b-3/"), ("a/b/", "a/b-3/"), ("a/b/%05d.png", "a/b-3/%05d.png"),
])  # fmt: skip
def test_numbered(path, name):
    assert settings.numbered(path, 3) == name


# Warnings


def test_task_that_was_not_trained(run, given, tmp_path):
    folder = tiny.write_model(tmp_path / "model", tasks=("text", "extend"))
    options = (*parts(folder), "--video", given / "clip.mp4", "--window", 6, "-o", "a.mp4")
    message = r"^warning: tiny video was not trained for the task edit \(v2v\), only for text, extend; .*\n$"
    run("generate", "make it blue", "--task", "edit", *options, err=message)
    run("generate", PROMPT, "--task", "extend", *options)


def test_what_the_text_encoder_cut_off(run, given):
    long = " ".join(["red"] * 40 + ["circle"] * 9)
    message = r"^warning: tiny video reads only 48 tokens; left out of 'red .*': '.*circle"
    run("generate", long, "--frames", 1, "--batch", 2, "-o", "a.png", err=message)
    run("score", given / "picture.png", "--prompt", long, err=message)


# What is refused


@pytest.mark.parametrize(("options", "message"), [
    ("--height 33 --width 32", "height 33 is not a multiple of 16; nearest are 32 and 48"),
    ("--height 32 --width 5", "width 5 is less than one token; the smallest is 16"),
    ("--height 32", "height and width go together"),
    ("--height 32 --width 32 --aspect 1:1", "give either height and width, or aspect and size"),
    ("--size 8", "size 8 is smaller than one token; the minimum is 16"),
    ("--aspect 16x9", "'16x9': expected width:height"),
    ("--aspect 0:1", "too extreme"),
    ("--aspect 1:0", "'1:0': expected width:height"),
    ("--frames 10", "10 frames: .* nearest are 9 and 13"),
    ("--frames 0", "0 frames: .* nearest are 1 and 5"),
    ("--guidance -1", "guidance is -1.0; 0 is off, typical is 1"),
    ("--guidance nan", "guidance is nan"),
    ("--window 0", "window is 0 latent frames; the minimum is 1"),
    ("--window 3 --keep 3 --frames 17", "keep is 3; a window of 3 latent frames keeps 1 to 2"),
    ("--span 0", "span is 0; the minimum is 1"),
    ("--tolerance 2", "tolerance is 2.0, expected 0 <= tolerance < 1"),
    ("--best-of 1", "the best of 1; give at least 2 candidates, or leave it out"),
    ("--best-of 2 --resume", "--best-of can't be resumed; choose first, then --resume with the --seed that it names"),
    ("--solver autoregressive --preset exact", "autoregressive solver has no settings"),
    ("--solver autoregressive --span 3", "autoregressive solver has no settings"),
    ("--device cuda:99", "device 'cuda:99' isn't there; this machine has .*cpu"),
    ("--device toaster", "device 'toaster' isn't there"),
    ("--model nowhere.safetensors", "no checkpoint at nowhere.safetensors; check the path"),
    ("--model {demo}/flow.safetensors", r"needs a text encoder \(flan-t5-xl\) and a VAE; only the bundled demo"),
    ("--model a.pth --vae b --text-encoder c", "no checkpoint at a.pth; check the path"),
    ("--vae b", "no VAE at b; check the path"),
    ("--tile 3", "tile is 3 latent cells; the minimum is 4"),
    ("--quality 101", "quality 101: expected 0 to 100"),
    ("--fps 99 -o a.gif", "frame rate 99.*: .gif takes"),
    ("-o a.xyz", "a.xyz: unknown format '.xyz'"),
    ("-o a.png", "a.png: .png takes one picture, not 9"),
    ("-o {given}/clip.mp4/a.mp4", "cannot be written"),
    ("--image missing.png", "missing.png: no such file"),
    ("--image {given}/noise.png", "noise.png cannot be read as a picture"),
    ("--last-image {given}/noise.png", "noise.png cannot be read as a picture"),
    ("--video missing.mp4 --task extend", "missing.mp4: no such file"),
    ("--video {given}/cut.mp4 --task edit", "cut.mp4 is truncated"),
    ("--video {given}/clip.mp4", "--video needs --task extend, .* or --task edit"),
    ("--task edit", "--task edit needs a clip; give it with --video"),
    ("--join", "--join puts a source before its continuation"),
    ("--video {given}/clip.mp4 --task edit --image {given}/picture.png", "cannot be combined"),
    ("--video {given}/clip.mp4 --task edit", "within 5 latent frames; the source may have at most 5 frames"),
    ("--video {given}/long.mp4 --task extend --keep 9 --frames 41", r"keep is 9; .* keeps 1 to 4"),
    ("--video {given}/long.mp4 --task extend --keep 5 --window 4 --frames 17", "keep is 5; .* keeps 1 to 3"),
    ("--video {given}/long.mp4 --task extend --frames 13", "context alone gives 13; ask for more frames"),
    ("--video {given}/picture.png --task extend", "extend needs a clip of at least 5 frames"),
    ("--last-image {given}/picture.png --frames 41", "longest result is 13 frames"),
])  # fmt: skip
def test_impossible_jobs(refused, given, demo, options, message):
    refused("generate", PROMPT, *options.format(given=given, demo=demo).split(), err=message)


@pytest.mark.parametrize(("words", "message"), [
    ([], "no prompt; give one, --timeline, or --prompt-file"),
    (["one", " "], "prompt 2 is empty"),
    (["one", "--prompt-file", "gap.txt"], "--prompt-file, not both"),
    (["--prompt-file", "empty.txt"], "empty.txt is empty; write one prompt per line"),
    (["--prompt-file", "gap.txt"], "gap.txt: line 2 is empty"),
    (["--prompt-file", "latin.txt"], "latin.txt is not UTF-8 text"),
    (["--prompt-file", "missing.txt"], "missing.txt cannot be read"),
])  # fmt: skip
def test_prompts(refused, given, words, message):
    refused("generate", *(given / w if w.endswith(".txt") else w for w in words), err=message)


@pytest.mark.parametrize("options", [
    "--batch 0", "--size 0", "--fps 0", "--fps fast", "--frames many", "--task dance", "--solver magic", "--no-such",
])  # fmt: skip
def test_arguments(options):
    with pytest.raises(SystemExit) as leaving:
        main(["generate", PROMPT, *options.split()])
    assert leaving.value.code == 2


def test_image_models_make_no_clips(refused, given, image_model):
    refused("generate", PROMPT, *image_model, "--frames", 9, err="makes images: frames is 9, expected 1")
    refused("generate", PROMPT, *image_model, "--image", given / "picture.png", err="needs a video model")


@pytest.mark.skipif(os.geteuid() == 0, reason="a superuser may write anywhere")
def test_folder_without_permission(refused, tmp_path):
    (tmp_path / "shut").mkdir(mode=0o500)
    refused("generate", PROMPT, "-o", "shut/a.mp4", err="cannot be written .Permission denied")


def test_memory_is_forecast(refused, monkeypatch, given):
    monkeypatch.setattr(memory, "free", lambda device: 1000)
    refused("generate", PROMPT, err=r"this job needs at least \d+ kB, but 1 kB are free on cpu; use a smaller size")
    refused("score", given / "clip.mp4", err="encoding this needs about")


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"),
])  # fmt: skip
def test_out_of_memory(run, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(pipeline.Pipeline, "frames", fail)
    run("generate", PROMPT, "-o", "a.mp4", code=2, err="^error: out of memory; use fewer frames[^\n]*\n$")


def test_other_failures_keep_their_traceback(run, monkeypatch):
    def fail(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(pipeline.Pipeline, "frames", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run("generate", PROMPT)


def test_missing_package(run, monkeypatch):
    def fail(*_):
        raise ModuleNotFoundError("No module named 'av'", name="av")

    monkeypatch.setattr(cli.importlib, "import_module", fail)
    message = "^error: the package av is missing; run pip install -r requirements.txt\n$"
    run("generate", PROMPT, code=2, err=message)


def test_full_disk(run, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "_publish", full)
    run("generate", PROMPT, "-o", "a.mp4", code=2, err="^error: a.mp4: the disk is full")
    assert list(tmp_path.iterdir()) == []


def test_nan_in_weights(run, tmp_path, demo):
    folder = tiny.write_model(tmp_path / "model")
    weights = load_file(folder / pipeline.FLOW_FILE)
    weights["blocks.1.proj_in.weight"][3, 1] = float("nan")
    save_file(weights, folder / pipeline.FLOW_FILE, TensorFile.open(demo / pipeline.FLOW_FILE).metadata)
    run("generate", PROMPT, *parts(folder), code=2, err=r"^error: blocks\.1\.proj_in\.weight .* has NaN or infinity")


def test_nan_in_latents(run, given, monkeypatch):
    """What the VAE made of a picture; the flow says where it met it."""
    latents = torch.zeros(1, 4, 1, 2, 2)
    latents[0, 2, 0, 1, 0] = float("nan")
    monkeypatch.setattr(VAE, "encode", lambda *_, **__: latents)
    message = (
        r"^error: NaN or infinity in the given latents: batch element 0, latent frame 0, token 2 \(row 1, column 0\)"
    )
    run("generate", PROMPT, "--image", given / "picture.png", code=2, err=message)
    assert not Path("outputs").exists()


@pytest.mark.parametrize("moment", ["__call__", "wrote"])
def test_interruption(run, monkeypatch, tmp_path, moment):
    """Ctrl-C while the solver sweeps, and while frames are being written."""
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(SamplingBar, moment, interrupt)
    out = run("generate", PROMPT, "-o", "a.mp4", code=130, err="^interrupted; no partial files were left\n$")
    assert out == []
    assert list(tmp_path.iterdir()) == []


def test_interruption_keeps_what_is_complete(run, monkeypatch, tmp_path):
    starts = []

    def start(*args, **options):
        if starts:
            raise KeyboardInterrupt
        starts.append(1)
        return original(*args, **options)

    original = generate.start
    monkeypatch.setattr(generate, "start", start)
    run("generate", "one", "two", "--frames", 1, "-o", "a.png", code=130, err="^interrupted")
    assert [path.name for path in tmp_path.iterdir()] == ["a-0.png"]


def test_the_second_job_says_how_long_it_takes(run, monkeypatch):
    said = []
    monkeypatch.setattr(generate, "tell_plan", lambda plan: said.append(str(plan)))
    for _ in range(2):
        run("generate", PROMPT, "--frames", 5, "--height", 32, "--width", 48)
    assert "Takes" not in said[0]
    assert re.search(r"Takes about \d+ s, going by the last such job here$", said[1])
    assert any("Takes about" in line for line in run("inspect", "--device", "cpu", "--dtype", "fp32"))


LONG = ("--frames", 33, "--window", 4, "--keep", 1, "--guidance", 0, "--height", 32, "--width", 48)


def test_a_long_clip_is_resumed(run, monkeypatch, tmp_path):
    """After a kill within the third window: the same file, without the first two windows' sweeps."""
    command = ("generate", PROMPT, *LONG, "--resume", "-o", "a.mp4")
    sweeps = int(re.search(r"(\d+) deep sweeps", run(*command)[-1])[1])
    whole, writes = Path("a.mp4").read_bytes(), []

    def wrote(self, frames):
        writes.append(frames)
        if sum(writes) > 27:  # the eighth latent frame
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SamplingBar, "wrote", wrote)
        run("generate", PROMPT, *LONG, "--resume", "-o", "b.mp4", code=130, err="^interrupted")
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "b.mp4.unfinished.safetensors"]
    message = "b.mp4.unfinished.safetensors is of another job: seed differ. Give the same options"
    run("generate", PROMPT, *LONG, "--resume", "--seed", 1, "-o", "b.mp4", code=2, err=message)
    out = run("generate", PROMPT, *LONG, "--resume", "-o", "b.mp4", err="^going on after 7 of 9 latent frames\n$")
    assert int(re.search(r"(\d+) deep sweeps", out[-1])[1]) < sweeps / 2
    assert Path("b.mp4").read_bytes() == whole
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "b.mp4"]


# Progress


def test_the_bar_shows_the_solver_and_then_the_frames():
    shown = []

    def show(key, done, total, phase, note, unit):
        shown.append((key, done, total, phase.strip(), note))

    sampling = SamplingBar(show, frames=9)
    sampling(Progress("deep", 10, 40, settled=10, tokens=40, residual=0.013))
    sampling(Progress("shallow", 1, 2, 1, 2, 0.5))
    sampling.wrote(1)
    sampling(Progress("deep", 40, 40, settled=40, tokens=40))
    sampling.wrote(4)
    assert shown == [
        ("tokens", 10, 40, "deep", "residual 1e-02, 1 sweeps, 0/9 frames"),
        ("tokens", 10, 40, "shallow", "residual 5e-01, 1 sweeps, 0/9 frames"),
        ("tokens", 10, 40, "decode", "1 sweeps, 1/9 frames"),
        ("frames", 1, 9, "deep", ""),
        ("frames", 5, 9, "decode", ""),
    ]


def test_every_written_frame_is_counted(run, monkeypatch):
    counted = []
    monkeypatch.setattr(SamplingBar, "wrote", lambda self, frames: counted.append((self._frames, frames)))
    run("generate", PROMPT, "--batch", 2)
    assert counted == [(9, 1), (9, 4), (9, 4)]


def test_bars_count_up_and_go(monkeypatch):
    """One bar for each phase, on a terminal alone."""
    bars = []

    class Bar:
        def __init__(self, total, initial, **options):
            assert options["disable"] is None
            self.total, self.n, self.open = total, initial, True
            bars.append(self)

        def update(self, count):
            self.n += count

        def close(self):
            self.open = False

        def set_description_str(self, text, refresh): ...

        def set_postfix_str(self, text, refresh): ...

    monkeypatch.setattr(progress, "tqdm", Bar)
    with Meter() as meter:
        for done in (10, 30, 100):
            meter.bytes(Progress("load", done, 100))
        meter.encoding(Progress("encode", 1, 3))
        meter.encoding(Progress("encode", 2, 3))
        assert [(bar.n, bar.total, bar.open) for bar in bars] == [(100, 100, False), (2, 3, True)]
    assert not bars[1].open


# Encode, decode, score


def vae_round_trip(path, folder, frames) -> torch.Tensor:
    vae = load_vae(folder / pipeline.VAE_FILE)
    clip = pixels(path)[:frames].transpose(0, 1).unsqueeze(0)
    with torch.no_grad():
        return vae.decode(vae.encode(clip))[0].transpose(0, 1)


@pytest.mark.parametrize("solver", [[], ["--solver", "autoregressive"]])
def test_noise_and_back(run, given, demo, solver):
    out = run("encode", given / "clip.mp4", "--prompt", PROMPT, "-o", "noise.safetensors")
    assert out[0] == "noise.safetensors"
    assert re.fullmatch(r"log-likelihood -?[\d.]+ nats", out[1])
    assert re.fullmatch(r"bits per dimension -?[\d.]+", out[2])
    assert load_file("noise.safetensors")["noise"].shape == (1, 3, 4, 2, 2)
    run("decode", "noise.safetensors", *solver, "-o", "back/%05d.png")
    assert (pixels("back/") - vae_round_trip(given / "clip.mp4", demo, 9)).abs().max() <= 1.01 / 127.5
    found = read_metadata("back/")
    assert (found["prompt"], found["task"], found["fps"], found["model"]) == (PROMPT, "decode", 12, "tiny video")
    assert found["solver"]["method"] == (solver[1] if solver else "jacobi")
    assert read_video("back/").fps == 12


def test_decoding_is_exact_unless_told_otherwise(run, given):
    """And at the rate that was given to encode."""
    run("encode", given / "clip.mp4", "--fps", 8, "-o", "n.safetensors")
    sweeps = {}
    for preset in ("", "exact", "fast"):
        out = run("decode", "n.safetensors", *(["--preset", preset] if preset else []), "-o", f"{preset or 'default'}/")
        sweeps[preset] = int(out[1].split(" s, ")[1].split()[0])
        assert read_video(out[0]).fps == 8
        assert read_metadata(out[0])["solver"]["tolerance"] == solvers.PRESETS[preset or "exact"].tolerance
    assert sweeps[""] == sweeps["exact"] > sweeps["fast"]


def test_a_picture_and_back(run, given, demo):
    run("encode", given / "picture.png", "-o", "n.safetensors")
    run("decode", "n.safetensors", "-o", "back.png")
    assert (pixels("back.png") - vae_round_trip(given / "picture.png", demo, 1)).abs().max() <= 1.01 / 127.5


def test_a_picture_and_back_by_an_image_model(run, given, image_model):
    out = run("encode", given / "picture.png", *image_model)
    assert out[0] == "outputs/picture.safetensors"
    out = run("decode", out[0], *image_model)
    assert pixels(out[0]).shape == (1, 3, 32, 32)
    message = (
        r"^warning: outputs/picture.safetensors is noise from tiny image; tiny video will turn it into something else"
    )
    run("decode", "outputs/picture.safetensors", err=message)


def test_a_long_clip_and_back(run, given, demo):
    """Window by window, with guidance."""
    options = ("--frames", 21, "--guidance", 1.5, "--negative", "blue")
    out = run("encode", given / "long.mp4", *options, "-o", "n.safetensors")
    assert out == ["n.safetensors"]  # under guidance there is no likelihood
    run("decode", "n.safetensors", "-o", "back/%05d.png")
    assert (pixels("back/") - vae_round_trip(given / "long.mp4", demo, 21)).abs().max() <= 1.01 / 127.5
    found = read_metadata("back/")
    assert (found["guidance"], found["negative"], found["denoise"]) == (1.5, "blue", False)
    assert found["noise"] == ["from a clip", "prompt ''"]


def test_variations_and_mixtures(run, given):
    for name, seed in (("a", 4), ("b", 5)):
        run("encode", given / "clip.mp4", "--seed", seed, "-o", f"{name}.safetensors")
    assert run("mix", "a.safetensors") == ["outputs/a-mixed.safetensors"]
    run("mix", "a.safetensors", "--amount", 0, "-o", "same.safetensors")
    run("mix", "a.safetensors", "--amount", 1, "--seed", 7, "--keep-frames", 1, "-o", "other.safetensors")
    run("mix", "a.safetensors", "b.safetensors", "--amount", 1, "-o", "second.safetensors")
    noise = {path.stem: load_file(path)["noise"] for path in Path().glob("*.safetensors")}
    assert torch.equal(noise["same"], noise["a"])
    assert torch.equal(noise["other"][:, :1], noise["a"][:, :1])
    assert not torch.isclose(noise["other"][:, 1:], noise["a"][:, 1:]).any()
    torch.testing.assert_close(noise["second"], noise["b"])
    for name in ("same", "other"):
        run("decode", f"{name}.safetensors", "--prompt", "blue", "-o", f"{name}/")
    assert (pixels("same/") - pixels("other/")).abs().max() > 0.1
    found = read_metadata("other/")
    assert (found["prompt"], found["denoise"]) == ("blue", True)
    assert found["noise"] == [
        "from a clip, with the model's own noise of seed 4", "varied by 1, seed 7, 1 latent frames kept", "prompt ''",
    ]  # fmt: skip
    run("encode", given / "clip.mp4", "-o", "clean.safetensors")
    message = "^error: this noise is that of clean latents, which can't be blended with fresh noise"
    run("mix", "clean.safetensors", code=2, err=message)
    run("mix", "clean.safetensors", "a.safetensors", code=2, err="one noise is that of clean latents, the other isn't")
    for amount in (-0.1, 1.1, "nan"):
        run(
            "mix",
            "a.safetensors",
            "--amount",
            amount,
            code=2,
            err="^error: the strength of a variation is .*from 0 to 1",
        )


@pytest.mark.parametrize("hold", ["clip", "first-frame"])
def test_reprompt(run, given, hold):
    words = ("reprompt", given / "clip.mp4", "a blue ring", "--was", PROMPT, "--hold", hold)
    out = run(*words, "--candidates", 2, "--seed", 3)
    assert out[0] == "outputs/clip-a-blue-ring.mp4"
    assert [re.sub(r"-?[\d.]+( \(kept\))?$", "", line) for line in out[1:3]] == ["candidate 0: ", "candidate 1: "]
    assert sum(line.endswith(" (kept)") for line in out[1:3]) == 1
    assert read_video(out[0]).fps == 12
    found = read_metadata(out[0])
    assert (found["prompt"], found["was"], found["hold"], found["seed"]) == ("a blue ring", PROMPT, hold, 3)
    assert found["scores"][found["candidate"]] == max(found["scores"])
    assert found["guidance"] == {"clip": 0.0, "first-frame": 3.0}[hold]
    run(*words, "--strength", 0, "-o", "other.mp4")
    assert (read_metadata("other.mp4")["noise"][-1].startswith("varied by 1")) == (hold == "clip")


@pytest.fixture(scope="module")
def masks(given):
    """Masks of the clip: its right half, one frame, and some that don't fit."""
    half = torch.full((9, 3, 32, 32), -1.0)
    half[..., 16:] = 1
    write_video(given / "half.png", half[:1], 0)
    write_video(given / "halves.gif", half, 12)
    write_video(given / "few.gif", half[:4], 12)
    write_video(given / "black.png", half[:1] * 0 - 1, 0)
    write_video(given / "white.png", half[:1] * 0 + 1, 0)
    write_video(given / "small.png", half[:1, :, :16], 0)
    return given


@pytest.mark.parametrize("mask", ["half.png", "halves.gif"])
def test_fill_by_a_mask(run, masks, mask):
    words = ("fill", masks / "clip.mp4", PROMPT, "--mask", masks / mask, "--particles", 2)
    out = run(*words, "--seed", 3, "-o", "filled/")
    assert out[0] == "filled/"
    assert re.fullmatch(r"effective particles by latent frame: [\d.]+ of 16, [\d.]+, [\d.]+", out[1])
    made, source = pixels("filled/"), pixels(masks / "clip.mp4")
    assert torch.equal(made[..., :16], source[..., :16])
    assert not torch.equal(made[..., 16:], source[..., 16:])
    found = read_metadata("filled/")
    assert (found["task"], found["prompt"], found["seed"], found["particles"]) == ("fill", PROMPT, 3, 2)
    assert (found["filled"], found["fps"], len(found["effective"])) == (0.5, 12, 3)
    assert "task           fill" in run("inspect", "filled/")
    run(*words, "--seed", 4, "-o", "other/")
    assert not torch.equal(pixels("other/"), made)


def test_fill_missing_frames_and_around(run, masks):
    source = pixels(masks / "clip.mp4")
    run("fill", masks / "clip.mp4", PROMPT, "--missing", "1-4", "--particles", 2, "-o", "missing/")
    made = pixels("missing/")
    assert torch.equal(made[[0, 5, 6, 7, 8]], source[[0, 5, 6, 7, 8]])
    assert all(not torch.equal(made[i], source[i]) for i in range(1, 5))
    assert read_metadata("missing/")["missing"] == "1-4"
    words = ("fill", masks / "clip.mp4", PROMPT, "--outpaint", "16,0,0,32", "--height", 64, "--width", 48)
    run(*words, "--particles", 2, "-o", "around/")
    assert torch.equal(pixels("around/")[:, :, :32, 16:], source)
    assert read_metadata("around/")["filled"] == pytest.approx(1 - 32 * 32 / (64 * 48), abs=1e-4)


def test_fill_takes_as_many_particles_as_fit(run, masks, monkeypatch):
    asked = []

    def require(need, device, what):
        asked.append((what, need))
        if [each for each, _ in asked].count("filling this") == 1:
            raise OutOfMemoryForecast("too much")

    monkeypatch.setattr(memory, "require", require)
    words = ("fill", masks / "clip.mp4", PROMPT, "--missing", "1-4")
    run(*words, "-o", "few/", err="warning: 8 particles don't fit in memory, so 4 go side by side")
    assert read_metadata("few/")["particles"] == 4
    needs = [need for what, need in asked if what == "filling this"]
    assert needs[0] > needs[1]
    asked.clear()
    run(*words, "--particles", 8, code=2, err="error: too much Fewer particles than 8 need less, too")


def test_fill_forecasts_the_weights_in_int8(run, masks, monkeypatch):
    plans = []
    monkeypatch.setattr(cli_fill, "tell_plan", plans.append)
    words = ("fill", masks / "clip.mp4", PROMPT, "--missing", "1-4", "--particles", 1, "-o", "filled/")
    for dtype in ("auto", "int8"):
        run(*words, "--dtype", dtype)
    assert plans[1].means.int8
    assert plans[1].need.weights < plans[0].need.weights


def test_fill_around_keeps_the_size_unless_one_is_given(run, refused, masks):
    source, words = pixels(masks / "clip.mp4"), ("fill", masks / "clip.mp4", PROMPT, "--particles", 1)
    run(*words, "--outpaint", "16,0,0,32", "-o", "own/")
    assert torch.equal(pixels("own/")[:, :, :32, 16:], source)
    assert pixels("own/").shape[-2:] == (64, 48)
    sized = ("--height", 32, "--width", 48, "-o", "sized/")
    run(
        *words, "--outpaint", "16,0,0,32", *sized, err="with its margins it is 48 x 64; that is scaled to cover 48 x 32"
    )
    for margins, nearest in (("20,0,0,3", "16,0,0,0"), ("0,9,4,9", "0,9,0,7"), ("0,15,31,0", "0,16,32,0")):
        refused(
            *words, "--outpaint", margins, err=f"but sides are multiples of 16; the nearest margins are {nearest}, or"
        )


def test_fill_adds_an_empty_mask_and_missing_frames_up(run, masks):
    words = ("fill", masks / "clip.mp4", PROMPT, "--particles", 1, "-o", "both/")
    run(*words, "--mask", masks / "black.png", "--missing", "5-8")
    assert read_metadata("both/")["filled"] == pytest.approx(4 / 9, abs=1e-4)


def test_fill_of_a_clip_beyond_the_window_says_what_to_give(refused, masks):
    refused("fill", masks / "clip.mp4", PROMPT, "--missing", "1-4", "--window", 1, err="to fill it window by window")


def test_fill_needs_a_prompt(refused, masks):
    refused("fill", masks / "clip.mp4", " ", "--missing", "1-4", err="the prompt is empty; say what all of the result")


def test_fill_a_picture_with_an_image_model(run, masks, image_model):
    run("fill", masks / "picture.png", "a boat", "--mask", masks / "half.png", "--particles", 2, "-o", "a.png",
        "--height", 32, "--width", 32, *image_model)  # fmt: skip
    assert torch.equal(pixels("a.png")[..., :16], pixels(masks / "picture.png")[..., :16])


@pytest.mark.parametrize(("words", "message"), [
    ("", "nothing is to be filled; give --mask, --outpaint or --missing"),
    ("--mask {given}/small.png", "the mask is of 32 x 16, the frames are 32 x 32"),
    ("--mask {given}/few.gif", "the mask has 4 frames, the clip 9"),
    ("--mask {given}/black.png", "the mask is empty"),
    ("--mask {given}/white.png", "no cell of 16 x 16 pixels wholly known"),
    ("--mask missing.png", "missing.png: no such file"),
    ("--outpaint 0,0,33,0", "the margin on the right is 33 pixels; give 0 to 32"),
    ("--missing 3-9", "frames 3 to 9 are missing, but the clip's are 0 to 8"),
    ("--missing 4-3", "frames 4 to 3 are missing"),
    ("--missing 0-8", "no cell of 16 x 16 pixels wholly known"),
    ("--missing 3-4 --guidance -2", "guidance is -2"),
    ("--missing 3-4 --particles 900000", "filling this needs about"),
    ("--missing 3-4 -o a.png", "a.png: .png takes one picture, not 9"),
])  # fmt: skip
def test_fill_refuses(refused, masks, words, message):
    refused("fill", masks / "clip.mp4", PROMPT, *words.format(given=masks).split(), err=message)


def test_score(run, given):
    options = (given / "clip.mp4", "--prompt", PROMPT)
    text = run("score", *options)
    found = json.loads(run("score", *options, "--json")[0])
    assert found["dimensions"] == 3 * 4 * 2 * 2
    assert text[0] == f"log-likelihood {found['log_likelihood']:.2f} nats"
    bits = -found["log_likelihood"] / (found["dimensions"] * torch.log(torch.tensor(2.0)).item())
    assert found["bits_per_dim"] == pytest.approx(bits)
    assert text[1] == f"bits per dimension {bits:.4f}"
    assert run("score", given / "clip.mp4") != text
    windows = json.loads(run("score", *options, "--window", 2, "--keep", 1, "--frames", 9, "--json")[0])
    assert windows["log_likelihood"] != pytest.approx(found["log_likelihood"], rel=1e-3)
    choice = ("score", given / "clip.mp4", "--choose", PROMPT, "blue", "--frames", 9, "--window", 2, "--json")
    assert json.loads(run(*choice, "--keep", 1)[0])["captions"][PROMPT] == pytest.approx(windows["log_likelihood"])
    frames = found["frames"]
    assert [(f["first"], f["last"]) for f in frames] == [(0, 0), (1, 4), (5, 8)]
    assert sum(f["nats"] for f in frames) == pytest.approx(-found["log_likelihood"], rel=1e-5)


@pytest.mark.parametrize("target", ["m.mp4", "m.webm", "m.gif", "m.webp", "m/", "m/%03d.jpg"])
def test_a_map_of_a_clip(run, given, target):
    out = run("score", given / "clip.mp4", "--prompt", PROMPT, "--map", target)
    assert out[2:] == [target]
    made = read_video(Path(target).parent if "%" in target else target)
    assert len(made.pixels) == 9
    assert min(made.pixels.shape[2:]) >= 320
    told = read_metadata(Path(target).parent if "%" in target else target)
    assert (told["prompt"], told["source"], told["unit"]) == (PROMPT, "clip.mp4", "nats per token")
    assert f"log-likelihood {told['log_likelihood']:.2f} nats" == out[0]


def test_a_map_of_a_picture(run, given, image_model):
    out = run("score", given / "picture.png", *image_model, "--map", "m.png", "--json")
    assert json.loads(out[0])["map"] == "m.png"
    assert pixels("m.png").shape[0] == 1


def test_which_caption_fits(run, given):
    captions = [PROMPT, "a blue square", "something green"]
    single = [json.loads(run("score", given / "clip.mp4", "--prompt", c, "--json")[0]) for c in captions]
    command = ("score", given / "clip.mp4", "--choose", *captions)
    text, found = run(*command), json.loads(run(*command, "--json", "--map", "m.gif")[0])
    scores = [s["log_likelihood"] for s in single]
    assert found["captions"] == pytest.approx(dict(zip(captions, scores, strict=True)), abs=1e-3)
    best = max(range(3), key=scores.__getitem__)
    assert found["winner"] == captions[best] == read_metadata("m.gif")["prompt"]
    assert found["distance"] == pytest.approx(sorted(scores)[-1] - sorted(scores)[-2], abs=1e-3)
    assert found["frames"][1]["nats"] == pytest.approx(single[best]["frames"][1]["nats"], abs=1e-3)
    assert text[:3] == [f"{found['captions'][c]:.2f} nats: {c}" for c in captions]
    assert text[3] == f"best: {captions[best]} ({found['distance']:.2f} nats ahead)"


def test_best_of_makes_what_the_winners_seed_makes(run):
    out = run("generate", PROMPT, "--best-of", 5, "--batch", 2, "--seed", 4, "-o", "best/")
    figures = [re.fullmatch(r"seed (\d+): log-likelihood (-?[\d.]+) nats(, kept)?", line) for line in out[:5]]
    assert [int(f[1]) for f in figures] == [4, 5, 6, 7, 8]
    kept = max(figures, key=lambda f: float(f[2]))
    assert [f for f in figures if f[3]] == [kept]
    assert kept is not figures[0]  # or this test would see nothing
    told = read_metadata("best/")
    assert told["seed"] == int(kept[1])
    assert told["best_of"] == {"latent_frames": 2, "unit": "nats", **{f"seed {f[1]}": float(f[2]) for f in figures}}
    run("generate", PROMPT, "--seed", told["seed"], "-o", "alone/")
    assert torch.equal(pixels("best/"), pixels("alone/"))
    assert any(line.startswith("best_of") and f"seed 8 {figures[-1][2]}" in line for line in run("inspect", "best/"))


def test_best_of_several_prompts_and_tasks(run, given, image_model):
    out = run("generate", "one", "two", *image_model, "--best-of", 2, "--seed", 10, "-o", "a.png")
    assert [line.split(":")[0] for line in out[:4]] == ["seed 10", "seed 11", "seed 12", "seed 13"]
    assert out[4:6] == ["a-0.png", "a-1.png"]
    assert read_metadata("a-1.png")["best_of"]["latent_frames"] == 1
    assert read_metadata("a-1.png")["seed"] in (12, 13)
    options = ("--video", given / "clip.mp4", "--task", "extend", "--join", "--best-of", 2, "-o", "b/")
    run("generate", PROMPT, *options)
    assert read_metadata("b/")["best_of"]["latent_frames"] == 3


TIMELINE = "0s: a red circle moving right | 1s: a blue circle moving up"


def test_a_timeline_is_followed_and_told(run, monkeypatch):
    run("generate", "--timeline", TIMELINE, "--frames", 33, "--keep-at-change", 2, "-o", "a.mp4")
    told = read_metadata("a.mp4")
    assert told["prompt"] == TIMELINE
    assert (told["prompts_begin_at_frames"], told["keep_at_change"]) == ([0, 17], 2)
    lines = run("inspect", "a.mp4")
    assert any(line.startswith("prompt ") and line.endswith(TIMELINE) for line in lines)
    assert any(line.startswith("prompts_begin_at_frames [0, 17]") for line in lines)
    run("generate", "a red circle moving right", "--frames", 33, "-o", "plain/")
    assert told["change_kept"] is True
    assert "keep_at_change" not in read_metadata("plain/")
    run("generate", "--timeline", TIMELINE, "--frames", 33, "-o", "changed/")
    plain, changed = pixels("plain/"), pixels("changed/")
    assert (plain[:9] - changed[:9]).abs().max() < 0.01 < (plain[17:] - changed[17:]).abs().max()


def test_a_timeline_is_resumed_only_as_it_was(run, monkeypatch, tmp_path):
    command = ("generate", "--timeline", TIMELINE, "--frames", 33, "--resume")
    run(*command, "-o", "a.mp4")
    whole, wrote = Path("a.mp4").read_bytes(), []

    def stop(self, frames):
        wrote.append(frames)
        if sum(wrote) > 13:  # of the 17 that are final when the first prompt ends
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SamplingBar, "wrote", stop)
        run(*command, "-o", "b.mp4", code=130, err="^interrupted")
    other = ("generate", "--timeline", TIMELINE.replace("1s", "1.5s"), "--frames", 33, "--resume", "-o", "b.mp4")
    run(*other, code=2, err="is of another job: changes, prompt differ")
    run(*command, "-o", "b.mp4", err="^going on after 5 of 9 latent frames\n$")
    assert Path("b.mp4").read_bytes() == whole


def test_a_timeline_with_a_batch_a_context_and_candidates(run, given):
    options = ("--frames", 33, "--image", given / "picture.png")
    run("generate", "--timeline", TIMELINE, *options, "--batch", 2, "-o", "a.mp4")
    assert sorted(path for path in os.listdir() if path.endswith("mp4")) == ["a-0.mp4", "a-1.mp4"]
    extend = ("--video", given / "clip.mp4", "--task", "extend", "--frames", 33)
    begins = []
    for name, options in {"c.mp4": (), "d.mp4": ("--join",)}.items():
        run("generate", "--timeline", TIMELINE, *extend, *options, "-o", name)
        begins.append(read_metadata(name)["prompts_begin_at_frames"])
    assert begins[1] == [0, begins[0][1] + read_metadata("d.mp4")["frames"] - 33]
    assert begins[1] != begins[0]
    out = run("generate", "--timeline", TIMELINE, "--frames", 33, "--best-of", 2, "-o", "b.mp4")
    assert read_metadata("b.mp4")["prompt"] == TIMELINE
    assert out[0].startswith("seed 0: log-likelihood")


@pytest.mark.parametrize(("words", "message"), [
    (("--timeline", "a red circle"), "--timeline has no second prompt; write it as in '0s: a red circle"),
    (("--timeline", "0s: a | 0s: b"), "times have to increase"),
    (("--timeline", "0s: a | 9s: b"), "begins after the clip's end"),
    (("--timeline", "0s: a | 0.3s: b", "--frames", "1"), "one frame has one prompt"),
    (("--timeline", "0s: a | 0.3s: b", "x"), "leave out PROMPT and --prompt-file"),
    (("x", "--no-change-kept"), "--change-kept is for prompts that change"),
    (("x", "--keep-at-change", "2"), "--keep-at-change is for prompts that change"),
    (("--timeline", "0s: a | 0.3s: b", "--keep-at-change", "5"), "keep_at_change is 5; .* keeps 1 to 4"),
])  # fmt: skip
def test_impossible_timelines(refused, words, message):
    refused("generate", *words, err=message)


def test_frames_that_do_not_fill_a_latent_frame(run, given, tmp_path):
    write_video(tmp_path / "seven.gif", pixels(given / "clip.mp4")[:7], 10)
    run("encode", "seven.gif", err="^warning: the last 2 of 7 frames don't fill a latent frame and were left out\n$")
    assert json.loads(run("score", given / "clip.mp4", "--frames", 5, "--json")[0])["dimensions"] == 2 * 4 * 2 * 2


@pytest.mark.parametrize(("words", "message"), [
    ("encode missing.png", "missing.png: no such file"),
    ("encode {given}/noise.png", "cannot be read"),
    ("encode {given}/clip.mp4 --frames 10", "has only 9 frames; lower --frames"),
    ("encode {given}/clip.mp4 --frames 6", "6 frames: .* nearest are 5 and 9"),
    ("encode {given}/long.mp4", "longer than the window of 17 frames; give --frames 17, or more of them"),
    ("encode {given}/clip.mp4 -o noise.bin", "does not end in .safetensors"),
    ("encode {given}/clip.mp4 -o {given}/clip.mp4/n.safetensors", "cannot be written"),
    ("decode missing.safetensors", "no checkpoint at missing.safetensors"),
    ("decode {demo}/flow.safetensors", "flow.safetensors isn't a noise file; create one with `encode`"),
    ("decode {given}/noise.png", "noise.png isn't a noise file; create one with `encode`"),
    ("encode {given}/clip.mp4 --frames 9 --window 2 --keep 2", "keeps 1 to 1 when it slides"),
    ("mix missing.safetensors", "no checkpoint at missing.safetensors"),
    ("reprompt {given}/clip.mp4 blue --strength 2", "the strength of holding on is 2; give a number from 0 to 1"),
    ("reprompt {given}/clip.mp4 blue --guidance nan", "guidance is nan; 0 is off"),
    ("reprompt {given}/clip.mp4 blue -o {given}/clip.mp4/x.mp4", "cannot be written|not a directory|exists"),
    ("mix a b c", "3 noises; give one for a variation of it, or two to mix"),
    ("mix a b --seed 1", "--seed and --keep-frames are for variations of one noise"),
    ("score {given}/clip.mp4 --height 30 --width 30", "height 30 .* nearest are 16 and 32"),
    ("score {given}/clip.mp4 --map m.xyz", "m.xyz: unknown format '.xyz'"),
    ("score {given}/clip.mp4 --map m.png", "m.png: .png takes one picture, not 9"),
    ("score {given}/clip.mp4 --map m.gif --fps 60", "frame rate 60.*: .gif takes"),
    ("score {given}/clip.mp4 --map {given}/clip.mp4/m.mp4", "cannot be written"),
    ("score {given}/clip.mp4 --choose one", "one caption leaves nothing to choose; give two or more"),
    ("score {given}/clip.mp4 --choose one two one", "the caption 'one' is given twice; give different ones"),
    ("score {given}/clip.mp4 --choose one two --prompt three", "--choose compares captions, so leave out --prompt"),
])  # fmt: skip
def test_what_cannot_be_inverted(refused, given, demo, words, message):
    refused(*words.format(given=given, demo=demo).split(), err=message)


def test_nan_in_noise(run, given):
    run("encode", given / "picture.png", "-o", "n.safetensors")
    noise = load_file("n.safetensors")["noise"]
    metadata = TensorFile.open("n.safetensors").metadata
    noise[0, 0, 0, 0, 0] = float("nan")
    save_file({"noise": noise}, "n.safetensors", metadata)
    run("decode", "n.safetensors", code=2, err="^error: NaN or infinity in the given noise")
    save_file({"noise": torch.zeros(1, 1, 7, 2, 2)}, "n.safetensors", metadata)
    run("decode", "n.safetensors", code=2, err=r"^error: noise of shape \(1, 1, 7, 2, 2\), the job's latents are")


# Checkpoints


def test_convert(run, demo):
    source = demo / pipeline.FLOW_FILE
    assert run("convert", source, "half.safetensors", "--dtype", "fp16") == ["half.safetensors"]
    assert load_flow("half.safetensors").compute_dtype == torch.float16
    run("convert", source, "half.safetensors", code=2, err="^error: half.safetensors exists")
    run("convert", source, "half.safetensors", "--overwrite")
    assert load_flow("half.safetensors").compute_dtype == torch.bfloat16
    found = json.loads(run("inspect", "half.safetensors", "--json")[0])
    assert found["metadata"]["source_name"] == "flow.safetensors"
    assert len(found["metadata"]["source_sha256"]) == 64
    run("convert", demo / pipeline.TEXT_FILE, "b.safetensors", code=2, err="it looks like a T5 text encoder")


def test_int8(run, demo):
    """The same picture from a file of it as from one that is brought to it; results say what they were made with."""
    options = ("--frames", 1, "--height", 32, "--width", 32, "--seed", 3)
    others = [word for word in parts(demo) if word not in ("--model", str(demo / pipeline.FLOW_FILE))]
    run("convert", demo / pipeline.FLOW_FILE, "bf16.safetensors")
    run("convert", "bf16.safetensors", "int8.safetensors", "--dtype", "int8")
    for source, target in (("bf16", "a.png"), ("int8", "b.png")):
        model = ("--model", f"{source}.safetensors", *others)
        run("generate", PROMPT, *model, *options, "--dtype", "int8", "-o", target)
    assert torch.equal(pixels("a.png"), pixels("b.png"))
    found = json.loads(run("inspect", "a.png", "--json")[0])
    assert (found["weights"], found["dtype"]) == ("int8", "float32")
    run("generate", PROMPT, *options, "-o", "c.png")
    assert "weights" not in json.loads(run("inspect", "c.png", "--json")[0])


def test_inspect_of_8_bit(run, demo):
    run("convert", demo / pipeline.FLOW_FILE, "int8.safetensors", "--dtype", "int8")
    flow = load_flow("int8.safetensors")
    held = sum(weight.nbytes for weight in flow.parameters())
    found = json.loads(run("inspect", "int8.safetensors", "--json")[0])
    assert set(found["dtypes"]) == {"int8", "bfloat16"}
    assert found["parameters"] == sum(weight.numel() for weight in load_flow(demo / pipeline.FLOW_FILE).parameters())
    assert {name: need["weights"] for name, need in found["memory"].items()} == {"int8": held}
    of_others = json.loads(run("inspect", "--json")[0])["memory"]
    assert of_others["int8"] == found["memory"]["int8"]
    asked = json.loads(run("inspect", "int8.safetensors", "--json", "--dtype", "bf16")[0])["memory"]
    assert asked == {"bf16": found["memory"]["int8"]}  # what is in 8 bit stays so


def test_inspect_reads_the_header_alone(run, monkeypatch):
    monkeypatch.setattr(TensorFile, "tensor", lambda *_: pytest.fail("weights were read"))
    text = "\n".join(run("inspect"))
    assert "tiny video" in text.splitlines()[0]
    for part in (
        "text, first_frame, extend, edit, last_frame",
        "license            none",
        "guidance 1",
        "bf16",
        "fp32",
    ):
        assert part in text
    assert CONFIG_KEY not in text


def test_inspect_forecasts(run):
    small, large = (
        json.loads(run("inspect", "--json", "--frames", n, "--batch", b, "--guidance", 2, "--size", 64)[0])
        for n, b in ((5, 1), (17, 3))
    )
    assert large["job"] == {"frames": 17, "height": 64, "width": 64, "batch": 3, "guidance": 2.0}
    assert large["memory"]["bf16"]["total"] > small["memory"]["bf16"]["total"]
    for need in small["memory"].values():
        assert need["total"] == need["weights"] + need["cache"] + need["activations"]
    assert set(small["memory"]) == {"bf16", "fp32", "int8"}
    assert small["memory"]["fp32"]["weights"] == 4 * small["parameters"] == 2 * small["memory"]["bf16"]["weights"]
    assert set(json.loads(run("inspect", "--json", "--dtype", "fp16")[0])["memory"]) == {"fp16"}
    assert small["free"] > 0


def test_inspect_a_result(run, tmp_path):
    metadata = {"prompt": PROMPT, "seed": 3}
    for name in ("a.mp4", "a.png", "a/%03d.jpg"):
        write_video(name, torch.zeros(1, 3, 32, 32), 8, metadata)
        assert json.loads(run("inspect", tmp_path / name.partition("/%")[0], "--json")[0]) == metadata
    assert run("inspect", "a.png") == [f"prompt         {PROMPT}", "seed           3"]
    solved = {**metadata, "negative": "", "solver": {"span": 132, "method": "jacobi"}}
    write_video("c.png", torch.zeros(1, 3, 32, 32), 0, solved)
    assert run("inspect", "c.png")[1:] == ["seed           3", "solver         span 132, method jacobi"]
    write_video("b.png", torch.zeros(1, 3, 32, 32), 0)
    assert run("inspect", "b.png") == ["no metadata in b.png"]


@pytest.mark.parametrize(("words", "message"), [
    ("missing.safetensors", "no checkpoint at missing.safetensors"),
    ("missing.mp4", "missing.mp4: no such file"),
    ("{given}/noise.png", "cannot be read"),
    ("{demo}/vae.safetensors", "isn't a STARFlow checkpoint: it looks like a"),
    ("{demo}/flow.safetensors --frames 6", "nearest are 5 and 9"),
    ("{demo}/flow.safetensors --device toaster", "device 'toaster' isn't there"),
])  # fmt: skip
def test_what_cannot_be_inspected(refused, given, demo, words, message):
    refused("inspect", *words.format(given=given, demo=demo).split(), err=message)


def test_model_is_found_before_it_is_loaded(demo):
    args = Namespace(device="cpu", dtype="bf16", model=None, text_encoder=None, vae=None, lora=[])
    model = settings.Setup.find(args)
    assert (model.config.name, model.dtype) == ("tiny video", torch.bfloat16)
    assert model.parts.checkpoint.path == demo / pipeline.FLOW_FILE


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--fps", "1e309", "is not a rate"), ("--fps", "1e999999999", "is not a rate"), ("--fps", "0/1", "above 0"),
        ("--fps", "1/0", "above 0"), ("--fps", "9" * 400, "is not a rate"),
        ("--fps", "99999", "expected a number above 0"), ("--frames", "abc", "'abc' is not a whole number"),
        ("--frames", "9" * 400, "whole number of at most 20 digits"),
        ("--batch", "abc", "'abc' is not a whole number"), ("--batch", "0", "whole number from 1"),
        ("--guidance", "nan", "guidance is nan"), ("--guidance", "1e309", "guidance is inf"),
        ("--height", "8", "less than one token; the smallest is 16"), ("--keep", "-3", "keep is -3 latent frames"),
    ],
)  # fmt: skip
def test_numbers_that_are_none(capsys, tmp_path, option, value, message):
    words = ["generate", "a ring", "--width", "32", option, value, "-o", str(tmp_path / "a.mp4")]
    words += [] if option == "--height" else ["--height", "32"]
    try:
        code = main(words)
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_files_prompts_are_checked_before_the_model_is_loaded(refused, tmp_path):
    (tmp_path / "long.txt").write_text("a ring\n" + "red " * 10**6)
    refused("generate", "--prompt-file", "long.txt", "--frames", 1, err="a prompt has 4000000 characters; shorten it")


@pytest.mark.parametrize(
    ("prompt", "message"), [("a \udce9 ring", "at position 2"), ("red " * 10**6, "4000000 characters")]
)
def test_prompts_that_are_no_text(capsys, tmp_path, prompt, message):
    target = str(tmp_path / "a.png")
    for words in (
        ["generate", prompt, "--frames", "1", "-o", target],
        ["generate", "a ring", "--negative", prompt, "--frames", "1", "-o", target],
        ["encode", "missing.png", "--prompt", prompt],
        ["score", "missing.png", "--prompt", prompt],
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_no_text_is_printed(tmp_path):
    """In a process of its own, whose output is strict."""
    command = [
        sys.executable,
        "-m",
        "starflow_core",
        "generate",
        "a ring",
        "--frames",
        "1",
        "--height",
        "16",
        "--width",
        "16",
    ]
    target = os.fsencode(tmp_path) + b"/\xe9.png"
    done = subprocess.run(
        [*command, "-o", target], capture_output=True, check=False, env={**os.environ, "PYTHONUTF8": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert os.path.exists(target)


def test_sigterm_is_as_ctrl_c(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("starflow_core.cli.files.convert", lambda *_: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert main(["convert", "a.pth", str(tmp_path / "b.safetensors")]) == 143
    assert "no partial files were left" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_that_a_finaliser_swallows_is_sent_again(monkeypatch, capsys, tmp_path, kind, code):
    class Finalised:
        def __del__(self):
            signal.raise_signal(kind)
            time.sleep(0)  # where the handler runs

    def work(*_):
        Finalised()
        time.sleep(20)

    monkeypatch.setattr("starflow_core.cli.files.convert", work)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert main(["convert", "a.pth", str(tmp_path / "b.safetensors")]) == code
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "no partial files were left" in said
