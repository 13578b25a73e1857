"""Checkpoints of flows, text encoders and VAEs with something wrong in them: configurations, headers, pickles."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import subprocess
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path

import torch
from safetensors.torch import load, save

from starflow_core.bundled import FLOW_FILE, TEXT_FILE, VAE_FILE
from starflow_core.weights.flow import CONFIG_KEY, convert, load_flow, quick_look
from starflow_core.weights.text import T5_CONFIG_KEY, load_text_encoder
from starflow_core.weights.vae import METADATA_KEY, load_vae
from tests.core import tiny
from tests.core.weightfiles import METADATA, write_pickle, write_shards

from .case import Case
from .values import wrong_bytes, wrong_json

READERS = {FLOW_FILE: load_flow, TEXT_FILE: load_text_encoder, VAE_FILE: load_vae}
KEYS = {FLOW_FILE: CONFIG_KEY, TEXT_FILE: T5_CONFIG_KEY, VAE_FILE: METADATA_KEY}


def cases(seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    while True:
        kind = random.Random(rng.random())
        yield rng.choice(KINDS)(kind)


@lru_cache
def whole(kind: str) -> dict[str, bytes]:
    """A tiny model's files, by name."""
    with tempfile.TemporaryDirectory() as folder:
        tiny.write_model(Path(folder), kind)
        write_pickle(Path(folder) / "a.pth")
        (Path(folder) / "shards").mkdir()
        write_shards(Path(folder) / "shards")
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def read(folder: Path, files: dict[str, bytes], reader: Callable, name: str) -> None:
    """Write the files of a case, and read one."""
    for file, data in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(data)
    path = folder / name
    if reader is load_flow:
        quick_look(path)
    reader(path)
    if reader is load_flow:
        convert(path, folder / "converted.safetensors")


def case(name: str, rng: random.Random, change: Callable[[dict[str, bytes], str], None]) -> Case:
    """One of a tiny model's three files, changed, and read with the others beside it."""
    kind, file = rng.choice(("image", "video")), rng.choice(list(READERS))
    files = {key: data for key, data in whole(kind).items() if "/" not in key}
    change(files, file)
    return Case(f"{name}, {file.partition('.')[0]}", partial(read, files=files, reader=READERS[file], name=file))


def configuration(rng: random.Random) -> Case:
    """In the metadata."""

    def change(files: dict[str, bytes], file: str) -> None:
        metadata = _metadata(files[file])
        metadata[KEYS[file]] = wrong_json(json.loads(metadata[KEYS[file]]), rng)
        files[file] = save(load(files[file]), {key: _storable(text) for key, text in metadata.items()})

    return case("configuration", rng, change)


def beside(rng: random.Random) -> Case:
    """In a JSON file beside a checkpoint that says nothing, or in its folder."""
    places = {
        FLOW_FILE: (FLOW_FILE, rng.choice(("flow.json", "config.json"))),
        TEXT_FILE: ("folder/model.safetensors", "folder/config.json"),
        VAE_FILE: ("folder/diffusion_pytorch_model.safetensors", "folder/config.json"),
    }

    def change(files: dict[str, bytes], file: str) -> None:
        weights, config = places[file]
        text = wrong_json(json.loads(_metadata(files[file])[KEYS[file]]), rng).encode("utf-8", "surrogatepass")
        files[weights] = save(load(files.pop(file)))
        files[config] = wrong_bytes(text, rng) if rng.random() < 0.2 else text
        files["folder/tokenizer.json"] = files["tokenizer.json"]

    made = case("configuration beside", rng, change)
    name = made.run.keywords["name"]
    return Case(made.name, partial(made.run, name=Path(places[name][0]).parts[0]))


def entries(rng: random.Random) -> Case:
    """The entries of a safetensors file's header: types, shapes and places of tensors."""

    def change(files: dict[str, bytes], file: str) -> None:
        end = 8 + int.from_bytes(files[file][:8], "little")
        text = wrong_json(json.loads(files[file][8:end]), rng).encode("utf-8", "surrogatepass")
        files[file] = len(text).to_bytes(8, "little") + text + files[file][end:]

    return case("safetensors entries", rng, change)


def header(rng: random.Random) -> Case:
    """Bytes of a safetensors file, mostly of its header."""

    def change(files: dict[str, bytes], file: str) -> None:
        end = 8 + int.from_bytes(files[file][:8], "little")
        files[file] = wrong_bytes(files[file], rng, end if rng.random() < 0.8 else None)

    return case("safetensors bytes", rng, change)


def pickled(rng: random.Random) -> Case:
    """Bytes of a .pth, anywhere, or its entries compressed."""
    data = whole("video")["a.pth"]
    data = (
        _repacked(data, lambda listing: listing, zipfile.ZIP_DEFLATED) if rng.random() < 0.1 else wrong_bytes(data, rng)
    )
    return _pickle("pickle bytes", data)


def listing(rng: random.Random) -> Case:
    """The list of tensors within a .pth, which says what to make and how large."""
    data = _repacked(whole("video")["a.pth"], lambda listing: wrong_bytes(listing, rng), zipfile.ZIP_STORED)
    return _pickle("pickle's list", data)


def unusual(rng: random.Random) -> Case:
    """A .pth of PyTorch's older format, or with tensors that aren't plain."""
    return _pickle("pickle of another kind", _pickles()[rng.randrange(len(_pickles()))], rng)


def program(rng: random.Random) -> Case:
    """A pickle that would run a command."""
    act = rng.choice(((os.system, "true"), (eval, "__import__('os').system('true')"), (subprocess.Popen, "true")))
    tensors: dict = {"a": torch.zeros(2), "b": _Program(*act)}
    file = io.BytesIO()
    if rng.random() < 0.3:
        pickle.dump(tensors, file, rng.randrange(6))
    else:
        torch.save(
            tensors, file, _use_new_zipfile_serialization=rng.random() < 0.7, pickle_protocol=rng.randrange(2, 6)
        )
    return _pickle("pickle that would run code", file.getvalue(), rng)


class _Program:
    """Pickled as a call of `function`."""

    def __init__(self, function: Callable, argument: str):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@lru_cache
def _pickles() -> list[bytes]:
    """What torch.save can make that isn't a list of plain tensors, in both formats."""
    warnings.simplefilter("ignore")  # most are deprecated or in development
    plain, found = torch.ones(4, 4), []
    tensors = (
        plain, plain.to_sparse(), plain.to_sparse_csr(), plain.to("meta"), plain.to(torch.complex64),
        torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8), torch.nested.nested_tensor([plain, plain[:2]]),
        torch.zeros(1).expand(1 << 20, 1 << 10),
    )  # fmt: skip
    for tensor in tensors:
        for archive in (True, False):
            torch.save({"a": tensor}, file := io.BytesIO(), _use_new_zipfile_serialization=archive)
            found.append(file.getvalue())
    return found


def index(rng: random.Random) -> Case:
    """An index of shards."""
    name = "shards/model.safetensors.index.json"
    files = {key: data for key, data in whole("video").items() if key.startswith("shards/")}
    files[name] = wrong_json(json.loads(files[name]), rng).encode("utf-8", "surrogatepass")
    return Case("index of shards", partial(read, files=files, reader=load_flow, name=name))


def _pickle(name: str, data: bytes, rng: random.Random | None = None) -> Case:
    """`rng` damages it now and then."""
    if rng and rng.random() < 0.3:
        data = wrong_bytes(data, rng)
    files = {"a.pth": data, "a.json": METADATA[CONFIG_KEY].encode()}
    return Case(name, partial(read, files=files, reader=load_flow, name="a.pth"))


def _metadata(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length])["__metadata__"]


def _storable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _repacked(data: bytes, change: Callable[[bytes], bytes], compression: int) -> bytes:
    """An archive with its list of tensors changed."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(result, "w", compression) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return result.getvalue()


KINDS = (configuration, configuration, beside, entries, header, pickled, listing, unusual, program, index)
