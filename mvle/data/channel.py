"""A bounded queue between two threads of the loader that ends its waits when the loader closes."""

from __future__ import annotations

import queue
import threading
from typing import Generic, TypeVar

Item = TypeVar("Item")

_LOOK_SECONDS = 0.1  # how often a wait looks whether the loader closed


class ClosedError(Exception):
    """The loader was closed while a thread waited."""


class Channel(Generic[Item]):
    """At most `size` items on their way; `stop` set ends every wait with ClosedError."""

    def __init__(self, size: int, stop: threading.Event) -> None:
        self._queue: queue.Queue[Item] = queue.Queue(size)
        self._stop = stop

    def __len__(self) -> int:
        return self._queue.qsize()

    def put(self, item: Item) -> None:
        """Wait for room."""
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=_LOOK_SECONDS)
            except queue.Full:
                continue
        raise ClosedError

    def get(self) -> Item:
        """Wait for the next item."""
        while not self._stop.is_set():
            try:
                return self._queue.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                continue
        raise ClosedError
