"""The example workflows, described once: `python -m tests.nodes.workflows` writes them for the page
(example_workflows/) and for the API (example_workflows/api/), and the blueprint in subgraphs/."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starflow_core import __version__

from . import crosses

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "example_workflows"
INFO = json.loads((Path(__file__).parent / "object_info.json").read_text())
CORE = {  # what the examples use of core: inputs in order, outputs
    "LoadImage": ({"image": "COMBO"}, {"IMAGE": "IMAGE", "MASK": "MASK"}),
    "LoadVideo": ({"file": "COMBO"}, {"VIDEO": "VIDEO"}),
    "GetVideoComponents": ({"video": "VIDEO"}, {"images": "IMAGE", "audio": "AUDIO", "fps": "FLOAT"}),
    "VAEEncode": ({"pixels": "IMAGE", "vae": "VAE"}, {"LATENT": "LATENT"}),
    "PreviewImage": ({"images": "IMAGE"}, {}),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": "STRING"}, {}),
    "PreviewAny": ({"source": "*"}, {}),
    "LossGraphNode": ({"loss": "LOSS_MAP", "filename_prefix": "STRING"}, {}),
    "ImageBatch": ({"image1": "IMAGE", "image2": "IMAGE"}, {"IMAGE": "IMAGE"}),
}
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
WIDTH, GAP, ROW_GAP = 340, 120, 70
COLUMN = WIDTH + GAP
TITLE, EDGE, LANE = 30, 20, 24  # of a node; around a group's nodes; between two links that run above the groups
GROUPS = {  # by the last kind of node that a group holds, from left to right
    "Loaders": ("#8899a6", ("STARFlowLoadModel", "STARFlowLoadTextEncoder", "STARFlowLoadVAE")),
    "Size, input and prompt": ("#5b9bd5", ("STARFlowTextEncode",)),
    "Sampling": ("#d0a04a", ("STARFlowSampler", "STARFlowEditByInversion", "STARFlowFillIn")),
    "Result": ("#6fbf73", ()),
}
HUB = "https://huggingface.co"


@dataclass
class Node:
    """A node of an example: widget values by name, links as (node, output's name)."""

    type: str
    values: dict[str, Any] = field(default_factory=dict)
    links: dict[str, tuple[Node, str]] = field(default_factory=dict)
    title: str = ""
    id: int = 0
    column: int = 0
    after: str = "randomize"  # what the page does to a seed after a run
    models: list[tuple[str, str, str]] = field(default_factory=list)  # file, address, folder: what the page offers

    @property
    def inputs(self) -> dict[str, tuple[str, dict]]:
        """Type and options of each input, in the order that the page gives them."""
        if self.type in CORE:
            return {name: (kind, {}) for name, kind in CORE[self.type][0].items()}
        info = INFO[self.type]["input"]
        given = {**info.get("required", {}), **info.get("optional", {})}
        return {name: ("COMBO" if isinstance(kind, list) else kind, options) for name, (kind, options) in given.items()}

    @property
    def outputs(self) -> list[tuple[str, str]]:
        """Name and type of each output."""
        if self.type in CORE:
            return list(CORE[self.type][1].items())
        return list(zip(INFO[self.type]["output_name"], INFO[self.type]["output"], strict=True))

    def output(self, name: str) -> int:
        return [n for n, _ in self.outputs].index(name)

    def value(self, name: str) -> Any:
        return self.values.get(name, self.inputs[name][1].get("default"))


class Graph:
    """Nodes in columns from left to right, each left of what it is connected to, and a note that says what to try."""

    def __init__(self, note: str):
        self.note, self.nodes = note, []

    def add(self, type: str, title: str = "", **inputs) -> Node:
        """Inputs are widget values, or (node, output's name) for a link."""
        links = {k: v for k, v in inputs.items() if isinstance(v, tuple)}
        values = {k: v for k, v in inputs.items() if k not in links}
        node = Node(type, values, links, title, len(self.nodes) + 1)
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
        self._arrange()
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
        groups = self._groups(drawn)
        drawn.append(_note(self.note, len(self.nodes) + 1, bottom.get(0, 0) + EDGE))
        return {
            "last_node_id": len(drawn), "last_link_id": len(links), "nodes": drawn, "links": links, "groups": groups,
            "config": {}, "extra": self._lanes(links, drawn), "version": 0.4,
        }  # fmt: skip

    def _arrange(self) -> None:
        """Loaders come first; every other node stands just before the first that needs it. Prompts stand together."""
        for node in self.nodes:
            node.column = 1 + max((source.column for source, _ in node.links.values()), default=-1)
        for node in reversed(self.nodes):
            used = [n.column for n in self.nodes if any(source is node for source, _ in n.links.values())]
            if used and node.type not in (*GROUPS["Loaders"][1], "STARFlowTextEncode"):
                node.column = min(used) - 1

    def _groups(self, drawn: list[dict]) -> list[dict]:
        """A frame around the columns of each stage."""
        made, first = [], 0
        for id, (title, (colour, kinds)) in enumerate(GROUPS.items(), 1):
            last = max((node.column for node in self.nodes if not kinds or node.type in kinds), default=first - 1)
            if last < first:
                continue
            held = [box for node, box in zip(self.nodes, drawn, strict=True) if first <= node.column <= last]
            bottom = max(box["pos"][1] + box["size"][1] for box in held)
            top = -TITLE - 2 * EDGE
            width = (last - first) * COLUMN + WIDTH + 2 * EDGE
            made.append({"id": id, "title": title, "bounding": [first * COLUMN - EDGE, top, width, bottom - top + EDGE],
                         "color": colour, "font_size": 24, "flags": {}})  # fmt: skip
            first = last + 1
        return made

    def _lanes(self, links: list[list], drawn: list[dict]) -> dict[str, list[dict]]:
        """Links over more than one column run above the groups, not behind the nodes between: one lane an output, which
        goes down beside a target that isn't at the top."""
        columns = {node.id: node.column for node in self.nodes}
        tops = {box["id"]: box["pos"][1] for box in drawn}
        far: dict[tuple[int, int], dict[tuple[int, int], list[int]]] = {}  # of an output: links by column and top
        for id, source, output, target, _, _ in links:
            if columns[target] - columns[source] > 1:
                place = (columns[target], tops[target])
                far.setdefault((source, output), {}).setdefault(place, []).append(id)
        points, ends = [], []
        for lane, ((source, _), targets) in enumerate(far.items()):
            height = -TITLE - 2 * EDGE - LANE * (lane + 1)
            along = _point(
                points,
                columns[source] * COLUMN + WIDTH + 2 * EDGE,
                height,
                [i for ids in targets.values() for i in ids],
            )
            for column in sorted({column for column, _ in targets}):
                x = column * COLUMN - 2 * EDGE
                along = _point(
                    points, x, height, [i for (c, _), ids in targets.items() if c >= column for i in ids], along
                )
                down = along
                for top in sorted(top for c, top in targets if c == column):
                    if top:
                        below = [i for (c, t), ids in targets.items() if c == column and t >= top for i in ids]
                        down = _point(points, x, top, below, down)
                    ends += [{"id": id, "parentId": down} for id in targets[column, top]]
        return {"linkExtensions": ends, "reroutes": points} if points else {}

    def blueprint(self, name: str, description: str, given: list[tuple[Node, str]], made: tuple[Node, str]) -> dict:
        """A subgraph of these nodes: `given` are the inputs that it shows, `made` is its output."""
        page = self.page()
        inner = [n for n in page["nodes"] if n["type"] != "MarkdownNote"]
        links = [dict(zip(LINK, link, strict=True)) for link in page["links"]]
        key = str(uuid.uuid5(uuid.NAMESPACE_URL, f"starflow/{name}"))
        inputs = []
        for slot, (node, given_name) in enumerate(given):
            kind, drawn = node.inputs[given_name][0], inner[node.id - 1]
            link = {"id": len(links) + 1, "origin_id": -10, "origin_slot": slot, "target_id": node.id}
            if kind in WIDGETS:
                drawn["inputs"].append({"name": given_name, "type": kind, "widget": {"name": given_name}, "link": None})
            target = next(i for i, socket in enumerate(drawn["inputs"]) if socket["name"] == given_name)
            drawn["inputs"][target]["link"] = link["id"]
            links.append({**link, "target_slot": target, "type": kind})
            id = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{key}/{given_name}"))
            inputs.append({"id": id, "name": given_name, "type": kind, "linkIds": [link["id"]],
                           "pos": [-200, 40 + 20 * slot]})  # fmt: skip
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
        sockets = [
            {"name": i["name"], "type": i["type"], "link": None}
            | ({"widget": {"name": i["name"]}} if i["type"] in WIDGETS else {})
            for i in inputs
        ]
        proxies = [[str(node.id), given_name] for node, given_name in given if node.inputs[given_name][0] in WIDGETS]
        shown = {
            "id": 1, "type": key, "pos": [0, 0], "size": [WIDTH, 260], "flags": {}, "order": 0, "mode": 0,
            "title": name, "inputs": sockets,
            "outputs": [{"name": output, "type": kind, "links": []}],
            "properties": {"proxyWidgets": proxies}, "widgets_values": [],
        }  # fmt: skip
        return {
            "revision": 0, "last_node_id": 1, "last_link_id": 0, "nodes": [shown], "links": [], "version": 0.4,
            "definitions": {"subgraphs": [definition]}, "extra": {},
        }  # fmt: skip


def _point(points: list[dict], x: int, y: int, links: list[int], parent: int | None = None) -> int:
    """A new point that these links run through."""
    parent = {"parentId": parent} if parent else {}
    points.append({"id": len(points) + 1, **parent, "pos": [x, y], "linkIds": sorted(links)})
    return len(points)


def _display_name(type: str) -> str:
    return type if type in CORE else INFO[type].get("display_name", type)


def _drawn(node: Node, order: int, top: int, sockets: list[str], links: list[list]) -> dict[str, Any]:
    values = []
    for name, (kind, options) in node.inputs.items():
        if kind in WIDGETS:
            values.append(node.value(name))
            if options.get("control_after_generate"):
                values.append(node.after)
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
    """What a node needs after a run, in both of the page's renderings; it grows nodes that are too small."""
    texts = sum(bool(options.get("multiline")) for _, options in node.inputs.values())
    return 50 + 22 * max(sockets, len(node.outputs)) + 28 * values + 80 * texts + SHOWN.get(node.type, 0)


SHOWN = {  # pictures and lines of text
    "LoadImage": 340, "LoadVideo": 340, "PreviewImage": 260, "SaveImage": 300, "PreviewAny": 140,
    "STARFlowEmptyLatent": 50, "STARFlowTextEncode": 150, "STARFlowSampler": 280, "STARFlowVAEDecode": 280,
    "STARFlowVideoCombine": 340, "STARFlowInvert": 50, "STARFlowEditByInversion": 50, "STARFlowLikelihood": 50,
    "STARFlowFillIn": 50, "STARFlowTrainLoRA": 110, "LossGraphNode": 260,
}  # fmt: skip


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
            graph, graph.add("STARFlowLoadModel"), graph.add("STARFlowLoadTextEncoder"), graph.add("STARFlowLoadVAE")
        )

    def latent(self, **values) -> Node:
        return self.graph.add("STARFlowEmptyLatent", model=(self.model, "model"), **values)

    def picture(self, file: str, title: str = "") -> Node:
        return self.graph.add("LoadImage", title, image=file)

    def frames(self, file: str) -> Node:
        """Those of a clip in the host's input folder."""
        return self.graph.add("GetVideoComponents", video=(self.graph.add("LoadVideo", file=file), "VIDEO"))

    def encoded(self, source: Node) -> Node:
        """Latents of a clip's frames."""
        return self.graph.add("VAEEncode", pixels=(source, "images"), vae=(self.vae, "vae"))

    def prompt(self, prompt: str, latent: Node, output: str = "latent", title: str = "", **given) -> Node:
        return self.graph.add(
            "STARFlowTextEncode", title, model=(self.model, "model"), text_encoder=(self.text, "text_encoder"),
            latent=(latent, output), prompt=prompt, **given,
        )  # fmt: skip

    def flowed(self, kind: str, text: Node, latent: Node, output: str = "latent", **given) -> Node:
        """A node that needs the flow, a prompt and latents: the sampler, or its inverse."""
        return self.graph.add(
            kind, model=(self.model, "model"), positive=(text, "positive"), negative=(text, "negative"),
            latent=(latent, output), **given,
        )  # fmt: skip

    def context(self, kind: str, latent: Node, **given) -> Node:
        return self.graph.add(kind, vae=(self.vae, "vae"), latent=(latent, "latent"), **given)

    def sampled(self, prompt: str, latent: Node, context: Node | None = None, seed: int = 1, **values) -> Node:
        """Text encode and sampler."""
        given = {"context": (context, "context")} if context else {}
        return self.flowed(
            "STARFlowSampler", self.prompt(prompt, latent, **given), latent, seed=seed, **given, **values
        )

    def decoded(self, sampler: Node, **values) -> Node:
        return self.graph.add("STARFlowVAEDecode", samples=(sampler, "latent"), vae=(self.vae, "vae"), **values)

    def combined(self, images: Node, name: str, output: str = "images") -> Node:
        return self.graph.add("STARFlowVideoCombine", images=(images, output), filename_prefix=f"video/STARFlow-{name}")


INPUT = "It comes with the pack and was put into ComfyUI's input folder; if it isn't there, choose one of your own."


def text_to_image() -> Graph:
    parts = Parts.of(
        "**Text to image.** Runs as it is, with the small demo model: it knows coloured circles, squares, triangles "
        "and rings.\n\nFor real pictures, choose Apple's 3B checkpoint, flan-t5-xl and Stable Diffusion's VAE in the "
        "three loaders."
    )
    sampler = parts.sampled("a blue ring on a white background", parts.latent(frames=1, batch_size=4), seed=3)
    parts.graph.add("SaveImage", images=(parts.decoded(sampler), "images"), filename_prefix="STARFlow")
    return parts.graph


def text_to_video() -> Graph:
    parts = Parts.of(
        "**Text to video.** Runs as it is, with the small demo model: coloured circles, squares, triangles and rings "
        "that move left, right, up or down.\n\nFor real clips, choose STARFlow-V, flan-t5-xl and Wan 2.2's VAE in the "
        "three loaders; nothing else has to change."
    )
    sampler = parts.sampled("a red circle moving right on a black background", parts.latent())
    parts.combined(parts.decoded(sampler), "text")
    return parts.graph


def image_to_video() -> Graph:
    parts = Parts.of(
        "**Image to video.** The clip begins with the picture in Load Image. " + INPUT + "\n\nThe prompt says what is "
        "to be seen and how it moves."
    )
    picture, latent = parts.picture("starflow_square.png"), parts.latent()
    context = parts.context("STARFlowFirstFrame", latent, image=(picture, "IMAGE"))
    sampler = parts.sampled("a green square moving left on a white background", latent, context)
    parts.combined(parts.decoded(sampler), "image")
    return parts.graph


def video_edit() -> Graph:
    parts = Parts.of(
        "**Video edit.** The prompt says what to change; motion and length stay the same. The source is the clip in "
        "Load Video. "
        + INPUT
        + "\n\nSource and result have to fit into the model's window together, so the demo takes "
        "at most 17 frames."
    )
    source, latent = parts.frames("starflow_red_circle.mp4"), parts.latent(frames=17)
    edit = parts.context("STARFlowVideoEdit", latent, images=(source, "images"))
    sampler = parts.sampled("make it green", edit, edit)
    parts.combined(parts.decoded(sampler), "edit")
    return parts.graph


def extend() -> Graph:
    parts = Parts.of(
        "**Extend.** Continues the clip in Load Video. " + INPUT + "\n\nVAE Decode drops the frames that the source "
        "already shows, and Batch Images joins the two."
    )
    source, latent = parts.frames("starflow_yellow_triangle.mp4"), parts.latent()
    context = parts.context("STARFlowExtend", latent, model=(parts.model, "model"), images=(source, "images"), keep=4)
    sampler = parts.sampled("a yellow triangle moving down on a grey background", latent, context)
    added = parts.decoded(sampler, trim_overlap=True)
    joined = parts.graph.add("ImageBatch", image1=(source, "images"), image2=(added, "images"))
    parts.combined(joined, "extend", "IMAGE")
    return parts.graph


def first_and_last_frame() -> Graph:
    parts = Parts.of(
        "**First and last frame.** The clip ends with one picture and can begin with another. Both come with the pack "
        "and were put into ComfyUI's input folder; if they aren't there, choose two of your own."
    )
    first = parts.picture("starflow_ring_first.png", "First frame")
    last = parts.picture("starflow_ring_last.png", "Last frame")
    latent = parts.latent()
    context = parts.context("STARFlowFirstLastFrame", latent, last_image=(last, "IMAGE"), first_image=(first, "IMAGE"))
    sampler = parts.sampled("a purple ring moving up on a white background", latent, context)
    parts.combined(parts.decoded(sampler), "last")
    return parts.graph


def long_video() -> Graph:
    parts = Parts.of(
        "**Long video.** More frames than the window holds: when it is full, it keeps its last frames and slides on. "
        "The demo's window is 10 latent frames (37 frames)."
    )
    sampler = parts.sampled("a green triangle moving left on a black background", parts.latent(frames=97))
    parts.combined(parts.decoded(sampler), "long")
    return parts.graph


def prompts_that_change() -> Graph:
    parts = Parts.of(
        "**Prompts that change.** One clip, three prompts, each from its second on: another direction, then another "
        "colour. Times are rounded to latent frames, 4 frames each.\n\n*keep at change* in the sampler is how many "
        "latent frames the clip goes on from: with more, the change is smoother, but a new direction is followed less."
    )
    prompt = (
        "0s: a red circle moving right on a black background | 2s: a red circle moving up on a black background | "
        "4s: a yellow circle moving up on a black background"
    )
    sampler = parts.sampled(prompt, parts.latent(frames=97))
    parts.combined(parts.decoded(sampler), "prompts")
    return parts.graph


def convergence_study() -> Graph:
    parts = Parts.of(
        "**Convergence.** The same clip with three presets. The pictures show the residual by sweep (left to right) "
        "and frame (top to bottom): the clip settles frame after frame. The text says how many sweeps that took."
    )
    latent = parts.latent()
    text = None
    for preset in ("fast", "balanced", "exact"):
        settings = parts.graph.add("STARFlowJacobiSettings", title=preset, preset=preset)
        if text is None:
            sampler = parts.sampled(
                "an orange square moving up on a black background", latent, settings=(settings, "settings")
            )
            text = sampler.links["positive"][0]
        else:
            sampler = parts.flowed("STARFlowSampler", text, latent, seed=1, settings=(settings, "settings"))
        sampler.after = "fixed"  # the three are to be compared
        parts.graph.add("PreviewImage", images=(sampler, "convergence"))
        parts.graph.add("PreviewAny", source=(sampler, "statistics"))
        if preset == "balanced":
            parts.combined(parts.decoded(sampler), "convergence")
    return parts.graph


def variations() -> Graph:
    parts = Parts.of(
        "**Variations of a clip.** Invert finds the noise that makes the clip in Load Video, Mix Noise changes it a "
        "little, and the sampler makes a clip of that: another one each time you press Run. "
        + INPUT
        + "\n\nThe amount in Mix Noise says how much changes, from 0 to 1. With a second noise it finds what lies "
        "between two clips."
    )
    latent = parts.encoded(parts.frames("starflow_red_circle.mp4"))
    text = parts.prompt("a red circle moving right on a black background", latent, "LATENT")
    inverted = parts.flowed("STARFlowInvert", text, latent, "LATENT", guidance=1.0)
    mixed = parts.graph.add("STARFlowMixNoise", noise=(inverted, "noise"), amount=0.35, seed=2)
    sampler = parts.flowed("STARFlowSampler", text, latent, "LATENT", noise=(mixed, "noise"))
    sampler.after = "fixed"  # the noise's seed counts
    parts.combined(parts.decoded(sampler), "variation")
    return parts.graph


def another_prompt() -> Graph:
    parts = Parts.of(
        "**Another prompt for the same noise.** Invert finds the noise that makes the clip in Load Video under a "
        "prompt that describes it. From the same noise and another prompt, the sampler makes another clip, which moves "
        "as the source does. "
        + INPUT
        + "\n\nNo noise is added and guidance is 0 both ways: with the first prompt, the very same clip would come "
        "back."
    )
    latent = parts.encoded(parts.frames("starflow_red_circle.mp4"))
    shown = parts.prompt("a red circle moving right on a black background", latent, "LATENT", "What it shows")
    wanted = parts.prompt("a red triangle moving right on a black background", latent, "LATENT", "What it shall show")
    inverted = parts.flowed("STARFlowInvert", shown, latent, "LATENT", add_noise=False)
    sampler = parts.flowed("STARFlowSampler", wanted, latent, "LATENT", guidance=0.0, noise=(inverted, "noise"))
    sampler.after = "fixed"  # there is no seed in this noise
    parts.combined(parts.decoded(sampler), "prompt")
    return parts.graph


def edit_by_inversion() -> Graph:
    parts = Parts.of(
        "**Edit by inversion.** What the second prompt says changes, and the rest of the clip stays: nothing was "
        "trained for it. Of several candidates the one that is most like the source is kept. "
        + INPUT
        + "\n\nSay in the first prompt what the clip shows, the closer, the better."
    )
    latent = parts.encoded(parts.frames("starflow_red_circle.mp4"))
    shown = parts.prompt("a red circle moving right on a black background", latent, "LATENT", "What it shows")
    wanted = parts.prompt("a green circle moving right on a grey background", latent, "LATENT", "What it shall show")
    edit = parts.flowed(
        "STARFlowEditByInversion", wanted, latent, "LATENT", vae=(parts.vae, "vae"), shows=(shown, "positive"), seed=1,
    )  # fmt: skip
    parts.graph.add("PreviewAny", source=(edit, "report"))
    parts.combined(edit, "edit-by-inversion")
    return parts.graph


def surprise() -> Graph:
    parts = Parts.of(
        "**What doesn't belong.** Likelihood says how likely the model finds the clip in Load Video, and shows where "
        "something surprises it: in this one the circle changes its colour half-way. "
        + INPUT
        + "\n\nThe first frame is always a surprise, since only the prompt says what comes."
    )
    source = parts.frames("starflow_changing_circle.mp4")
    latent = parts.encoded(source)
    text = parts.prompt("a red circle moving right on a black background", latent, "LATENT")
    judged = parts.graph.add(
        "STARFlowLikelihood", model=(parts.model, "model"), positive=(text, "positive"), latent=(latent, "LATENT"),
        images=(source, "images"),
    )  # fmt: skip
    parts.graph.add("PreviewAny", source=(judged, "report"))
    parts.combined(judged, "surprise", "overlay")
    return parts.graph


def fill_in() -> Graph:
    parts = Parts.of(
        "**Fill in.** The right half of the clip in Load Video is masked, and filled as the prompt says. The other "
        "half stays as it is. "
        + INPUT
        + "\n\nThe mask is the transparent part of the picture in Load Image: draw your own in its mask editor, over a "
        "picture of the clip's size. The prompt has to describe all of the clip, known parts included."
    )
    source, mask = parts.frames("starflow_red_circle.mp4"), parts.picture("starflow_mask.png", "Mask")
    latent = parts.latent(frames=17)
    text = parts.prompt("a red circle moving right on a black background", latent)
    filled = parts.flowed(
        "STARFlowFillIn", text, latent, images=(source, "images"), mask=(mask, "MASK"), vae=(parts.vae, "vae"), seed=1
    )  # fmt: skip
    parts.combined(filled, "fill")
    return parts.graph


def train_lora() -> Graph:
    parts = Parts.of(
        "**Train a LoRA.** The demo doesn't know crosses. It learns them here from the pictures in Load Video, one a "
        "frame, each with its caption, in about two minutes on two CPU cores. On the right are four samples of the "
        "same noise, without the LoRA and with it. " + INPUT + "\n\nThe LoRA is kept in models/loras: press R, and "
        "STARFlow Load LoRA offers it. Cancel keeps what was learned so far, and the next run goes on from there."
    )
    source, latent = parts.frames(crosses.FILE), parts.latent(frames=1, batch_size=4)
    trained = parts.graph.add(
        "STARFlowTrainLoRA", model=(parts.model, "model"), text_encoder=(parts.text, "text_encoder"),
        vae=(parts.vae, "vae"), images=(source, "images"), captions="\n".join(crosses.captions()), steps=400,
        learning_rate=8e-3, lora_name="starflow_cross", blocks="all", caption_drop=0.0,
    )  # fmt: skip
    text = parts.prompt("a cyan cross", latent)
    for title, model in (("Without", parts.model), ("With", trained)):
        sampler = parts.graph.add(
            "STARFlowSampler", f"{title} the LoRA", model=(model, "model"), positive=(text, "positive"),
            negative=(text, "negative"), latent=(latent, "latent"), seed=1,
        )  # fmt: skip
        sampler.after = "fixed"  # the two are to be compared
        prefix = f"STARFlow-{title.lower()}-LoRA"
        parts.graph.add("SaveImage", images=(parts.decoded(sampler), "images"), filename_prefix=prefix)
    parts.graph.add("LossGraphNode", loss=(trained, "loss_map"), filename_prefix="loss")
    return parts.graph


def text_to_image_3b() -> Graph:
    parts = Parts.of(
        "**Text to image with Apple's 3B checkpoint**, which is for research only. Put three files under the names in "
        "the loaders: the checkpoint into models/diffusion_models, flan-t5-xl into models/text_encoders, and the VAE "
        "into models/vae. Then press R to refresh the lists. It needs about 9 GB in bf16, plus the text encoder and "
        "VAE.\n\nThe text encoder is offered as the first of flan-t5-xl's two files, which by its size holds the whole "
        "encoder; we couldn't check. If tensors are missing, put the whole folder there, with its index, config.json "
        "and tokenizer.json, and choose it."
    )
    for node, widget, folder, name, address in (
        (parts.model, "model_name", "diffusion_models", "starflow_3B_t2i_256x256.pth",
         "apple/starflow/resolve/main/starflow_3B_t2i_256x256.pth"),
        (parts.text, "encoder_name", "text_encoders", "flan-t5-xl.safetensors",
         "google/flan-t5-xl/resolve/main/model-00001-of-00002.safetensors"),
        (parts.vae, "vae_name", "vae", "sd-vae-ft-ema.safetensors",
         "stabilityai/sd-vae-ft-ema/resolve/main/diffusion_pytorch_model.safetensors"),
    ):  # fmt: skip
        node.values[widget] = name
        node.models = [(name, f"{HUB}/{address}", folder)]
    sampler = parts.sampled("a cat in a field of flowers, golden hour", parts.latent(frames=1), seed=3)
    parts.graph.add("SaveImage", images=(parts.decoded(sampler), "images"), filename_prefix="STARFlow")
    return parts.graph


EXAMPLES = {
    function.__name__: function
    for function in (
        text_to_image, text_to_video, image_to_video, video_edit, extend, first_and_last_frame, long_video,
        prompts_that_change, convergence_study, variations, another_prompt, edit_by_inversion, surprise, fill_in,
        train_lora,
    )
}  # fmt: skip
REAL_WEIGHTS = {"text_to_image_3b": text_to_image_3b}  # examples that need files which don't come with the pack


# The blueprints: subgraphs for hosts that have them


def _blueprint(parts: Parts, name: str, description: str, first: list, latent: Node, sampler: Node, made: tuple):
    """What most change comes first: the given frames and prompt, then size, seed, guidance and files."""
    given = [*first, (sampler.links["positive"][0], "prompt"), (latent, "aspect_ratio"), (latent, "frames"),
             (sampler, "seed"), (sampler, "guidance"), (parts.model, "model_name"), (parts.text, "encoder_name"),
             (parts.vae, "vae_name")]  # fmt: skip
    name = f"{name} (STARFlow)"
    drawn = parts.graph.blueprint(name, description, given, made)
    return ROOT / "subgraphs" / f"{name}.json", json.dumps(drawn, indent=1, ensure_ascii=False) + "\n"


def text_to_video_blueprint() -> tuple[Path, str]:
    parts = Parts.of("")
    latent = parts.latent()
    sampler = parts.sampled("a red circle moving right on a black background", latent)
    made = (parts.decoded(sampler), "images")
    description = "From a prompt to a clip's frames, with the demo or STARFlow-V."
    return _blueprint(parts, "Text to Video", description, [], latent, sampler, made)


def image_to_video_blueprint() -> tuple[Path, str]:
    parts = Parts.of("")
    latent = parts.latent()
    context = parts.context("STARFlowFirstFrame", latent)
    sampler = parts.sampled("a green square moving left on a white background", latent, context)
    made = (parts.decoded(sampler), "images")
    description = "From a picture and a prompt to a clip's frames that begin with the picture."
    return _blueprint(parts, "Image to Video", description, [(context, "image")], latent, sampler, made)


def extend_blueprint() -> tuple[Path, str]:
    parts = Parts.of("")
    latent = parts.latent()
    context = parts.context("STARFlowExtend", latent, model=(parts.model, "model"), keep=4)
    sampler = parts.sampled("a yellow triangle moving down on a grey background", latent, context)
    added = parts.decoded(sampler, trim_overlap=True)
    description = "From a clip and a prompt to the frames that follow it, without those that the clip already shows."
    first = [(context, "images"), (context, "keep")]
    return _blueprint(parts, "Extend Video", description, first, latent, sampler, (added, "images"))


def edit_blueprint() -> tuple[Path, str]:
    parts = Parts.of("")
    latent = parts.latent(frames=17)
    edit = parts.context("STARFlowVideoEdit", latent)
    sampler = parts.sampled("make it green", edit, edit)
    made = (parts.decoded(sampler), "images")
    description = "From a clip and a prompt that says what to change to the changed clip's frames."
    return _blueprint(parts, "Edit Video", description, [(edit, "images")], latent, sampler, made)


BLUEPRINTS = (text_to_video_blueprint, image_to_video_blueprint, extend_blueprint, edit_blueprint)


def texts(name: str) -> dict[Path, str]:
    """The files of an example and what belongs into them."""
    graph = (EXAMPLES | REAL_WEIGHTS)[name]()
    return {
        FOLDER / f"{name}.json": json.dumps(graph.page(), indent=1, ensure_ascii=False) + "\n",
        FOLDER / "api" / f"{name}.json": json.dumps(graph.api(), indent=1, ensure_ascii=False) + "\n",
    }


def main() -> None:
    for files in (*(texts(name) for name in EXAMPLES | REAL_WEIGHTS), dict(make() for make in BLUEPRINTS)):
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
