"""Ragged attention, backward: a context and its readers, one head, in one program.

Math     attention.py has it. With p = 2^(t - lse) as in the forward, dO the gradient of O, delta = rowsum(dO O):
         dV = p^T dO;  ds = p (dO V^T - delta);  dQ = ds K / sqrt(E);  dK = ds^T Q / sqrt(E), summed over the readers.
         A program takes a chunk of a context's readers (attention.py, `readers_of`): K and V once, then the tiles of
         all its queries; dK and dV stay in registers, dQ goes out at once. It works on t^T [keys, queries], so that
         products have keys as rows. The first chunk of a context writes dK and dV; others (of hubs) write float32
         parts, which `add_parts_kernel` adds. A context too long to be held whole goes to one program for each block of
         its keys, and dQ to a kernel of its own (`query_gradient_kernel`): two launches in the place of one.
Cost     reads s E (3 q + 2 k), writes s E (q + 2 k) a head and sequence (s: bytes of the dtype); 8 q k E operations,
         and 2 q k E more to make t again. Floor of base at 256 pairs, bfloat16, 12 heads of 64: 197x14 334 MB,
         77x77 243 MB, 197x197 622 MB moved.
Exact    as the forward; p and ds are rounded to the dtype before products. Readers in the order of `readers_of`, parts
         in the order of chunks: bitwise repeatable. A hub's first part is rounded to the dtype before others are added.
Limits   as the forward.
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

from .attention import split_readers
from .attention_triton import FILL, LOG2_E, cases, fillers, load_rows, older, strides, zero_tail
from .launches import architecture, config
from .triton_support import allocate, dot_dtype, launch, power_of_2

# ---- launch choice --------------------------------------------------------------------------------------------------


def rule(max_q: int, max_k: int, head: int, arch: str, dtype: torch.dtype) -> dict[str, int]:
    """The sums of a context lie in registers, 2 BLOCK_K BLOCK_E of float32 over all threads, beside two tiles of t.
    Chosen by what compiles without spilling them, not by time."""
    block_e, keys = power_of_2(head, 16), power_of_2(max_k, 16)
    queries, small = power_of_2(max_q, 16), older(arch)
    if dtype == torch.float32:
        return {"BLOCK_Q": 16, "BLOCK_K": min(keys, 32 * 64 // block_e), "num_warps": 4, "num_stages": 1}
    whole = keys * block_e <= (64 if small else 256) * 64
    block_k = keys if whole else (64 if small else 128) * 64 // block_e
    if block_k <= 32 and block_e <= 64:
        block_q, warps = (64, 4) if max_q > 32 and not small else (32, 2)
        if small and queries < block_k:  # one query, say: two warps would spill (Triton 3.6)
            warps = 4
    elif block_k * block_e <= 64 * 64:
        block_q, warps = 32, 4
    else:
        block_q, warps = 32 if whole else 64, 8
    return {"BLOCK_Q": min(block_q, queries), "BLOCK_K": block_k, "num_warps": warps, "num_stages": 1}


# ---- kernels --------------------------------------------------------------------------------------------------------

LN_2: tl.constexpr = tl.constexpr(math.log(2))


@triton.jit
def store_rows(x, first, row, length, e, values, H: tl.constexpr, E: tl.constexpr, EVEN: tl.constexpr):
    """values [row, e] to rows first + row of one head of x [rows, H, E], which is dense; first: int64."""
    place = (first + row)[:, None] * (H * E) + e[None, :]
    mask = (row < length)[:, None]
    if not EVEN:
        mask = mask & (e < E)[None, :]
    tl.store(x + place, values.to(x.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["chunks", "parts", "blocks", "fill", "sequences", "contexts", "q_rows", "k_rows", "max_k"]
)
def attention_backward_kernel(
    # inputs
    q,
    k,
    v,
    out,
    gradient,
    lse,
    q_offsets,
    k_offsets,
    chunk_table,  # and order: or anything, if not INDEXED
    order,
    # outputs
    dq,
    dk,
    dv,
    part_k,
    part_v,
    # sizes
    chunks,
    blocks,  # of keys, of the longest context
    fill,  # programs that zero tails
    sequences,
    contexts,
    q_rows,
    k_rows,
    max_k,
    # strides
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_gt,
    stride_gh,
    # scalars
    scale_2,  # of products, times log2(e); the scale itself would be one more value to keep through the loop
    # compile-time
    H: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    INDEXED: tl.constexpr,
    WHOLE: tl.constexpr,
    DOT: tl.constexpr,
    FILL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One block of keys of one head of one context against one chunk of its readers; the last programs zero tails."""
    program = tl.program_id(0)
    work = chunks * H * blocks
    if program >= work:
        q_tail, k_tail = tl.load(q_offsets + sequences), tl.load(k_offsets + contexts)
        zero_tail(dq, q_tail, q_rows, H * E, program - work, fill, FILL)
        zero_tail(dk, k_tail, k_rows, H * E, program - work, fill, FILL)
        zero_tail(dv, k_tail, k_rows, H * E, program - work, fill, FILL)
        return
    head, block, chunk = (program % H).to(tl.int64), (program // H) % blocks, program // (H * blocks)
    context, first, count, slot = chunk, chunk, 1, -1
    if INDEXED:
        context, first = tl.load(chunk_table + chunk * 4), tl.load(chunk_table + chunk * 4 + 1)
        count, slot = tl.load(chunk_table + chunk * 4 + 2), tl.load(chunk_table + chunk * 4 + 3)
    if context < 0:
        return
    k_first = tl.load(k_offsets + context)
    k_length = tl.load(k_offsets + context + 1) - k_first
    if (block > 0) & (block * BLOCK_K >= k_length):
        return

    e = tl.arange(0, BLOCK_E)
    EVEN: tl.constexpr = E == BLOCK_E
    key = block * BLOCK_K + tl.arange(0, BLOCK_K)
    keys = load_rows(k + head * stride_kh, stride_kt, k_first, key, k_length, e, E, EVEN, DOT)
    values = load_rows(v + head * stride_vh, stride_vt, k_first, key, k_length, e, E, EVEN, DOT)
    sum_k = tl.zeros([BLOCK_K, BLOCK_E], tl.float32)
    sum_v = tl.zeros([BLOCK_K, BLOCK_E], tl.float32)
    for reader in range(first, first + count):
        s = reader
        if INDEXED:
            s = tl.load(order + reader)
        q_first = tl.load(q_offsets + s).to(tl.int64)
        q_length = (tl.load(q_offsets + s + 1) - q_first).to(tl.int32)
        for start in range(0, q_length, BLOCK_Q):
            row = start + tl.arange(0, BLOCK_Q)
            queries = load_rows(q + head * stride_qh, stride_qt, q_first, row, q_length, e, E, EVEN, DOT)
            slope = load_rows(gradient + head * stride_gh, stride_gt, q_first, row, q_length, e, E, EVEN, DOT)
            result = load_rows(out + head * E, H * E, q_first, row, q_length, e, E, EVEN, DOT)
            delta = tl.sum(slope.to(tl.float32) * result.to(tl.float32), 1)
            lse_row = tl.load(lse + head * q_rows + q_first + row, mask=row < q_length, other=0)

            t = tl.dot(keys, tl.trans(queries), input_precision="ieee") * scale_2
            p = tl.exp2(t - lse_row[None, :])  # past the context whatever comes: those rows of sum_v are not stored
            sum_v += tl.dot(p.to(DOT), slope, input_precision="ieee")
            dp = tl.dot(values, tl.trans(slope), input_precision="ieee")
            ds = tl.where((key < k_length)[:, None], p * (dp - delta[None, :]), 0.0).to(DOT)
            if WHOLE:  # before sum_k: behind it Triton 3.6 spills for sm_100
                dq_rows = tl.dot(tl.trans(ds), keys, input_precision="ieee") * (scale_2 * LN_2)
                store_rows(dq + head * E, q_first, row, q_length, e, dq_rows, H, E, EVEN)
            sum_k += tl.dot(ds, queries, input_precision="ieee")

    if slot < 0:
        at = k_first.to(tl.int64)
        store_rows(dk + head * E, at, key, k_length, e, sum_k * (scale_2 * LN_2), H, E, EVEN)
        store_rows(dv + head * E, at, key, k_length, e, sum_v, H, E, EVEN)
    else:
        at = tl.cast(slot, tl.int64) * max_k
        store_rows(part_k + head * E, at, key, k_length, e, sum_k * (scale_2 * LN_2), H, E, EVEN)
        store_rows(part_v + head * E, at, key, k_length, e, sum_v, H, E, EVEN)


@triton.jit(do_not_specialize=["q_rows", "tiles"])
def query_gradient_kernel(
    # inputs
    q,
    k,
    v,
    out,
    gradient,
    lse,
    q_offsets,
    k_offsets,
    kv_index,  # or anything, if not INDEXED
    # outputs
    dq,
    # sizes
    q_rows,
    tiles,  # of queries, of the longest sequence
    # strides
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_gt,
    stride_gh,
    # scalars
    scale,
    scale_2,  # times log2(e)
    # compile-time
    H: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    INDEXED: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dQ of one tile of one head of one query sequence, over the blocks of a long context."""
    program = tl.program_id(0)
    tile, head, s = program % tiles, ((program // tiles) % H).to(tl.int64), program // (tiles * H)
    q_first = tl.load(q_offsets + s).to(tl.int64)
    q_length = (tl.load(q_offsets + s + 1) - q_first).to(tl.int32)
    if tile * BLOCK_Q >= q_length:
        return
    context = s
    if INDEXED:
        context = tl.load(kv_index + s)
    k_first = tl.load(k_offsets + context)
    k_length = tl.load(k_offsets + context + 1) - k_first

    row, e = tile * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_E)
    EVEN: tl.constexpr = E == BLOCK_E
    queries = load_rows(q + head * stride_qh, stride_qt, q_first, row, q_length, e, E, EVEN, DOT)
    slope = load_rows(gradient + head * stride_gh, stride_gt, q_first, row, q_length, e, E, EVEN, DOT)
    result = load_rows(out + head * E, H * E, q_first, row, q_length, e, E, EVEN, DOT)
    delta = tl.sum(slope.to(tl.float32) * result.to(tl.float32), 1)
    lse_row = tl.load(lse + head * q_rows + q_first + row, mask=row < q_length, other=0)
    total = tl.zeros([BLOCK_Q, BLOCK_E], tl.float32)
    for start in range(0, k_length, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        keys = load_rows(k + head * stride_kh, stride_kt, k_first, key, k_length, e, E, EVEN, DOT)
        values = load_rows(v + head * stride_vh, stride_vt, k_first, key, k_length, e, E, EVEN, DOT)
        t = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale_2
        p = tl.exp2(t - lse_row[:, None])
        dp = tl.dot(slope, tl.trans(values), input_precision="ieee")
        ds = tl.where((key < k_length)[None, :], p * (dp - delta[:, None]), 0.0).to(DOT)
        total += tl.dot(ds, keys, input_precision="ieee")
    store_rows(dq + head * E, q_first, row, q_length, e, total * scale, H, E, EVEN)


@triton.jit(do_not_specialize=["max_k"])
def add_parts_kernel(
    # inputs
    slots,
    k_offsets,
    part_k,
    part_v,
    # in and out
    dk,
    dv,
    # sizes
    max_k,
    # compile-time
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """To a hub's dK and dV the parts of its further chunks, in order: 8 blocks of values after one another."""
    slot = tl.program_id(0)
    count = tl.load(slots + slot * 4 + 1)
    if count == 0:
        return
    context = tl.load(slots + slot * 4)
    first = tl.load(k_offsets + context).to(tl.int64)
    size = (tl.load(k_offsets + context + 1) - first) * WIDTH
    for start in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
        x = start + tl.arange(0, BLOCK)
        mask = x < size
        sum_k = tl.load(dk + first * WIDTH + x, mask=mask, other=0).to(tl.float32)
        sum_v = tl.load(dv + first * WIDTH + x, mask=mask, other=0).to(tl.float32)
        for part in range(count):
            at = (slot + part).to(tl.int64) * max_k * WIDTH + x
            sum_k += tl.load(part_k + at, mask=mask, other=0)
            sum_v += tl.load(part_v + at, mask=mask, other=0)
        tl.store(dk + first * WIDTH + x, sum_k.to(dk.dtype.element_ty), mask=mask)
        tl.store(dv + first * WIDTH + x, sum_v.to(dv.dtype.element_ty), mask=mask)


# ---- launcher -------------------------------------------------------------------------------------------------------


def backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    kv_index: Tensor | None,
    readers: Tensor | None,
    max_q: int,
    max_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq [T_q, H, E], dk and dv [T_k, H, E])."""
    (T, H, E), device = q.shape, q.device
    sequences, contexts = q_offsets.numel() - 1, k_offsets.numel() - 1
    dq, dk, dv = (allocate(x.shape, q.dtype, device) for x in (q, k, v))
    chunks, parts, chunk_table, slots, order = contexts, 0, k_offsets, k_offsets, k_offsets
    if readers is not None:
        chunk_table, slots, order = split_readers(readers, sequences, contexts, max_q)
        chunks, parts = len(chunk_table) // 4, len(slots) // 4
    part_k, part_v = (allocate((parts, max_k, H, E), torch.float32, device) for _ in range(2))
    sums: dict[str, Any] = {"part_k": part_k, "part_v": part_v, "dk": dk, "dv": dv}
    bucket = {"q": power_of_2(max_q, 16), "k": power_of_2(max_k, 16), "e": power_of_2(E, 16)}
    fallback = rule(max_q, max_k, E, architecture(device), q.dtype)
    chosen: Mapping[str, int] = config("attention_backward", device, q.dtype, bucket, fallback)
    blocks, fill = -(-max_k // chosen["BLOCK_K"]), fillers(max(q.numel(), k.numel()))
    shared: dict[str, Any] = {"q": q, "k": k, "v": v, "out": out, "gradient": gradient, "lse": lse, "dq": dq}
    shared |= {"q_offsets": q_offsets, "k_offsets": k_offsets, "q_rows": T}
    shared |= strides(q=q, k=k, v=v, g=gradient)
    shared |= {"scale_2": LOG2_E / math.sqrt(E), "H": H, "E": E, "BLOCK_E": bucket["e"]}
    shared |= {"INDEXED": readers is not None, "DOT": dot_dtype(q.dtype)}
    launch(
        attention_backward_kernel,
        (chunks * H * max(blocks, 1) + fill,),
        chosen,
        **shared,
        chunk_table=chunk_table,
        order=order,
        **sums,
        chunks=chunks,
        blocks=max(blocks, 1),
        fill=fill,
        sequences=sequences,
        contexts=contexts,
        k_rows=k.shape[0],
        max_k=max_k,
        WHOLE=blocks <= 1,
        FILL=FILL,
    )
    if blocks > 1:
        tiles = -(-max_q // chosen["BLOCK_Q"])
        shared |= {"kv_index": k_offsets if kv_index is None else kv_index, "scale": 1 / math.sqrt(E)}
        launch(query_gradient_kernel, (sequences * H * tiles,), chosen, **shared, tiles=tiles)
    if parts:
        spread = min(-(-max_k * H * E // (8 * FILL)), 65535)  # all that a grid's second axis takes
        sums |= {"slots": slots, "k_offsets": k_offsets, "max_k": max_k}
        launch(add_parts_kernel, (parts, spread), {}, **sums, WIDTH=H * E, BLOCK=FILL)
    return dq, dk, dv


# ---- what base and large launch -------------------------------------------------------------------------------------


def variants(device: str = "meta") -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of each launch that is held by the regression check, over tensors without memory; and on a GPU,
    where the tuner times them, over tensors that such a call may have."""
    for name, q, k, *rest in cases(device):
        lse = torch.zeros(q.shape[1], len(q), device=device)
        yield name, partial(backward, q, q, k, k, q, lse, *rest)
