"""The sampling plan: a pure function of (seed, counter, data) that says which pair comes when, and how it is shown.

    counter = step * batch_total + position        position = slot * (batch_total / slots) + k

Ranks own contiguous slots. So the order does not depend on how many ranks there are, and a run resumes from one
integer. The positions of a slot, step after step, are its turns: turns.py says which source has a turn, and walk.py
which row of that source it shows.

All randomness is Philox (mvle_kernels.random), and only +, *, / and sqrt touch it: equal bits on every machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from mvle_kernels.random import Stream, uniform, words
from numpy.typing import NDArray

from .captions import NAMES_COLOUR, NO_FLIP
from .decode import Window
from .errors import DataError
from .sources import Source, weights_of
from .turns import Turns
from .walk import Walk

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

    @property
    def sources(self) -> Sequence[Source]:
        """What the shards belong to; at least one, and together every shard, in order."""

    def size(self, row: int) -> tuple[int, int]:
        """(width, height) as displayed."""

    def caption_count(self, row: int) -> int:
        """Captions of the image."""

    def flags(self, row: int, caption: int) -> int:
        """Bit 0: must not be flipped. Bit 1: the caption names a colour."""

    def key_hash(self, row: int) -> int:
        """64 bits of the key."""


@dataclass(frozen=True)
class Draw:
    """One pair as it is to be shown.

    window (y, x, height, width): displayed pixels, inside the image · ratio: share of cells to mask ·
    augmentation: four 32-bit words for whoever wants more randomness of this pair · names_colour: the caption does.
    """

    counter: int
    row: int
    caption: int
    window: Window
    flip: bool
    ratio: float
    augmentation: tuple[int, int, int, int]
    names_colour: bool = False


class SamplingPlan:
    """Which pairs a run sees, in which order, through which windows.

    shards: the data (a ShardSet) · batch_total: pairs of a step over all ranks · slots: divides it; ranks divide slots
    image_ratio: share of cells to mask, or (low, high) drawn for each pair · fraction: keep the rows whose key hashes
    below this share (nested: a smaller fraction is a subset of each source) · window: shards of a shuffling window ·
    crop_scale, crop_aspect: range of the window's share of the image's area, and of its width / height · augment: how
    the images are changed by the words that the plan draws for it, as plain values; None: not at all.
    Raises DataError where a source has no image, ValueError for numbers that do not divide.
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
        augment: Mapping[str, Any] | None = None,
    ) -> None:
        if slots < 1 or batch_total % slots:
            raise ValueError(f"data.slots must divide batch.total ({batch_total}); got {slots}.")
        self.shards, self.seed, self.batch_total, self.slots = shards, seed, batch_total, slots
        self.image_ratio = image_ratio if isinstance(image_ratio, tuple) else (image_ratio, image_ratio)
        self.fraction, self.window, self.flip = fraction, window, flip
        self.crop_scale, self.crop_aspect, self.augment = crop_scale, crop_aspect, augment

        self.weights = weights_of(shards.sources)
        rows = _kept_rows(shards, fraction)
        spans = [source.shards for source in shards.sources] if len(self.weights) > 1 else [range(len(rows))]
        self._walks = [
            Walk(seed, number, rows[span.start : span.stop], slots, window) for number, span in enumerate(spans)
        ]
        self._turns = Turns(seed, self.weights, slots)
        self.source_images = [walk.images for walk in self._walks]  # rows that the plan walks
        self.images = sum(self.source_images)
        self._refuse_empty()

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
            augment=data.augment.model_dump(mode="json") if data.augment.on else None,
        )

    @property
    def fingerprint(self) -> str:
        """Everything that decides the order and the draws, data included, as hex. A resumed run must have the same."""
        parts = {
            "version": _VERSION, "data": self.shards.fingerprint, "seed": self.seed, "batch_total": self.batch_total,
            "slots": self.slots, "image_ratio": self.image_ratio, "fraction": self.fraction, "window": self.window,
            "crop_scale": self.crop_scale, "crop_aspect": self.crop_aspect, "flip": self.flip,
        }  # fmt: skip
        if self.augment is not None:  # runs without it keep the fingerprint that they had before there was one
            parts["augment"] = self.augment
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()

    def epochs(self, steps: int) -> list[float]:
        """How often so many steps show each image of each source; one number where the sources are one set."""
        pairs, whole = steps * self.batch_total, sum(self.weights)
        return [pairs * weight / whole / walk.shown for weight, walk in zip(self.weights, self._walks, strict=True)]

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
        """What stands in for a pair whose image fails: the row that its slot gives `attempt` turns of the same source
        later, with the random numbers of this counter. The same on every number of ranks."""
        return self._show(np.array([counter], np.int64), [self.row(counter, attempt)])[0]

    def row(self, counter: int, ahead: int = 0) -> int:
        """The row of a counter, or the one that its slot gives `ahead` turns of the same source later."""
        step, position = divmod(counter, self.batch_total)
        each = self.batch_total // self.slots
        slot, k = divmod(position, each)
        source, turn = self._turns.source(slot, step * each + k)
        return self._walks[source].row(slot, turn + ahead)

    def _refuse_empty(self) -> None:
        """Raise DataError for a source without a single row."""
        for walk, source in zip(self._walks, self.shards.sources, strict=False):
            if walk.images == 0:
                name = f"data.train.{source.name}" if len(self._walks) > 1 else "data.train"
                raise DataError(
                    f"{name} must hold at least one image; it holds none (data.fraction={self.fraction:g}). Name other "
                    "shards, or raise data.fraction."
                )

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
            flags = shards.flags(row, caption)
            flip = self.flip and bool(drawn[i, 0] & 1) and not flags & NO_FLIP
            y, x, height, width = (int(v) for v in windows[i])
            a, b, c, d = (int(v) for v in extra[i])
            window, ratio, colour = (y, x, height, width), float(ratios[i]), bool(flags & NAMES_COLOUR)
            draws.append(Draw(int(counters[i]), row, caption, window, flip, ratio, (a, b, c, d), colour))
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


def _kept_rows(shards: Rows, fraction: float) -> list[Integers | range]:
    """The rows of each shard whose key hashes below `fraction`."""
    if not 0 < fraction <= 1:
        raise ValueError(f"data.fraction must be above 0 and at most 1; got {fraction}.")
    kept: list[Integers | range] = []
    start = 0
    for size in shards.shard_sizes:
        rows = range(start, start + size)
        start += size
        if fraction == 1:
            kept.append(rows)
            continue
        hashes = np.array([shards.key_hash(row) for row in rows], np.int64).view(np.uint64)
        below = np.flatnonzero(hashes < np.uint64(int(fraction * 2**64) & (2**64 - 1)))
        kept.append(rows.start + below.astype(np.int64))
    return kept
