"""The recorded tensors. STARFLOW_GOLDEN names another folder with the same layout."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import safe_open

FOLDER = Path(os.environ.get("STARFLOW_GOLDEN") or Path(__file__).parents[1] / "golden")


def load(name: str) -> tuple[dict, dict, dict]:
    """Tensors, config and notes of a golden file."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return tensors, json.loads(metadata.get("config", "{}")), json.loads(metadata.get("notes", "{}"))
