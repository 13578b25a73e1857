"""Video Combine: what is in the files, and what the page is told of them."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from starflow_core import read_metadata, read_video

from . import pack
from .steps import NODES

GRAPH = {"prompt": {"1": {"inputs": {"seed": 1}}}, "extra_pnginfo": {"workflow": {"nodes": []}}}


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """The host's output folder."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    return tmp_path


def combine(images, hidden=None, **inputs):
    return pack.run(NODES["STARFlowVideoCombine"], hidden, images=images, **inputs)


def pictures(*shape: int) -> torch.Tensor:
    """Images in 0..1 that bytes hold exactly."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)) / 255


@pytest.mark.parametrize("format", ["mp4", "webm", "gif", "webp"])
def test_clips_are_written_shown_and_given_on(folder, clip, format):
    images = torch.cat((clip, clip.flip(0)))
    output = combine(images, frame_rate=12.5, format=format, filename_prefix="a/b", clip_frames=9)
    files = sorted((folder / "a").iterdir())
    assert [file.name for file in files] == [f"b_00001_.{format}", f"b_00002_.{format}"]
    for file, wanted, video in zip(files, images.split(9), *output.args, strict=True):
        written = read_video(file)
        assert written.fps == 12.5
        assert ((written.pixels + 1) / 2 - wanted.movedim(-1, 1)).abs().mean() < 0.05
        given = video.get_components()
        assert torch.equal(given.images, wanted)
        assert given.frame_rate == Fraction(25, 2)
    assert output.ui["images"] == [{"filename": file.name, "subfolder": "a", "type": "output"} for file in files]
    assert output.ui["animated"] == (format != "gif",)


def test_a_png_sequence_loses_nothing(folder):
    images = pictures(3, 20, 30, 4)
    output = combine(images, format="png sequence", filename_prefix="b")
    names = sorted(file.name for file in (folder / "b_00001_").glob("*.png"))
    assert len(names) == 3
    assert output.ui["images"] == [{"filename": n, "subfolder": "b_00001_", "type": "output"} for n in names]
    assert output.ui["animated"] == (False,)
    pixels = read_video(folder / "b_00001_").pixels
    torch.testing.assert_close((pixels + 1) / 2, images[..., :3].movedim(-1, 1), atol=1e-6, rtol=0)


def test_rates_of_broadcast_are_met(folder):
    (video,) = combine(pictures(2, 16, 16, 3), frame_rate=29.97002997).args[0]
    assert video.get_components().frame_rate == Fraction(30000, 1001)


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_rate_that_is_none_is_refused(folder, rate):
    with pytest.raises(Exception, match=rf"frame_rate is {rate:g}; give frames per second, such as 16"):
        combine(pictures(2, 16, 16, 3), frame_rate=rate)
    assert not list(folder.iterdir())


def test_files_are_numbered_on_and_named_by_their_size(folder):
    for _ in range(2):
        output = combine(pictures(2, 16, 32, 3), format="webp", filename_prefix="%width%x%height%")
    assert [file["filename"] for file in output.ui["images"]] == ["32x16_00002_.webp"]
    assert output.ui["images"][0]["subfolder"] == ""
    assert sorted(file.name for file in folder.iterdir()) == ["32x16_00001_.webp", "32x16_00002_.webp"]


def test_quality_costs_bytes(folder, clip):
    for quality in (10, 95):
        combine(clip, format="webp", quality=quality, filename_prefix="q")
    small, large = (file.stat().st_size for file in sorted(folder.iterdir()))
    assert small < large / 2


@pytest.mark.parametrize("format", ["mp4", "webm", "webp", "png sequence"])
def test_the_graph_is_in_the_file(folder, format):
    combine(pictures(2, 16, 16, 3), GRAPH, format=format, filename_prefix="m")
    (file,) = folder.iterdir()
    assert read_metadata(file) == {"prompt": GRAPH["prompt"], "workflow": GRAPH["extra_pnginfo"]["workflow"]}


def test_only_what_a_file_can_hold_is_kept(folder):
    """The host notes NaN for nodes that always run; other packs' keys may be anything."""
    hidden = {"prompt": {"1": {"is_changed": [float("nan")]}}, "extra_pnginfo": {"Other Pack": 1, "workflow": {}}}
    combine(pictures(2, 16, 16, 3), hidden, format="webp", filename_prefix="m")
    assert read_metadata(folder / "m_00001_.webp") == {"prompt": {"1": {"is_changed": [None]}}, "workflow": {}}
    combine(pictures(2, 16, 16, 3), format="webp", filename_prefix="n")
    assert read_metadata(folder / "n_00001_.webp") == {}


def test_a_host_that_keeps_graphs_out_of_files_is_obeyed(monkeypatch, folder):
    import comfy.cli_args

    monkeypatch.setattr(comfy.cli_args.args, "disable_metadata", True)
    combine(pictures(2, 16, 16, 3), GRAPH, format="webp", filename_prefix="m")
    assert read_metadata(folder / "m_00001_.webp") == {}


def test_clips_of_a_batch_become_files_of_their_own(folder, demo):
    """Decode notes how long a clip is; what is asked for counts more, and other nodes lose the note."""
    images = demo.decode(demo.empty(width=32, height=32, frames=5, batch_size=2))
    given = {"format": "webp", "filename_prefix": "b"}
    assert len(combine(images, **given).args[0]) == 2
    assert len(combine(images, **given, clip_frames=10).args[0]) == 1
    assert len(combine(images.clone(), **given).args[0]) == 1
    with pytest.raises(
        Exception, match="10 frames can't be split into clips of 4; clip_frames has to divide their number"
    ):
        combine(images, **given, clip_frames=4)


def test_trimmed_clips_of_a_batch_are_told_apart(folder, demo, clip):
    latent = demo.empty(width=32, height=32, batch_size=2)
    (context,) = pack.run(
        NODES["STARFlowExtend"], model=demo.model, images=clip, vae=demo.vae, latent=latent, keep=1
    ).args
    images = demo.decode(demo.sample(latent, context=context)[0], trim_overlap=True)
    assert len(images) == 16
    assert [len(video.get_components().images) for video in combine(images, format="webp").args[0]] == [8, 8]
