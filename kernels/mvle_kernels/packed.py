"""Packed: many sequences of different lengths in one buffer, and nothing padded.

`rows` [T, ...] holds sequence s at rows offsets[s] .. offsets[s + 1]. T is offsets[-1] rounded up, so that shapes
repeat from step to step; the rows of the tail are zero, forward and backward, in every op.
A layout is a Packed without rows: `Packed.layout_of(...)`, then `layout.with_rows(x)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def round_up(total: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `total`."""
    return -(-total // multiple) * multiple


def from_host(values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """Numbers that the host knows, as a tensor [n] on the device, without waiting for it.

    `torch.tensor(values, device="cuda")` waits until the device has done all that was asked of it before. Here equal
    numbers are filled in on the device, and others leave from pinned memory.
    """
    device = torch.device(device or "cpu")
    if values and values.count(values[0]) == len(values):
        return torch.full((len(values),), values[0], dtype=dtype, device=device)
    pinned = device.type == "cuda" and torch.cuda.is_initialized()
    return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class Packed:
    """rows [T, ...] · offsets int32 [S + 1] on the device · lengths on the host, or None where a draw on the device
    decides them · max_length, a static cap on every length · total = T · min_length, where lengths is None: a static
    lower bound on every length (above 0: no sequence can be empty)."""

    rows: Tensor
    offsets: Tensor
    lengths: tuple[int, ...] | None
    max_length: int
    total: int
    min_length: int = 0
    cache: dict[str, Any] = field(default_factory=dict, repr=False)  # index tensors, made once for one layout

    @property
    def sequences(self) -> int:
        """How many sequences: S."""
        return self.offsets.numel() - 1

    @property
    def shortest(self) -> int:
        """No sequence is shorter; 0 where there is none, or where nothing is known."""
        return self.min_length if self.lengths is None else min(self.lengths, default=0)

    @staticmethod
    def layout_of(
        lengths: Sequence[int],
        row_multiple: int = 1,
        device: torch.device | str | None = None,
        max_length: int | None = None,
    ) -> Packed:
        """A layout from lengths known on the host; T is their sum rounded up to `row_multiple`."""
        lengths = tuple(int(n) for n in lengths)
        longest = max(lengths, default=0)
        if max_length is None:
            max_length = longest
        if longest > max_length:
            raise ValueError(f"max_length must be at least the longest sequence, {longest}; got {max_length}.")
        ends = [0, *accumulate(lengths)]
        if lengths and 0 < longest == min(lengths):
            offsets = torch.arange(0, ends[-1] + 1, longest, dtype=torch.int32, device=device)
        else:
            offsets = from_host(ends, torch.int32, device)
        rows = torch.empty(0, device=offsets.device)
        return Packed(rows, offsets, lengths, max_length, round_up(ends[-1], row_multiple))

    @staticmethod
    def of(sequences: Sequence[Tensor], row_multiple: int = 1) -> Packed:
        """Pack a list of tensors [length, ...] that agree in all but their first size."""
        if not sequences:
            raise ValueError("at least one sequence is needed to pack; got none.")
        layout = Packed.layout_of([len(s) for s in sequences], row_multiple, sequences[0].device)
        rows = torch.cat(list(sequences))
        tail = rows.new_zeros(layout.total - len(rows), *rows.shape[1:])
        return layout.with_rows(torch.cat([rows, tail]))

    def with_rows(self, rows: Tensor) -> Packed:
        """The same layout around other rows. Raises ValueError if their number is not T."""
        if rows.shape[0] != self.total:
            raise ValueError(f"rows must number {self.total} (the layout's total); got {tuple(rows.shape)}.")
        return replace(self, rows=rows)  # the cache is shared on purpose: it belongs to the layout

    def unpack(self) -> list[Tensor]:
        """The sequences as a list of tensors. Needs lengths on the host."""
        if self.lengths is None:
            raise ValueError("unpack needs lengths on the host; this Packed was drawn on the device.")
        ends = [0, *accumulate(self.lengths)]
        return [self.rows[a:b] for a, b in pairwise(ends)]

    def part(self, start: int, stop: int, row_multiple: int = 1) -> Packed:
        """The layout of sequences start .. stop alone, its offsets made on the device. Needs lengths on the host."""
        if self.lengths is None:
            raise ValueError("a part needs lengths on the host; this Packed was drawn on the device.")
        lengths, before = self.lengths[start:stop], sum(self.lengths[:start])
        offsets = self.offsets[start : stop + 1]
        if before:
            offsets = offsets - before
        return Packed(self.rows[:0], offsets, lengths, self.max_length, round_up(sum(lengths), row_multiple))

    def slice(self, start: int, stop: int, row_multiple: int = 1) -> Packed:
        """Sequences start .. stop as a Packed of their own (a micro-batch). Needs lengths on the host."""
        layout = self.part(start, stop, row_multiple)
        assert self.lengths is not None and layout.lengths is not None
        before, own = sum(self.lengths[:start]), sum(layout.lengths)
        tail = self.rows.new_zeros(layout.total - own, *self.rows.shape[1:])
        return layout.with_rows(torch.cat([self.rows[before : before + own], tail]))

    def to(self, device: torch.device | str) -> Packed:
        """A copy on another device (asynchronous from pinned memory)."""
        rows, offsets = (x.to(device, non_blocking=True) for x in (self.rows, self.offsets))
        return replace(self, rows=rows, offsets=offsets, cache={})


def once(cache: dict[str, Any], name: str, make: Callable[[], T]) -> T:
    """What a cache has under this name; made if it is not there, and never as inference mode would: a layout that was
    evaluated with first is trained with later, and autograd keeps no tensor that was made there."""
    if name not in cache:
        with torch.inference_mode(False):
            cache[name] = make()
    return cache[name]


def row_index(layout: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """For each of the T rows: (sequence int64, position in it int64, real bool). Tail rows: sequence S, position 0."""

    def make() -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.arange(layout.total, device=layout.offsets.device)
        offsets = layout.offsets.long()
        sequence = torch.searchsorted(offsets[1:].contiguous(), rows, right=True)
        real = sequence < layout.sequences
        position = (rows - offsets[sequence.clamp(max=layout.sequences)]) * real
        return sequence, position, real

    return once(layout.cache, "row_index", make)


def concatenate(parts: Sequence[Packed], row_multiple: int = 1) -> Packed:
    """Packed buffers end to end as one. Parts with lengths on the host lose their tails; a part without them keeps its
    capacity, so it may only come last."""
    if any(p.lengths is None for p in parts[:-1]):
        raise ValueError("only the last part may have lengths unknown on the host.")
    sizes = [sum(p.lengths) if p.lengths is not None else p.total for p in parts]
    total = round_up(sum(sizes), row_multiple)
    pieces = [p.rows if len(p.rows) == n else p.rows[:n] for p, n in zip(parts, sizes, strict=True)]
    tail = pieces[0].new_zeros(total - sum(sizes), *pieces[0].shape[1:])
    starts = [0, *accumulate(sizes)]
    offsets = [p.offsets[(1 if i else 0) :] + starts[i] for i, p in enumerate(parts)]
    lengths = None
    if parts[-1].lengths is not None:
        lengths = tuple(n for p in parts for n in p.lengths or ())
    rows = pieces[0] if len(pieces) == 1 and not len(tail) else torch.cat([*pieces, tail])
    longest, shortest = max(p.max_length for p in parts), min(p.shortest for p in parts)
    return Packed(rows, torch.cat(offsets), lengths, longest, total, shortest)
