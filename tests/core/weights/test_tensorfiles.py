"""Files of tensors: what is opened, what is refused, and what is said of damaged ones."""

from __future__ import annotations

import os
import pickle
import stat
import subprocess
import sys
import weakref
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from starflow_core.errors import CheckpointError, InputError, NonFiniteError
from starflow_core.weights import tensorfiles
from starflow_core.weights.flow import convert, expected_shapes, load_flow
from starflow_core.weights.tensorfiles import TensorFile, save_tensors, write_tensors

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


@pytest.fixture
def mapping(monkeypatch):
    """Files are mapped, as by safetensors before 0.8."""
    monkeypatch.setattr(tensorfiles, "MAPS", True)
    monkeypatch.setattr(tensorfiles, "BACKEND", {})


def test_a_mapped_tensor_is_independent_of_the_file(tmp_path, mapping):
    test_tensor_is_exact_and_independent_of_the_file(tmp_path)


CUT_WHILE_MAPPED = """
import os, sys
from starflow_core.errors import CheckpointError
from starflow_core.weights import tensorfiles
tensorfiles.MAPS, tensorfiles.BACKEND = True, {}
file = tensorfiles.TensorFile.open(sys.argv[1])
os.truncate(sys.argv[1], 5000)
try:
    file.tensor("blocks.2.proj_in.weight")
except CheckpointError as error:
    print(error)
"""


def test_a_mapped_file_that_is_cut_is_an_error_not_a_crash(tmp_path):
    path = write_safetensors(tmp_path / "a.safetensors")
    result = subprocess.run([sys.executable, "-c", CUT_WHILE_MAPPED, str(path)], capture_output=True, text=True)
    assert "changed while it was read (its size has changed)" in result.stdout


@pytest.mark.skipif(tensorfiles.MAPS, reason="safetensors before 0.8")
def test_a_file_of_the_same_size_that_is_cut_in_between(tmp_path, monkeypatch):
    """The library notices where the check of the size comes too early."""
    path = write_safetensors(tmp_path / "a.safetensors")
    checkpoint, size = TensorFile.open(path), path.stat()
    path.write_bytes(path.read_bytes()[:-4])
    monkeypatch.setattr(Path, "stat", lambda self: size)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        checkpoint.tensor(max(checkpoint.shapes))


def test_types_that_are_not_known_here_are_listed(tmp_path):
    weights = {
        "a": torch.ones(2, dtype=torch.float8_e4m3fn),
        "b": torch.ones(2, dtype=torch.uint16),
        "c": torch.ones(2),
    }
    save_file(weights, tmp_path / "a.safetensors")
    file = TensorFile.open(tmp_path / "a.safetensors")
    assert file.dtypes == {"a": torch.float8_e4m3fn, "b": None, "c": torch.float32}
    assert set(file.shapes.values()) == {(2,)}


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
    file = TensorFile.open(index)
    assert [part.name[:11] for part in file.files] == ["model-00001", "model-00002"]
    assert file.metadata == METADATA


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
    mixed = {**weights, "ema.weight": torch.ones(1)}
    assert TensorFile.open(write_pickle(tmp_path / "b.pth", mixed)).shapes.keys() == mixed.keys()


def test_missing_file_and_folders_without_choice(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere\.safetensors"):
        TensorFile.open(tmp_path / "nowhere.safetensors")
    with pytest.raises(CheckpointError, match="contains no safetensors file"):
        TensorFile.open(tmp_path)
    write_safetensors(tmp_path / "a.safetensors")
    write_safetensors(tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"several checkpoints \(a.safetensors, b.safetensors\)"):
        TensorFile.open(tmp_path)


def test_unknown_kind_of_file(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"a\.gguf isn't a checkpoint; give a \.safetensors"):
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


def test_a_list_far_longer_than_any_is_refused_unread(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/data.pkl", b"]" * 20_000_000)
    with pytest.raises(CheckpointError, match="its list of tensors has 20000000 bytes"):
        TensorFile.open(tmp_path / "a.pth")


def test_pickle_without_tensors(tmp_path):
    with pytest.raises(CheckpointError, match="contains a dictionary of 'epoch', 'lr'"):
        TensorFile.open(write_pickle(tmp_path / "a.pth", {"epoch": 1, "lr": 2.0}))
    with pytest.raises(CheckpointError, match="contains a list, not a state_dict"):
        TensorFile.open(write_pickle(tmp_path / "b.pth", [1, 2]))


VIEWS = {
    "transposed": torch.arange(6.0).view(2, 3).t(),
    "part": torch.arange(100.0)[7:20],
    "every second": torch.arange(10)[::2],
    "scalar": torch.tensor(3.0),
    "nothing": torch.empty(0, 4),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "flags": torch.tensor([True, False]),
}


@pytest.mark.parametrize("protocol", [2, 4])
def test_tensors_of_an_archive_are_those_that_were_saved(tmp_path, protocol):
    torch.save(VIEWS, tmp_path / "a.pth", pickle_protocol=protocol)
    file = TensorFile.open(tmp_path / "a.pth")
    for name, value in VIEWS.items():
        read = file.tensor(name)
        assert (read.shape, read.dtype, read.is_contiguous()) == (value.shape, value.dtype, True)
        assert torch.equal(read, value)


def test_the_state_of_a_module_is_read(tmp_path):
    """Its dictionary has attributes, which are passed over."""
    module = torch.nn.Linear(3, 2)
    torch.save({"state_dict": module.state_dict(), "epoch": 3}, tmp_path / "a.pth")
    assert torch.equal(TensorFile.open(tmp_path / "a.pth").tensor("weight"), module.weight)


def quantised():
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [lambda: torch.eye(3).to_sparse(), quantised, lambda: torch.ones(3, device="meta")])
def test_tensors_of_other_kinds_are_refused(tmp_path, make):
    torch.save({"a": make()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth was refused; none of its code ran"):
        TensorFile.open(tmp_path / "a.pth")


def archive(path: Path, listing: bytes, data: bytes = b"", compression: int = zipfile.ZIP_STORED) -> Path:
    """An archive as torch.save writes it, of this pickle and one storage."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("a/data.pkl", listing)
        file.writestr("a/data/0", data)
    return path


def listed(count: int, shape: tuple, stride: tuple, offset: int = 0) -> bytes:
    """The pickle of {"x": a tensor} whose storage is said to have `count` numbers."""
    storage = f"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu{number(count)}tQ"
    sizes = "".join(f"({''.join(map(number, part))}t" for part in (shape, stride))
    tensor = f"ctorch._utils\n_rebuild_tensor_v2\n({storage}{number(offset)}{sizes}\x89}}tR"
    return f"\x80\x02}}X\x01\0\0\0x{tensor}s.".encode("latin-1")


def number(value: int) -> str:
    data = value.to_bytes(16, "little", signed=True).decode("latin-1")
    return f"\x8a\x10{data}"


def test_a_pickle_written_by_hand_is_read(tmp_path):
    data = torch.arange(4.0).numpy().tobytes()
    file = TensorFile.open(archive(tmp_path / "a.pth", listed(4, (2, 2), (2, 1)), data))
    assert torch.equal(file.tensor("x"), torch.arange(4.0).view(2, 2))


@pytest.mark.parametrize(
    "numbers",
    [
        {"count": 10**12, "shape": (4,), "stride": (1,)}, {"count": 4, "shape": (10**12,), "stride": (1,)},
        {"count": 4, "shape": (10**12,), "stride": (0,)}, {"count": 4, "shape": (4,), "stride": (1,), "offset": 1},
        {"count": 4, "shape": (-4,), "stride": (1,)}, {"count": 4, "shape": (4,), "stride": (-1,)},
        {"count": -1, "shape": (0,), "stride": (1,)}, {"count": 4, "shape": (2, 2), "stride": (1,)},
        {"count": 4, "shape": (1 << 61, 1 << 61, 1 << 61), "stride": (0, 0, 0)},
    ],
)  # fmt: skip
def test_sizes_that_the_file_does_not_have(tmp_path, numbers):
    with pytest.raises(CheckpointError, match=r"a\.pth is corrupt"):
        TensorFile.open(archive(tmp_path / "a.pth", listed(**numbers), bytes(16)))


def test_a_compressed_archive_is_refused_before_it_is_inflated(tmp_path):
    path = archive(tmp_path / "a.pth", listed(1 << 24, (1 << 24,), (1,)), bytes(1 << 26), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 17
    with pytest.raises(CheckpointError, match="compressed archive"):
        TensorFile.open(path)


def test_a_pickle_cannot_make_hashing_endless(tmp_path):
    """Sixty tuples, each twice in the next, as a key: hashing it takes 2^60 steps."""
    listing = b"\x80\x02})" + b"2\x86" * 60 + b"K\x01s."
    with pytest.raises(CheckpointError, match=r"refused|corrupt"):
        TensorFile.open(archive(tmp_path / "a.pth", listing.replace(b"2", b"q\0h\0")))


@pytest.mark.parametrize(
    "listing",
    [
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x08" + (10**12).to_bytes(8, "little") + b"\x85R.",
        b"\x80\x02r\xff\xff\xff\x7f.", b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b".", b"",
        b"\x80\x02ccollections\nOrderedDict\n]\x85R.", b"\x80\x02" + b"(" * 100_000 + b".",
    ],
)  # fmt: skip
def test_a_pickle_allocates_nothing_it_names(tmp_path, listing):
    with pytest.raises(CheckpointError, match=r"a\.pth"):
        TensorFile.open(archive(tmp_path / "a.pth", listing))


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
        ("{", "isn't an index of shards"),
        ('{"weight_map": 3}', "isn't an index of shards"),
        ('{"weight_map": {"x": "../a.safetensors"}}', r"outside its folder, \.\./a"),
        ('{"weight_map": {"x": "model-00001-of-00002.safetensors"}}', "lists tensors that aren't there: x in"),
    ],
)
def test_broken_index(tmp_path, index, message):
    path = write_shards(tmp_path)
    path.write_text(index)
    with pytest.raises(CheckpointError, match=message):
        TensorFile.open(path)


# Writing


def test_saved_tensors(tmp_path):
    path, tensors = tmp_path / "new" / "a.safetensors", {"b": torch.randn(3, 4).T, "a": torch.ones(())}
    for metadata in ({"license": "none"}, {"title": "again"}):
        save_tensors(tensors, path, "bf16", metadata)
        assert TensorFile.open(path).metadata == metadata
    saved = load_file(path)
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], value.bfloat16()) for name, value in tensors.items())
    assert os.listdir(path.parent) == [path.name]


def test_equal_content_gives_equal_bytes(tmp_path):
    tensors, metadata = {"b": torch.ones(3), "a": torch.zeros(2, 2)}, {key: key * 2 for key in "qwertyuiop"}
    for name in "ab":
        save_tensors(tensors, tmp_path / f"{name}.safetensors", "fp32", metadata)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_saved_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    save_tensors({"a": torch.ones(1)}, tmp_path / "a.safetensors", "fp32", {})
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_save_that_fails_keeps_the_earlier_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors({"a": torch.ones(1)}, path, "fp32", {})
    before = path.read_bytes()
    for bad, error in ((float("nan"), NonFiniteError), (1e30, CheckpointError)):
        with pytest.raises(error, match=r"b of a\.safetensors"):
            save_tensors({"a": torch.ones(1), "b": torch.tensor([1, bad])}, path, "fp16", {})
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(InputError, match=r"a\.safetensors could not be written: .*[Tt]oo ?[Ll]arge"):
            save_tensors({"a": torch.ones(20_000)}, path, "fp32", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_written_tensors_are_in_memory_one_at_a_time(tmp_path):
    shapes = {f"layer{i}": (50, i + 1) for i in range(5)}
    made = []

    def tensors():
        for shape in shapes.values():
            assert not any(ref() is not None for ref in made)
            tensor = torch.full(shape, float(len(made)))
            made.append(weakref.ref(tensor))
            yield tensor
            del tensor

    layout = {name: (shape, torch.float32) for name, shape in shapes.items()}
    write_tensors(tmp_path / "a.safetensors", layout, {"title": "x"}, tensors())
    written = TensorFile.open(tmp_path / "a.safetensors")
    assert written.shapes == shapes
    assert written.metadata == {"title": "x"}
    assert [written.tensor(name).unique().item() for name in shapes] == [0, 1, 2, 3, 4]
