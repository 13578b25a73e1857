"""Training a LoRA on pictures or clips, by the core's own trainer."""

from __future__ import annotations

import filecmp
import gc
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from comfy_api.latest import io
from torch import Tensor

from ..starflow_core.errors import InputError
from ..starflow_core.parts import replacing
from ..starflow_core.weights.lora import LoraFile, base_hash
from ..starflow_core.weights.tensorfiles import TensorFile
from . import host
from .types import CATEGORY, SEARCH, ModelType, TextEncoderType

if TYPE_CHECKING:
    from ..starflow_core.control import Progress
    from ..starflow_core.training.data.dataset import Dataset
    from ..starflow_core.training.settings import Settings
    from ..starflow_core.training.train import Sources

OWN = 0  # in a number's place: the model's, or what suits
LARGEST_SEED = (1 << 63) - 1  # that training takes
SAVE_EVERY = 100  # steps; Cancel saves as well
SAY_EVERY = 0.5  # seconds between two lines of text
PHASES = {"read": "reading", "encode": "encoding", "text": "reading captions", "rehearse": "drawing"}


class STARFlowTrainLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STARFlowTrainLoRA",
            display_name="STARFlow Train LoRA",
            category=CATEGORY,
            **SEARCH,
            description="Teaches the model something new from pictures or clips with captions, and saves it as a LoRA. "
            "Cancel keeps what was learned: the same inputs go on from there.",
            inputs=[
                ModelType.Input(
                    "model", tooltip="From STARFlow Load Model, without a LoRA. Its own file is trained on."
                ),
                TextEncoderType.Input("text_encoder", tooltip="From STARFlow Load Text Encoder."),
                io.Vae.Input("vae", tooltip="From STARFlow Load VAE."),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    tooltip="What each picture or clip shows, a line for each in their order, or one line for all. "
                    "Captions of a folder are in its files.",
                ),
                io.Int.Input(
                    "steps",
                    default=300,
                    min=1,
                    max=1000000,
                    tooltip="How long it learns. Too few and it can't do it yet, too many and it only repeats what it "
                    "was shown.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=1e-3,
                    min=1e-7,
                    max=1.0,
                    step=1e-5,
                    round=False,
                    tooltip="How fast it learns. Halve it if the loss jumps.",
                ),
                io.Int.Input(
                    "rank",
                    default=16,
                    min=1,
                    max=4096,
                    tooltip="How much the LoRA can hold. Larger files and more memory with it.",
                ),
                io.Int.Input(
                    "batch",
                    default=8,
                    min=1,
                    max=1024,
                    tooltip="Pictures or clips in a step. Where memory is short, they are taken one after the other.",
                ),
                io.Int.Input(
                    "size",
                    default=OWN,
                    min=0,
                    max=8192,
                    step=16,
                    tooltip="Side in pixels of a square of the same area; the nearest trained aspect ratio is used. 0 "
                    "uses the model's.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=LARGEST_SEED,
                    control_after_generate=False,
                    tooltip="Of the LoRA's first weights, the order and the noise.",
                ),
                io.String.Input(
                    "lora_name",
                    default="starflow_lora",
                    tooltip="Name of the file in models/loras, which gets a number after it.",
                ),
                io.Image.Input(
                    "images", optional=True, tooltip="Pictures, or the frames of clips, one after the other."
                ),
                io.Int.Input(
                    "frames",
                    default=OWN,
                    min=0,
                    max=100001,
                    optional=True,
                    tooltip="Frames of each clip in images, 4n + 1; of a folder the longest that is learned. 0 takes "
                    "clips of this pack's nodes as they are, other images as pictures, and of a folder the model's "
                    "length.",
                ),
                io.Float.Input(
                    "fps",
                    default=float(OWN),
                    min=0.0,
                    max=1000.0,
                    step=1.0,
                    optional=True,
                    tooltip="Frames per second of the clips; those of a folder are brought to it. 0 uses the model's.",
                ),
                io.Float.Input(
                    "alpha",
                    default=float(OWN),
                    min=0.0,
                    max=4096.0,
                    step=1.0,
                    optional=True,
                    tooltip="The LoRA is scaled by alpha / rank. 0 uses the rank.",
                ),
                io.String.Input(
                    "blocks",
                    default="deep",
                    optional=True,
                    tooltip="What learns. deep: the block that reads the prompt; all; or numbers such as 4,5.",
                ),
                io.Float.Input(
                    "caption_drop",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="Share of captions that are left empty, which guidance needs.",
                ),
                io.String.Input(
                    "folder",
                    default="",
                    optional=True,
                    tooltip="A folder of pictures and clips, each with its caption in a .txt of the same name, in "
                    "place of images: its whole path, or one in ComfyUI's input folder.",
                ),
                io.String.Input(
                    "rehearse",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Captions of what the model is to go on knowing, a line each. It draws a sample of each "
                    "before it learns, and sees them in half of the steps.",
                ),
            ],
            outputs=[
                io.Custom("LORA_MODEL").Output(display_name="lora", tooltip="For ComfyUI's own Save LoRA Weights."),
                io.Custom("LOSS_MAP").Output(display_name="loss_map", tooltip="For ComfyUI's own Plot Loss Graph."),
                ModelType.Output(display_name="model", tooltip="The model with the LoRA at strength 1."),
                io.String.Output(display_name="lora_name", tooltip="The file's name in models/loras."),
            ],
            # Newer hosts give output nodes the last two whether they ask or not.
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(
        cls, captions: str = "", lora_name: str = "starflow_lora", blocks: str = "deep", folder: str = ""
    ) -> bool | str:
        return _wrong_name(lora_name) or _wrong_blocks(blocks) or True

    @classmethod
    def fingerprint_inputs(cls, folder: str = "", **others) -> str:
        """A folder's files may change while its name stays."""
        return _state_of(host.input_folder() / folder) if folder else ""

    @classmethod
    def execute(
        cls, model, text_encoder, vae, captions: str, steps: int, learning_rate: float, rank: int, batch: int,
        size: int, seed: int, lora_name: str, images=None, frames: int = OWN, fps: float = 0.0, alpha: float = 0.0,
        blocks: str = "deep", caption_drop: float = 0.1, folder: str = "", rehearse: str = "",
    ) -> io.NodeOutput:  # fmt: skip
        if wrong := _wrong_name(lora_name) or _wrong_blocks(blocks):
            raise InputError(wrong)
        files = _files(model, text_encoder, vae)
        bar, root = host.NodeProgress(cls.hidden.unique_id), host.training_folder()
        host.lora_folder(lora_name)  # refused before the work
        if folder:
            data = {"data": (str(_folder(folder, images)),), "frames": frames or None}
        else:
            data = _written(images, frames, captions, root)
        settings = _settings(
            files, data, host.flow_of(model), steps=steps, learning_rate=learning_rate, rank=rank, batch=batch,
            size=size or None, seed=seed, fps=fps or None, alpha=alpha or None, blocks=blocks,
            caption_drop=caption_drop, rehearse=_lines(rehearse),
        )  # fmt: skip
        result, losses = _trained(settings, root, bar)
        path, name = _kept(result, lora_name)
        lora = LoraFile.open(path)
        with torch.inference_mode(False):  # they may be trained on
            tensors = {key: stored.read() for key, stored in lora.file.tensors.items()}
        bar.say(f"{name}: loss {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps")
        return io.NodeOutput(tensors, {"loss": losses}, host.with_lora(model, lora.load()), name)


NODES = [STARFlowTrainLoRA]


# What is given


def _wrong_name(name: str) -> str | None:
    if not name.strip() or Path(name).is_absolute() or ".." in Path(name).parts or name.endswith(("/", "\\")):
        return f"lora_name is {name!r}; give a file's name in models/loras, such as starflow_lora"
    return None


def _wrong_blocks(blocks: str) -> str | None:
    from ..starflow_core.model.lora import block_indices

    try:
        block_indices(blocks, sys.maxsize)  # which there are is known with the model
    except InputError as error:
        return str(error)
    return None


def _files(model, text_encoder, vae) -> dict[str, str]:
    """The files that the models are from: they are trained on as they are there. Raises InputError where there are
    others."""
    if host.has_lora(model):
        raise InputError("the model has a LoRA already; train on the model itself, from STARFlow Load Model")
    source = getattr(vae, "source", None)
    if source is None:
        raise InputError("this VAE isn't from STARFlow Load VAE, which training needs; load it there")
    paths = {"model": host.source_of(model), "text_encoder": text_encoder.source, "vae": source}
    tokenizer = host.tokenizer_for(text_encoder.source)
    return {name: str(path) for name, path in paths.items()} | ({"tokenizer": str(tokenizer)} if tokenizer else {})


def _folder(folder: str, images: Tensor | None) -> Path:
    if images is not None:
        raise InputError("both images and a folder are given; disconnect images, or leave the folder empty")
    return host.input_folder() / folder  # an absolute path stays as it is


def _state_of(folder: Path) -> str:
    """Changes with the files below a folder."""
    stats = ((path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())
    told = [[str(path), stat.st_mtime_ns, stat.st_size] for path, stat in stats]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _written(images: Tensor | None, frames: int, captions: str, root: Path) -> dict:
    """What the settings are told of pictures and clips, in a folder that is named by their content."""
    if images is None:
        raise InputError("nothing to learn from; connect images, or name a folder")
    length = frames or host.clip_frames(images, 1)
    if len(images) % length:
        raise InputError(
            f"{len(images)} images can't be split into clips of {length} frames; frames has to divide them"
        )
    pixels = (images[..., :3].cpu().float().clamp(0, 1) * 255).round().byte()
    texts = _captions(captions, len(pixels) // length)
    about = json.dumps([list(pixels.shape), length, texts]).encode()
    folder = root / f"data-{hashlib.sha256(about + pixels.numpy().tobytes()).hexdigest()[:16]}"
    if not (folder / "metadata.jsonl").is_file():
        _write(folder, pixels.split(length), texts)
    return {"data": (str(folder),), "frames": frames or (length - 1) // 4 * 4 + 1}


def _captions(captions: str, count: int) -> list[str]:
    """One for each. Raises InputError for another number."""
    texts = list(_lines(captions))
    if len(texts) not in (1, count):
        raise InputError(f"{len(texts)} captions for {count} pictures or clips; write a line for each, or one for all")
    return texts * count if len(texts) == 1 else texts


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _write(folder: Path, clips: Iterable[Tensor], texts: list[str]) -> None:
    """Pictures and clips without any loss, and then the list of their captions."""
    lines = []
    for index, (clip, text) in enumerate(zip(clips, texts, strict=True)):
        host.check_interrupted()
        file = folder / f"{index:05}{'.png' if len(clip) == 1 else '.tiff'}"
        with replacing(file) as part:
            _write_frames(part, clip, file.suffix)
        lines.append(json.dumps({"file_name": file.name, "text": text}) + "\n")
    with replacing(folder / "metadata.jsonl") as part:
        part.write_text("".join(lines), encoding="utf-8")


def _write_frames(path: Path, frames: Tensor, suffix: str) -> None:
    """A picture, or the pages of one: a clip without a rate, which is taken frame by frame."""
    from PIL import Image

    first, *others = map(Image.fromarray, frames.numpy())
    options = {"save_all": True, "append_images": others, "compression": "tiff_deflate"} if others else {}
    first.save(path, {".png": "PNG", ".tiff": "TIFF"}[suffix], **options)


def _settings(files: dict, data: dict, flow, steps: int, **given) -> Settings:
    from ..starflow_core.training.settings import Settings

    return Settings(
        **files, **data, **given, steps=steps, int8=host.has_int8(flow), held_out=0.0, warmup=min(50, steps // 10),
        save_every=SAVE_EVERY,
    )  # fmt: skip


# Training


def _trained(settings: Settings, root: Path, bar: host.NodeProgress) -> tuple[Path, list[float]]:
    """The finished file and the loss of each step. The host's models make room, for others of the same files."""
    from ..starflow_core.training import train as training
    from ..starflow_core.training.processes import Processes

    device = host.flow_device()
    watch = _Watch(bar, settings.steps)
    with torch.inference_mode(False), torch.no_grad():
        sources = training.find_sources(settings)
        training.check(settings, sources.config)
        base_hash(TensorFile.open(settings.model), bar.bytes)  # which takes a while once, and can be cancelled here
        settings = replace(settings, work=str(root / f"run-{_key(settings)}"), data_cache=str(root / "cache"))
        host.unload()
        settings = _fitted(settings, sources, device, watch)
        try:
            result = training.train(
                settings, sources, device, Processes(), host.log.info, watch.step, watch.preparing, host.interrupted
            )  # fmt: skip
        except KeyboardInterrupt:  # how a run stops that was asked to
            host.check_interrupted()
            raise
        finally:
            gc.collect()  # what was trained on the card
            host.release()
    return result, list(_losses(Path(settings.work)))


def _key(settings: Settings) -> str:
    """What tells a run from others: it goes on only where all is the same."""
    stats = [Path(path).stat() for path in (settings.model, settings.text_encoder, settings.vae)]
    told = [settings.to_dict(), [[stat.st_mtime_ns, stat.st_size] for stat in stats]]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _fitted(settings: Settings, sources: Sources, device: torch.device, watch: _Watch) -> Settings:
    """The fastest way to take a step that fits; says what it takes. Raises OutOfMemoryForecast where none does."""
    from ..starflow_core.errors import OutOfMemoryForecast
    from ..starflow_core.training.data.cache import Cache
    from ..starflow_core.training.data.prepare import find

    dataset = find(settings, sources.config, Cache(settings.cached), progress=watch.preparing)
    *ways, last = _ways(settings)
    for way in ways:
        try:
            return _said(way, sources, device, dataset, watch)
        except OutOfMemoryForecast:
            continue
    return _said(last, sources, device, dataset, watch)


def _ways(settings: Settings) -> Iterator[Settings]:
    """From the fastest to the thriftiest."""
    yield replace(settings, recompute=False)
    yield settings
    rows = settings.batch
    while rows > 1:
        rows = -(-rows // 2)
        yield replace(settings, micro_batch=rows)


def _said(settings: Settings, sources: Sources, device: torch.device, dataset: Dataset, watch: _Watch) -> Settings:
    """The settings again, once their forecast fits and was shown."""
    from ..starflow_core.training.forecast import forecast, require
    from ..starflow_core.training.train import dtype_of

    lines = dataset.report()
    for bucket in dataset.buckets:
        need = forecast(sources.config, settings, dtype_of(settings, device, sources.config), bucket)
        require(need, device, bucket)
        lines.append(f"{bucket}: {need}")
    watch.forecast = "\n".join(lines)
    watch.bar.say(watch.forecast)
    host.log.info("STARFlow: %s", watch.forecast)
    return settings


class _Watch:
    """Shows on the node how far a run is. Raises the host's exception on Cancel, but for where the trainer asks."""

    def __init__(self, bar: host.NodeProgress, steps: int):
        self.bar, self.steps, self.forecast, self.said = bar, steps, "", -SAY_EVERY

    def preparing(self, progress: Progress) -> None:
        host.check_interrupted()
        self.bar.update(progress.step, max(progress.total, 1))
        self._say(f"{PHASES[progress.phase]}: {progress.step} of {progress.total}")

    def step(self, step: int, figures: dict[str, float]) -> None:
        if host.interrupted():  # the trainer saves the step, and stops
            return
        self.bar.update(step, self.steps)
        left = (self.steps - step) * figures["seconds a step"]
        self._say(f"step {step} of {self.steps}, loss {figures['loss']:.3f}, {left:.0f} s left", step == self.steps)

    def _say(self, line: str, last: bool = False) -> None:
        now = time.monotonic()
        if last or now - self.said >= SAY_EVERY:
            self.said = now
            self.bar.say("\n".join(filter(None, [line, self.forecast])))


def _losses(work: Path) -> Iterator[float]:
    """Of all steps, those of earlier runs too."""
    from ..starflow_core.training.watch import FIGURES

    for line in (work / "logs" / FIGURES).read_text(encoding="utf-8").splitlines():
        yield json.loads(line)["loss"]


def _kept(result: Path, name: str) -> tuple[Path, str]:
    """A finished file's place among the host's LoRAs and its name there; the same LoRA is kept once."""
    folder, stem, number, subfolder = host.lora_folder(name)
    same = (file for file in folder.glob(f"{escape(stem)}_*.safetensors") if filecmp.cmp(file, result, shallow=False))
    target = next(same, folder / f"{stem}_{number:05}_.safetensors")
    if not target.exists():
        try:
            with replacing(target) as part:
                shutil.copyfile(result, part)
        except OSError as error:
            raise InputError(f"{target} can't be written ({error.strerror}); the LoRA is in {result}") from None
    return target, str(Path(subfolder) / target.name)
