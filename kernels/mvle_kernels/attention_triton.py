"""Ragged attention, forward: a tile of queries of one head against its whole context.

Math     attention.py has it. A program takes BLOCK_Q rows of one query sequence and one head:
         t = Q K^T log2(e) / sqrt(E); m = max t; p = 2^(t - m); l = sum p; O = p V / l; lse = m + log2(l), base 2, which
         is all that a backward needs of the softmax. A context of up to 256 rows is one block, so the softmax is one
         pass; a longer one comes block by block, and m, l and O are corrected as m grows.
Cost     reads s E (q + k + k) bytes a head and sequence (s: bytes of the dtype), K and V once more for each further
         tile of queries, writes s E q + 4 q; 4 q k E operations. Floor of base at 256 pairs, bfloat16, 12 heads of 64:
         197x14 168 MB, 77x77 122 MB, 197x197 312 MB moved; libraries work in tiles of 128 and more, of which 14 fill a
         tenth.
Exact    float32 but for the products of bfloat16 and float16; no atomics: bitwise repeatable. The weights p are rounded
         to the dtype before they meet V, l is not.
Limits   heads of 16 to 128 values; up to 1024 rows a sequence; last dimensions contiguous.
Measured not yet measured on a GPU
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import readers_a_chunk, readers_of, split_readers
from .launches import architecture, config
from .recipes import RECIPES
from .triton_support import allocate, dot_dtype, launch, power_of_2

LOG2_E = math.log2(math.e)
FILL = 1024  # elements of a tail that a program zeroes at a time


# ---- launch choice --------------------------------------------------------------------------------------------------


def older(arch: str) -> bool:
    """Products by warps, not by groups of four: what they need lies in registers, so tiles are smaller."""
    return arch.startswith(("sm_8", "sm_12"))


def rule(max_q: int, max_k: int, head: int, arch: str, dtype: torch.dtype) -> dict[str, int]:
    """Tiles that the lengths fill; a whole context where one block of it fits beside a tile of queries. Chosen by what
    compiles without spilling registers, not by time."""
    block_e, keys = power_of_2(head, 16), power_of_2(max_k, 16)
    if dtype == torch.float32:  # exact products are made without tensor cores, of operands in registers
        block_k = min(keys, 32 * 64 // block_e)
        return {"BLOCK_Q": min(32, power_of_2(max_q, 16)), "BLOCK_K": block_k, "num_warps": 4, "num_stages": 1}
    small = block_e > 64 or older(arch)
    block_k = keys if keys <= (128 if small else 256) else 32 if block_e > 64 and older(arch) else 64 if small else 128
    block_q = min(64, power_of_2(max_q, 16))
    warps = 2 if block_q < 64 and block_q * block_k <= 16 * 64 else 4
    return {"BLOCK_Q": block_q, "BLOCK_K": block_k, "num_warps": warps, "num_stages": 2 if block_k < keys else 1}


def fillers(elements: int) -> int:
    """Programs that zero tails, whose length only the device may know: each for 8 blocks, if all were tail."""
    return min(64, -(-elements // (8 * FILL)))


# ---- kernel ---------------------------------------------------------------------------------------------------------


@triton.jit
def zero_tail(x, first, rows, width, program, programs, FILL: tl.constexpr):
    """Zero rows first .. rows of x [rows, width], which is dense: one program's share of it."""
    end = rows.to(tl.int64) * width
    for at in range(first.to(tl.int64) * width + program * FILL, end, programs * FILL):
        place = at + tl.arange(0, FILL).to(tl.int64)
        tl.store(x + place, tl.zeros([FILL], x.dtype.element_ty), mask=place < end)


@triton.jit
def load_rows(x, stride, first, row, length, e, E: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr):
    """Rows first + row of one head [row, e], for products; zeros from row `length` on and from value E on."""
    place = (first + row).to(tl.int64)[:, None] * stride + e[None, :]
    mask = (row < length)[:, None]
    if not EVEN:
        mask = mask & (e < E)[None, :]
    return tl.load(x + place, mask=mask, other=0).to(DOT)


@triton.jit(do_not_specialize=["sequences", "q_rows", "tiles", "fill"])
def attention_kernel(
    # inputs
    q,
    k,
    v,
    q_offsets,
    k_offsets,
    kv_index,  # or anything, if not INDEXED
    order,  # or anything, if not ORDERED
    # outputs
    out,
    lse,
    # sizes
    sequences,
    q_rows,
    tiles,  # of queries, of the longest sequence
    fill,  # programs that zero tails
    # strides
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    # scalars
    scale,
    # compile-time
    H: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    INDEXED: tl.constexpr,
    ORDERED: tl.constexpr,
    WHOLE: tl.constexpr,
    DOT: tl.constexpr,
    FILL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of one head of one query sequence; the last programs zero the tail of out."""
    program = tl.program_id(0)
    work = sequences * H * tiles
    if program >= work:
        zero_tail(out, tl.load(q_offsets + sequences), q_rows, H * E, program - work, fill, FILL)
        return
    tile, head, s = program % tiles, (program // tiles) % H, program // (tiles * H)
    if ORDERED:  # readers of one context follow one another, so that it comes out of the cache
        s = tl.load(order + s)
    q_first = tl.load(q_offsets + s)
    q_length = tl.load(q_offsets + s + 1) - q_first
    if tile * BLOCK_Q >= q_length:
        return
    context = s
    if INDEXED:
        context = tl.load(kv_index + s)
    k_first = tl.load(k_offsets + context)
    k_length = tl.load(k_offsets + context + 1) - k_first

    row, e = tile * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_E)
    EVEN: tl.constexpr = E == BLOCK_E
    head = head.to(tl.int64)
    queries = load_rows(q + head * stride_qh, stride_qt, q_first, row, q_length, e, E, EVEN, DOT)
    k += head * stride_kh
    v += head * stride_vh

    if WHOLE:
        key = tl.arange(0, BLOCK_K)
        keys = load_rows(k, stride_kt, k_first, key, k_length, e, E, EVEN, DOT)
        values = load_rows(v, stride_vt, k_first, key, k_length, e, E, EVEN, DOT)
        t = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        t = tl.where((key < k_length)[None, :], t, float("-inf"))
        m = tl.max(t, 1)
        m = tl.where(m == float("-inf"), 0.0, m)  # an empty context: p = 2^-inf = 0
        p = tl.exp2(t - m[:, None])
        l = tl.sum(p, 1)  # noqa: E741
        o = tl.dot(p.to(DOT), values, input_precision="ieee")
    else:
        m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_Q], tl.float32)  # noqa: E741
        o = tl.zeros([BLOCK_Q, BLOCK_E], tl.float32)
        for start in range(0, k_length, BLOCK_K):
            key = start + tl.arange(0, BLOCK_K)
            keys = load_rows(k, stride_kt, k_first, key, k_length, e, E, EVEN, DOT)
            values = load_rows(v, stride_vt, k_first, key, k_length, e, E, EVEN, DOT)
            t = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
            t = tl.where((key < k_length)[None, :], t, float("-inf"))
            highest = tl.maximum(m, tl.max(t, 1))
            finite = tl.where(highest == float("-inf"), 0.0, highest)
            p = tl.exp2(t - finite[:, None])
            shrink = tl.exp2(m - finite)
            l = l * shrink + tl.sum(p, 1)  # noqa: E741
            o = o * shrink[:, None] + tl.dot(p.to(DOT), values, input_precision="ieee")
            m = highest
        m = tl.where(m == float("-inf"), 0.0, m)

    l = tl.where(l == 0.0, 1.0, l)  # noqa: E741  only an empty context has none
    place = q_first.to(tl.int64) + row  # the sum of both cast instead: Triton 3.6 spills for sm_80
    mask = (row < q_length)[:, None]
    if not EVEN:
        mask = mask & (e < E)[None, :]
    o = (o / l[:, None]).to(out.dtype.element_ty)
    tl.store(out + place[:, None] * (H * E) + head * E + e[None, :], o, mask=mask)
    tl.store(lse + head * q_rows + place, m + tl.log2(l), mask=row < q_length)


# ---- launcher -------------------------------------------------------------------------------------------------------


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    kv_index: Tensor | None,
    readers: Tensor | None,
    max_q: int,
    max_k: int,
) -> tuple[Tensor, Tensor]:
    """(out [T_q, H, E], lse float32 [H, T_q]). readers: for the backward; here their order alone, if it is there. The
    tail of lse is left as it was allocated: a backward reads rows of sequences alone."""
    T, H, E = q.shape
    out, lse = allocate((T, H, E), q.dtype, q.device), allocate((H, T), torch.float32, q.device)
    bucket = {"q": power_of_2(max_q, 16), "k": power_of_2(max_k, 16), "e": power_of_2(E, 16)}
    fallback = rule(max_q, max_k, E, architecture(q.device), q.dtype)
    chosen: Mapping[str, int] = config("attention_forward", q.device, q.dtype, bucket, fallback)
    sequences, tiles, fill = q_offsets.numel() - 1, -(-max_q // chosen["BLOCK_Q"]), fillers(q.numel())
    order = k_offsets
    if readers is not None:
        order = split_readers(readers, sequences, k_offsets.numel() - 1, max_q)[2]
    launch(
        attention_kernel,
        (sequences * H * tiles + fill,),
        chosen,
        q=q,
        k=k,
        v=v,
        q_offsets=q_offsets,
        k_offsets=k_offsets,
        kv_index=k_offsets if kv_index is None else kv_index,
        order=order,
        out=out,
        lse=lse,
        sequences=sequences,
        q_rows=T,
        tiles=tiles,
        fill=fill,
        **strides(q=q, k=k, v=v),
        scale=LOG2_E / math.sqrt(E),
        H=H,
        E=E,
        BLOCK_E=bucket["e"],
        INDEXED=kv_index is not None,
        ORDERED=readers is not None,
        WHOLE=chosen["BLOCK_K"] >= max_k,
        DOT=dot_dtype(q.dtype),
        FILL=FILL,
    )
    return out, lse


def strides(**tensors: Tensor) -> dict[str, int]:
    """stride_qt and stride_qh of q=q, and so on: of rows and of heads."""
    return {f"stride_{name}{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate("th")}


# ---- what base and large launch -------------------------------------------------------------------------------------


def cases(device: str) -> Iterator[tuple[Any, ...]]:
    """(name, q, k, offsets of q, of k, kv_index and readers or None, longest query, longest key). Captions come at
    their mean and at their longest; 77 rows are those of a masked image, 577 those of one of 384 pixels."""
    for name, recipe in RECIPES.items():
        image, longest = recipe.patches + 1, recipe.tokens
        captions = recipe.caption, longest
        apart = [(image, image), (77, 77), (577, 577), *((n, n) for n in captions)]
        # what reads the context of its own pair: visible or all patches, masked patches and words in last blocks
        apart += [(a, n) for a in (image, 77, recipe.masked, 7) for n in captions] + [(recipe.masked, image)]
        across = [(a, n) for a in (image, 77) for n in captions] + [(n, image) for n in captions]
        across += [(1, image), (1, longest), (577, recipe.caption)]
        B = recipe.pairs
        numbers = torch.arange(B + 1, dtype=torch.int32, device=device)
        for a, b, indexed in [*((*p, False) for p in apart), *((*p, True) for p in across)]:
            q, k = (torch.randn(B * n, recipe.heads, recipe.head, dtype=torch.bfloat16, device=device) for n in (a, b))
            index, readers = None, None
            if indexed:
                index = (numbers[1:] * 7) % B
                readers = readers_of(index, B, readers_a_chunk(a))
            yield (
                f"{name}, {a}x{b}{', indexed' if indexed else ''}",
                q,
                k,
                numbers * a,
                numbers * b,
                index,
                readers,
                a,
                b,
            )


def variants(device: str = "meta") -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of each launch that is held by the regression check, over tensors without memory; and on a GPU,
    where the tuner times them, over tensors that such a call may have."""
    for name, q, k, *rest in cases(device):
        yield name, partial(forward, q, k, k, *rest)
