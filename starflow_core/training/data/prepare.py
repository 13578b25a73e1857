"""From folders and settings to a data set: everything that training can draw is encoded before it starts."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from ...bundled import BUNDLED, TEXT_FILE, VAE_FILE
from ...control import Progress
from ...errors import InputError, NonFiniteError
from ...model.config import FlowConfig
from ...model.text import TextEncoder
from ...model.vae.codec import VAE
from ...weights.text import find_text_encoder
from ...weights.vae import find_vae
from ..settings import Settings
from .buckets import Notes, Sample, assign
from .cache import Cache, Text, Window, identity
from .dataset import Dataset, Identities, Practice
from .encoders import with_noise
from .folders import Item, find_items, shortened
from .windows import read_windows

Report = Callable[[Progress], None]

LARGEST_SIDE = 8192  # pixels of a square
FEW = 10  # samples; of fewer none is held out
NO_TASK = "no task that is practised suits them"
NEEDS = {
    "first_frame": "clips of 5 frames or more",
    "extend": "clips of 5 frames or more",
    "last_frame": "clips of 5 frames or more",
    "edit": "pairs: NAME.source.EXT beside NAME.EXT, or `source` in metadata.jsonl",
    "text": "pictures or clips that aren't half of a pair",
}


def prepare(
    settings: Settings, config: FlowConfig, vae: Callable[[], VAE], encode_text: Callable[[], TextEncoder],
    cache: Cache, rank: int = 0, world: int = 1, progress: Report | None = None,
    extra: Callable[[Dataset], Sequence[str]] = lambda dataset: (),
) -> Dataset:  # fmt: skip
    """The data set of some settings, with whatever isn't in the cache yet encoded.

    `vae` and `encode_text` load them; they are called only if something is missing, and what they give is dropped
    before the end. Of `world` processes that share the cache each encodes its part: an entry may be missing until all
    have returned. `extra` gives wrapped prompts that are encoded as well. What is finished stays if this is
    interrupted. Raises InputError for folders, captions and settings that can't be used.
    """
    dataset = find(settings, config, cache, rank, world, progress)
    beside = extra(dataset)  # which may refuse
    _encode_windows(dataset, vae, rank, world, progress or _silent)
    _encode_prompts(dataset, encode_text, beside, rank, world, progress or _silent)
    return dataset


def find(
    settings: Settings, config: FlowConfig, cache: Cache, rank: int = 0, world: int = 1, progress: Report | None = None
) -> Dataset:
    """As `prepare`, but nothing is encoded."""
    check_tasks(settings, config)
    config = with_noise(config, settings)
    found = find_items(settings.folders)
    _look_at(found.items, cache, rank, world, progress or _silent)
    frames, fps = settings.frames or config.defaults.frames, settings.fps or config.defaults.fps
    samples, notes = assign(found.items, config, settings.size, frames, fps, cache.facts, settings.stride)
    for reason, paths in found.left_out.items():
        notes.left_out[reason] += paths
    practice = Practice(config, fps, settings.shares, settings.caption_drop)
    samples = _practised(samples, practice, notes)
    files = {path: cache.content(path) for path in _paths(sample.item for sample in samples)}
    learned, held = split(samples, settings.held_out, lambda sample: files[sample.item.path])
    dataset = Dataset([*learned, *held], len(held), practice, _identities(settings, files), cache, notes)
    dataset.lines = _report(dataset, len(found.items), settings.batch)
    return dataset


def check_tasks(settings: Settings, config: FlowConfig) -> None:
    """Raise InputError for what a model can't practise or be shown."""
    if (settings.size or 0) > LARGEST_SIDE:
        raise InputError(f"size is {settings.size}; the largest is {LARGEST_SIDE}")
    if config.kind == "video":
        return
    others = [task for task, share in settings.shares.items() if share and task != "text"]
    if others:
        raise InputError(f"tasks: {config.name} makes pictures; {others[0]} needs a video model, practise text")
    if (settings.frames or 1) > 1:
        raise InputError(f"frames is {settings.frames}, but {config.name} makes pictures; leave it out, or set 1")


def split(
    samples: Sequence[Sample], share: float, content: Callable[[Sample], str]
) -> tuple[list[Sample], list[Sample]]:
    """Samples to learn from, and those that are held out: whole files, chosen by their content.

    So a file stays on its side when others come or go, under whatever name. From `FEW` samples on at least one file
    is held out; one is always left to learn from.
    """
    places = {sample.item.path: int(content(sample)[:12], 16) / 16**12 for sample in samples}
    ordered = sorted(set(places.values()))
    if not share or len(samples) < FEW or len(ordered) < 2:
        return list(samples), []
    limit = min(max(share, ordered[1]), ordered[-1])  # places below it are held out
    held = [sample for sample in samples if places[sample.item.path] < limit]
    return [sample for sample in samples if places[sample.item.path] >= limit], held


def _practised(samples: list[Sample], practice: Practice, notes: Notes) -> list[Sample]:
    """The samples that some task suits. Raises InputError for a task that suits none."""
    tasks = [practice.tasks(sample.bucket, bool(sample.item.source)) for sample in samples]
    for task, share in practice.shares.items():
        if share and not any(task in found for found in tasks):
            raise InputError(f"tasks: {task} is to be practised, but needs {NEEDS[task]}; add some, or leave it out")
    idle = [sample.item.path for sample, found in zip(samples, tasks, strict=True) if not found]
    if idle:
        notes.left_out[NO_TASK] += list(dict.fromkeys(idle))
    return [sample for sample, found in zip(samples, tasks, strict=True) if found]


def _identities(settings: Settings, files: dict[Path, str]) -> Identities:
    vae = find_vae(settings.vae or BUNDLED / VAE_FILE).weights
    text = find_text_encoder(settings.text_encoder or BUNDLED / TEXT_FILE, settings.tokenizer)
    return Identities(files, identity(vae.files), identity(text.weights.files, text.tokenizer.to_str()))


def _paths(items: Iterable[Item]) -> list[Path]:
    """All files of some items, sources too, once each."""
    return list(dict.fromkeys(path for item in items for path in (item.path, item.source) if path))


def _look_at(items: Sequence[Item], cache: Cache, rank: int, world: int, progress: Report) -> None:
    """Examine all files; every process begins with others, so that each finds most of the work done."""
    paths = _paths(items)
    ordered = [path for turn in range(world) for path in paths[(rank + turn) % world :: world]]
    for done, path in enumerate(ordered):
        progress(Progress("read", done, len(ordered)))
        cache.facts(path)
    progress(Progress("read", len(ordered), len(ordered)))


# Encoding


@dataclass
class Reading:
    """What is needed of one file at one size: entries by first frame and number of frames."""

    path: Path
    height: int
    width: int
    spans: dict[tuple[int, int], Window] = field(default_factory=dict)


def _encode_windows(dataset: Dataset, load: Callable[[], VAE], rank: int, world: int, progress: Report) -> None:
    """Encode this process's share of the windows that are missing."""
    readings = _missing(dataset, rank, world)
    if not readings:
        return
    vae, done, total = load(), 0, sum(len(reading.spans) for reading in readings)
    dataset.practice.config.check_vae(vae.channels, vae.spatial, vae.temporal)
    for reading in readings:
        for window, latents in _encoded(dataset, reading, vae):
            dataset.cache.put(window, latents)
            done += 1
            progress(Progress("encode", done, total))
    del vae
    _give_back()


def _missing(dataset: Dataset, rank: int, world: int) -> list[Reading]:
    """What isn't in the cache of this process's share, by file and size, in a fixed order. All is shared out before it
    is looked for: what others have written meanwhile must not move the shares."""
    wanted: dict[tuple, Reading] = {}
    for sample in dataset.samples:
        for window, part in dataset.windows(sample).items():
            path = sample.item.source if part == "source" else sample.item.path
            reading = wanted.setdefault(
                (window.file, window.height, window.width), Reading(path, window.height, window.width)
            )
            reading.spans[window.start, window.frames] = window
    mine = list(wanted.values())[rank::world]
    for reading in mine:
        reading.spans = {span: one for span, one in reading.spans.items() if not dataset.cache.has(one)}
    return [reading for reading in mine if reading.spans]


def _encoded(dataset: Dataset, reading: Reading, vae: VAE) -> Iterator[tuple[Window, Tensor]]:
    """Each window of a file with its latents (C, T, h, w). Raises InputError if the file has changed meanwhile."""
    cache, path, fps = dataset.cache, reading.path, Fraction(dataset.practice.fps)
    pixels = read_windows(path, cache.facts(path), reading.height, reading.width, fps, list(reading.spans))
    for span, frames in pixels:
        window = reading.spans[span]
        latents = _latents_of(vae, frames, path)
        if cache.content(path) != window.file:
            raise InputError(f"{path} has changed while it was read; run it again")
        yield window, latents


@torch.no_grad()
def _latents_of(vae: VAE, frames: Tensor, path: Path) -> Tensor:
    """(F, 3, H, W) to the posterior's mean, (C, T, h, w) float32."""
    clip = frames.transpose(0, 1).unsqueeze(0)
    try:
        latents = vae.encode(clip.squeeze(2)).unsqueeze(2) if vae.kind == "image" else vae.encode(clip)
    except NonFiniteError as error:
        raise NonFiniteError(f"{path}: {error}") from None
    return latents[0].float()


def _encode_prompts(
    dataset: Dataset, load: Callable[[], TextEncoder], extra: Sequence[str], rank: int, world: int, progress: Report
) -> None:
    """Encode this process's share of the prompts that are missing: one by one, so that an embedding depends on its
    prompt alone."""
    notes = {key: dataset.cache.note(key) for key in map(dataset.text, dataset.prompts(extra))}
    missing = [key for key in list(notes)[rank::world] if notes[key] is None]
    if missing:
        notes |= _encoded_prompts(dataset, load(), missing, progress)
        _give_back()
    if cut := [note for note in notes.values() if note]:
        length = dataset.practice.config.prompt.tokens
        dataset.lines.append(f"prompts longer than {length} tokens: {len(cut)}, the first loses {cut[0][:60]!r}")


def _encoded_prompts(dataset: Dataset, encoder: TextEncoder, keys: Sequence[Text], progress: Report) -> dict[Text, str]:
    """Encode prompts; gives what was cut off each."""
    dataset.practice.config.check_text_encoder(encoder.dim)
    cut = {}
    for done, key in enumerate(keys, 1):
        encoded = encoder.encode([key.prompt], key.tokens)
        rows, cut[key] = encoded.embeddings[0], encoded.cut[0]
        length = int(rows.ne(0).any(-1).nonzero().max()) + 1
        dataset.cache.put(key, rows[:length], cut[key])
        progress(Progress("text", done, len(keys)))
    return cut


def _give_back() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _silent(progress: Progress) -> None:
    pass


# The report


def _report(dataset: Dataset, files: int, batch: int) -> list[str]:
    notes, samples = dataset.notes, dataset.samples
    used = len({sample.item.path for sample in samples})
    held = len({sample.item.path for sample in samples[len(dataset) :]})
    lines = [f"{files} files with captions, {used} used: {len(samples)} samples"]
    lines += [f"  {bucket}: {count}" for bucket, count in dataset.buckets.items()]
    lines += [f"  held out for measuring: {dataset.held}, of {_counted(held, 'file')}"] if held else []
    lines += [f"cropped: {_cropping(notes.cropped)}"] if notes.cropped else []
    lines += _counts(notes)
    lines += [f"left out, {reason}: {shortened(paths)}" for reason, paths in notes.left_out.items() if paths]
    shares = ", ".join(f"{task} {share:.0%}" for task, share in dataset.shares().items())
    return [*lines, f"practised: {shares}; {_counted(dataset.steps(batch), 'step')} of {batch} an epoch"]


def _cropping(shares: Sequence[float]) -> str:
    """How much of the files' area is cut off."""
    cut = [share for share in shares if share >= 0.005]
    if not cut:
        return "nothing"
    mean = sum(cut) / len(cut)
    return f"{len(cut)} of {len(shares)} files, by {mean:.0%} of their area on average, {max(cut):.0%} at most"


def _counts(notes: Notes) -> list[str]:
    total, lines = notes.shown + notes.trimmed, []
    if notes.trimmed:
        lines.append(f"trimmed at the ends of clips: {notes.trimmed} of {total} frames ({notes.trimmed / total:.0%})")
    told = {"enlarged": notes.enlarged, "slower than the rate, so that frames are shown twice": notes.slower}
    told["clips of which one frame is shown"] = notes.stills
    return lines + [f"{what}: {shortened(paths)}" for what, paths in told.items() if paths]


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
