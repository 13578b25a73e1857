"""Model folders, which are empty until a test adds some, the input and the output folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

WEIGHTS = {".safetensors", ".pth", ".pt", ".ckpt"}
folder_names_and_paths: dict[str, tuple[list[str], set[str]]] = {
    name: ([], WEIGHTS) for name in ("diffusion_models", "text_encoders", "vae")
}


def get_folder_paths(folder: str) -> list[str]:
    return list(folder_names_and_paths[folder][0])


def get_filename_list(folder: str) -> list[str]:
    roots, suffixes = folder_names_and_paths[folder]
    files = {path.relative_to(root) for root in roots for path in Path(root).rglob("*") if path.is_file()}
    return sorted(str(file) for file in files if file.suffix.lower() in suffixes)


def get_full_path(folder: str, name: str) -> str | None:
    """A file; folders are none."""
    places = (Path(root, name) for root in get_folder_paths(folder))
    return next((str(path) for path in places if path.is_file()), None)


input_directory = ""


def get_input_directory() -> str:
    return input_directory


def set_input_directory(folder: str) -> None:
    global input_directory
    input_directory = folder


def get_output_directory() -> str:
    raise NotImplementedError("a test that saves names a folder")


get_temp_directory = get_output_directory


def get_save_image_path(prefix: str, output: str, width: int = 0, height: int = 0) -> tuple[str, str, int, str, str]:
    """Folder, file name, next free number, folder below `output`, and the prefix with its tokens replaced."""
    prefix = prefix.replace("%width%", str(width)).replace("%height%", str(height))
    subfolder, name = os.path.split(os.path.normpath(prefix))
    folder = Path(output, subfolder)
    folder.mkdir(parents=True, exist_ok=True)
    taken = (re.match(rf"{re.escape(name)}_(\d+)", entry.name) for entry in folder.iterdir())
    number = 1 + max((int(found[1]) for found in taken if found), default=0)
    return str(folder), name, number, subfolder, prefix
