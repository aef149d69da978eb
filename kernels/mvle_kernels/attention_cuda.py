"""Ragged attention by CUDA, forward: csrc/cuda/attention.cu has the maths, the cost and the kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .attention import split_readers
from .cuda_support import native
from .triton_support import allocate

LOG2_E = math.log2(math.e)
ENOUGH = 1024  # blocks that fill a GPU several times over


def layout_of(q_offsets: Tensor, k_offsets: Tensor, kv_index: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As kernels read them: int32."""
    return q_offsets.int(), k_offsets.int(), None if kv_index is None else kv_index.int()


def parts_of(max_q: int, sequences: int) -> int:
    """How many blocks share the queries of one sequence and head: one, which fetches the context once, unless there
    would be too few blocks; at most one for each 64 queries."""
    return min(max(1, -(-max_q // 64)), max(1, ENOUGH // max(1, sequences)))


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
    """(out [T_q, H, E], lse float32 [H, T_q], base 2)."""
    T, H, E = q.shape
    out, lse = allocate((T, H, E), q.dtype, q.device), allocate((H, T), torch.float32, q.device)
    sequences, order = q_offsets.numel() - 1, None
    if readers is not None:
        order = split_readers(readers, sequences, k_offsets.numel() - 1, max_q)[2]
    call = q, k, v, *layout_of(q_offsets, k_offsets, kv_index), order, out, lse, max_q, max_k
    native(q).attention_forward(*call, LOG2_E / math.sqrt(E), parts_of(max_q, sequences * H))
    return out, lse
