"""Ragged attention as torch ops: what their launchers share, whoever wrote the kernels.

Launchers are `forward` of attention_triton.py or attention_cuda.py, `backward` of attention_backward_triton.py or
attention_backward_cuda.py; `by` names which.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import AttentionPlan
from .layout import padded_length
from .triton_support import define, launcher

# ---- forward --------------------------------------------------------------------------------------------------------


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
    by: str,
) -> tuple[Tensor, Tensor]:
    """(out [T_q, H, E], lse float32 [H, T_q], base 2). readers: for the backward; here their order alone, if it is
    there."""
    return launcher("attention", by).forward(q, k, v, q_offsets, k_offsets, kv_index, readers, max_q, max_k)


def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.max_q, ctx.max_k, ctx.by = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, q_offsets, k_offsets, kv_index, readers, out, lse = ctx.saved_tensors
    assert kv_index is None or readers is not None, "a backward with kv_index needs to know who reads what"
    if gradient.stride(-1) != 1:
        gradient = gradient.contiguous()
    tensors = gradient, q, k, v, out, lse, q_offsets, k_offsets, kv_index, readers
    return *attention_backward(*tensors, ctx.max_q, ctx.max_k, ctx.by), *[None] * 7


def meetings(q: Tensor, k: Tensor, q_offsets: Tensor, indexed: bool, max_q: int, max_k: int) -> int:
    """Pairs of a query and a key, as far as shapes tell: exact where all lengths are equal, else a bound."""
    bounds = [q.shape[0] * max_k, (q_offsets.shape[0] - 1) * max_q * max_k]
    return min(bounds if indexed else [*bounds, k.shape[0] * max_q])


def _flops(q: Any, k: Any, v: Any, q_offsets: Any, k_offsets: Any, kv_index: Any, readers: Any, *others: Any) -> int:
    """Two products; a formula sees shapes alone, so lengths count as `meetings` bounds them."""
    H, E = q.shape[1:]
    return 4 * H * E * meetings(q, k, q_offsets, kv_index is not None, *others[:2])


attention = define(
    "ragged_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor q_offsets, Tensor k_offsets, Tensor? kv_index, Tensor? readers, "
    "SymInt max_q, SymInt max_k, str by) -> (Tensor, Tensor)",
    forward,
    _fake,
    setup=_setup,
    backward=_backward,
    flops=_flops,
)


# ---- backward -------------------------------------------------------------------------------------------------------


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
    by: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq [T_q, H, E], dk and dv [T_k, H, E])."""
    run = launcher("attention_backward", by).backward
    return run(gradient, q, k, v, out, lse, q_offsets, k_offsets, kv_index, readers, max_q, max_k)


def _backward_fake(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _backward_flops(gradient: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, q_offsets: Any, *others: Any) -> int:
    """Four products. A fifth makes the softmax again: no step needs it, so it does not count."""
    H, E = q.shape[1:]
    return 8 * H * E * meetings(q, k, q_offsets, others[1] is not None, *others[3:5])


attention_backward = define(
    "ragged_attention_backward",
    "(Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor q_offsets, Tensor k_offsets, "
    "Tensor? kv_index, Tensor? readers, SymInt max_q, SymInt max_k, str by) -> (Tensor, Tensor, Tensor)",
    backward,
    _backward_fake,
    flops=_backward_flops,
)


# ---- the backend, as attention.py asks for it -----------------------------------------------------------------------


def ragged_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, by: str) -> Tensor:
    """The backend of `ragged_attention`."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    readers = None
    if plan.kv_index is not None and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        readers = plan.readers
    caps = padded_length(plan.q), padded_length(plan.k)
    # kernels walk them as dense lists
    q_offsets, k_offsets = plan.q.offsets.contiguous(), plan.k.offsets.contiguous()
    kv_index = None if plan.kv_index is None else plan.kv_index.contiguous()
    return attention(q, k, v, q_offsets, k_offsets, kv_index, readers, *caps, by)[0]
