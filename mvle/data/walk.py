"""The walk through one source: which of its rows a slot shows at each of its turns.

Each epoch the shards are permuted and their rows laid end to end; rows are shuffled within windows of `window` shards;
the whole is cut into `slots` equal pieces (the few left over wait for another epoch), and slot s walks piece s. So a
rank whose pieces are longer than a window reads its shards one window after another. With fewer shards than a window
the shuffle is a full one. (Shuffling before cutting, not after: else, with one shard, two images of one piece would
never meet in a batch.)

A source with fewer rows than slots has no pieces: its epochs are laid end to end, and dealt to the slots in turn.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from mvle_kernels.random import Stream, words
from numpy.typing import NDArray

Integers = NDArray[np.int64]


class Walk:
    """The endless order of the rows of one source: a pure function of (seed, number of the source, slot, turn).

    rows: of each shard, its row numbers (int64, or a range of them); at least one in all. number: 0 .. 255.
    """

    def __init__(self, seed: int, number: int, rows: Sequence[Integers | range], slots: int, window: int) -> None:
        self.seed, self.slots, self.window = seed, slots, window
        self._rows = rows
        self._sizes = np.array([len(some) for some in rows], np.int64)
        self.images = int(self._sizes.sum())
        self.piece = self.images // slots  # rows of a slot in an epoch; 0: they are dealt
        # Sources draw from words of their own: their number is a part of each id that epochs and windows leave free.
        self._epoch_ids, self._window_ids = number << 48, number << 24
        # Walking slots keep one window each; a step may touch the next window of each as well.
        self._windows: OrderedDict[tuple[int, int], Integers] = OrderedDict()
        self._cached_windows = 2 * slots + 2
        self._epochs: OrderedDict[int, tuple[Integers, Integers]] = OrderedDict()

    @property
    def shown(self) -> int:
        """Rows that an epoch shows, over all slots."""
        return self.piece * self.slots or self.images

    def row(self, slot: int, turn: int) -> int:
        """The row that a slot shows when this source has its turn for the `turn`th time (0 is the first)."""
        if self.piece:
            epoch, place = divmod(turn, self.piece)
            return self._ordered(epoch, slot * self.piece + place)
        return self._ordered(*divmod(turn * self.slots + slot, self.images))

    def _ordered(self, epoch: int, place: int) -> int:
        """Row number `place` of an epoch's order."""
        _, ends = self._epoch(epoch)
        group = int(np.searchsorted(ends, place, side="right"))
        rows = self._window(epoch, group)
        return int(rows[place - (int(ends[group - 1]) if group else 0)])

    def _epoch(self, epoch: int) -> tuple[Integers, Integers]:
        """(shards in the epoch's order, where each window of them ends in the epoch's rows)."""
        if epoch not in self._epochs:
            ids = np.array([self._epoch_ids | epoch])
            noise = words(self.seed, Stream.SHARD_ORDER, ids, len(self._sizes))[0]
            order = np.argsort(noise, kind="stable")
            ends = np.cumsum(self._sizes[order])[self.window - 1 :: self.window]
            if len(order) % self.window:
                ends = np.append(ends, self.images)
            self._epochs[epoch] = order, ends
            while len(self._epochs) > 3:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _window(self, epoch: int, group: int) -> Integers:
        """The shuffled rows of one window of an epoch."""
        found = self._windows.get((epoch, group))
        if found is None:
            shards = self._epoch(epoch)[0][group * self.window : (group + 1) * self.window]
            rows = np.concatenate([self._shard_rows(int(s)) for s in shards])
            ids = np.array([(epoch << 32) | self._window_ids | group])
            noise = words(self.seed, Stream.WINDOW_ORDER, ids, len(rows))[0]
            found = self._windows[epoch, group] = rows[np.argsort(noise, kind="stable")]
            while len(self._windows) > self._cached_windows:
                self._windows.popitem(last=False)
        self._windows.move_to_end((epoch, group))
        return found

    def _shard_rows(self, shard: int) -> Integers:
        rows = self._rows[shard]
        return np.arange(rows.start, rows.stop, dtype=np.int64) if isinstance(rows, range) else rows
