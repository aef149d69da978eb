"""Whole sequences repeated by an index, and the sum of a sequence's readers back: no sort, no index of rows.

Math     forward: row t of the result is row starts[index[s]] + t - ends[s] of the source, where s is the sequence with
         ends[s] <= t < ends[s + 1]; zero behind the last. Backward: the gradient of row r of sequence b is the sum over
         all s with index[s] = b, in ascending order, of the gradient of row ends[s] + r - starts[b].
Cost     reads R rows and writes T (R: rows of what is read; T: of the result), one launch each way. Floor of base's
         image side at 256 pairs, bfloat16: 50432 rows of 768 values in and out = 155 MB. Plain torch makes an index of
         rows first, in 15 launches, and sorts in the backward: by count 387 to 620 MB there. It blanks a tail in a
         second pass.
Exact    copies; the backward sums in float32 in a fixed order and rounds once: bitwise repeatable.
Limits   fewer than 2^31 rows; sequences of up to 524280 rows, for which the second axis of a grid has programs. All
         readers of a sequence are summed by the same programs, one for each 8 rows and 256 values: a sequence that
         everybody reads costs them a loop over everybody.
Measured not yet measured on a GPU
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import config
from .packed import Packed
from .recipes import RECIPES
from .triton_support import allocate, define, launch, power_of_2

# ---- launch choice --------------------------------------------------------------------------------------------------


def rule(width: int) -> dict[str, int]:
    """8 rows of the result, 256 of their values at a time: a warp reads 16 bytes a thread of one row."""
    return {"ROWS": 8, "BLOCK_D": min(power_of_2(width, 16), 256), "num_warps": 4, "num_stages": 1}


def backward_rule(width: int, copies: int) -> dict[str, int]:
    """8 rows of a sequence and 256 of their values, summed in registers; the index is read up to 256 at a time."""
    return {
        "ROWS": 8,
        "BLOCK_D": min(power_of_2(width, 16), 256),
        "BLOCK_S": min(power_of_2(copies, 16), 256),
        "num_warps": 4,
        "num_stages": 1,
    }


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["total"])
def expand_kernel(
    # inputs
    rows,
    index,
    starts,
    ends,
    # outputs
    out,
    # sizes
    copies,
    total,
    # strides
    stride_t,
    # compile-time
    STEPS: tl.constexpr,  # of a search among copies
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A few rows of the result."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    low = tl.zeros_like(t)  # how many sequences end at or before the row
    high = tl.zeros_like(t) + copies
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        searching = low < high
        behind = tl.load(ends + middle + 1, mask=searching, other=0) <= t
        low = tl.where(searching & behind, middle + 1, low)
        high = tl.where(searching & ~behind, middle, high)
    real = (low < copies) & (t < total)
    source = tl.load(index + low, mask=real, other=0)
    row = tl.load(starts + source, mask=real, other=0) + t - tl.load(ends + low, mask=real, other=0)
    read = row.to(tl.int64)[:, None] * stride_t
    write = t.to(tl.int64)[:, None] * D
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        value = tl.load(rows + read + d, mask=real[:, None] & (d < D), other=0)
        tl.store(out + write + d, value, mask=(t < total)[:, None] & (d < D))


@triton.jit(do_not_specialize=["total", "read"])
def expand_backward_kernel(
    # inputs
    gradient,
    index,
    starts,
    ends,
    # outputs
    of_rows,
    # sizes
    sequences,
    copies,
    total,  # rows of the source, and of the gradient
    read,
    # strides
    stride_t,
    # compile-time
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """A few rows of one sequence; programs behind the last sequence make the tail zero."""
    columns: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    d = (program % columns) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    position = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    b = program // columns
    begin = tl.load(starts + b)
    if b < sequences:
        length = tl.load(starts + b + 1) - begin
        summed = tl.zeros([ROWS, BLOCK_D], tl.float32)
        first = 0
        while first < copies:
            s = first + tl.arange(0, BLOCK_S)
            which = tl.load(index + s, mask=s < copies, other=-1)
            readers = tl.where(which == b, s, copies)  # those that are none stand behind all
            reader = tl.min(readers, 0)
            while reader < copies:
                row = tl.load(ends + reader) + position
                there = (position < length) & (row < read)
                at = row.to(tl.int64)[:, None] * stride_t + d
                summed += tl.load(gradient + at, mask=there[:, None] & (d < D), other=0).to(tl.float32)
                readers = tl.where(readers > reader, readers, copies)
                reader = tl.min(readers, 0)
            first += BLOCK_S
        write = (begin + position).to(tl.int64)[:, None] * D + d
        tl.store(of_rows + write, summed.to(of_rows.dtype.element_ty), mask=(position < length)[:, None] & (d < D))
    else:
        zero = tl.zeros([ROWS, BLOCK_D], of_rows.dtype.element_ty)
        row = begin + position
        while tl.min(row, 0) < total:
            tl.store(of_rows + row.to(tl.int64)[:, None] * D + d, zero, mask=(row < total)[:, None] & (d < D))
            row += tl.num_programs(1) * ROWS


# ---- launchers ------------------------------------------------------------------------------------------------------


def forward(rows: Tensor, index: Tensor, starts: Tensor, ends: Tensor, total: int, longest: int) -> Tensor:
    """Rows [T, D] of the result. starts, ends: offsets of the source and of the result."""
    copies, D = index.numel(), rows.shape[1]
    out = allocate((total, D), rows.dtype, rows.device)
    chosen: Mapping[str, int] = config("expand", rows.device, rows.dtype, {"d": D}, rule(D))
    launch(
        expand_kernel,
        (-(-total // chosen["ROWS"]),),
        chosen,
        rows=rows,
        index=index,
        starts=starts,
        ends=ends,
        out=out,
        copies=copies,
        total=total,
        stride_t=rows.stride(0),
        STEPS=copies.bit_length(),
        D=D,
    )
    return out


def backward(gradient: Tensor, index: Tensor, starts: Tensor, ends: Tensor, total: int, longest: int) -> Tensor:
    """Gradient [total, D] of the source; longest: of its sequences."""
    if gradient.stride(-1) != 1:
        gradient = gradient.contiguous()
    copies, D, sequences = index.numel(), gradient.shape[1], starts.numel() - 1
    of_rows = allocate((total, D), gradient.dtype, gradient.device)
    chosen: Mapping[str, int] = config(
        "expand_backward", gradient.device, gradient.dtype, {"d": D}, backward_rule(D, copies)
    )
    launch(
        expand_backward_kernel,
        (-(-D // chosen["BLOCK_D"]) * (sequences + 1), max(1, -(-longest // chosen["ROWS"]))),
        chosen,
        gradient=gradient,
        index=index,
        starts=starts,
        ends=ends,
        of_rows=of_rows,
        sequences=sequences,
        copies=copies,
        total=total,
        read=gradient.shape[0],
        stride_t=gradient.stride(0),
        D=D,
    )
    return of_rows


# ---- registration ---------------------------------------------------------------------------------------------------


def _fake(rows: Tensor, index: Tensor, starts: Tensor, ends: Tensor, total: int, longest: int) -> Tensor:
    return rows.new_empty(total, rows.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, index, starts, ends, _, longest = inputs
    ctx.save_for_backward(index, starts, ends)
    ctx.total, ctx.longest = rows.shape[0], longest


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return backward_op(gradient, *ctx.saved_tensors, ctx.total, ctx.longest), *[None] * 5


SCHEMA = "Tensor index, Tensor starts, Tensor ends, SymInt total, SymInt longest) -> Tensor"
backward_op = define("expand_backward", "(Tensor gradient, " + SCHEMA, backward, _fake)
forward_op = define("expand", "(Tensor rows, " + SCHEMA, forward, _fake, setup=_setup, backward=_backward)


# ---- the backend, as patches.py asks for it --------------------------------------------------------------------------


def expand(rows: Packed, index: Tensor, layout: Packed) -> Packed:
    """The backend of `expand`."""
    flat = rows.rows.flatten(1) if rows.rows.dim() != 2 else rows.rows
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    longest = max(rows.lengths, default=0) if rows.lengths is not None else rows.max_length
    lists = [t.contiguous() for t in (index, rows.offsets, layout.offsets)]
    out = forward_op(flat, *lists, layout.total, longest)
    return layout.with_rows(out.view(layout.total, *rows.rows.shape[1:]))


# ---- what base and large launch --------------------------------------------------------------------------------------


def variants(device: str = "meta") -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of each launch that is held by the regression check, over tensors without memory; and on a GPU,
    where the tuner times them, over tensors that such a call may have."""
    ints = partial(torch.arange, dtype=torch.int32, device=device)
    for name, recipe in RECIPES.items():
        B = recipe.pairs
        for side, longest, mean in (("images", recipe.patches + 1, None), ("captions", recipe.tokens, recipe.caption)):
            length = mean or longest
            source, result = B * length, B * longest  # drawn captions: room for the longest
            shared = ints(B) * 7 % B, ints(B + 1) * length, ints(B + 1) * length
            for way, run, given, made in (("forward", forward, source, result), ("backward", backward, result, source)):
                rows = torch.randn(given, recipe.width, dtype=torch.bfloat16, device=device)
                yield f"{name}, {side}, {way}", partial(run, rows, *shared, made, longest)
