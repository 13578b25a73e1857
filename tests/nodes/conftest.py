"""A loaded demo, tiny models in the host's folders, the core beside the nodes, and what nodes tell the host."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from starflow_core import load_pipeline
from tests.core import tiny

from .steps import PROMPT, Loaded


@dataclass
class Told:
    """`steps` of progress bars as (value, total), `previews` as (format, picture, largest side), lines of `texts`,
    and `loads` as (patcher, bytes to leave free, whether it has to be there as a whole)."""

    steps: list = field(default_factory=list)
    previews: list = field(default_factory=list)
    texts: list = field(default_factory=list)
    loads: list = field(default_factory=list)
    nodes: set = field(default_factory=set)  # that were named with steps and texts

    def bar(self, value, total, preview, node_id=None) -> None:
        self.steps.append((value, total))
        self.nodes.add(node_id)
        if preview is not None:
            self.previews.append(preview)

    def text(self, text, node_id) -> None:
        self.texts.append(text)
        self.nodes.add(node_id)


@pytest.fixture
def told(monkeypatch):
    """Stands where a host has its server."""
    import comfy.model_management as management
    import comfy.utils

    told, load = Told(), management.load_models_gpu

    def recorded(models, memory_required=0, force_full_load=False):
        told.loads += [(model, memory_required, force_full_load) for model in models]
        load(models, memory_required=memory_required, force_full_load=force_full_load)

    server = SimpleNamespace(PromptServer=SimpleNamespace(instance=SimpleNamespace(send_progress_text=told.text)))
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", told.bar)
    monkeypatch.setattr(management, "load_models_gpu", recorded)
    monkeypatch.setitem(sys.modules, "server", server)
    return told


@pytest.fixture(scope="session")
def demo():
    return Loaded.of()


@pytest.fixture(scope="session")
def clip(demo):
    """Frames (9, 96, 96, 3) of the demo."""
    return demo.decode(demo.sample(demo.empty(), seed=1)[0])


@pytest.fixture(scope="session")
def core():
    """The demo without nodes: what they make has to be what the core makes."""
    return load_pipeline()


@pytest.fixture(scope="session")
def made(core):
    """Latents and statistics of the core's own job: 48 x 32 unless it says more."""

    def make(job=None, prompt=PROMPT, negative="", **settings):
        job = job or core.job(**{"height": 32, "width": 48, **settings})
        generation, _ = core.start(prompt, job, negative=negative)
        final = [piece.latents for piece in generation.stream() if piece.final]
        return torch.cat(final, 2), generation.statistics

    return make


@pytest.fixture
def model_folders(monkeypatch, tmp_path):
    """An empty folder for each kind of model, which the host knows."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "filename_list_cache", {}, raising=False)
    for name in ("diffusion_models", "text_encoders", "vae"):
        (tmp_path / name).mkdir()
        _, suffixes = folder_paths.folder_names_and_paths[name]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path / name)], suffixes))
    return tmp_path


@pytest.fixture(scope="session")
def tiny_image(tmp_path_factory):
    """The files of a tiny image model with random weights."""
    return tiny.write_model(tmp_path_factory.mktemp("tiny") / "image", "image")


@pytest.fixture
def image_model(model_folders, tiny_image):
    """That model, loaded by its names in the host's folders."""
    for name in ("diffusion_models", "text_encoders", "vae"):
        (model_folders / name / "image").symlink_to(tiny_image)
    return Loaded.of("image/flow.safetensors", "image/text.safetensors", "image/vae.safetensors")
