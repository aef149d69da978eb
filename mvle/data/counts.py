"""What a loader counts of its own work while it runs: where its time goes, and how far ahead it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

Work = Literal["reading", "decoding", "text"]
WORK: tuple[Work, ...] = ("reading", "decoding", "text")


@dataclass
class Figures:
    """Sums since the loader was made.

    read, decode, text  seconds of work, summed over threads. With DALI, whose threads are its own, `decode` is what the
                        loader waited for them
    verify              seconds that the loader waited for images to be decoded by torch before DALI was given them
    bytes               encoded bytes read
    takes, ready        batches that the model took, and how many were ready at these moments, summed
    late                seconds in which the last stage had nothing to do, by what it waited for: the largest is the
                        bottleneck
    """

    read: float = 0.0
    decode: float = 0.0
    text: float = 0.0
    verify: float = 0.0
    bytes: int = 0
    takes: int = 0
    ready: int = 0
    late_reading: float = 0.0
    late_decoding: float = 0.0
    late_text: float = 0.0

    @property
    def late(self) -> dict[Work, float]:
        """Seconds waited for each kind of work."""
        return {"reading": self.late_reading, "decoding": self.late_decoding, "text": self.late_text}

    def since(self, before: Figures) -> Figures:
        """What came after `before`."""
        return Figures(**{name: value - getattr(before, name) for name, value in vars(self).items()})


class Counts:
    """Figures that many threads add to."""

    def __init__(self) -> None:
        self._figures = Figures()
        self._lock = threading.Lock()

    def add(self, **amounts: float) -> None:
        """Add to figures by name."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self._figures, name, getattr(self._figures, name) + amount)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to a figure, also if it fails."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(**{name: time.perf_counter() - start})

    def figures(self) -> Figures:
        """The sums of now, as a copy."""
        with self._lock:
            return replace(self._figures)
