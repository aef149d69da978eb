"""Images that turn out bad while a run reads them: named once each, counted, and too many of them end the run.

Which row stands in for a bad one is the plan's business (SamplingPlan.replacement): it depends on the counter and the
disk alone, not on what this process met before.
"""

from __future__ import annotations

import logging
from collections import deque

from .errors import DataError
from .shards import ShardSet

log = logging.getLogger(__name__)

_EARLY_PAIRS = 1000  # before so many pairs were read, max_bad_share is a share of this number
_RECENT_PAIRS = 10_000  # bad images found longer ago do not count: a disk may begin to fail after months


class BadImageError(DataError):
    """An image whose bytes are not those that were indexed, or do not decode any more."""


class BadImages:
    """The bad images of one rank.

    max_bad_share: the run stops when more than so large a share of the recent pairs is bad · whose: how messages begin.
    pairs: pairs read so far · reasons: key and shard -> why it is bad, in the order of finding.
    """

    def __init__(self, shards: ShardSet, max_bad_share: float, whose: str = "") -> None:
        self.shards, self.max_bad_share, self.whose = shards, max_bad_share, whose
        self.pairs = 0
        self.reasons: dict[str, str] = {}
        self._rows: set[int] = set()
        self._found: deque[int] = deque()  # pairs read when each of the recent bad images was found

    def note(self, row: int, reason: str) -> None:
        """A row is bad. Raises DataError, with the list, when that makes too many."""
        if row in self._rows:
            return
        self._rows.add(row)
        name = f"{self.shards.name(row)} ({self.shards.shard_path(row)})"
        self.reasons[name] = reason
        log.warning("%simage %s is bad and gets replaced: %s", self.whose, name, reason)
        self._found.append(self.pairs)
        while self._found[0] <= self.pairs - _RECENT_PAIRS:
            self._found.popleft()
        recent = min(self.pairs, _RECENT_PAIRS)
        if len(self._found) > self.max_bad_share * max(recent, _EARLY_PAIRS):
            raise DataError(
                f"{self.whose}{len(self._found)} images failed within {recent} pairs, over "
                f"data.max_bad_share={self.max_bad_share}.\n{self.listed()}"
            )

    def listed(self) -> str:
        """The bad images, one a line, and what mends them."""
        lines = [f"    {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join([*lines, "Fetch these shards again, then index them: python -m mvle.data index SHARDS"])
