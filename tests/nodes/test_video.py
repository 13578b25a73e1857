"""Video Combine: what is in the files, and what the page is told of them."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
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


@pytest.fixture
def temp(monkeypatch, tmp_path_factory):
    """The host's folder for what isn't kept."""
    import folder_paths

    path = tmp_path_factory.mktemp("temp")
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(path))
    return path


def combine(images, hidden=None, **inputs):
    return pack.run(NODES["STARFlowVideoCombine"], hidden, images=images, **inputs)


def pictures(*shape: int) -> torch.Tensor:
    """Images in 0..1 that bytes hold exactly."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)) / 255


FILES = {"mp4 (h265)": "mp4", "mp4 (av1)": "mp4"}  # endings of formats that have another name


def tone(hertz: float, seconds: float, channels: int = 2, rate: int = 44100) -> torch.Tensor:
    """A sound (1, channels, n)."""
    wave = 0.5 * torch.sin(2 * torch.pi * hertz * torch.arange(int(seconds * rate)) / rate)
    return wave.expand(1, channels, -1)


def heard(file) -> tuple[float, int, float]:
    """Seconds, channels and the loudest frequency of a file's sound."""
    import av

    with av.open(str(file)) as container:
        blocks = [frame.to_ndarray() for frame in container.decode(audio=0)]
        rate = container.streams.audio[0].rate
    samples = torch.from_numpy(np.concatenate(blocks, 1))
    loudest = torch.fft.rfft(samples[0]).abs().argmax() * rate / samples.shape[1]
    return samples.shape[1] / rate, len(samples), float(loudest)


@pytest.mark.parametrize("format", ["mp4", "webm", "gif", "webp", "mp4 (h265)", "mp4 (av1)"])
def test_clips_are_written_shown_and_given_on(folder, clip, format):
    images = torch.cat((clip, clip.flip(0)))
    output = combine(images, frame_rate=12.5, format=format, filename_prefix="a/b", clip_frames=9)
    files = sorted((folder / "a").iterdir())
    ending = FILES.get(format, format)
    assert [file.name for file in files] == [f"b_00001_.{ending}", f"b_00002_.{ending}"]
    for file, wanted, video in zip(files, images.split(9), *output.args, strict=True):
        written = read_video(file)
        assert written.fps == 12.5
        assert ((written.pixels + 1) / 2 - wanted.movedim(-1, 1)).abs().mean() < 0.05
        given = video.get_components()
        assert torch.equal(given.images, wanted)
        assert given.frame_rate == Fraction(25, 2)
        assert given.audio is None
    assert output.ui["images"] == [{"filename": file.name, "subfolder": "a", "type": "output"} for file in files]
    assert output.ui["animated"] == (format != "gif",)


@pytest.mark.parametrize(("format", "codec"), [("mp4 (h265)", "hevc"), ("mp4 (av1)", "av1"), ("mp4", "h264")])
def test_the_codec_is_the_one_that_was_chosen(folder, clip, format, codec):
    import av

    combine(clip, format=format, filename_prefix="c")
    with av.open(str(folder / "c_00001_.mp4")) as container:
        found = container.streams.video[0]
        assert codec in (found.codec_context.codec.canonical_name, found.codec_context.name)
        assert found.codec_tag == {"hevc": "hvc1", "av1": "av01", "h264": "avc1"}[codec]


def test_encoders_that_are_missing_are_neither_listed_nor_taken(monkeypatch):
    import av

    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx265"})
    node = NODES["STARFlowVideoCombine"]
    fresh = type(node.__name__, (node,), {})
    (options,) = (given.info()[1] if hasattr(given, "info") else given.as_dict() for given in
                  fresh.define_schema().inputs if given.id == "format")  # fmt: skip
    assert options["options"] == ["mp4", "webm", "gif", "webp", "png sequence", "mp4 (av1)"]
    message = node.validate_inputs(format="mp4 (h265)")
    assert message == "format 'mp4 (h265)' needs an encoder that this PyAV doesn't have; choose mp4"


@pytest.mark.parametrize("format", ["mp4", "webm", "mp4 (h265)", "mp4 (av1)"])
def test_sound_goes_along_and_ends_with_the_frames(folder, clip, format):
    audio = {"waveform": tone(440, 5), "sample_rate": 44100}
    (given,) = combine(clip, frame_rate=6.0, format=format, filename_prefix="s", audio=audio).args[0]
    seconds, channels, hertz = heard(next(folder.iterdir()))
    assert seconds == pytest.approx(1.5, abs=0.05)
    assert channels == 2
    assert hertz == pytest.approx(440, abs=2)
    assert torch.equal(given.get_components().audio["waveform"], audio["waveform"])


def test_sound_may_be_a_videos_or_each_clips_own(folder, clip):
    host = pack.module("nodes.host")
    source = host.video(clip, Fraction(16), {"waveform": tone(660, 1, 1), "sample_rate": 44100})
    combine(clip, frame_rate=9.0, filename_prefix="v", video=source)
    assert heard(folder / "v_00001_.mp4") == (pytest.approx(1, abs=0.05), 1, pytest.approx(660, abs=2))
    both = {"waveform": torch.cat((tone(330, 1), tone(550, 1))), "sample_rate": 44100}
    combine(torch.cat((clip, clip)), clip_frames=9, frame_rate=9.0, filename_prefix="a", audio=both, video=source)
    assert [round(heard(folder / f"a_0000{i}_.mp4")[2], -1) for i in (1, 2)] == [330, 550]
    combine(clip, filename_prefix="n", video=host.video(clip, Fraction(16)))  # a silent one
    with pytest.raises(Exception, match="audio has 2 sounds for 1 clips; give one, or one each"):
        combine(clip, audio=both)


def test_formats_without_sound_take_none(folder, clip):
    audio = {"waveform": tone(440, 1), "sample_rate": 44100}
    for format in ("gif", "webp", "png sequence"):
        (given,) = combine(clip, format=format, filename_prefix="s", audio=audio).args[0]
        assert given.get_components().audio is not None


def test_what_is_only_shown_is_in_the_temp_folder(folder, temp, clip):
    output = combine(clip, filename_prefix="a/b", save_output=False)
    assert not list(folder.iterdir())
    assert [file.name for file in (temp / "a").iterdir()] == ["b_00001_.mp4"]
    assert output.ui["images"] == [{"filename": "b_00001_.mp4", "subfolder": "a", "type": "temp"}]
    assert len(output.args[0]) == 1


@pytest.mark.parametrize("format", ["gif", "webp"])
@pytest.mark.parametrize("plays", [0, 1, 3])
def test_animations_play_as_often_as_asked(folder, clip, format, plays):
    from PIL import Image

    combine(clip, format=format, filename_prefix="l", loop_count=plays)
    with Image.open(next(folder.iterdir())) as picture:
        told = picture.info.get("loop")
    repeats = {0: 0, 1: None, 3: 2} if format == "gif" else {0: 0, 1: 1, 3: 3}  # a gif counts those after the first
    assert told == repeats[plays]


def test_pingpong_goes_back_without_standing_still(folder):
    images = pictures(4, 16, 16, 3)
    (video,) = combine(images, format="png sequence", filename_prefix="p", pingpong=True).args[0]
    assert torch.equal(video.get_components().images, images[[0, 1, 2, 3, 2, 1]])
    assert len(list((folder / "p_00001_").glob("*.png"))) == 6
    for count in (1, 2):
        (video,) = combine(images[:count], format="webp", pingpong=True).args[0]
        assert len(video.get_components().images) == count


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
