"""The packages that do the work are loaded when they are needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from starflow_core.media import VideoWriter, check_writable, read_image, read_metadata, read_video, write_video
from tests.core.media.samples import noise


def test_import_loads_no_decoder():
    code = "import sys, starflow_core.media; print(*{'av', 'imageio', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(("package", "name"), [("imageio", "a.png"), ("imageio", "a.webp"), ("av", "a.mp4")])
def test_missing_package_is_not_taken_for_a_bad_file(tmp_path, monkeypatch, package, name):
    path = tmp_path / name
    write_video(path, noise(1), 16)
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    for use in (check_writable, read_video, lambda path: VideoWriter(path, 16)):
        with pytest.raises(ModuleNotFoundError, match=package):
            use(path)
    with pytest.raises(ModuleNotFoundError, match=package):
        (read_image if package == "imageio" else read_metadata)(path)
