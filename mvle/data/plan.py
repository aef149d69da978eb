"""The sampling plan: a pure function of (seed, counter, data) that says which pair comes when, and how it is shown.

    counter = step * batch_total + position        position = slot * (batch_total / slots) + k

Each epoch the shards are permuted and their rows laid end to end; rows are shuffled within windows of `window` shards;
the whole is cut into `slots` equal pieces (the few left over wait for another epoch), and slot s walks piece s. Ranks
own contiguous slots. So the order does not depend on how many ranks there are, a run resumes from one integer, and a
rank whose pieces are longer than a window reads its shards one window after another. With fewer shards than a window
the shuffle is a full one. (Shuffling before cutting, not after: else, with one shard, two images of one piece would
never meet in a batch.)

All randomness is Philox (mvle_kernels.random), and only +, *, / and sqrt touch it: equal bits on every machine.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from mvle_kernels.random import Stream, uniform, words
from numpy.typing import NDArray

from .captions import NO_FLIP
from .decode import Window
from .errors import DataError

Integers = NDArray[np.int64]

_CROP_TRIES = 10  # then the largest centred window of an allowed aspect
_CROP_WORDS = 4 + 2 * _CROP_TRIES  # flip, ratio, y, x, then (area, aspect) a try
_VERSION = 1


class Rows(Protocol):
    """What the plan asks of the data; ShardSet is one."""

    @property
    def fingerprint(self) -> str:
        """Changes with the data."""

    @property
    def shard_sizes(self) -> Sequence[int]:
        """Images of each shard."""

    def size(self, row: int) -> tuple[int, int]:
        """(width, height) as displayed."""

    def caption_count(self, row: int) -> int:
        """Captions of the image."""

    def flags(self, row: int, caption: int) -> int:
        """Bit 0: must not be flipped."""

    def key_hash(self, row: int) -> int:
        """64 bits of the key."""


@dataclass(frozen=True)
class Draw:
    """One pair as it is to be shown.

    window (y, x, height, width): displayed pixels, inside the image · ratio: share of cells to mask ·
    augmentation: four 32-bit words for whoever wants more randomness of this pair.
    """

    counter: int
    row: int
    caption: int
    window: Window
    flip: bool
    ratio: float
    augmentation: tuple[int, int, int, int]


class SamplingPlan:
    """Which pairs a run sees, in which order, through which windows.

    shards: the data (a ShardSet) · batch_total: pairs of a step over all ranks · slots: divides it; ranks divide slots
    image_ratio: share of cells to mask, or (low, high) drawn for each pair · fraction: keep the rows whose key hashes
    below this share (nested: a smaller fraction is a subset) · window: shards of a shuffling window ·
    crop_scale, crop_aspect: range of the window's share of the image's area, and of its width / height.
    Raises DataError where the data is smaller than the number of slots, ValueError for numbers that do not divide.
    """

    def __init__(
        self,
        shards: Rows,
        *,
        seed: int,
        batch_total: int,
        slots: int,
        image_ratio: float | tuple[float, float] = 0.6,
        fraction: float = 1.0,
        window: int = 8,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        crop_aspect: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
    ) -> None:
        if slots < 1 or batch_total % slots:
            raise ValueError(f"data.slots must divide batch.total ({batch_total}); got {slots}.")
        self.shards, self.seed, self.batch_total, self.slots = shards, seed, batch_total, slots
        self.image_ratio = image_ratio if isinstance(image_ratio, tuple) else (image_ratio, image_ratio)
        self.fraction, self.window, self.flip = fraction, window, flip
        self.crop_scale, self.crop_aspect = crop_scale, crop_aspect

        self._kept = _kept_rows(shards, fraction)  # None: every row
        sizes = shards.shard_sizes if self._kept is None else [len(rows) for rows in self._kept]
        self._sizes = np.asarray(sizes, np.int64)
        self._starts = np.concatenate([[0], np.cumsum(np.asarray(shards.shard_sizes, np.int64))])
        self.images = int(self._sizes.sum())  # rows that the plan walks
        self.piece = self.images // slots  # rows of a slot in an epoch
        if self.piece == 0:
            raise DataError(
                f"data.train must hold at least one image for each of data.slots={slots}; it holds {self.images} "
                f"(data.fraction={fraction}). Set data.slots to a divisor of batch.total ({batch_total}) that is at "
                f"most {self.images}."
            )
        # Walking slots keep one window each; a step may touch the next window of each as well.
        self._windows: OrderedDict[tuple[int, int], Integers] = OrderedDict()
        self._cached_windows = 2 * slots + 2
        self._epochs: OrderedDict[int, tuple[Integers, Integers]] = OrderedDict()

    @staticmethod
    def build(config: Any, shards: Rows) -> SamplingPlan:
        """The plan of a run. config: the root config (sections run, data, masking, batch)."""
        data = config.data
        return SamplingPlan(
            shards,
            seed=config.run.seed,
            batch_total=config.batch.total,
            slots=data.slots_for(config.batch.total),
            image_ratio=config.masking.image_ratio,
            fraction=data.fraction,
            window=data.window,
            crop_scale=data.crop_scale,
            crop_aspect=data.crop_aspect,
            flip=data.flip,
        )

    @property
    def fingerprint(self) -> str:
        """Everything that decides the order and the draws, data included, as hex. A resumed run must have the same."""
        parts = {
            "version": _VERSION, "data": self.shards.fingerprint, "seed": self.seed, "batch_total": self.batch_total,
            "slots": self.slots, "image_ratio": self.image_ratio, "fraction": self.fraction, "window": self.window,
            "crop_scale": self.crop_scale, "crop_aspect": self.crop_aspect, "flip": self.flip,
        }  # fmt: skip
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()

    @property
    def epoch_steps(self) -> float:
        """Steps of one epoch."""
        return self.piece * self.slots / self.batch_total

    def positions(self, step: int, rank: int = 0, ranks: int = 1) -> Integers:
        """Counters of the pairs that a rank owns at a step: int64 [batch_total / ranks], consecutive."""
        if self.slots % ranks:
            raise ValueError(f"the number of ranks must divide data.slots ({self.slots}); got {ranks} ranks.")
        share = self.batch_total // ranks
        first = step * self.batch_total + rank * share
        return np.arange(first, first + share, dtype=np.int64)

    def draw(self, counter: int) -> Draw:
        """The pair of one counter."""
        return self.draws(np.array([counter], np.int64))[0]

    def draws(self, counters: Integers) -> list[Draw]:
        """The pairs of several counters; each is what `draw` gives for it alone."""
        return self._show(counters, [self.row(int(counter)) for counter in counters])

    def replacement(self, counter: int, attempt: int) -> Draw:
        """What stands in for a pair whose image fails: the row that its slot gives `attempt` turns later, with the
        random numbers of this counter. The same on every number of ranks."""
        return self._show(np.array([counter], np.int64), [self.row(counter, attempt)])[0]

    def row(self, counter: int, ahead: int = 0) -> int:
        """The row of a counter, or the one that its slot gives `ahead` turns later."""
        step, position = divmod(counter, self.batch_total)
        each = self.batch_total // self.slots
        slot, k = divmod(position, each)
        epoch, place = divmod(step * each + k + ahead, self.piece)
        return self._ordered(epoch, slot * self.piece + place)

    # --- order -------------------------------------------------------------------------------------------------------

    def _ordered(self, epoch: int, place: int) -> int:
        """Row number `place` of an epoch's order."""
        _, ends = self._epoch(epoch)
        group = int(np.searchsorted(ends, place, side="right"))
        rows = self._window(epoch, group)
        return int(rows[place - (int(ends[group - 1]) if group else 0)])

    def _epoch(self, epoch: int) -> tuple[Integers, Integers]:
        """(shards in the epoch's order, where each window of them ends in the epoch's rows)."""
        if epoch not in self._epochs:
            noise = words(self.seed, Stream.SHARD_ORDER, np.array([epoch]), len(self._sizes))[0]
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
            noise = words(self.seed, Stream.WINDOW_ORDER, np.array([(epoch << 32) | group]), len(rows))[0]
            found = self._windows[epoch, group] = rows[np.argsort(noise, kind="stable")]
            while len(self._windows) > self._cached_windows:
                self._windows.popitem(last=False)
        self._windows.move_to_end((epoch, group))
        return found

    def _shard_rows(self, shard: int) -> Integers:
        if self._kept is not None:
            return self._kept[shard]
        return np.arange(self._starts[shard], self._starts[shard + 1], dtype=np.int64)

    # --- what is shown -----------------------------------------------------------------------------------------------

    def _show(self, counters: Integers, rows: Sequence[int]) -> list[Draw]:
        shards = self.shards
        counts = np.array([shards.caption_count(row) for row in rows], np.int64)
        captions = (words(self.seed, Stream.CAPTION, counters, 1)[:, 0] * counts) >> 32
        drawn = words(self.seed, Stream.CROP, counters, _CROP_WORDS)
        extra = words(self.seed, Stream.AUGMENTATION, counters, 4)
        low, high = self.image_ratio
        ratios = low + (high - low) * uniform(drawn[:, 1])
        sizes = np.array([shards.size(row) for row in rows], np.int64)
        windows = crop_windows(sizes[:, 0], sizes[:, 1], drawn, self.crop_scale, self.crop_aspect)
        draws = []
        for i, row in enumerate(rows):
            caption = int(captions[i])
            flip = self.flip and bool(drawn[i, 0] & 1) and not shards.flags(row, caption) & NO_FLIP
            y, x, height, width = (int(v) for v in windows[i])
            a, b, c, d = (int(v) for v in extra[i])
            draws.append(
                Draw(int(counters[i]), row, caption, (y, x, height, width), flip, float(ratios[i]), (a, b, c, d))
            )
        return draws


def crop_windows(
    widths: Integers, heights: Integers, drawn: Integers, scale: tuple[float, float], aspect: tuple[float, float]
) -> Integers:
    """Random resized crops: int64 [n, 4] of (y, x, height, width), inside images of widths x heights pixels [n].

    drawn int64 [n, 24]: words 2 and 3 place the window, words 4 + 2t and 5 + 2t choose area and aspect of try t. The
    first try that fits is taken; where none does, the largest centred window of an allowed aspect.
    """
    tries = uniform(drawn[:, 4:]).reshape(len(drawn), _CROP_TRIES, 2)
    area = (widths * heights)[:, None] * (scale[0] + (scale[1] - scale[0]) * tries[:, :, 0])
    # Wide and tall are equally likely: a coin says whether width / height or height / width is drawn uniformly.
    coin, u = tries[:, :, 1] < 0.5, (tries[:, :, 1] * 2) % 1.0
    low, high = aspect
    shape = np.where(coin, low + (high - low) * u, 1 / (1 / high + (1 / low - 1 / high) * u))
    w = np.floor(np.sqrt(area * shape) + 0.5).astype(np.int64)
    h = np.floor(np.sqrt(area / shape) + 0.5).astype(np.int64)
    fits = (w > 0) & (h > 0) & (w <= widths[:, None]) & (h <= heights[:, None])
    first = fits.argmax(axis=1)
    rows = np.arange(len(drawn))

    widest = np.minimum(widths, np.floor(heights * high + 0.5).astype(np.int64)).clip(min=1)
    tallest = np.minimum(heights, np.floor(widths / low + 0.5).astype(np.int64)).clip(min=1)
    some = fits.any(axis=1)
    w, h = np.where(some, w[rows, first], widest), np.where(some, h[rows, first], tallest)
    free_y, free_x = heights - h, widths - w
    y = np.where(some, (drawn[:, 2] * (free_y + 1)) >> 32, free_y // 2)
    x = np.where(some, (drawn[:, 3] * (free_x + 1)) >> 32, free_x // 2)
    return np.stack([y, x, h, w], axis=1)


def evaluation_pairs(shards: Any, count: int, seed: int) -> Integers:
    """`count` rows of a set (all, if it has fewer), chosen by the seed, ascending: int64. Read with caption 0 each."""
    noise = words(seed, Stream.EVALUATION, np.array([0]), shards.images)[0]
    return np.sort(np.argsort(noise, kind="stable")[:count])


def _kept_rows(shards: Rows, fraction: float) -> list[Integers] | None:
    """The rows of each shard whose key hashes below `fraction`; None where that is all of them."""
    if not 0 < fraction <= 1:
        raise ValueError(f"data.fraction must be above 0 and at most 1; got {fraction}.")
    if fraction == 1:
        return None
    kept, start = [], 0
    for size in shards.shard_sizes:
        hashes = np.array([shards.key_hash(row) for row in range(start, start + size)], np.int64).view(np.uint64)
        kept.append(start + np.flatnonzero(hashes < np.uint64(int(fraction * 2**64) & (2**64 - 1))).astype(np.int64))
        start += size
    return kept
