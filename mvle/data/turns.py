"""Whose turn it is: the source of each pair, where several have weights.

Turns of a slot are cut into periods. How many turns each source has in a period follows from the weights in closed
form, and their order within it is drawn; so the turns that a source had before are a sum that nobody has to walk, and
every choice is a pure function of (seed, slot, turn).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from mvle_kernels.random import Stream, words
from numpy.typing import NDArray

Integers = NDArray[np.int64]

PERIOD = 256  # turns whose order is drawn together


class Turns:
    """The turns of the slots, shared among the sources by weight.

    weights: whole numbers above 0, one a source. After any number of whole periods a slot has given each source its
    share of the turns to within as many turns as there are sources: the difference does not grow. One source has every
    turn, and nothing is drawn.
    """

    def __init__(self, seed: int, weights: Sequence[int], slots: int) -> None:
        self.seed, self.weights = seed, tuple(weights)
        self._periods: OrderedDict[tuple[int, int], tuple[Integers, Integers]] = OrderedDict()
        self._cached = 2 * slots + 2  # walking slots keep one each; a step may touch the next of each as well

    def source(self, slot: int, turn: int) -> tuple[int, int]:
        """(the source that has this turn of a slot, how many turns of the slot it had before)."""
        if len(self.weights) == 1:
            return 0, turn
        period, place = divmod(turn, PERIOD)
        sources, before = self._period(slot, period)
        return int(sources[place]), int(before[place])

    def _period(self, slot: int, period: int) -> tuple[Integers, Integers]:
        """Of each turn of a period: the source, and how many turns of the slot it had before."""
        found = self._periods.get((slot, period))
        if found is None:
            # Each slot enters the sequence of all turns at a place of its own: else a source that has one turn in
            # thousands would have it in the same period of every slot.
            first = int(words(self.seed, Stream.SOURCE, np.array([-1 - slot]), 1)[0, 0])
            had, start, stop = (self._given(first + turns) for turns in (0, period * PERIOD, (period + 1) * PERIOD))
            noise = words(self.seed, Stream.SOURCE, np.array([(slot << 32) | period]), PERIOD)[0]
            counts = [b - a for a, b in zip(start, stop, strict=True)]
            sources = np.repeat(np.arange(len(counts)), counts)[np.argsort(noise, kind="stable")]
            before = np.empty(PERIOD, np.int64)
            for source, count in enumerate(counts):
                before[sources == source] = start[source] - had[source] + np.arange(count)
            found = self._periods[slot, period] = sources, before
            while len(self._periods) > self._cached:
                self._periods.popitem(last=False)
        self._periods.move_to_end((slot, period))
        return found

    def _given(self, turns: int) -> list[int]:
        """How many of the first `turns` turns each source has.

        The first takes floor(turns * its weight / all weights), the next as much of what is left, and so on. What is
        left never falls as turns grow, so no source ever loses a turn; whole numbers of Python, so nothing is rounded.
        """
        found, left, whole = [], turns, sum(self.weights)
        for weight in self.weights:
            found.append(left * weight // whole)
            left, whole = left - found[-1], whole - weight
        return found
