"""Ragged attention by CUDA, backward: csrc/cuda/attention_backward.cu has the maths, the cost and the kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .attention import split_readers
from .attention_cuda import layout_of, parts_of
from .cuda_support import native
from .triton_support import allocate


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
    delta = allocate((H, T), torch.float32, device)
    chunks, slots, order, hubs = None, None, None, 0
    if readers is not None:
        chunks, slots, order = split_readers(readers, sequences, contexts, max_q)
        hubs = len(slots) // 4
    part_k, part_v = (allocate((hubs, max_k, H, E), torch.float32, device) for _ in range(2))
    layout = *layout_of(q_offsets, k_offsets, kv_index), order, chunks, slots
    sums = delta, part_k, part_v, dq, dk, dv
    run = native(q).attention_backward
    run(gradient, q, k, v, out, lse, *layout, *sums, max_q, max_k, 1 / math.sqrt(E), parts_of(max_q, sequences * H))
    return dq, dk, dv
