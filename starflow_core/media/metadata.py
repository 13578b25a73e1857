"""Metadata as files hold it: JSON in a tag for each key, or all of it in one text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ..errors import InputError

Metadata = dict[str, Any]

_KEY = re.compile(r"[a-z][a-z0-9_]{0,60}")  # what every format gives back as it was; Matroska has one case only
# Set, left out or renamed by ffmpeg itself.
_CONTAINER_KEYS = {"major_brand", "minor_version", "compatible_brands", "encoder", "encoding_tool", "creation_time"}
_CONTAINER_KEYS |= {"duration", "stereo_mode", "part_number"}
_IMAGE_DESCRIPTION = 0x010E  # EXIF
_COMFYUI_TAGS = {"prompt": 0x0110, "workflow": 0x010F}  # where ComfyUI's page looks in a webp, as "key:JSON"


def check_metadata(metadata: Metadata) -> None:
    """Raise InputError for a key or value that some format could not give back."""
    for key, value in metadata.items():
        if not _is_key(key):
            raise InputError(f"metadata key {key!r}: expected a lower-case name, not one that file formats use")
        try:
            _tag(value).encode()
        except (TypeError, ValueError) as error:
            raise InputError(f"metadata {key!r} cannot be stored as JSON ({error})") from None


def encode_tags(metadata: Metadata) -> dict[str, str]:
    """A tag for each key, for formats that take Unicode."""
    return {key: _tag(value) for key, value in metadata.items()}


def decode_tags(tags: Mapping[str, str]) -> Metadata:
    """The tags that are metadata, among others that a file may have."""
    values = {}
    for key, text in tags.items():
        if _is_key(key):
            with suppress(ValueError, RecursionError):
                values[key] = json.loads(text)
    return values


def encode_text(metadata: Metadata) -> str:
    """One text, for fields that are 7-bit by their format."""
    return json.dumps(metadata, allow_nan=False)


def decode_text(text: Any) -> Metadata:
    """The inverse of `encode_text`; {} for anything else."""
    with suppress(ValueError, TypeError, RecursionError):
        values = json.loads(text)
        return values if isinstance(values, dict) else {}
    return {}


def encode_png(metadata: Metadata) -> Any:
    """What Pillow takes for a PNG: a text for each key."""
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    for key, text in encode_tags(metadata).items():
        texts.add_text(key, text)
    return texts


def encode_exif(metadata: Metadata) -> bytes:
    """An EXIF block with ComfyUI's tags, and the rest as the image's description; empty if there is none."""
    from PIL import Image

    if not metadata:
        return b""
    exif = Image.Exif()
    exif[_IMAGE_DESCRIPTION] = encode_text({k: v for k, v in metadata.items() if k not in _COMFYUI_TAGS})
    for key, tag in _COMFYUI_TAGS.items():
        if key in metadata:
            exif[tag] = f"{key}:{json.dumps(metadata[key], allow_nan=False)}"
    return exif.tobytes()


def decode_exif(exif: Mapping[int, Any]) -> Metadata:
    """The inverse of `encode_exif`, of what Pillow makes of the block."""
    values = decode_text(exif.get(_IMAGE_DESCRIPTION))
    for key, tag in _COMFYUI_TAGS.items():
        name, _, text = str(exif.get(tag, "")).partition(":")
        if name == key:
            values |= decode_tags({key: text})
    return values


def _is_key(key: str) -> bool:
    return _KEY.fullmatch(key) is not None and key not in _CONTAINER_KEYS


def _tag(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
