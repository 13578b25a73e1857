"""Files of tensors: what is opened, what is refused, and what is said of damaged ones."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from starflow_core.errors import CheckpointError
from starflow_core.weights.flow import convert, expected_shapes, load_flow
from starflow_core.weights.tensorfiles import TensorFile

from ..weightfiles import CONFIG, METADATA, random_weights, write_pickle, write_safetensors, write_shards


def assert_holds(path: Path) -> None:
    file, weights = TensorFile.open(path), random_weights()
    assert file.shapes.keys() == weights.keys()
    assert all(torch.equal(file.tensor(name), value) for name, value in weights.items())


def test_opening_reads_no_tensor(tmp_path):
    path = write_safetensors(tmp_path / "a.safetensors")
    checkpoint = TensorFile.open(path)
    assert checkpoint.path == path
    assert checkpoint.metadata == METADATA
    assert checkpoint.shapes == expected_shapes(CONFIG)
    assert set(checkpoint.dtypes.values()) == {torch.float32}
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        checkpoint.tensor("blocks.0.sos_embed")


def test_tensor_is_exact_and_independent_of_the_file(tmp_path):
    weights = random_weights()
    for path in (write_safetensors(tmp_path / "a.safetensors"), write_pickle(tmp_path / "a.pth")):
        checkpoint = TensorFile.open(path)
        read = {name: checkpoint.tensor(name) for name in checkpoint.shapes}
        with open(path, "r+b") as file:  # in place, as a careless download would
            file.write(b"\xff" * path.stat().st_size)
        assert all(torch.equal(read[name], weights[name]) for name in weights)


def test_unaligned_header(tmp_path):
    """Older writers did not pad the header."""
    value = torch.arange(3, dtype=torch.float32)
    header = b'{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'
    assert (8 + len(header)) % 4
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + value.numpy().tobytes())
    assert torch.equal(TensorFile.open(path).tensor("x"), value)


def test_shards_by_index_and_by_folder(tmp_path):
    index = write_shards(tmp_path)
    assert_holds(index)
    assert_holds(tmp_path)
    assert [file.name[:11] for file in TensorFile.open(index).files] == ["model-00001", "model-00002"]


def test_folder_with_one_file(tmp_path):
    path = write_safetensors(tmp_path / "a.safetensors")
    assert TensorFile.open(tmp_path).path == path


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"model": w, "step": 3}, lambda w: {"state_dict": w}])
def test_pickle_wrappings(tmp_path, wrap):
    path = write_pickle(tmp_path / "a.pth", wrap(random_weights()))
    assert_holds(path)


def test_parallel_prefix(tmp_path):
    weights = {f"module.{name}": value for name, value in random_weights().items()}
    assert_holds(write_pickle(tmp_path / "a.pth", weights))


def test_missing_file_and_folders_without_choice(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere\.safetensors"):
        TensorFile.open(tmp_path / "nowhere.safetensors")
    with pytest.raises(CheckpointError, match="holds no safetensors file"):
        TensorFile.open(tmp_path)
    write_safetensors(tmp_path / "a.safetensors")
    write_safetensors(tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"several checkpoints \(a.safetensors, b.safetensors\)"):
        TensorFile.open(tmp_path)


def test_unknown_kind_of_file(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"a\.gguf is no \.safetensors"):
        TensorFile.open(path)


@pytest.mark.parametrize("fraction", [0, 0.0001, 0.01, 0.3, 0.9])
def test_truncated_safetensors(tmp_path, fraction):
    path = write_safetensors(tmp_path / "a.safetensors")
    data = path.read_bytes()
    cut = int(len(data) * fraction)
    path.write_bytes(data[:cut])
    with pytest.raises(CheckpointError, match=rf"a\.safetensors is truncated.*found {cut}\b"):
        TensorFile.open(path)


def test_truncated_data_says_expected_and_found(tmp_path):
    path = write_safetensors(tmp_path / "a.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=f"truncated: expected {len(data)} bytes, found {len(data) - 1}"):
        TensorFile.open(path)
    path.write_bytes(data + b"x")
    with pytest.raises(CheckpointError, match=f"corrupt: expected {len(data)} bytes, found {len(data) + 1}"):
        TensorFile.open(path)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"x": 1}',
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
        b'{"x": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"x": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        b"[" * 50_000,
    ],
)
def test_corrupt_header(tmp_path, header):
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match=r"header of .* is corrupt"):
        TensorFile.open(path)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "web page"),
    ],
)
def test_failed_downloads_are_recognised(tmp_path, name, content, found):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=found):
        TensorFile.open(path)


@pytest.mark.parametrize("fraction", [0, 0.0001, 0.02, 0.5, 0.999])
def test_truncated_pickle(tmp_path, fraction):
    path = write_pickle(tmp_path / "a.pth")
    data = path.read_bytes()
    cut = int(len(data) * fraction)
    path.write_bytes(data[:cut])
    with pytest.raises(CheckpointError, match=rf"a\.pth.* (found )?\(?{cut} bytes"):
        TensorFile.open(path)


def test_corrupt_pickle(tmp_path):
    path = write_pickle(tmp_path / "a.pth")
    data = bytearray(path.read_bytes())
    start = data.index(b"data.pkl")
    data[start + 40 : start + 400] = bytes(360)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"a\.pth (was refused|is corrupt)"):
        TensorFile.open(path)


def test_pickle_without_tensors(tmp_path):
    with pytest.raises(CheckpointError, match="a dictionary of epoch, lr"):
        TensorFile.open(write_pickle(tmp_path / "a.pth", {"epoch": 1, "lr": 2.0}))
    with pytest.raises(CheckpointError, match="but a list"):
        TensorFile.open(write_pickle(tmp_path / "b.pth", [1, 2]))


class Payload:
    def __init__(self, marker: Path):
        self.command = f"echo ran > {marker}"

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("form", ["archive", "legacy", "plain"])
def test_pickle_that_would_run_code_is_refused(tmp_path, form):
    marker, path = tmp_path / "marker", tmp_path / "a.pth"
    content = {**random_weights(), "payload": Payload(marker)}
    if form == "plain":
        path.write_bytes(pickle.dumps(Payload(marker)))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "archive")
    for use in (TensorFile.open, load_flow, lambda p: convert(p, tmp_path / "b.safetensors")):
        with pytest.raises(CheckpointError, match="If you trust its source") as refusal:
            use(path)
    if form == "archive":
        assert "system" in str(refusal.value)
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]
    # The payload does work: whoever unpickled it would have left the marker.
    pickle.loads(path.read_bytes()) if form == "plain" else torch.load(path, weights_only=False)
    assert marker.exists()


def test_missing_shard(tmp_path):
    index = write_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00002\.safetensors"):
        TensorFile.open(index)


def test_single_shard_names_the_index(tmp_path):
    write_shards(tmp_path)
    with pytest.raises(CheckpointError, match=r"one of 2 shards; open their \.safetensors\.index\.json"):
        TensorFile.open(tmp_path / "model-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "no index of shards"),
        ('{"weight_map": 3}', "no index of shards"),
        ('{"weight_map": {"x": "../a.safetensors"}}', r"outside its folder, \.\./a"),
        ('{"weight_map": {"x": "model-00001-of-00002.safetensors"}}', "lists tensors that aren't there: x in"),
    ],
)
def test_broken_index(tmp_path, index, message):
    path = write_shards(tmp_path)
    path.write_text(index)
    with pytest.raises(CheckpointError, match=message):
        TensorFile.open(path)
