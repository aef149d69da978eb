"""Rows without files: what a sampling plan asks of a set of shards, in as many sources as a test wants."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from mvle.data.captions import NO_FLIP
from mvle.data.plan import SamplingPlan
from mvle.data.sources import Source


@dataclass
class FakeRows:
    """Rows of shards of given sizes; row r has 1 + r % 3 captions, the last of which says left."""

    shard_sizes: tuple[int, ...] = (40, 25, 0, 60, 33, 42)
    fingerprint: str = "f"
    side: tuple[int, int] = (640, 427)
    sources: Sequence[Source] = ()

    def __post_init__(self) -> None:
        self.sources = self.sources or (Source("", range(len(self.shard_sizes))),)

    @property
    def images(self) -> int:
        return sum(self.shard_sizes)

    def size(self, row: int) -> tuple[int, int]:
        return self.side

    def caption_count(self, row: int) -> int:
        return 1 + row % 3

    def flags(self, row: int, caption: int) -> int:
        return NO_FLIP if caption == row % 3 else 0

    def key_hash(self, row: int) -> int:
        return int.from_bytes(hashlib.blake2b(str(row).encode(), digest_size=8).digest(), "little", signed=True)


def fake_sources(sizes: Sequence[Sequence[int]], weights: Sequence[float | None]) -> FakeRows:
    """Sources a, b, ..., each of shards of the given sizes."""
    ends = list(accumulate((len(one) for one in sizes), initial=0))
    spans = [range(start, stop) for start, stop in pairwise(ends)]
    named = [Source("abcdefgh"[i], span, weight) for i, (span, weight) in enumerate(zip(spans, weights, strict=True))]
    return FakeRows(tuple(size for one in sizes for size in one), sources=named)


def source_of(rows: FakeRows, row: int) -> int:
    """The number of the source that a row belongs to."""
    stops = accumulate(sum(rows.shard_sizes[shard] for shard in source.shards) for source in rows.sources)
    return next(number for number, stop in enumerate(stops) if row < stop)


def plan_of(rows: FakeRows | None = None, **changes: object) -> SamplingPlan:
    """A small plan of 12 slots, with changes."""
    options = {"seed": 3, "batch_total": 24, "slots": 12, "window": 2, **changes}
    return SamplingPlan(rows or FakeRows(), **options)  # type: ignore[arg-type]


def digest(found: object) -> str:
    """A short hash of what a plan gave, to write down in a test."""
    text = repr(found).replace(", names_colour=False", "")  # newer than what is written down; no caption here names one
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
