"""Daemon threads for short tasks, or none: then whoever asks does them.

Not ThreadPoolExecutor: the interpreter joins its threads when it ends, and one that hangs in a read of a dead file
system would keep the process for ever.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """`count` threads, started at once, that end with `stop`; 0: tasks are done by the caller, at once."""

    def __init__(self, count: int, name: str) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.threads = [threading.Thread(target=self._work, daemon=True, name=f"{name}-{i}") for i in range(count)]
        for thread in self.threads:
            thread.start()

    def start(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Future[Result]]:
        """What will be function(item) of each item, in order. Not after `stop`: nobody would do it."""
        tasks = [(Future[Result](), item) for item in items]
        for future, item in tasks:
            task = partial(_settle, future, function, item)
            if self.threads:
                self._tasks.put(task)
            else:
                task()
        return [future for future, _ in tasks]

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """[function(item) for item in items], shared among the threads. Raises what the first item that failed raised.
        Not after `stop`: nobody would do it."""
        return [future.result() for future in self.start(function, items)]

    def stop(self) -> None:
        """End each thread after what it does now and what is queued."""
        for _ in self.threads:
            self._tasks.put(None)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()


def _settle(future: Future[Result], function: Callable[[Item], Result], item: Item) -> None:
    try:
        future.set_result(function(item))
    except BaseException as error:  # whoever waits for the result raises it
        future.set_exception(error)
