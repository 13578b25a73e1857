"""Pictures made by running the examples in ComfyUI: `python -m tests.browser.pictures`.

For the template browser (example_workflows/NAME.jpg), the help pages (web/docs/NODE.webp) and the README.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from starflow_core.bundled import BUNDLED, FLOW_FILE
from starflow_core.media import read_video
from starflow_core.media.pixels import to_bytes
from starflow_core.model.lora import adapt
from starflow_core.weights.flow import load_flow
from starflow_core.weights.lora import base_metadata, save_lora
from starflow_core.weights.tensorfiles import TensorFile
from tests.nodes.workflows import EXAMPLES, FOLDER, REAL_WEIGHTS, ROOT, Graph, Node, text_to_image
from tests.server.host import Server, example

from .page import visit

SIDE = 512
LORA = "my_pet.safetensors"
SHOWN = {  # which example a help page's picture is from
    "text_to_video": ("LoadModel", "LoadTextEncoder", "LoadVAE", "EmptyLatent", "TextEncode", "Sampler", "VAEDecode",
                      "VideoCombine"),
    "image_to_video": ("FirstFrame",),
    "first_and_last_frame": ("FirstLastFrame",),
    "extend": ("Extend",),
    "video_edit": ("VideoEdit",),
    "convergence_study": ("JacobiSettings",),
    "variations": ("Invert", "MixNoise"),
    "memory": ("Memory",),
    "devices": ("Devices",),
    "compiled": ("Compile",),
    "noise": ("Noise",),
    "surprise": ("Likelihood",),
    "edit_by_inversion": ("EditByInversion",),
    "fill_in": ("FillIn",),
    "lora": ("LoadLoRA",),
    "train_lora": ("TrainLoRA",),
}  # fmt: skip


def thumbnail(files: list[Path]) -> Image.Image:
    """Four frames in a square: of one clip evenly spread, of several clips their first and last."""
    clips = [to_bytes(read_video(file).pixels) for file in files]
    if len(clips) == 1:
        frames = [clips[0][round(i * (len(clips[0]) - 1) / 3)] for i in range(4)]
    elif len(clips) == 2:
        frames = [clip[i] for clip in clips for i in (0, -1)]
    else:
        frames = [clip[0] for clip in clips[:4]]
    frames = [_squared(frame) for frame in frames]
    rows = [np.concatenate(frames[i : i + 2], 1) for i in (0, 2)]
    return Image.fromarray(np.concatenate(rows)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _squared(frame: np.ndarray) -> np.ndarray:
    """A frame (H, W, 3) in the middle of a black square."""
    height, width, _ = frame.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return np.pad(frame, ((top, side - height - top), (left, side - width - left), (0, 0)))


def card(*lines: str) -> Image.Image:
    """In a picture's place where no sample was made: says so in words."""
    picture = Image.new("RGB", (SIDE, SIDE), "#1d2430")
    draw = ImageDraw.Draw(picture)
    for row, (line, size) in enumerate(zip(lines, (56, 36, 28), strict=False)):
        draw.text((SIDE / 2, SIDE / 2 + 70 * (row - 1)), line, "#e8edf4", ImageFont.load_default(size), anchor="mm")
    return picture


def memory() -> Graph:
    """An example with a node that none has."""
    graph = text_to_image()
    _only(graph, "Sampler").links["options"] = (graph.add("STARFlowMemory", cache="int8"), "options")
    return graph


def devices() -> Graph:
    """The same with another one after it."""
    graph = memory()
    sampler = _only(graph, "Sampler")
    sampler.links["options"] = (graph.add("STARFlowDevices", second="cpu", options=sampler.links["options"]), "options")
    return graph


def compiled() -> Graph:
    """An example with a node between the model and the sampler."""
    graph = text_to_image()
    sampler = _only(graph, "Sampler")
    sampler.links["model"] = (graph.add("STARFlowCompile", model=sampler.links["model"]), "model")
    return graph


def noise() -> Graph:
    """The same with another one."""
    graph = text_to_image()
    sampler = _only(graph, "Sampler")
    given = {name: sampler.links[name] for name in ("model", "latent")}
    sampler.links["noise"] = (graph.add("STARFlowNoise", **given, seed=3), "noise")
    return graph


def lora() -> Graph:
    """The same with a LoRA on the model."""
    graph = text_to_image()
    model = _only(graph, "LoadModel")
    users = [node for node in graph.nodes if node.links.get("model", (None,))[0] is model]
    added = graph.add("STARFlowLoadLoRA", model=(model, "model"), lora_name=LORA, strength=0.8)
    for node in users:
        node.links["model"] = (added, "model")
    return graph


def write_lora(folder: Path) -> None:
    """A LoRA of the demo that was trained on nothing."""
    checkpoint = TensorFile.open(BUNDLED / FLOW_FILE)
    flow = load_flow(checkpoint)
    generator = torch.Generator().manual_seed(0)
    loras = adapt(flow, 4, 4.0, generator=generator)
    for each in loras.values():
        torch.nn.init.normal_(each.lora_B, std=1e-2, generator=generator)
    save_lora(loras, folder / LORA, flow.config, base_metadata(checkpoint))


def _only(graph: Graph, kind: str) -> Node:
    (node,) = (node for node in graph.nodes if node.type == f"STARFlow{kind}")
    return node


def main() -> None:
    for name in REAL_WEIGHTS:
        words = card("STARFlow 3B", "text to image", "needs Apple's 3B checkpoint")
        words.save(FOLDER / f"{name}.jpg", quality=88)
    server = Server()
    try:
        write_lora(server.base / "models" / "loras")
        for name in EXAMPLES:
            entry = server.run(example(name))
            kind = "temp" if name == "convergence_study" else "output"
            files = sorted(file for file in server.files(entry) if kind in file.parts)
            if name == "train_lora":  # the first two without it, and below them with it
                files = [file for which in ("without", "with") for file in files if f"-{which}-" in file.name][:6]
                files = files[:2] + files[4:]
            picture = Image.open(files[1]) if kind == "temp" else thumbnail(files)
            picture.convert("RGB").save(FOLDER / f"{name}.jpg", quality=88)
            print(FOLDER / f"{name}.jpg", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            made = (memory, devices, compiled, noise, lora)
            others = {make.__name__: Path(folder) / f"{make.__name__}.json" for make in made}
            for make in made:
                others[make.__name__].write_text(json.dumps(make().page()), encoding="utf-8")
            for name, kinds in SHOWN.items():
                shots = {f"STARFlow{kind}": Path(folder) / f"{kind}.png" for kind in kinds}
                graph = Path(folder) / "graph.png" if name == "text_to_video" else None
                server.post("/free", {"free_memory": True})  # a node whose result is kept shows no text
                seen = visit(server.port, others.get(name, FOLDER / f"{name}.json"), shots, graph)
                assert not seen["errors"], seen["errors"]
                for kind, shot in shots.items():
                    Image.open(shot).save(ROOT / "web" / "docs" / f"{kind}.webp", quality=88)
                if graph:
                    Image.open(graph).save(ROOT / "docs" / "graph.webp", quality=88)
                print(name, f"{seen['seconds']:.1f} s", flush=True)
    finally:
        server.stop()


if __name__ == "__main__":
    main()
