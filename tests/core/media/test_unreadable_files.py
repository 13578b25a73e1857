"""Files that cannot be read."""

from __future__ import annotations

import numpy as np
import pytest

from starflow_core.errors import InputError
from starflow_core.media import read_image, read_metadata, read_video, write_video
from tests.core.media.samples import noise


@pytest.mark.parametrize("read", [read_image, read_video, read_metadata])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp", "a.mp4", "a.webm"])
def test_unreadable_files(tmp_path, read, name, capfd):
    path = tmp_path / name
    with pytest.raises(InputError, match="no such file or folder; check the path"):
        read(path)
    for content in (b"", b"just a text", np.random.default_rng(0).bytes(5000)):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"cannot be read as a .*export it again") as caught:
            read(path)
        assert str(path) in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.webp", "a.png", "a.jpg"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.9, 0.97])
def test_truncated_files(tmp_path, name, part, capfd):
    path = tmp_path / name
    write_video(path, noise(1 if name[2:] in ("png", "jpg") else 20, 64, 64, cell=2), 16)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(InputError, match=rf"{name}.*again"):
        read_video(path)
    assert capfd.readouterr() == ("", "")


def test_mp4_cut_between_frames_is_truncated(tmp_path):
    """The decoder alone would give a shorter clip."""
    import av

    path = tmp_path / "a.mp4"
    write_video(path, noise(12, 64, 64), 16)
    with av.open(str(path)) as container:
        ends = [packet.pos + packet.size for packet in container.demux() if packet.size]
    path.write_bytes(path.read_bytes()[: ends[6]])
    with pytest.raises(InputError, match="truncated"):
        read_video(path)


def test_missing_things(tmp_path):
    for name in ("nothing", "nothing/", "nothing/%d.png"):
        for read in (read_video, read_metadata):
            with pytest.raises(InputError, match="no such file or folder"):
                read(f"{tmp_path}/{name}")
    with pytest.raises(InputError, match="is a folder"):
        read_image(tmp_path)
    with pytest.raises(InputError, match="holds no pictures"):
        read_video(tmp_path)
    with pytest.raises(InputError, match="at least 1"):
        read_video(tmp_path / "a.mp4", frames=0)
