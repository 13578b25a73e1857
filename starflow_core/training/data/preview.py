"""A contact sheet of what a model will see: each sample as it is cropped, and as the VAE gives it back."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...control import Progress
from ...errors import InputError
from ...media import fit
from ...media.pixels import to_bytes
from ...model.vae.codec import VAE
from ...parts import replacing
from .buckets import Bucket, Sample
from .dataset import Dataset

MOST = 48  # samples on a sheet
WIDTH, MARGIN, GAP = 1420, 32, 24  # of the sheet, in pixels
SIDE = 144  # of a square of the same area as a frame
LINES = 3  # of a caption
PAPER, INK, FAINT = (24, 24, 28), (236, 236, 236), (150, 150, 158)
ABOUT = "As cropped, then as the VAE gives them back. Clips: first, middle and last frame. Edits: their source first."
TITLE, HEADING, TEXT, SMALL = (ImageFont.load_default(size) for size in (24, 18, 14, 12))


def write_sheet(path: Path, dataset: Dataset, vae: VAE, progress: Callable[[Progress], None] | None = None) -> None:
    """Write a PNG of at most `MOST` samples: stills, and the first, middle and last frame of clips. Raises InputError
    if it can't be written."""
    groups, made = chosen(dataset), 0
    total = sum(map(len, groups.values()))
    cards: dict[Bucket, list[Image.Image]] = {}
    for bucket, samples in groups.items():
        cards[bucket] = []
        for sample in samples:
            cards[bucket].append(_card(dataset, sample, vae))
            made += 1
            if progress:
                progress(Progress("preview", made, total))
    sheet = _sheet(dataset, cards)
    try:
        with replacing(path) as part:
            sheet.save(part, "PNG")
    except OSError as error:
        raise InputError(f"{path} could not be written ({error.strerror or error}); choose another place") from None


def chosen(dataset: Dataset) -> dict[Bucket, list[Sample]]:
    """Samples of every bucket, spread evenly over it, in turn until there are enough."""
    groups = defaultdict(list)
    for sample in dataset.samples:
        groups[sample.bucket].append(sample)
    counts = dict.fromkeys(groups, 0)
    for _ in range(MOST):
        for bucket in groups:
            if sum(counts.values()) < MOST and counts[bucket] < len(groups[bucket]):
                counts[bucket] += 1
    return {bucket: _spread(groups[bucket], counts[bucket]) for bucket in sorted(groups) if counts[bucket]}


def _spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    return [samples[i * len(samples) // count] for i in range(count)]


# One sample


def _card(dataset: Dataset, sample: Sample, vae: VAE) -> Image.Image:
    """The source of an edit, frames as they are cropped, and as they come out of the VAE, one below the other, or for
    stills beside each other; then the caption and the name."""
    shown = _shown(sample.bucket)
    rows = [dataset.frames(sample)[shown], _decoded(dataset, sample, vae)[shown]]
    if sample.item.source:
        rows.insert(0, dataset.frames(sample, "source")[shown])
    if sample.bucket.frames == 1:
        rows = [torch.cat(rows)]
    picture = _tiled([[_thumbnail(frame) for frame in row] for row in rows])
    return _captioned(picture, sample, sample in dataset.samples[len(dataset) :])


@torch.no_grad()
def _decoded(dataset: Dataset, sample: Sample, vae: VAE) -> Tensor:
    """Pixels (F, 3, H, W) of a sample's latents in the cache."""
    latents = dataset.cache.get(dataset.window(sample), str(sample.item.path)).unsqueeze(0)
    pixels = vae.decode(latents.squeeze(2)).unsqueeze(2) if vae.kind == "image" else vae.decode(latents)
    return pixels[0].transpose(0, 1).cpu()


def _shown(bucket: Bucket) -> list[int]:
    """The frames of a clip that stand for it."""
    return [0, bucket.frames // 2, bucket.frames - 1] if bucket.frames > 1 else [0]


def _thumbnail(frame: Tensor) -> Image.Image:
    height, width = frame.shape[-2:]
    scale = SIDE / (height * width) ** 0.5
    return Image.fromarray(to_bytes(fit(frame, round(height * scale), round(width * scale))))


def _tiled(rows: list[list[Image.Image]]) -> Image.Image:
    """Pictures of one size in rows, a pixel or two apart."""
    width, height = rows[0][0].size
    tiled = Image.new("RGB", (len(rows[0]) * (width + 2) - 2, len(rows) * (height + 2) - 2), PAPER)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            tiled.paste(picture, (x * (width + 2), y * (height + 2)))
    return tiled


def _captioned(picture: Image.Image, sample: Sample, held: bool) -> Image.Image:
    lines = list(_wrapped(sample.item.caption, TEXT, picture.width))
    lines = lines if len(lines) <= LINES else [*lines[: LINES - 1], _cut(lines[LINES - 1] + " ..", TEXT, picture.width)]
    card = Image.new("RGB", (picture.width, picture.height + 10 + 18 * len(lines) + 18), PAPER)
    card.paste(picture, (0, 0))
    draw, y = ImageDraw.Draw(card), picture.height + 6
    for line in lines:
        draw.text((0, y), line, INK, TEXT)
        y += 18
    about = (f", from frame {sample.start}" if sample.start else "") + (", held out" if held else "")
    name = sample.item.path.name.encode("utf-8", "replace").decode()  # it may not be text
    draw.text((0, y + 2), _cut(name + about, SMALL, picture.width), FAINT, SMALL)
    return card


def _wrapped(text: str, font, width: int) -> Iterator[str]:
    """Lines of a text that are not wider; a word that is wider by itself is cut."""
    line = ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if line and font.getlength(longer) > width:
            yield line
            longer = word
        line = _cut(longer, font, width)
    yield line


def _cut(text: str, font, width: int) -> str:
    """The text, or as much of it as there is room for."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "..") > width:
        text = text[:-1]
    return text + ".."


# The sheet


def _sheet(dataset: Dataset, cards: dict[Bucket, list[Image.Image]]) -> Image.Image:
    """All cards below the headings of their buckets."""
    counts = Counter(sample.bucket for sample in dataset.samples)
    strips = [_heading(f"{sum(map(len, cards.values()))} of {len(dataset.samples)} samples", TITLE, 34, INK)]
    strips.append(_heading(ABOUT, TEXT, 38, FAINT))
    for bucket, group in cards.items():
        strips.append(_heading(f"{bucket}: {counts[bucket]}", HEADING, 34, INK))
        strips += [_beside(row) for row in _rows(group)]
    sheet = Image.new("RGB", (WIDTH, 2 * MARGIN + sum(strip.height for strip in strips)), PAPER)
    y = MARGIN
    for strip in strips:
        sheet.paste(strip, (MARGIN, y))
        y += strip.height
    return sheet


def _heading(text: str, font: ImageFont.FreeTypeFont, height: int, colour: tuple[int, int, int]) -> Image.Image:
    strip = Image.new("RGB", (WIDTH - 2 * MARGIN, height), PAPER)
    ImageDraw.Draw(strip).text((0, 0), text, colour, font)
    return strip


def _beside(cards: Sequence[Image.Image]) -> Image.Image:
    """A row of cards, with the gap below it."""
    strip = Image.new("RGB", (WIDTH - 2 * MARGIN, max(card.height for card in cards) + GAP), PAPER)
    x = 0
    for card in cards:
        strip.paste(card, (x, 0))
        x += card.width + GAP
    return strip


def _rows(cards: Sequence[Image.Image]) -> Iterator[list[Image.Image]]:
    """As many cards in a row as fit; one that is too wide has a row to itself."""
    row, width = [], 0
    for card in cards:
        if row and width + card.width > WIDTH - 2 * MARGIN:
            yield row
            row, width = [], 0
        row.append(card)
        width += card.width + GAP
    yield row
