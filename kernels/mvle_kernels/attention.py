"""Ragged attention: every query sequence attends to one key sequence, both packed, nothing padded in memory.

Math     for query sequence s with rows Q_s [q, E] and context c = kv_index[s] (default c = s), a head at a time:
         O_s = softmax(Q_s K_c^T / sqrt(E)) V_c.      A context of length 0 gives zeros.
Cost     forward 4 * q * k * E FLOPs a head and pair; bytes 2 * E * (2 q + 2 k) a head in bf16. At base (E = 64)
         197 x 14 and 14 x 197 are bound by bytes, 197 x 197 by neither far: nothing here is long.
Exact    float32 accumulation (float64 stays float64); the tail of the output and of each gradient is zero; a non-finite
         sequence does not reach another one. Deterministic, no float atomics, but where a library computes: see
         attention_libraries.py.
Limits   E the same for q, k, v; kv_index in 0..S_k - 1. Which shapes go to which backend: attention_libraries.CHOICES.
Measured not yet measured on a GPU

Many calls of a step share their layouts: `attention_plan` prepares the index tensors once, and each block passes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import cuda_support, triton_support
from .attention_libraries import (
    installed,
    refuse_cudnn,
    refuse_varlen,
    refuse_xformers,
    unasked_cuda,
    unasked_cudnn,
    unasked_triton,
    varlen,
    xformers,
)
from .dispatch import Op
from .layout import equal_length, may_be_empty, pad, pad_index, padded_length, unpad
from .packed import Packed, once
from .patches import sum_into

ATTENTION = Op("ragged_attention")


@dataclass(frozen=True)
class Segment:
    """Query sequences start .. stop, handled as one dense batch; `q` and (where keys are cut alike) `k` are their own
    layouts; `bias` [S, 1, 1, L_k] hides slots past the end of a context, None if there are none."""

    start: int
    stop: int
    q: Packed
    k: Packed | None
    bias: Tensor | None
    alive: Tensor | None  # [S, 1, 1, 1]: False where the context is empty; None if no context can be


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """What the calls of a step with the same layouts share. What a backend needs is made when it first asks."""

    q: Packed
    k: Packed
    kv_index: Tensor | None
    cache: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The dense backend's batches."""
        return once(self.cache, "segments", lambda: _segments(self))

    @property
    def readers(self) -> Tensor:
        """Who reads which context, for a backward: `readers_of`. Only with a kv_index."""
        index = self.kv_index
        assert index is not None, "without kv_index each context has one reader"
        a_chunk = readers_a_chunk(padded_length(self.q))
        return once(self.cache, "readers", lambda: readers_of(index, self.k.sequences, a_chunk))


def attention_plan(q: Packed, k: Packed, kv_index: Tensor | None = None) -> AttentionPlan:
    """What calls share whose queries have layout `q` and contexts layout `k`.

    q, k: Packed (rows are not read); kv_index int [S_q] or None. Raises ValueError if S_q and S_k differ without one.
    """
    if kv_index is None and q.sequences != k.sequences:
        raise ValueError(
            f"without kv_index each query sequence needs its own context; got {q.sequences} query and "
            f"{k.sequences} key sequences."
        )
    return AttentionPlan(q, k, kv_index)


# ---- who reads a context --------------------------------------------------------------------------------------------


def readers_a_chunk(max_q: int) -> int:
    """How many query sequences one program of a backward walks: about 32 tiles of 64 rows, whoever reads whom."""
    return min(32, max(4, 32 // max(1, -(-max_q // 64))))


def reader_sizes(readers: int, contexts: int, a_chunk: int) -> tuple[int, int]:
    """(chunks, slots) that hold any index: a context has one chunk, and one more for each a_chunk readers."""
    return contexts + readers // a_chunk, readers // a_chunk


def split_readers(readers: Tensor, sequences: int, contexts: int, max_q: int) -> tuple[Tensor, Tensor, Tensor]:
    """(chunks, slots, order) of what `readers_of` gave for these sizes, flat."""
    chunks, slots = reader_sizes(sequences, contexts, readers_a_chunk(max_q))
    return readers[: 4 * chunks], readers[4 * chunks : 4 * (chunks + slots)], readers[4 * (chunks + slots) :]


def readers_of(kv_index: Tensor, contexts: int, a_chunk: int) -> Tensor:
    """The readers of each context in chunks of at most `a_chunk`, int32, made on the device without waiting for it.

    A context that many sequences read (a hub) has several chunks, so that no program walks long. One tensor, since an
    op takes tensors alone:
        chunks [C, 4]   context (-1: no chunk), place of its first reader in `order`, readers, slot of its partial sums
                        (-1: the first chunk of a context, which needs none)
        slots [P, 4]    context whose partial sums begin here (or 0), how many there are (0: none begin here), 0, 0
        order [S_q]     query sequences by context, in each by number: sums have a fixed order
    """
    index = kv_index.long()
    C, P = reader_sizes(len(index), contexts, a_chunk)
    device = index.device
    by_context, order = torch.sort(index, stable=True)
    first = torch.searchsorted(by_context, torch.arange(contexts + 1, device=device))
    readers = first[1:] - first[:-1]
    chunks_of = ((readers + a_chunk - 1) // a_chunk).clamp(min=1)
    chunk_ends = chunks_of.cumsum(0)
    slot_ends = chunk_ends - torch.arange(1, contexts + 1, device=device)  # a slot for every chunk but the first

    chunk = torch.arange(C, device=device)
    context = torch.searchsorted(chunk_ends, chunk, right=True)
    real, c = context < contexts, context.clamp(max=max(contexts - 1, 0))
    nth = chunk - (chunk_ends - chunks_of)[c]
    count = (readers[c] - nth * a_chunk).clamp(0, a_chunk) * real
    slot = torch.where(real & (nth > 0), (slot_ends - chunks_of)[c] + nth, -1)
    chunks = torch.stack([torch.where(real, context, -1), first[c] + nth * a_chunk, count, slot], 1)

    place = torch.arange(P, device=device)
    context = torch.searchsorted(slot_ends, place, right=True)
    real, c = context < contexts, context.clamp(max=max(contexts - 1, 0))
    begins = real & (place == (slot_ends - chunks_of)[c] + 1)
    nothing = torch.zeros_like(place)
    slots = torch.stack([c * begins, (chunks_of[c] - 1) * begins, nothing, nothing], 1)
    return torch.cat([chunks.flatten(), slots.flatten(), order]).int()


def _zeros_of(q: Tensor) -> Tensor:
    """Zeros that still belong to the graph (gradient zero), even where q is not finite."""
    return q.masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0)


# ---- triton and libraries -------------------------------------------------------------------------------------------


def _refuse_triton(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> str | None:
    if not 16 <= q.shape[-1] <= 128:
        return f"takes heads of 16 to 128 values; got {q.shape[-1]}"
    longest = max(padded_length(plan.q), padded_length(plan.k))
    if longest > 1024:
        return f"takes sequences of at most 1024 rows; got {longest}"
    index = () if plan.kv_index is None else (plan.kv_index,)
    return triton_support.refuse(q, k, v, plan.q.offsets, plan.k.offsets, *index)


@ATTENTION.register(
    "triton", "short contexts held whole, hubs in chunks, tails included", _refuse_triton, unasked_triton
)
def _triton(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    from .attention_op import ragged_attention

    return ragged_attention(q, k, v, plan, by="triton")


def _refuse_cuda(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> str | None:
    if not 16 <= q.shape[-1] <= 128:
        return f"takes heads of 16 to 128 values; got {q.shape[-1]}"
    longest = max(padded_length(plan.q), padded_length(plan.k))
    if longest > 1024:
        return f"takes sequences of at most 1024 rows; got {longest}"
    index = () if plan.kv_index is None else (plan.kv_index,)
    return cuda_support.refuse(q, k, v, plan.q.offsets, plan.k.offsets, *index, dtypes=cuda_support.HALVES)


@ATTENTION.register("cuda", "the same, in tiles of 16 queries and 8 keys", _refuse_cuda, unasked_cuda)
def _cuda(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    from .attention_op import ragged_attention

    return ragged_attention(q, k, v, plan, by="cuda")


ATTENTION.register("varlen", "torch's attention of packed sequences", refuse_varlen)(varlen)


@ATTENTION.register("cudnn", "torch's SDPA by cuDNN, runs of equal lengths as batches", refuse_cudnn, unasked_cudnn)
def _cudnn(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _dense(q, k, v, plan)


ATTENTION.register("xformers", "memory-efficient attention of packed sequences", refuse_xformers)(xformers)


# ---- reference ------------------------------------------------------------------------------------------------------


def _reference(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    compute = torch.promote_types(q.dtype, torch.float32)
    q_ends, k_ends = plan.q.offsets.tolist(), plan.k.offsets.tolist()
    which = range(plan.q.sequences) if plan.kv_index is None else plan.kv_index.tolist()
    outputs = [q[:0]]
    for s, c in enumerate(which):
        q_HqE = q[q_ends[s] : q_ends[s + 1]].transpose(0, 1).to(compute)
        k_HkE = k[k_ends[c] : k_ends[c + 1]].transpose(0, 1).to(compute)
        v_HkE = v[k_ends[c] : k_ends[c + 1]].transpose(0, 1).to(compute)
        if k_HkE.shape[1] == 0:
            outputs.append(_zeros_of(q[q_ends[s] : q_ends[s + 1]]))
            continue
        weight = torch.softmax(q_HqE @ k_HkE.transpose(1, 2) / math.sqrt(q.shape[-1]), dim=-1)
        outputs.append((weight @ v_HkE).transpose(0, 1).to(q.dtype))
    out = torch.cat(outputs)
    return torch.cat([out, out.new_zeros(len(q) - len(out), *q.shape[1:])])


# ---- dense ----------------------------------------------------------------------------------------------------------


def segments_of(lengths: Sequence[int] | None, sequences: int) -> list[tuple[int, int]]:
    """Cut the query sequences where a long run of equal length begins or ends: such a run needs no padding."""
    if lengths is None or not sequences:
        return [(0, sequences)]
    runs: list[tuple[int, int]] = []
    start = 0
    for s in range(1, sequences + 1):
        if s == sequences or lengths[s] != lengths[start]:
            runs.append((start, s))
            start = s
    long = max(4, sequences // 8)
    merged: list[tuple[int, int, bool]] = []
    for a, b in runs:
        short = b - a < long
        if merged and short and merged[-1][2]:
            merged[-1] = (merged[-1][0], b, True)
        else:
            merged.append((a, b, short))
    return [(a, b) for a, b, _ in merged]


def _segments(plan: AttentionPlan) -> tuple[Segment, ...]:
    q, k, kv_index = plan.q, plan.k, plan.kv_index
    apart = kv_index is None and k.lengths is not None and q.lengths is not None
    device = q.offsets.device
    cuts = segments_of(q.lengths, q.sequences)
    whole = len(cuts) == 1
    segments = []
    for a, b in cuts:
        q_part = q if whole else q.part(a, b)
        k_part, bias, alive = None, None, None
        if apart:
            k_part = k if whole else k.part(a, b)
        keys = k_part if k_part is not None else k
        if keys.sequences and equal_length(keys) is None and padded_length(keys):
            valid = pad_index(keys)[1]
            if k_part is None:
                valid = valid[a:b] if kv_index is None else valid.index_select(0, kv_index.long()[a:b])
            filled = valid[:, 0]  # slot 0 is open even in an empty context: softmax stays finite, `alive` hides it
            valid = torch.cat([torch.ones_like(valid[:, :1]), valid[:, 1:]], 1)
            bias = torch.zeros(valid.shape, device=device).masked_fill(~valid, -math.inf)[:, None, None]
            if may_be_empty(keys):
                alive = filled[:, None, None, None]
        segments.append(Segment(a, b, q_part, k_part, bias, alive))
    return tuple(segments)


class _Take(torch.autograd.Function):
    """Contexts [S_k, ...] -> [S_q, ...] by kv_index; the backward sums the readers of a context in a fixed order."""

    @staticmethod
    def forward(ctx: Any, contexts: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.contexts = contexts.shape[0]
        return contexts.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        total = grad.new_zeros(ctx.contexts, *grad.shape[1:])
        sum_into(total, index, grad)
        return total, None


def _dense(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    if 0 in (plan.k.total, padded_length(plan.k), plan.q.total, padded_length(plan.q)):
        return _zeros_of(q)
    whole = len(plan.segments) == 1
    cut = plan.segments[0].k is not None  # keys are cut like the queries
    if whole:
        q_parts = [q]
    else:
        sizes = [s.q.total for s in plan.segments]
        q_parts = list(q.split([*sizes, len(q) - sum(sizes)]))
    if cut:
        sizes = [s.k.total for s in plan.segments if s.k is not None]
        k_parts = [k] if whole else list(k.split([*sizes, len(k) - sum(sizes)]))
        v_parts = [v] if whole else list(v.split([*sizes, len(v) - sum(sizes)]))
    else:
        k_all, v_all = pad(k, plan.k), pad(v, plan.k)
        if plan.kv_index is not None:
            index = plan.kv_index.long()
            k_all, v_all = _Take.apply(k_all, index), _Take.apply(v_all, index)
        sizes = [s.stop - s.start for s in plan.segments]
        k_parts, v_parts = list(k_all.split(sizes)), list(v_all.split(sizes))
    outputs = []
    for part, segment in enumerate(plan.segments):
        if segment.q.total == 0:
            continue
        query = pad(q_parts[part], segment.q)
        keys, values = k_parts[part], v_parts[part]
        if segment.k is not None:
            keys, values = pad(keys, segment.k), pad(values, segment.k)
        if keys.shape[1] == 0:
            outputs.append(_zeros_of(q_parts[part]))
            continue
        bias = None if segment.bias is None else segment.bias.to(q.dtype)
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), attn_mask=bias
        )
        if segment.alive is not None:
            out = torch.where(segment.alive, out, torch.zeros((), dtype=out.dtype, device=out.device))
        outputs.append(unpad(out.transpose(1, 2), segment.q))
    if whole:
        return outputs[0]
    rows = sum(len(o) for o in outputs)
    return torch.cat([*outputs, q.new_zeros(len(q) - rows, *q.shape[1:])])


ATTENTION.register("dense", "equal lengths as one batch, ragged ones padded within the call, torch's SDPA")(_dense)
ATTENTION.register("reference", "one sequence at a time")(_reference)


def attention_ops() -> list[Any]:
    """The torch ops as which attention runs beside torch's own: what checkpointing that keeps attention has to name."""
    found = []
    from . import attention_op  # noqa: F401  registers it

    found.append(torch.ops.mvle.ragged_attention.default)
    if installed("torch.nn.attention.varlen"):
        import_module("torch.nn.attention.varlen")  # registers its own
        if hasattr(torch.ops.torch_attn, "_varlen_attn"):
            found.append(torch.ops.torch_attn._varlen_attn.default)
    return found


# ---- public ---------------------------------------------------------------------------------------------------------


def ragged_attention(
    q_THE: Tensor,
    k_THE: Tensor,
    v_THE: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    max_q: int,
    max_k: int,
    kv_index: Tensor | None = None,
    *,
    plan: AttentionPlan | None = None,
) -> Tensor:
    """softmax(Q K^T / sqrt(E)) V for each query sequence against its context; returns [T_q, H, E], its tail zero.

    q [T_q, H, E]; k, v [T_k, H, E] (strided inputs are fine); q_offsets int [S_q + 1], k_offsets int [S_k + 1];
    max_q, max_k: static caps on the lengths; kv_index int [S_q]: which context each query sequence reads.
    plan: `attention_plan(...)` of the same layouts, so that calls that share them prepare once.
    Raises ValueError if shapes or dtypes do not fit.
    """
    if q_THE.dim() != 3 or k_THE.shape != v_THE.shape or q_THE.shape[1:] != k_THE.shape[1:]:
        raise ValueError(
            "q must be [T_q, H, E] and k, v [T_k, H, E] with the same H and E; got "
            f"{tuple(q_THE.shape)}, {tuple(k_THE.shape)}, {tuple(v_THE.shape)}."
        )
    if not q_THE.dtype == k_THE.dtype == v_THE.dtype:
        raise ValueError(f"q, k and v must share a dtype; got {q_THE.dtype}, {k_THE.dtype}, {v_THE.dtype}.")
    if plan is None:
        queries = Packed(q_THE, q_offsets, None, max_q, len(q_THE))
        keys = Packed(k_THE, k_offsets, None, max_k, len(k_THE))
        plan = attention_plan(queries, keys, kv_index)
    elif plan.q.total != len(q_THE) or plan.k.total != len(k_THE):
        raise ValueError(
            f"plan was made for {plan.q.total} query and {plan.k.total} key rows; got {len(q_THE)} and {len(k_THE)}."
        )
    return ATTENTION(q_THE, k_THE, v_THE, plan)
