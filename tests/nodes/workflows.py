"""The example workflows, described once: `python -m tests.nodes.workflows` writes them for the page
(example_workflows/) and for the API (example_workflows/api/), and the blueprint in subgraphs/."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starflow_core import __version__

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "example_workflows"
INFO = json.loads((Path(__file__).parent / "object_info.json").read_text())
CORE = {  # what the examples use of core: inputs in order, outputs
    "PreviewImage": ({"images": "IMAGE"}, []),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": "STRING"}, []),
    "PreviewAny": ({"source": "*"}, []),
    "ImageBatch": ({"image1": "IMAGE", "image2": "IMAGE"}, ["IMAGE"]),
    "ImageFromBatch": ({"image": "IMAGE", "batch_index": "INT", "length": "INT"}, ["IMAGE"]),
}
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
COLUMN, ROW_GAP, WIDTH = 380, 70, 320
HUB = "https://huggingface.co"


@dataclass
class Node:
    """A node of an example: widget values by name, links as (node, output's name)."""

    type: str
    column: int
    values: dict[str, Any] = field(default_factory=dict)
    links: dict[str, tuple[Node, str]] = field(default_factory=dict)
    title: str = ""
    id: int = 0
    models: list[tuple[str, str, str]] = field(default_factory=list)  # file, address, folder: what the page offers

    @property
    def inputs(self) -> dict[str, tuple[str, dict]]:
        """Type and options of each input, in the order that the page gives them."""
        if self.type in CORE:
            return {name: (kind, {}) for name, kind in CORE[self.type][0].items()}
        info = INFO[self.type]["input"]
        return {**info.get("required", {}), **info.get("optional", {})}

    @property
    def outputs(self) -> list[tuple[str, str]]:
        """Name and type of each output."""
        if self.type in CORE:
            return [(kind, kind) for kind in CORE[self.type][1]]
        return list(zip(INFO[self.type]["output_name"], INFO[self.type]["output"], strict=True))

    def output(self, name: str) -> int:
        return [n for n, _ in self.outputs].index(name)

    def value(self, name: str) -> Any:
        return self.values.get(name, self.inputs[name][1].get("default"))


class Graph:
    """Nodes in columns from left to right, and a note that says what to try."""

    def __init__(self, note: str):
        self.note, self.nodes = note, []

    def add(self, type: str, column: int, title: str = "", **inputs) -> Node:
        """Inputs are widget values, or (node, output's name) for a link."""
        links = {k: v for k, v in inputs.items() if isinstance(v, tuple)}
        values = {k: v for k, v in inputs.items() if k not in links}
        node = Node(type, column, values, links, title, len(self.nodes) + 1)
        self.nodes.append(node)
        unknown = set(inputs) - set(node.inputs)
        assert not unknown, f"{type} has no {unknown}"
        return node

    def api(self) -> dict[str, Any]:
        """The prompt as /prompt takes it."""
        made = {}
        for node in self.nodes:
            inputs = {}
            for name, (kind, _) in node.inputs.items():
                if name in node.links:
                    source, output = node.links[name]
                    inputs[name] = [str(source.id), source.output(output)]
                elif kind in WIDGETS:
                    inputs[name] = node.value(name)
            title = node.title or _display_name(node.type)
            made[str(node.id)] = {"inputs": inputs, "class_type": node.type, "_meta": {"title": title}}
        return made

    def page(self) -> dict[str, Any]:
        """The workflow as the page saves it (version 0.4)."""
        links, drawn, bottom = [], [], {}
        sockets = {node.id: [n for n, (kind, _) in node.inputs.items() if kind not in WIDGETS] for node in self.nodes}
        for node in self.nodes:
            for name, (source, output) in node.links.items():
                slot = sockets[node.id].index(name)
                out = source.output(output)
                links.append([len(links) + 1, source.id, out, node.id, slot, source.outputs[out][1]])
        for order, node in enumerate(self.nodes):
            top = bottom.get(node.column, 0)
            drawn.append(_drawn(node, order, top, sockets[node.id], links))
            bottom[node.column] = top + drawn[-1]["size"][1] + ROW_GAP
        drawn.append(_note(self.note, len(self.nodes) + 1, bottom.get(0, 0)))
        return {
            "last_node_id": len(drawn), "last_link_id": len(links), "nodes": drawn, "links": links, "groups": [],
            "config": {}, "extra": {}, "version": 0.4,
        }  # fmt: skip

    def blueprint(self, name: str, description: str, given: list[tuple[Node, str]], made: tuple[Node, str]) -> dict:
        """A subgraph of these nodes: `given` are the widgets that it shows, `made` is its output."""
        page = self.page()
        inner = [n for n in page["nodes"] if n["type"] != "MarkdownNote"]
        links = [dict(zip(LINK, link, strict=True)) for link in page["links"]]
        key = str(uuid.uuid5(uuid.NAMESPACE_URL, f"starflow/{name}"))
        inputs = []
        for slot, (node, widget) in enumerate(given):
            kind, drawn = node.inputs[widget][0], inner[node.id - 1]
            link = {"id": len(links) + 1, "origin_id": -10, "origin_slot": slot, "target_id": node.id}
            links.append({**link, "target_slot": len(drawn["inputs"]), "type": kind})
            drawn["inputs"].append({"name": widget, "type": kind, "widget": {"name": widget}, "link": links[-1]["id"]})
            inputs.append({"id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{key}/{widget}")), "name": widget, "type": kind,
                           "linkIds": [links[-1]["id"]], "pos": [-200, 40 + 20 * slot]})  # fmt: skip
        source, output = made
        slot = source.output(output)
        kind = source.outputs[slot][1]
        link = {"id": len(links) + 1, "origin_id": source.id, "origin_slot": slot, "target_id": -20, "target_slot": 0}
        links.append({**link, "type": kind})
        inner[source.id - 1]["outputs"][slot]["links"] = [links[-1]["id"]]
        right = max(n["pos"][0] for n in inner) + COLUMN
        outputs = [{"id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{key}/{output}")), "name": output, "type": kind,
                    "linkIds": [links[-1]["id"]], "pos": [right + 20, 40]}]  # fmt: skip
        definition = {
            "id": key, "version": 1, "revision": 0, "config": {}, "name": name, "widgets": [], "groups": [],
            "extra": {},
            "state": {"lastGroupId": 0, "lastNodeId": len(inner), "lastLinkId": len(links), "lastRerouteId": 0},
            "inputNode": {"id": -10, "bounding": [-320, 0, 140, 60 + 20 * len(inputs)]},
            "outputNode": {"id": -20, "bounding": [right, 0, 120, 80]},
            "inputs": inputs, "outputs": outputs, "nodes": inner, "links": links,
            "category": "STARFlow", "description": description,
        }  # fmt: skip
        widgets = [{"name": i["name"], "type": i["type"], "widget": {"name": i["name"]}, "link": None} for i in inputs]
        shown = {
            "id": 1, "type": key, "pos": [0, 0], "size": [WIDTH, 260], "flags": {}, "order": 0, "mode": 0,
            "title": name, "inputs": widgets,
            "outputs": [{"name": output, "type": kind, "links": []}],
            "properties": {"proxyWidgets": [[str(node.id), widget] for node, widget in given]}, "widgets_values": [],
        }  # fmt: skip
        return {
            "revision": 0, "last_node_id": 1, "last_link_id": 0, "nodes": [shown], "links": [], "version": 0.4,
            "definitions": {"subgraphs": [definition]}, "extra": {},
        }  # fmt: skip


def _display_name(type: str) -> str:
    return type if type in CORE else INFO[type].get("display_name", type)


def _drawn(node: Node, order: int, top: int, sockets: list[str], links: list[list]) -> dict[str, Any]:
    values = []
    for name, (kind, options) in node.inputs.items():
        if kind in WIDGETS:
            values.append(node.value(name))
            if options.get("control_after_generate"):
                values.append("fixed")
    incoming = {link[4]: link[0] for link in links if link[3] == node.id}
    outgoing = [[link[0] for link in links if link[1] == node.id and link[2] == i] for i in range(len(node.outputs))]
    ours = node.type not in CORE
    models = [dict(zip(("name", "url", "directory"), model, strict=True)) for model in node.models]
    properties = {"cnr_id": "starflow" if ours else "comfy-core", "ver": __version__ if ours else "0.3.64"}
    drawn = {
        "id": node.id,
        "type": node.type,
        "pos": [node.column * COLUMN, top],
        "size": [WIDTH, _height(node, len(sockets), len(values))],
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": [
            {
                "name": n,
                "type": node.inputs[n][0],
                **({"shape": 7} if _optional(node, n) else {}),
                "link": incoming.get(i),
            }
            for i, n in enumerate(sockets)
        ],
        "outputs": [
            {"name": n, "type": kind, **({"shape": 6} if _listed(node, i) else {}), "links": outgoing[i] or None}
            for i, (n, kind) in enumerate(node.outputs)
        ],
        "properties": {**properties, "Node name for S&R": node.type, **({"models": models} if models else {})},
        "widgets_values": values,
    }
    return {**drawn, "title": node.title} if node.title else drawn


def _optional(node: Node, name: str) -> bool:
    return node.type in INFO and name in INFO[node.type]["input"].get("optional", {})


def _listed(node: Node, index: int) -> bool:
    return node.type in INFO and INFO[node.type]["output_is_list"][index]


def _height(node: Node, sockets: int, values: int) -> int:
    """About what the page needs; it grows nodes that are too small."""
    texts = sum(bool(options.get("multiline")) for _, options in node.inputs.values())
    media = {
        "PreviewImage": 260,
        "SaveImage": 260,
        "STARFlowVideoCombine": 300,
        "STARFlowSampler": 230,
        "STARFlowVAEDecode": 230,
        "PreviewAny": 80,
    }
    return 40 + 22 * max(sockets, len(node.outputs)) + 26 * values + 70 * texts + media.get(node.type, 0)


def _note(text: str, id: int, top: int) -> dict[str, Any]:
    return {
        "id": id, "type": "MarkdownNote", "pos": [0, top], "size": [WIDTH, 200], "flags": {}, "order": 0, "mode": 0,
        "inputs": [], "outputs": [], "properties": {}, "widgets_values": [text], "color": "#432", "bgcolor": "#653",
    }  # fmt: skip


# The examples


@dataclass
class Parts:
    """What every example begins with."""

    graph: Graph
    model: Node
    text: Node
    vae: Node

    @classmethod
    def of(cls, note: str) -> Parts:
        graph = Graph(note)
        return cls(
            graph,
            graph.add("STARFlowLoadModel", 0),
            graph.add("STARFlowLoadTextEncoder", 0),
            graph.add("STARFlowLoadVAE", 0),
        )

    def latent(self, column: int, **values) -> Node:
        return self.graph.add("STARFlowEmptyLatent", column, model=(self.model, "model"), **values)

    def sampled(
        self, column: int, prompt: str, latent: Node, context: Node | None = None, seed: int = 1, **values
    ) -> Node:
        """Text encode and sampler."""
        given = {"context": (context, "context")} if context else {}
        link = (latent, "latent")
        text = self.graph.add(
            "STARFlowTextEncode", column, model=(self.model, "model"), text_encoder=(self.text, "text_encoder"),
            latent=link, prompt=prompt, **given,
        )  # fmt: skip
        return self.graph.add(
            "STARFlowSampler", column + 1, model=(self.model, "model"), positive=(text, "positive"),
            negative=(text, "negative"), latent=link, seed=seed, **given, **values,
        )  # fmt: skip

    def decoded(self, column: int, sampler: Node, **values) -> Node:
        return self.graph.add("STARFlowVAEDecode", column, samples=(sampler, "latent"), vae=(self.vae, "vae"), **values)

    def combined(self, column: int, images: Node, name: str, output: str = "images") -> Node:
        return self.graph.add(
            "STARFlowVideoCombine", column, images=(images, output), filename_prefix=f"video/STARFlow-{name}"
        )

    def clip(self, column: int, prompt: str, seed: int = 1, **size) -> Node:
        """A source clip, made here so that the example runs as it is."""
        sampler = self.sampled(column + 1, prompt, self.latent(column, **size), seed=seed)
        return self.decoded(column + 2, sampler)


def text_to_image() -> Graph:
    parts = Parts.of(
        "**Text to image.** Runs as it is, with the small demo model: it knows coloured circles, squares, triangles "
        "and rings.\n\nFor real pictures, choose Apple's 3B checkpoint, flan-t5-xl and Stable Diffusion's VAE in the "
        "three loaders."
    )
    sampler = parts.sampled(1, "a blue ring on a white background", parts.latent(1, frames=1, batch_size=4), seed=3)
    parts.graph.add("SaveImage", 3, images=(parts.decoded(3, sampler), "images"), filename_prefix="STARFlow")
    return parts.graph


def text_to_video() -> Graph:
    parts = Parts.of(
        "**Text to video.** Runs as it is, with the small demo model: coloured circles, squares, triangles and rings "
        "that move left, right, up or down.\n\nFor real clips, choose STARFlow-V, flan-t5-xl and Wan 2.2's VAE in the "
        "three loaders; nothing else has to change."
    )
    sampler = parts.sampled(1, "a red circle moving right on a black background", parts.latent(1))
    parts.combined(3, parts.decoded(3, sampler), "text")
    return parts.graph


def image_to_video() -> Graph:
    parts = Parts.of(
        "**Image to video.** The first frame is made here, so the example runs as it is. To use your own picture, "
        "connect Load Image to First Frame instead of the first VAE Decode."
    )
    still = parts.sampled(1, "a green square on a white background", parts.latent(1, frames=1), seed=2)
    image = parts.decoded(3, still)
    latent = parts.latent(4)
    context = parts.graph.add(
        "STARFlowFirstFrame", 4, image=(image, "images"), vae=(parts.vae, "vae"), latent=(latent, "latent")
    )
    sampler = parts.sampled(5, "a green square moving left on a white background", latent, context)
    parts.combined(7, parts.decoded(7, sampler), "image")
    return parts.graph


def video_edit() -> Graph:
    parts = Parts.of(
        "**Video edit.** The prompt says what to change; motion and length stay the same. Source and result have to "
        "fit into the model's window together, so the demo takes at most 17 frames."
    )
    source = parts.clip(1, "a red circle moving right on a black background", frames=17)
    latent = parts.latent(4, frames=17)
    edit = parts.graph.add(
        "STARFlowVideoEdit", 4, images=(source, "images"), vae=(parts.vae, "vae"), latent=(latent, "latent")
    )
    sampler = parts.sampled(5, "make it green", edit, edit)
    parts.combined(7, source, "source")
    parts.combined(7, parts.decoded(7, sampler), "edit")
    return parts.graph


def extend() -> Graph:
    parts = Parts.of(
        "**Extend.** Continues a clip. VAE Decode drops the frames that the source already shows, and Batch Images "
        "joins the two."
    )
    source = parts.clip(1, "a yellow triangle moving down on a grey background", frames=17)
    latent = parts.latent(4)
    context = parts.graph.add(
        "STARFlowExtend", 4, model=(parts.model, "model"), images=(source, "images"), vae=(parts.vae, "vae"),
        latent=(latent, "latent"), keep=4,
    )  # fmt: skip
    sampler = parts.sampled(5, "a yellow triangle moving down on a grey background", latent, context)
    added = parts.decoded(7, sampler, trim_overlap=True)
    joined = parts.graph.add("ImageBatch", 7, image1=(source, "images"), image2=(added, "images"))
    parts.combined(7, joined, "extend", "IMAGE")
    return parts.graph


def first_and_last_frame() -> Graph:
    parts = Parts.of(
        "**First and last frame.** The clip ends with one picture and can begin with another. Both are taken from a "
        "clip that is made here, so the example runs as it is."
    )
    source = parts.clip(1, "a purple ring moving up on a white background", seed=4)
    first = parts.graph.add("ImageFromBatch", 4, image=(source, "images"), batch_index=0, length=1)
    last = parts.graph.add("ImageFromBatch", 4, image=(source, "images"), batch_index=32, length=1)
    latent = parts.latent(4)
    context = parts.graph.add(
        "STARFlowFirstLastFrame", 5, last_image=(last, "IMAGE"), vae=(parts.vae, "vae"), latent=(latent, "latent"),
        first_image=(first, "IMAGE"),
    )  # fmt: skip
    sampler = parts.sampled(6, "a purple ring moving up on a white background", latent, context)
    parts.combined(8, parts.decoded(8, sampler), "last")
    return parts.graph


def long_video() -> Graph:
    parts = Parts.of(
        "**Long video.** More frames than the window holds: when it is full, it keeps its last frames and slides on. "
        "The demo's window is 10 latent frames (37 frames)."
    )
    sampler = parts.sampled(1, "a green triangle moving left on a black background", parts.latent(1, frames=97))
    parts.combined(3, parts.decoded(3, sampler), "long")
    return parts.graph


def convergence_study() -> Graph:
    parts = Parts.of(
        "**Convergence.** The same clip with three presets. The pictures show the residual by sweep (left to right) "
        "and frame (top to bottom): the clip settles frame after frame. The text says how many sweeps that took."
    )
    latent = parts.latent(1)
    text = None
    for row, preset in enumerate(("fast", "balanced", "exact")):
        settings = parts.graph.add("STARFlowJacobiSettings", 2, title=preset, preset=preset)
        if text is None:
            sampler = parts.sampled(
                1, "an orange square moving up on a black background", latent, settings=(settings, "settings")
            )
            sampler.column, text = 3, sampler.links["positive"][0]
        else:
            sampler = parts.graph.add(
                "STARFlowSampler", 3, model=(parts.model, "model"), positive=(text, "positive"),
                negative=(text, "negative"), latent=(latent, "latent"), seed=1, settings=(settings, "settings"),
            )  # fmt: skip
        parts.graph.add("PreviewImage", 4, images=(sampler, "convergence"))
        parts.graph.add("PreviewAny", 4, source=(sampler, "statistics"))
        if row == 1:
            parts.combined(5, parts.decoded(5, sampler), "convergence")
    return parts.graph


def text_to_image_3b() -> Graph:
    parts = Parts.of(
        "**Text to image with Apple's 3B checkpoint**, which is for research only. Put the checkpoint into "
        "models/diffusion_models, flan-t5-xl into models/text_encoders as a folder with its config.json and "
        "tokenizer.json, and the VAE into models/vae under the name in its loader. Then press R to refresh the "
        "lists. It needs about 9 GB in bf16, plus the text encoder and VAE."
    )
    parts.model.values["model_name"] = "starflow_3B_t2i_256x256.pth"
    parts.model.models = [
        ("starflow_3B_t2i_256x256.pth", f"{HUB}/apple/starflow/resolve/main/starflow_3B_t2i_256x256.pth",
         "diffusion_models"),
    ]  # fmt: skip
    parts.text.values["encoder_name"] = "flan-t5-xl"
    parts.vae.values["vae_name"] = "sd-vae-ft-ema.safetensors"
    parts.vae.models = [
        ("sd-vae-ft-ema.safetensors",
         f"{HUB}/stabilityai/sd-vae-ft-ema/resolve/main/diffusion_pytorch_model.safetensors", "vae"),
    ]  # fmt: skip
    sampler = parts.sampled(1, "a cat in a field of flowers, golden hour", parts.latent(1, frames=1), seed=3)
    parts.graph.add("SaveImage", 3, images=(parts.decoded(3, sampler), "images"), filename_prefix="STARFlow")
    return parts.graph


EXAMPLES = {
    function.__name__: function
    for function in (
        text_to_image, text_to_video, image_to_video, video_edit, extend, first_and_last_frame, long_video,
        convergence_study,
    )
}  # fmt: skip
REAL_WEIGHTS = {"text_to_image_3b": text_to_image_3b}  # examples that need files which don't come with the pack


def blueprint() -> tuple[Path, str]:
    """The subgraph for hosts that have them: from a prompt to frames in one node."""
    parts = Parts.of("")
    latent = parts.latent(1)
    sampler = parts.sampled(1, "a red circle moving right on a black background", latent)
    text, images = sampler.links["positive"][0], parts.decoded(3, sampler)
    given = [(text, "prompt"), (latent, "aspect_ratio"), (latent, "frames"), (sampler, "seed"), (sampler, "guidance"),
             (parts.model, "model_name"), (parts.text, "encoder_name"), (parts.vae, "vae_name")]  # fmt: skip
    name, description = "Text to Video (STARFlow)", "From a prompt to a clip's frames, with the demo or STARFlow-V."
    made = parts.graph.blueprint(name, description, given, (images, "images"))
    return ROOT / "subgraphs" / f"{name}.json", json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def texts(name: str) -> dict[Path, str]:
    """The files of an example and what belongs into them."""
    graph = (EXAMPLES | REAL_WEIGHTS)[name]()
    return {
        FOLDER / f"{name}.json": json.dumps(graph.page(), indent=1, ensure_ascii=False) + "\n",
        FOLDER / "api" / f"{name}.json": json.dumps(graph.api(), indent=1, ensure_ascii=False) + "\n",
    }


def main() -> None:
    for files in (*(texts(name) for name in EXAMPLES | REAL_WEIGHTS), dict([blueprint()])):
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
