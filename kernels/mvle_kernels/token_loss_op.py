"""The token loss as a torch op: its products, and what its row kernels share, whoever wrote them.

A row kernel's launcher is `row_losses` of token_loss_triton.py or token_loss_cuda.py; `by` names which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .token_loss import as_given, product
from .triton_support import allocate, define, launcher

BUDGET_MIB = 512  # of logits alive at once: base and large at their own batches stay far below and are not cut


def rows_of_a_chunk(rows: int, columns: int, size: int, budget_mib: float) -> int:
    """All rows where their logits fit into the budget, else chunks of about equal length that do."""
    most = max(1, int(budget_mib * 2**20) // (columns * size))
    return rows if rows <= most else -(-rows // -(-rows // most))


# ---- products and rows ---------------------------------------------------------------------------------------------


def _add_product(total: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    """total += a b in float32; fresh: whatever total was before, it is a b."""
    beta = 0.0 if fresh else 1.0
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)


def score(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore: int,
    vocabulary: int,
    with_slope: bool,
    logits: Tensor,
    partial: Tensor,
    ranks: Tensor,
    by: str,
) -> None:
    """Fill logits [R, C] (with their gradient, if asked for), partial [R] and ranks [R]. All of one dtype: rows,
    weight, bias, logits."""
    if bias is None:
        torch.mm(rows, weight.T, out=logits)
    else:
        torch.addmm(bias, rows, weight.T, out=logits)
    launcher("token_loss", by).row_losses(logits, targets, partial, ranks, ignore, vocabulary, with_slope)


def _sums(partial: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """loss, rows with a target, rows whose best word is the target."""
    return partial.sum(), (ranks >= 0).sum(), (ranks == 0).sum()


def forward(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore: int,
    vocabulary: int,
    with_slope: bool,
    by: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, count, correct, ranks [R], slope [R, C]; [0, C] without a backward)."""
    R, C, dtype, device = rows.shape[0], weight.shape[0], rows.dtype, rows.device
    logits = allocate((R, C), dtype, device)
    partial = allocate((R,), torch.float32, device)
    ranks = allocate((R,), torch.int32, device)
    with as_given(device):
        cast = None if bias is None else bias.to(dtype)
        score(rows, weight.to(dtype), cast, targets, ignore, vocabulary, with_slope, logits, partial, ranks, by)
    return *_sums(partial, ranks), ranks, logits if with_slope else logits.new_empty(0, C)


def forward_chunked(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore: int,
    vocabulary: int,
    chunk: int,
    learns: Sequence[bool],
    by: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, count, correct, ranks [R], and in float32 the gradients of rows, weight and bias, for a gradient of the
    loss of 1). chunk: fewer than R rows. learns: which of the three are asked for; the others have length 0."""
    (R, D), C, dtype, device = rows.shape, weight.shape[0], rows.dtype, rows.device
    logits = allocate((chunk, C), dtype, device)
    partial = allocate((R,), torch.float32, device)
    ranks = allocate((R,), torch.int32, device)
    d_rows = allocate((R if learns[0] else 0, D), torch.float32, device)
    d_weight = allocate((C if learns[1] else 0, D), torch.float32, device)
    d_bias = torch.zeros(C if learns[2] else 0, dtype=torch.float32, device=device)
    with as_given(device):
        cast_weight, cast_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        for start in range(0, R, chunk):
            part = slice(start, min(start + chunk, R))
            x, z = rows[part], logits[: part.stop - start]
            score(
                *(x, cast_weight, cast_bias, targets[part], ignore, vocabulary),
                *(any(learns), z, partial[part], ranks[part], by),
            )
            if learns[0]:
                _add_product(d_rows[part], z, cast_weight, fresh=True)
            if learns[1]:
                _add_product(d_weight, z.T, x, fresh=start == 0)
            if learns[2]:
                d_bias += z.sum(0, dtype=torch.float32)
    d_weight[vocabulary:].zero_()  # 0 times a row that is not a number would be none
    return *_sums(partial, ranks), ranks, d_rows, d_weight, d_bias


def _fake(rows: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    R, C = rows.shape[0], weight.shape[0]
    count, correct = (rows.new_empty((), dtype=torch.int64) for _ in range(2))
    slope = rows.new_empty(R if rest[-2] else 0, C)
    return rows.new_empty((), dtype=torch.float32), count, correct, rows.new_empty(R, dtype=torch.int32), slope


def _fake_chunked(rows: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    (R, D), C = rows.shape, weight.shape[0]
    sums = _fake(rows, weight, False, None)[:4]
    shapes = [(R, D), (C, D), (C,)]
    kept = [(n if learns else 0, *more) for learns, (n, *more) in zip(rest[-2], shapes, strict=True)]
    return *sums, *(rows.new_empty(shape, dtype=torch.float32) for shape in kept)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, weight, bias, _, _, ctx.vocabulary, _, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[-1], rows, weight)


def _backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    slope, rows, weight = ctx.saved_tensors
    d_rows = d_weight = d_bias = None
    with as_given(rows.device):
        if ctx.needs_input_grad[0]:
            d_rows = (product(slope, weight.to(rows.dtype), torch.float32) * gradient).to(rows.dtype)
        if ctx.needs_input_grad[1]:
            scaled = (rows.float() * gradient).to(rows.dtype)  # [R, D] is scaled, not [C, D]
            d_weight = product(slope.T, scaled, weight.dtype)
            d_weight[ctx.vocabulary :].zero_()
        if ctx.needs_input_grad[2]:
            d_bias = (slope.sum(0, dtype=torch.float32) * gradient).to(ctx.bias_dtype)
    return d_rows, d_weight, d_bias, *[None] * 5


def _setup_chunked(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]
    ctx.learns = list(inputs[-2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[-3:])


def _backward_chunked(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    made = zip(ctx.saved_tensors, ctx.dtypes, ctx.learns, strict=True)
    return *((d * gradient).to(dtype) if learns else None for d, dtype, learns in made), *[None] * 6


def _flops(rows: Tensor, weight: Tensor, *_: Any) -> int:
    """Of the forward; torch counts the two products of the backward."""
    return 2 * rows.shape[0] * weight.shape[0] * weight.shape[1]


def _flops_chunked(rows: Tensor, weight: Tensor, *rest: Any) -> int:
    return _flops(rows, weight) * (1 + sum(rest[-2][:2]))


_ARGUMENTS = "(Tensor rows, Tensor weight, Tensor? bias, Tensor targets, SymInt ignore, SymInt vocabulary, "
token_loss = define(
    "masked_token_loss",
    _ARGUMENTS + "bool with_slope, str by) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    forward,
    _fake,
    setup=_setup,
    backward=_backward,
    flops=_flops,
)
token_loss_chunked = define(
    "masked_token_loss_chunked",
    _ARGUMENTS + "SymInt chunk, bool[] learns, str by) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    forward_chunked,
    _fake_chunked,
    setup=_setup_chunked,
    backward=_backward_chunked,
    flops=_flops_chunked,
)


def masked_token_loss(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore: int,
    vocabulary: int,
    by: str,
    budget_mib: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backend: as token_loss.py asks for it. budget_mib: of logits; BUDGET_MIB."""
    learns = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in (rows, weight, bias)]
    budget = BUDGET_MIB if budget_mib is None else budget_mib
    chunk = rows_of_a_chunk(rows.shape[0], weight.shape[0], rows.element_size(), budget)
    call = (rows, weight, bias, targets.contiguous(), ignore, vocabulary)
    if chunk >= rows.shape[0]:
        return token_loss(*call, any(learns), by)[:4]
    return token_loss_chunked(*call, chunk, learns, by)[:4]
