"""Moves between the packed form [T, ...] and the padded form [S, L, ...], each the exact inverse of the other.

Used by the dense backends: a CPU (and a library kernel) is fast on equal lengths. The index tensors are made once for
a layout and cached on it, so that all blocks of a step share them. Both directions are gathers, forward and backward:
no scatter, hence deterministic, and the tail stays zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .packed import Packed, once, row_index


def equal_length(layout: Packed) -> int | None:
    """The one length that all sequences share, if the host knows that they do (and there are any)."""
    lengths = layout.lengths
    if not lengths or lengths[0] == 0 or any(n != lengths[0] for n in lengths):
        return None
    return lengths[0]


def padded_length(layout: Packed) -> int:
    """L of the padded form: the longest sequence if the host knows it, else the static cap."""
    return max(layout.lengths, default=0) if layout.lengths is not None else layout.max_length


def pad_index(layout: Packed) -> tuple[Tensor, Tensor]:
    """(rows int64 [S * L], valid bool [S, L]). A slot past the end of a sequence repeats the sequence's own last row,
    so that a broken sequence cannot leak into another through the padding. The slots of an empty sequence point at rows
    of others: whoever gathers puts zeros there (`may_be_empty`)."""

    def make() -> tuple[Tensor, Tensor]:
        offsets = layout.offsets.long()
        slots = torch.arange(padded_length(layout), device=offsets.device)
        lengths = (offsets[1:] - offsets[:-1])[:, None]
        rows = offsets[:-1, None] + torch.minimum(slots, (lengths - 1).clamp(min=0))
        return rows.clamp(max=max(layout.total - 1, 0)).flatten(), slots < lengths

    return once(layout.cache, "pad_index", make)


def unpad_index(layout: Packed) -> tuple[Tensor, Tensor]:
    """(slots int64 [T] into the S * L padded rows, real bool [T]); tail rows point at slot 0."""

    def make() -> tuple[Tensor, Tensor]:
        sequence, position, real = row_index(layout)
        return (sequence * padded_length(layout) + position) * real, real

    return once(layout.cache, "unpad_index", make)


def has_tail(layout: Packed) -> bool:
    """Whether the buffer may hold rows of no sequence (always possible where lengths are unknown)."""
    return layout.lengths is None or sum(layout.lengths) < layout.total


def may_be_empty(layout: Packed) -> bool:
    """Whether some sequence may have no rows."""
    return layout.sequences > 0 and layout.shortest == 0


def _blank(rows: Tensor, real: Tensor) -> Tensor:
    """Zeros, in place, where not real: in a gather of one's own, and whatever stood there (NaN too)."""
    return rows.masked_fill_(~real.view(-1, *[1] * (rows.dim() - 1)), 0)


def _blank_tail(rows: Tensor, real: Tensor, layout: Packed) -> Tensor:
    if layout.lengths is None:
        return _blank(rows, real)
    rows[sum(layout.lengths) :].zero_()
    return rows


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: Packed) -> Tensor:
        ctx.layout = layout
        index, valid = pad_index(layout)
        padded = rows.index_select(0, index).view(*valid.shape, *rows.shape[1:])
        return _blank(padded, valid[:, 0]) if may_be_empty(layout) else padded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        slots, real = unpad_index(ctx.layout)
        return _blank_tail(grad.flatten(0, 1).index_select(0, slots), real, ctx.layout), None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, padded: Tensor, layout: Packed) -> Tensor:
        ctx.layout = layout
        slots, real = unpad_index(layout)
        return _blank_tail(padded.flatten(0, 1).index_select(0, slots), real, layout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        index, valid = pad_index(ctx.layout)
        padded = _blank(grad.index_select(0, index), valid.flatten())
        return padded.view(*valid.shape, *grad.shape[1:]), None


def pad(rows: Tensor, layout: Packed) -> Tensor:
    """[T, ...] -> [S, L, ...]. Slots past a sequence's end hold a copy of its last row (zeros if it has none):
    mask them before use."""
    if (length := equal_length(layout)) is not None:
        if has_tail(layout):  # a slice of all would be copied in its backward
            rows = rows[: layout.sequences * length]
        return rows.unflatten(0, (layout.sequences, length))
    if layout.sequences == 0 or layout.total == 0 or padded_length(layout) == 0:
        return rows.new_zeros(layout.sequences, padded_length(layout), *rows.shape[1:])
    return _Pad.apply(rows, layout)


def unpad(padded: Tensor, layout: Packed) -> Tensor:
    """[S, L, ...] -> [T, ...], the tail zero."""
    if (length := equal_length(layout)) is not None:
        rows = padded.flatten(0, 1)
        tail = layout.total - layout.sequences * length
        return torch.cat([rows, rows.new_zeros(tail, *rows.shape[1:])]) if tail else rows
    if padded.numel() == 0:
        return padded.new_zeros(layout.total, *padded.shape[2:])
    return _Unpad.apply(padded, layout)
