"""Truncated videos. ffmpeg makes a shorter clip of them, if they end between two frames or are Matroska files."""

from __future__ import annotations

import os
import struct

from ..errors import InputError


def check_complete(path) -> None:
    """Raise InputError for an mp4 or webm that ends before its header says."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        end = 0
        if start[4:] == b"ftyp":
            end = _mp4_end(file, size)
        elif start[:4] == b"\x1a\x45\xdf\xa3":
            end = _matroska_end(file)
    if end > size:
        raise InputError(f"{path} is truncated: {size} of {end} bytes; copy or download it again")


def _mp4_end(file, size: int) -> int:
    """Where the last of an mp4's boxes ends, by its header. A box of size 0 goes to the end of the file."""
    end = 0
    while end < size:
        file.seek(end)
        length, wide = struct.unpack(">I4xQ", file.read(16).ljust(16, b"\0"))
        length = wide if length == 1 else length
        if length < 8:
            return size
        end += length
    return end


def _matroska_end(file) -> int:
    """Where a Matroska file's one segment ends, by its header; 0 if that was left open, as in a live recording."""

    def element_size() -> int:
        first = file.read(5)[4:]  # after an identifier of four bytes
        width = 9 - first[0].bit_length()
        value = int.from_bytes(first + file.read(width - 1), "big")
        return value - (1 << 7 * width)

    file.seek(0)
    file.seek(element_size(), os.SEEK_CUR)
    size = element_size()
    return file.tell() + size if (size + 1) & size else 0
