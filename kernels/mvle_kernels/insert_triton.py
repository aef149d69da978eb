"""Mask tokens put in where patches were dropped: full-length sequences from visible rows, in one pass.

Math     position p of image b (0: the class token, n + 1: patch n) is masked, and becomes mask_token + positions[p], or
         it is row starts[b] + p - (masked patches before it). Backward: each visible row has the gradient of its one
         copy; that of positions[p] is the sum over the images that mask p, first of a chunk of them in one program,
         then of the chunks; that of the mask token is the sum over p of it.
Cost     reads the visible rows once and writes the result once. Floor of base at 256 pairs, bfloat16: 19712 rows in,
         50432 out, of 768 values of 2 bytes = 108 MB, and as much backward. Plain torch gathers a row for masked
         positions too, and chooses and pads in passes of their own: by count, 29 launches of 523 MB and 8 of 643 MB.
Exact    copies and sums in float32 of a fixed order, no atomics: bitwise repeatable.
Limits   fewer than 2^31 rows; sequence b has as many rows as positions that are not masked.
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
from .packed import Packed, round_up
from .recipes import RECIPES
from .triton_support import allocate, define, launch
from .views_triton import CHUNK, backward_rule, rule, type_of

# ---- kernels: launched as those of embed_views are ------------------------------------------------------------------


@triton.jit(do_not_specialize=["tail"])
def insert_kernel(
    # inputs
    rows,
    starts,
    masked,
    ends,
    mask_token,
    positions,
    # outputs
    out,
    place,  # the row of each position, or -1
    # sizes
    images,
    tail,  # rows of zeros behind the images
    # strides
    stride_t,
    stride_p,
    # compile-time
    P: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A few positions of one image, or a few rows of the tail."""
    blocks: tl.constexpr = (P + ROWS - 1) // ROWS
    program = tl.program_id(0)
    b = program // blocks
    kind = out.dtype.element_ty
    if b < images:
        p = (program % blocks) * ROWS + tl.arange(0, ROWS)
        real = p < P
        begin = tl.load(ends + b)
        count = tl.load(ends + b + 1) - begin
        before = tl.zeros_like(p)  # masked patches before the position, and at it
        here = tl.zeros_like(p)
        for start in range(0, P - 1, BLOCK_N):
            i = start + tl.arange(0, BLOCK_N)
            at = tl.load(masked + begin + i, mask=i < count, other=P).to(tl.int32) + 1
            before += tl.sum((at[None, :] < p[:, None]).to(tl.int32), 1)
            here += tl.sum((at[None, :] == p[:, None]).to(tl.int32), 1)
        row = tl.where(here > 0, -1, tl.load(starts + b).to(tl.int32) + p - before)
        tl.store(place + b * P + p, row, mask=real)
        read = row.to(tl.int64)[:, None] * stride_t
        write = (b.to(tl.int64) * P + p)[:, None] * D
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)[None, :]
            inside = real[:, None] & (d < D)
            covered = inside & (here > 0)[:, None]
            visible = tl.load(rows + read + d, mask=inside & (here == 0)[:, None], other=0).to(tl.float32)
            position = tl.load(positions + p.to(tl.int64)[:, None] * stride_p + d, mask=covered, other=0).to(tl.float32)
            token = tl.load(mask_token + d, mask=d < D, other=0).to(tl.float32)
            value = tl.where((here > 0)[:, None], token + position, visible)
            tl.store(out + write + d, value.to(kind), mask=inside)
    else:
        t = (program - images * blocks) * ROWS + tl.arange(0, ROWS)
        write = (images * P + t).to(tl.int64)[:, None] * D
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)[None, :]
            tl.store(out + write + d, tl.zeros([ROWS, BLOCK_D], kind), mask=(t < tail)[:, None] & (d < D))


@triton.jit(do_not_specialize=["total"])
def insert_backward_kernel(
    # inputs
    gradient,
    place,
    starts,
    # outputs
    of_rows,
    of_positions,  # of each chunk
    # sizes
    images,
    total,  # rows of of_rows
    # strides
    stride_r,
    # compile-time
    P: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One position in a chunk of the images; programs behind the last chunk make the tail zero."""
    columns: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    d = (program % columns) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    p, chunk = program // columns % P, program // columns // P
    kind = of_rows.dtype.element_ty
    if chunk * CHUNK < images:
        covered = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for start in range(0, CHUNK, ROWS):
            b = (chunk * CHUNK + start + tl.arange(0, ROWS)).to(tl.int64)
            inside = (b < images)[:, None] & (d < D)
            row = tl.load(place + b * P + p, mask=b < images, other=-1).to(tl.int64)[:, None]
            g = tl.load(gradient + (b * P + p)[:, None] * stride_r + d, mask=inside, other=0).to(tl.float32)
            tl.store(of_rows + row * D + d, g.to(kind), mask=inside & (row >= 0))
            covered += tl.where(row < 0, g, 0.0)
        part = (chunk.to(tl.int64) * P + p) * D + d
        tl.store(of_positions + part, tl.sum(covered, 0, keep_dims=True), mask=d < D)
    else:
        zero = tl.zeros([ROWS, BLOCK_D], kind)
        row = tl.load(starts + images) + p * ROWS + tl.arange(0, ROWS)
        while tl.min(row, 0) < total:
            tl.store(of_rows + row.to(tl.int64)[:, None] * D + d, zero, mask=(row < total)[:, None] & (d < D))
            row += P * ROWS


# ---- launchers ------------------------------------------------------------------------------------------------------


def forward(
    rows: Tensor, starts: Tensor, masked: Tensor, ends: Tensor, mask_token: Tensor, positions: Tensor, total: int
) -> tuple[Tensor, Tensor]:
    """(rows [total, D] of the result, place [B, N + 1]). starts, ends: offsets of rows and of masked."""
    P, D = positions.shape
    B, device = ends.numel() - 1, rows.device
    out = allocate((total, D), type_of(rows, mask_token, positions), device)
    place = allocate((B, P), torch.int32, device)
    chosen: Mapping[str, int] = config("insert_mask_tokens", device, out.dtype, {"d": D}, rule(D))
    tail = total - B * P
    launch(
        insert_kernel,
        (B * -(-P // chosen["ROWS"]) + -(-tail // chosen["ROWS"]),),
        chosen,
        rows=rows,
        starts=starts,
        masked=masked,
        ends=ends,
        mask_token=mask_token,
        positions=positions,
        out=out,
        place=place,
        images=B,
        tail=tail,
        stride_t=rows.stride(0),
        stride_p=positions.stride(0),
        P=P,
        D=D,
    )
    return out, place


def backward(gradient: Tensor, place: Tensor, starts: Tensor, total: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(gradient [total, D] of the rows in `dtype`, of the positions in float32)."""
    if gradient.stride(-1) != 1:
        gradient = gradient.contiguous()
    (B, P), D, device = place.shape, gradient.shape[1], gradient.device
    chunks = -(-B // CHUNK)
    of_rows = allocate((total, D), dtype, device)
    of_positions = allocate((chunks, P, D), torch.float32, device)
    chosen: Mapping[str, int] = config(
        "insert_mask_tokens_backward", device, gradient.dtype, {"d": D}, backward_rule(D)
    )
    launch(
        insert_backward_kernel,
        (-(-D // chosen["BLOCK_D"]) * P * (chunks + 1),),
        chosen,
        gradient=gradient,
        place=place,
        starts=starts,
        of_rows=of_rows,
        of_positions=of_positions,
        images=B,
        total=total,
        stride_r=gradient.stride(0),
        P=P,
        D=D,
        CHUNK=CHUNK,
    )
    return of_rows, of_positions.sum(0)


# ---- registration ---------------------------------------------------------------------------------------------------


def _fake(
    rows: Tensor, starts: Tensor, masked: Tensor, ends: Tensor, mask_token: Tensor, positions: Tensor, total: int
) -> tuple[Tensor, Tensor]:
    P, D = positions.shape
    out = rows.new_empty(total, D, dtype=type_of(rows, mask_token, positions))
    return out, ends.new_empty(ends.numel() - 1, P, dtype=torch.int32)


def _backward_fake(
    gradient: Tensor, place: Tensor, starts: Tensor, total: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    D = gradient.shape[1]
    return gradient.new_empty(total, D, dtype=dtype), gradient.new_empty(place.shape[1], D, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    rows, starts, _, _, mask_token, positions, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], starts)
    ctx.total, ctx.dtypes = rows.shape[0], [t.dtype for t in (rows, mask_token, positions)]


def _backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    rows, mask_token, positions = ctx.dtypes
    of_rows, of_positions = backward_op(gradient, *ctx.saved_tensors, ctx.total, rows)
    return of_rows, None, None, None, of_positions.sum(0).to(mask_token), of_positions.to(positions), None


backward_op = define(
    "insert_mask_tokens_backward",
    "(Tensor gradient, Tensor place, Tensor starts, SymInt total, ScalarType dtype) -> (Tensor, Tensor)",
    backward,
    _backward_fake,
)
forward_op = define(
    "insert_mask_tokens",
    "(Tensor rows, Tensor starts, Tensor masked, Tensor ends, Tensor mask_token, Tensor positions, SymInt total) -> "
    "(Tensor, Tensor)",
    forward,
    _fake,
    setup=_setup,
    backward=_backward,
)


# ---- the backend, as patches.py asks for it --------------------------------------------------------------------------


def insert_mask_tokens(
    rows: Packed, masked: Packed, mask_token: Tensor, positions: Tensor, row_multiple: int
) -> Packed:
    """The backend of `insert_mask_tokens`."""
    flat, mask_token, positions = (
        t if t.stride(-1) == 1 else t.contiguous() for t in (rows.rows, mask_token, positions)
    )
    layout = Packed.layout_of([positions.shape[0]] * masked.sequences, row_multiple, flat.device)
    lists = [t.contiguous() for t in (rows.offsets, masked.rows, masked.offsets)]
    return layout.with_rows(forward_op(flat, *lists, mask_token, positions, layout.total)[0])


# ---- what base and large launch --------------------------------------------------------------------------------------


def variants(device: str = "meta") -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of each launch that is held by the regression check, over tensors without memory; and on a GPU,
    where the tuner times them, over tensors that such a call may have."""
    make = partial(torch.randn, dtype=torch.bfloat16, device=device)
    ints = partial(torch.arange, dtype=torch.int32, device=device)
    for name, recipe in RECIPES.items():
        B, P, listed = recipe.pairs, recipe.patches + 1, recipe.masked
        visible, total = round_up(B * (P - listed), 128), B * P
        rows, positions = make(visible, recipe.width), make(P, recipe.width)
        starts, masked, ends = ints(B + 1) * (P - listed), ints(listed).repeat(B), ints(B + 1) * listed
        arguments = rows, starts, masked, ends, positions[0], positions, total
        yield f"{name}, forward", partial(forward, *arguments)
        place = torch.empty(B, P, dtype=torch.int32, device=device)
        if not place.is_meta:
            place = forward(*arguments)[1]
        gradient = make(total, recipe.width)
        yield f"{name}, backward", partial(backward, gradient, place, starts, visible, rows.dtype)
