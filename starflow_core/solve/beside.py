"""Computing in a second thread: PyTorch's modes are a thread's own, and nothing goes on when the caller has failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event
from typing import TypeVar

import torch

T = TypeVar("T")


def carried(act: Callable[..., T]) -> Callable[..., T]:
    """An act for another thread, under the modes of the one that asks for it."""
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def there(*args) -> T:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            return act(*args)

    return there


def ahead(items: Iterator[T], stop: Event) -> Iterator[T]:
    """The items, which are made in a second thread while the caller uses those before. What goes wrong there is raised
    here. Where the caller doesn't want more, `stop` is set, at which what makes them has to raise."""
    made: SimpleQueue = SimpleQueue()

    def make() -> None:
        try:
            for item in items:
                made.put(item)
        finally:
            made.put(made)  # nothing else is the queue itself

    with ThreadPoolExecutor(1, "ahead") as second:
        making = second.submit(carried(make))
        try:
            while (item := made.get()) is not made:
                yield item
            making.result()
        finally:
            stop.set()
