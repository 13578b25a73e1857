"""Entries are named by all they depend on, and a damaged one is noticed."""

from __future__ import annotations

import os
from dataclasses import fields, replace

import pytest
import torch

from starflow_core.errors import InputError
from starflow_core.training.data import cache as caches
from starflow_core.training.data.buckets import Facts
from starflow_core.training.data.cache import Cache, Text, Window, identity
from tests.core import models
from tests.core.training.data.files import write

WINDOW, TEXT = Window("f" * 64, 32, 48, 9, 5, "16.0", "v" * 64), Text("a circle", "e" * 64, 48)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.mark.parametrize("key", [WINDOW, TEXT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_come_back(cache, key, dtype):
    tensor = models.randn(4, 3, 2).to(dtype)
    assert not cache.has(key)
    cache.put(key, tensor, "cut")
    assert cache.has(key)
    assert cache.note(key) == "cut"
    found = cache.get(key, "x")
    assert found.dtype == dtype
    assert torch.equal(found, tensor)
    assert not list(cache.folder.rglob("*.part"))


@pytest.mark.parametrize("key", [WINDOW, TEXT])
def test_every_field_counts(cache, key):
    changed = [
        replace(key, **{field.name: value + (1 if isinstance(value, int) else "x")})
        for field in fields(key)
        for value in [getattr(key, field.name)]
    ]
    assert len({cache.path(one) for one in [key, *changed]}) == len(fields(key)) + 1


def test_damage_is_noticed(cache):
    cache.put(TEXT, torch.ones(4, 3))
    path = cache.path(TEXT)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(
        InputError, match=rf"{path.name}, encoded from a prompt, can't be used \(its content.*remove it"
    ):
        cache.get(TEXT, "a prompt")
    path.write_bytes(whole[:-1])
    assert not cache.has(TEXT)
    with pytest.raises(InputError, match="truncated"):
        cache.get(TEXT, "a prompt")
    path.unlink()
    with pytest.raises(InputError, match="no checkpoint at"):
        cache.get(TEXT, "a prompt")


@pytest.mark.parametrize("other", [WINDOW, replace(TEXT, tokens=5)])
def test_what_was_made_of_something_else_is_no_entry(cache, other):
    cache.put(other, torch.ones(4, 3))
    cache.path(TEXT).parent.mkdir(parents=True, exist_ok=True)
    os.replace(cache.path(other), cache.path(TEXT))
    assert not cache.has(TEXT)


def test_a_file_is_looked_at_once_and_again_when_it_changes(cache, tmp_path, monkeypatch):
    path, looked, look = write(tmp_path / "a.gif", None, 5), [], caches.look
    monkeypatch.setattr(caches, "look", lambda path: (looked.append(path), look(path))[1])
    first = cache.content(path)
    assert cache.facts(path).frames == 5
    assert Cache(cache.folder).content(path) == first
    assert len(looked) == 1
    write(path, None, 6)
    assert cache.facts(path).frames == 6
    assert cache.content(path) != first
    assert len(looked) == 2
    assert cache.content(write(tmp_path / "b.gif", None, 5)) == first


def test_an_error_is_not_kept(cache, tmp_path, monkeypatch):
    path = write(tmp_path / "a.png")
    assert "b.png" in cache.facts(tmp_path / "b.png").error
    with monkeypatch.context() as patch:
        patch.setattr(caches, "look", lambda path: Facts(error="the disk is away"))
        assert cache.facts(path).error == "the disk is away"
    assert not cache.facts(path).error


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"facts": {"fps": "1/0"}, "content": ""}'])
def test_a_damaged_record_is_made_again(cache, tmp_path, content):
    path = write(tmp_path / "a.png")
    first = cache.content(path)
    [record] = (cache.folder / "files").iterdir()
    record.write_bytes(content)
    assert cache.content(path) == first
    assert cache.facts(path).height == 16


def test_what_tells_weights_from_others(tmp_path):
    path, data = tmp_path / "a.safetensors", bytearray(os.urandom(5 << 20))
    path.write_bytes(data)
    first = identity([path])
    assert identity([path], "tokenizer") != first
    (tmp_path / "b.safetensors").write_bytes(data)
    assert identity([tmp_path / "b.safetensors"]) == first
    for place in (0, (5 << 20) - 1):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert identity([path]) != first
    path.write_bytes(data[: 2 << 20] + os.urandom(1 << 18) + data[(2 << 20) + (1 << 18) :])  # one tensor in the middle
    assert identity([path]) != first
    path.write_bytes(data + b"x")
    assert identity([path]) != first
