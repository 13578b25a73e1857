"""Decoder and encoder errors, converted to this package's."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import InputError, StarflowError


@contextmanager
def decoding_errors(path, kind: str) -> Iterator[None]:
    """Turn what is raised while `path` is read as a `kind` of file into InputError."""
    try:
        yield
    except (StarflowError, ImportError, MemoryError):
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file or folder; check the path") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; give a file") from None
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise InputError(
            f"{path} cannot be read as a {kind} ({reason(error)}); it may be damaged or in another format: "
            "open it in a viewer, or export it again"
        ) from error


@contextmanager
def encoding_errors(path) -> Iterator[None]:
    """Turn what is raised while `path` is written into StarflowError."""
    try:
        yield
    except (StarflowError, ImportError):
        raise
    except Exception as error:  # encoders raise errors of their own kinds
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StarflowError(
                f"{path}: the disk is full ({reason(error)}); free some space or write elsewhere"
            ) from error
        raise StarflowError(f"{path} could not be written ({reason(error)}); try another folder or format") from error


def reason(error: Exception) -> str:
    """An error's own words, for use inside a message."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
