"""Attention of libraries behind ragged_attention, and which shapes go to which backend.

varlen     torch.nn.attention.varlen.varlen_attn: FlashAttention, or cuDNN, as torch chooses
cudnn      torch's SDPA by cuDNN over runs of equal lengths as batches (attention.py cuts them); on demand alone
xformers   xformers.ops.memory_efficient_attention under a BlockDiagonalMask; an optional package

Limits   a GPU, bfloat16 or float16; no kv_index (contexts would have to be copied); no sequence that may be empty: what
         the libraries write there is nowhere promised. They leave the tails of packed buffers as they find them, so
         tails are made zero here, forward and backward: one pass more where there is a tail.
Exact    float32 accumulation. Their backward may add with float atomics: repeatable bit for bit only under
         torch.use_deterministic_algorithms(True).
Measured in whole steps on an H200 (docs/performance.md): CHOICES has what decided
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import cuda_support, optional, triton_support
from .dispatch import OPS
from .layout import equal_length, has_tail, may_be_empty, padded_length
from .packed import once, row_index

if TYPE_CHECKING:
    from .attention import AttentionPlan

HALVES = (torch.bfloat16, torch.float16)
LONGEST = 10**9


# ---- which shapes go where ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """Calls whose caps lie in these bounds (inclusive) go to `backend`, if it can take them; `measured`: where, when
    and by which command, or None."""

    kind: str
    q: tuple[int, int]
    k: tuple[int, int]
    backend: str
    why: str
    measured: str | None = None

    def __str__(self) -> str:
        return f"{self.kind} goes to {self.backend}: {self.why} ({self.measured or 'not measured yet'})"


ANY = (0, LONGEST)
# The first that fits is taken. One query against many keys, and everything short, is bound by bytes and by launches.
CHOICES = (
    Choice("a context of up to 128 rows", ANY, (0, 128), "triton", "it is held whole, in tiles of its own size"),
    Choice("up to 128 queries", (0, 128), ANY, "triton", "libraries work in tiles of 128 and more queries"),
    Choice(
        "long against long",
        (129, LONGEST),
        (129, LONGEST),
        "varlen",
        "it is tuned for that; until ours is found faster",
        "a step of base at 256 pairs, replace, H200, 2026-11-27: 956 pairs/s; by cuDNN 852; ours not yet",
    ),
)


def choice(plan: AttentionPlan) -> Choice:
    """The line of CHOICES for a plan's caps."""
    q, k = padded_length(plan.q), padded_length(plan.k)
    return next(c for c in CHOICES if c.q[0] <= q <= c.q[1] and c.k[0] <= k <= c.k[1])


def unasked_triton(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> str | None:
    """Why a call that Triton could take goes elsewhere: on a CPU, or by the table, if that backend takes it."""
    return triton_support.unasked(q) or _chosen_elsewhere("triton", q, k, v, plan)


def unasked_cuda(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> str | None:
    """The same of our CUDA kernels, which serve where the table names them, or where Triton cannot be had."""
    return cuda_support.unasked(q) or _chosen_elsewhere("cuda", q, k, v, plan)


def _chosen_elsewhere(own: str, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> str | None:
    found = choice(plan)
    if found.backend == own:
        return None
    other = next(b for b in OPS["ragged_attention"].backends if b.name == found.backend)
    return str(found) if other.refuse(q, k, v, plan) is None else None


# ---- what both refuse -----------------------------------------------------------------------------------------------


@cache  # a search of sys.path costs more than a short attention
def installed(module: str) -> bool:
    """Whether a module can be found."""
    try:
        return find_spec(module) is not None
    except ImportError:  # something hides it
        return False


def _refuse(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> str | None:
    if q.device.type != "cuda":
        return f"needs a GPU; got a tensor on {q.device.type}"
    if q.dtype not in HALVES:
        return f"takes bfloat16 and float16; got {q.dtype}"
    if plan.kv_index is not None:
        return "takes no kv_index: contexts would have to be copied"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"takes heads of 8, 16, … 256 values; got {q.shape[-1]}"
    if not plan.q.sequences or may_be_empty(plan.q) or may_be_empty(plan.k):
        return "takes no empty sequence, and some may be empty"
    return None


class _RealRows(torch.autograd.Function):
    """x as it is; in the backward zeros where no sequence has a row, whatever a library left there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, real: Tensor) -> Tensor:
        ctx.save_for_backward(real)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (real,) = ctx.saved_tensors
        return torch.where(real[:, None, None], grad, grad.new_zeros(())), None


def _between_tails(
    run: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan
) -> Tensor:
    """run(q, k, v), the tails of its output and of all gradients zero."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if has_tail(plan.k):
        real = row_index(plan.k)[2]
        k, v = _RealRows.apply(k, real), _RealRows.apply(v, real)
    if not has_tail(plan.q):
        return run(q, k, v)
    real = row_index(plan.q)[2]
    out = run(_RealRows.apply(q, real), k, v)
    return torch.where(real[:, None, None], out, out.new_zeros(()))


# ---- varlen ---------------------------------------------------------------------------------------------------------


def refuse_varlen(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> str | None:
    """Why torch's varlen attention does not take a call, or None."""
    if reason := _refuse(q, k, v, plan):
        return reason
    if not installed("torch.nn.attention.varlen"):
        return "this torch has no torch.nn.attention.varlen"
    return None


def _varlen_attn() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def varlen(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """The backend. Its first seven arguments are the same in every torch that we take; it needs no other."""
    attend, max_q, max_k = _varlen_attn(), padded_length(plan.q), padded_length(plan.k)
    q_ends, k_ends = plan.q.offsets.int(), plan.k.offsets.int()
    return _between_tails(lambda q, k, v: attend(q, k, v, q_ends, k_ends, max_q, max_k), q, k, v, plan)


# ---- cuDNN ----------------------------------------------------------------------------------------------------------


def refuse_cudnn(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> str | None:
    """Why cuDNN's attention does not take a call, or None."""
    if reason := _refuse(q, k, v, plan):
        return reason
    if q.shape[-1] > 128:
        return f"takes heads of at most 128 values; got {q.shape[-1]}"
    if any(s.k is None or s.bias is not None or equal_length(s.q) is None for s in plan.segments):
        return "takes runs of equal lengths, of queries and of contexts"
    return None


def unasked_cudnn(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> str | None:
    """Why a call that cuDNN could take goes elsewhere."""
    return _chosen_elsewhere("cudnn", q, k, v, plan)


# ---- xformers -------------------------------------------------------------------------------------------------------


def refuse_xformers(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> str | None:
    """Why xformers does not take a call, or None."""
    if not installed("xformers"):
        return "xformers is not installed"
    if reason := _refuse(q, k, v, plan):
        return reason
    if plan.q.lengths is None or plan.k.lengths is None:
        return "needs lengths on the host"
    return optional.xformers()[1]  # last: it imports xformers, once, to see whether it loads


def _xformers_parts() -> tuple[Callable[..., Tensor], Callable[..., Any]]:
    biases = import_module("xformers.ops.fmha.attn_bias")  # by name: nothing here needs it to be there
    return import_module("xformers.ops").memory_efficient_attention, biases.BlockDiagonalMask.from_seqlens


def xformers(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """The backend. It wants a batch of one, and buffers without tails."""
    attend, mask_of = _xformers_parts()
    assert plan.q.lengths is not None and plan.k.lengths is not None
    lengths = list(plan.q.lengths), list(plan.k.lengths)
    mask = once(plan.cache, "xformers", lambda: mask_of(*lengths, device=q.device))  # copies offsets to the device
    queries, keys = map(sum, lengths)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q[:queries], k[:keys], v[:keys]))
    out = attend(q[None], k[None], v[None], attn_bias=mask)[0]
    tail = plan.q.total - queries
    return torch.cat([out, out.new_zeros(tail, *out.shape[1:])]) if tail else out
