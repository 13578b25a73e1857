"""A real, headless ComfyUI runs the examples. Needs COMFYUI_PATH (and COMFYUI_PYTHON, where ComfyUI has an
environment of its own)."""

from __future__ import annotations

import json
import subprocess
import time

import pytest

from benchmarks.judge import look
from starflow_core.media import read_image, read_metadata, read_video
from starflow_core.weights.lora import LoraFile
from tests.nodes.pack import COMFYUI, ROOT
from tests.nodes.workflows import EXAMPLES, INFO

from .host import PYTHON, Failed, Refused, Server, cached, example, only

pytestmark = pytest.mark.skipif(not COMFYUI, reason="COMFYUI_PATH doesn't name a ComfyUI checkout")
EXPECTED = {  # frames of each saved clip, and what its prompt says
    "text_to_video": {"video": (33, "red", "right")},
    "image_to_video": {"image": (33, "green", "left")},
    "video_edit": {"edit": (17, "green", "right")},
    "extend": {"extend": (17 + 33 - 13, "yellow", "down")},
    "first_and_last_frame": {"last": (33, "purple", None)},
    "long_video": {"long": (97, "green", "left")},
    "prompts_that_change": {"prompts": (97, None, None)},
    "convergence_study": {"convergence": (33, "orange", "up")},
    "variations": {"variation": (17, "red", "right")},
    "another_prompt": {"prompt": (17, "red", "right")},
    "edit_by_inversion": {"edit-by-inversion": (17, "green", "right")},
    "surprise": {"surprise": (17, None, None)},
    "fill_in": {"fill": (17, "red", "right")},
}


@pytest.fixture(scope="module")
def server():
    running = Server()
    yield running
    running.stop()


def quick(**changes):
    return example("text_to_video", **{"frames": 9, "format": "webp", **changes})


def test_all_nodes_are_registered_as_recorded(server):
    found = server.get("/object_info")
    for name, recorded in INFO.items():
        assert found[name]["input_order"] == recorded["input_order"]
        assert found[name]["output"] == recorded["output"]
    assert "IMPORT FAILED" not in server.log.read_text()


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "train_lora"])
def test_example_runs_to_the_end(server, name):
    prompt = example(name)
    entry = server.run(prompt)
    files = [f for f in server.files(entry) if "output" in f.parts]
    if name == "text_to_image":
        pictures = [read_image(file) for file in files]
        assert [p.shape for p in pictures] == [(3, 96, 96)] * 4
        assert sum(look(p.unsqueeze(0)).colour == "blue" for p in pictures) >= 3
        return
    assert len(files) == len(EXPECTED[name] if name != "text_to_video" else [0])
    for file, (frames, colour, direction) in zip(sorted(files, key=_order(name)), EXPECTED[name].values(), strict=True):
        clip = read_video(file)
        assert len(clip.pixels) == frames
        assert clip.fps == 16
        sight = look(clip.pixels)
        assert colour in (None, sight.colour)
        assert colour is None or clip.pixels.shape[1:] == (3, 96, 96)
        assert direction in (None, sight.direction)
        kept = read_metadata(file)
        for node in kept["prompt"].values():
            node.pop("is_changed", None)  # what the host notes of a loaded file
        assert kept["prompt"] == prompt


def test_train_lora_runs_to_the_end(server):
    """In a few steps: a file, four pictures without it and four others with it, and the graph of losses."""
    entry = server.run(example("train_lora", steps=12))
    files = server.files(entry)
    without, made = ([read_image(f) for f in sorted(files) if f"-{which}-" in f.name] for which in ("without", "with"))
    assert [picture.shape for picture in without + made] == [(3, 96, 96)] * 8
    assert all((a - b).abs().mean() > 1e-3 for a, b in zip(without, made, strict=True))
    assert [file.suffix for file in files if "temp" in file.parts] == [".png"]
    loras = [LoraFile.open(file) for file in (server.base / "models" / "loras").glob("starflow_cross_*.safetensors")]
    assert len(loras) == 1
    assert json.loads(loras[0].metadata["settings"])["steps"] == 12


def test_cancelled_training_goes_on(server):
    prompt = example("train_lora", steps=40, seed=3, lora_name="later")
    prompt_id = server.queue(prompt)
    figures = _figures(server)
    for _ in range(600):
        if len(set(figures()) - {""}) > 3:
            break
        time.sleep(0.1)
    server.post("/interrupt", {})
    kinds = [kind for kind, _ in server.wait(prompt_id, 60)["status"]["messages"]]
    assert "execution_interrupted" in kinds
    before = figures()
    assert 3 < len(before) < 40
    assert not list((server.base / "models" / "loras").glob("later_*"))
    server.run(prompt)
    assert [json.loads(line)["step"] for line in figures()] == list(range(1, 41))
    assert figures()[: len(before)] == before
    assert list((server.base / "models" / "loras").glob("later_*"))


def _figures(server):
    """The lines that the newest run has written."""
    folder = server.base / "output" / "starflow_training"
    known = set(folder.glob("run-*"))

    def lines() -> list[str]:
        (run,) = set(folder.glob("run-*")) - known or [None]
        file = run and run / "logs" / "figures.jsonl"
        return file.read_text().splitlines() if file and file.is_file() else []

    return lines


def test_another_prompt_changes_the_kind_and_keeps_the_path(server):
    source = look(read_video(ROOT / "example_workflows" / "inputs" / "starflow_red_circle.mp4").pixels)
    (file,) = (f for f in server.files(server.run(example("another_prompt"))) if "output" in f.parts)
    made = look(read_video(file).pixels)
    assert (source.kind, made.kind) == ("circle", "triangle")
    assert abs(made.path - source.path).max() < 8


@pytest.mark.parametrize(
    "file", sorted((ROOT / "tests" / "nodes" / "saved" / "api").glob("*.json")), ids=lambda f: f.stem
)
def test_graphs_saved_by_earlier_versions_run(server, file):
    prompt = json.loads(file.read_text())
    if file.stem in EXAMPLES:
        entry = server.run(prompt)
        assert any("output" in saved.parts for saved in server.files(entry))
        return
    with pytest.raises(Refused) as refused:  # its files aren't there
        server.queue(prompt)
    wrong = [e for node in refused.value.body["node_errors"].values() for e in node["errors"]]
    assert sorted(e["extra_info"]["input_name"] for e in wrong) == ["encoder_name", "model_name", "vae_name"]


def _order(name):
    names = list(EXPECTED[name])
    return lambda file: next((i for i, part in enumerate(names) if part in file.name), 0)


def test_the_shown_video_can_be_fetched(server):
    entry = server.run(quick(format="mp4"))
    (output,) = (o["images"][0] for o in entry["outputs"].values() if "images" in o)
    import urllib.parse
    import urllib.request

    url = f"http://127.0.0.1:{server.port}/view?{urllib.parse.urlencode(output)}"
    with urllib.request.urlopen(url) as answer:
        assert answer.headers["Content-Type"] == "video/mp4"


def test_the_readmes_script_queues_and_saves(server, tmp_path):
    command = [
        PYTHON, "run.py", "text_to_video.json", "--set", "4.frames=9",
        "--set", "5.prompt=a blue ring on a white background",
        "--server", f"127.0.0.1:{server.port}", "--output", str(tmp_path),
    ]  # fmt: skip
    folder = ROOT / "example_workflows" / "api"
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    clip = read_video(done.stdout.strip())
    assert clip.pixels.shape == (9, 3, 96, 96)
    assert look(clip.pixels).colour == "blue"
    wrong = subprocess.run([*command, "--set", "5.nothing=1"], cwd=folder, capture_output=True, text=True, timeout=300)
    assert wrong.returncode != 0
    assert "no input 5.nothing" in wrong.stderr


def test_nothing_changed_runs_nothing_and_a_seed_runs_what_follows(server):
    prompt = quick(seed=100)
    server.run(prompt)
    assert cached(server.run(prompt)) == set(prompt)
    before = {n for n, v in prompt.items() if v["class_type"] in _BEFORE}
    changed = quick(seed=101)
    assert cached(server.run(changed)) == before


_BEFORE = (
    "STARFlowLoadModel", "STARFlowLoadTextEncoder", "STARFlowLoadVAE", "STARFlowEmptyLatent", "STARFlowTextEncode",
)  # fmt: skip


def test_what_the_memory_node_fixes_reaches_the_sampler(server):
    prompt = with_settings(quick(seed=102))
    prompt[only(prompt, "STARFlowMemory")]["inputs"]["cache"] = "int8"
    prompt["92"] = {"class_type": "PreviewAny", "inputs": {"source": [only(prompt, "STARFlowSampler"), 1]}}
    entry = server.run(prompt)
    assert "keys and values in 8 bit" in json.dumps(entry["outputs"]["92"])
    prompt[only(prompt, "STARFlowMemory")]["inputs"] |= {"cache": "auto", "budget": 1e-5}
    with pytest.raises(Failed, match="10 kB are free"):
        server.run(prompt)


def test_a_seed_means_the_same_after_a_restart(server):
    prompt = quick(seed=7, format="png sequence", filename_prefix="same/a")
    first = [f.read_bytes() for f in _pictures(server, server.run(prompt))]
    other = Server()
    try:
        again = [f.read_bytes() for f in _pictures(other, other.run(prompt))]
    finally:
        other.stop()
    assert [_pixels(b) for b in first] == [_pixels(b) for b in again]


def _pictures(server, entry):
    return sorted(server.files(entry))


def _pixels(data: bytes) -> bytes:
    import io

    from PIL import Image

    return Image.open(io.BytesIO(data)).tobytes()


def test_cancel_then_a_good_run(server):
    server.run(quick(seed=1))
    before = server.memory()
    prompt_id = server.queue(example("long_video", frames=385, seed=9))
    for _ in range(600):
        if server.get("/queue")["queue_running"]:
            break
        time.sleep(0.1)
    time.sleep(3)  # the sampler is the first node that takes longer
    began = time.monotonic()
    server.post("/interrupt", {})
    entry = server.wait(prompt_id, 60)
    assert time.monotonic() - began < 10
    kinds = [kind for kind, _ in entry["status"]["messages"]]
    assert "execution_interrupted" in kinds
    assert not server.files(entry)
    server.run(quick(seed=2))
    assert server.memory() < before + 200e6


def test_twenty_in_a_row_leave_memory_flat(server):
    for seed in range(200, 205):
        server.run(quick(seed=seed))
    before = server.memory()
    prompts = [server.queue(quick(seed=seed)) for seed in range(300, 320)]
    for prompt_id in prompts:
        server.wait(prompt_id)
    assert server.memory() < before + 50e6


NUMBERS = {
    "STARFlowJacobiSettings": {
        "image_span": -1,
        "first_span": 4097,
        "span": -1,
        "tolerance": 1.0,
        "shallow_tolerance": -1e-3,
        "max_sweeps": -1,
    },
    "STARFlowExtend": {"keep": -1},
    "STARFlowEmptyLatent": {"frames": 100002, "batch_size": 0, "width": -8, "height": 9000},
    "STARFlowTextEncode": {"frame_rate": -1.0},
    "STARFlowSampler": {"seed": -1, "guidance": 101.0, "window": -1, "keep": -1},
    "STARFlowMemory": {"budget": -1.0, "span": -1},
    "STARFlowInvert": {"seed": -1, "guidance": -1.0, "window": -1, "keep": -1},
    "STARFlowMixNoise": {"amount": 1.5, "seed": -1, "keep_frames": -1},
    "STARFlowVAEDecode": {"tile_size": -1},
    "STARFlowVideoCombine": {"frame_rate": 0.0, "quality": 0, "clip_frames": -1},
}
WITH_IT = {"STARFlowExtend": "extend", "STARFlowInvert": "variations", "STARFlowMixNoise": "variations"}


@pytest.mark.parametrize(
    ("kind", "name", "value"), [(k, n, v) for k, given in NUMBERS.items() for n, v in given.items()]
)
def test_numbers_out_of_range_are_refused(server, kind, name, value):
    prompt = example(WITH_IT[kind]) if kind in WITH_IT else with_settings(quick())
    prompt[only(prompt, kind)]["inputs"][name] = value
    with pytest.raises(Refused) as refused:
        server.queue(prompt)
    assert name in refused.value.text


def _is_list(kind):
    return kind == "COMBO" or isinstance(kind, list)


@pytest.mark.parametrize(
    "kind", [k for k in INFO if any(_is_list(v[0]) for v in INFO[k]["input"]["required"].values())]
)
def test_unknown_options_are_refused(server, kind):
    base = with_settings(quick())
    for name, (type_, _) in INFO[kind]["input"]["required"].items():
        if _is_list(type_):
            prompt = json.loads(json.dumps(base))
            node = next(n for n, v in prompt.items() if v["class_type"] == kind)
            prompt[node]["inputs"][name] = "no such thing"
            with pytest.raises(Refused) as refused:
                server.queue(prompt)
            assert "no such thing" in refused.value.text
    assert server.get("/system_stats")


def with_settings(prompt):
    """The sampler's settings from a node, as in the convergence study, since one wrong branch spoils all; and its
    options."""
    study = example("convergence_study")
    prompt["90"] = study[next(n for n, v in study.items() if v["class_type"] == "STARFlowJacobiSettings")]
    prompt["91"] = {
        "class_type": "STARFlowMemory",
        "inputs": {"budget": 0.0, "cache": "auto", "offload_cache": "auto", "span": 0},
    }
    prompt[only(prompt, "STARFlowSampler")]["inputs"] |= {"settings": ["90", 0], "options": ["91", 0]}
    return prompt


@pytest.mark.parametrize("name", ["text_to_video", "first_and_last_frame", "extend", "video_edit"])
def test_wrong_links_are_refused(server, name):
    prompt = example(name)
    for other in [n for n, v in prompt.items() if v["class_type"] == "STARFlowVideoCombine"][:-1]:
        del prompt[other]  # the host runs what is right, if there are several results
    for node in [n for n, v in prompt.items() if v["class_type"] in INFO]:
        for given, value in prompt[node]["inputs"].items():
            if isinstance(value, list):
                wrong = json.loads(json.dumps(prompt))
                wrong[node]["inputs"][given] = [_other_type(prompt, value), 0]
                with pytest.raises(Refused):
                    server.queue(wrong)
    assert server.get("/system_stats")


def _other_type(prompt, link):
    """A node of ours whose first output has another type than a link's."""
    kinds = {node: INFO[v["class_type"]]["output"] for node, v in prompt.items() if v["class_type"] in INFO}
    wanted = kinds[link[0]][link[1]] if link[0] in kinds else "IMAGE"  # core's nodes here give images
    return next(node for node, outputs in kinds.items() if outputs and outputs[0] != wanted)


BAD_JOBS = [
    ({"frames": 10}, "nearest are 9 and 13"),
    ({"width": 100, "height": 96}, "not a multiple of 16"),
    ({"clip_frames": 4}, "has to divide their number"),
    ({"window": 2, "keep": 2}, "keeps 1 to 1"),
    ({"guidance": -0.5}, "-1 uses the model's own value"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_JOBS)
def test_impossible_jobs_name_the_remedy(server, changes, message):
    with pytest.raises(Failed, match=message):
        server.run(quick(**changes))
    assert server.run(quick(seed=1))


def test_conditioning_of_another_size_is_refused(server):
    prompt = quick()
    other = json.loads(json.dumps(prompt[only(prompt, "STARFlowEmptyLatent")]))
    other["inputs"] |= {"width": 128, "height": 80}
    prompt["99"] = other
    prompt[only(prompt, "STARFlowSampler")]["inputs"]["latent"] = ["99", 0]
    with pytest.raises(Failed, match="the same model, latent and context"):
        server.run(prompt)
