"""Linear + cross-entropy of masked words: logits exist for the masked rows only, and become their own gradient.

Math     z = x W^T + b over the first `vocabulary` rows of W;   loss = sum over rows with a target: logsumexp(z) - z_t.
         dz = softmax(z) - onehot(t);  dx = dz W;  dW = dz^T x;  db = sum dz.
         rank: words that a stable sort by falling score puts before the target; it is right where that is 0.
Cost     three products of 2 R C D FLOPs; one logits buffer of R C, overwritten by its gradient in the forward.
Exact    products in the dtype of the rows, whatever that of the weight, and whether or not autocast is on: it would
         make float32 logits bfloat16. Each gradient has the dtype of its input, and is not rounded to a narrower one
         before. float32 accumulation (float64 stays float64); ignored rows get zero gradient; the padded vocabulary
         tail (so that C is a multiple of 128) is never scored and never learns.
Limits   first derivatives only.
Measured not yet measured on a GPU
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cuda_support, triton_support
from .dispatch import Op

TOKEN_LOSS = Op("masked_token_loss")
Found = tuple[Tensor, Tensor, Tensor, Tensor | None]  # loss, count, correct; ranks if they are asked for


def as_given(device: torch.device) -> torch.autocast:
    """Products in the dtypes of their operands, also where autocast is on."""
    return torch.autocast("cuda" if device.type == "cuda" else "cpu", enabled=False)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b, summed in float32 and rounded to `dtype` once."""
    if a.is_cuda and dtype == torch.float32 and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    compute = torch.promote_types(a.dtype, dtype)
    return torch.mm(a.to(compute), b.to(compute)).to(dtype)


def ranks_of(z: Tensor, label: Tensor, real: Tensor) -> Tensor:
    """Words of each row of z [R, V] that a stable sort by falling score puts before its label [R, 1], int32 [R]: V
    where the loss is not finite, -1 where not real."""
    own = z.gather(1, label)
    before = ((z > own) | ((z == own) & (torch.arange(z.shape[1], device=z.device) < label))).sum(1)
    finite = own[:, 0].isfinite() & z.logsumexp(1).isfinite()
    return torch.where(real, torch.where(finite, before, z.shape[1]), -1).int()


def _refuse(rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *_: Any, **__: Any) -> str | None:
    return triton_support.refuse(rows, weight, targets, *(() if bias is None else (bias,)))


def _refuse_cuda(rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *_: Any, **__: Any) -> str | None:
    return cuda_support.refuse(rows, weight, targets, *(() if bias is None else (bias,)))


@TOKEN_LOSS.register("triton", "one kernel between the products, in place", _refuse, triton_support.unasked)
def _triton(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore: int, vocabulary: int, ranks: bool
) -> Found:
    from .token_loss_op import masked_token_loss

    return masked_token_loss(rows, weight, bias, targets, ignore, vocabulary, by="triton")


@TOKEN_LOSS.register("cuda", "the same, a row read once", _refuse_cuda, cuda_support.unasked)
def _cuda(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore: int, vocabulary: int, ranks: bool
) -> Found:
    from .token_loss_op import masked_token_loss

    return masked_token_loss(rows, weight, bias, targets, ignore, vocabulary, by="cuda")


@TOKEN_LOSS.register("dense", "logits become their gradient in place")
def _dense(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore: int, vocabulary: int, ranks: bool
) -> Found:
    return _TokenLoss.apply(rows, weight, bias, targets, ignore, vocabulary, ranks)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ignore: int,
        vocabulary: int,
        ranks: bool,
    ) -> Found:
        compute = torch.promote_types(rows.dtype, torch.float32)
        real = targets != ignore
        label = torch.where(real, targets, 0).long()[:, None]
        with as_given(rows.device):
            z = (rows @ weight[:vocabulary].to(rows.dtype).T).to(compute)
        if bias is not None:
            z += bias[:vocabulary].to(compute)
        best = z.argmax(1) if len(z) else targets.new_zeros(0)
        found = ranks_of(z, label, real) if ranks else None
        lse = torch.logsumexp(z, 1, keepdim=True)
        loss = torch.where(real[:, None], lse - z.gather(1, label), torch.zeros((), dtype=compute, device=z.device))
        if any(ctx.needs_input_grad):
            z.sub_(lse).exp_()
            z.scatter_add_(1, label, torch.full_like(lse, -1.0))
            z.masked_fill_(~real[:, None], 0)
            ctx.save_for_backward(z.to(rows.dtype), rows, weight, bias)
            ctx.vocabulary = vocabulary
        count, correct = real.sum(), ((best == targets) & real).sum()
        ctx.mark_non_differentiable(count, correct, *(() if found is None else (found,)))
        return loss.sum(), count, correct, found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dz, rows, weight, bias = ctx.saved_tensors
        grad, d_rows, d_weight, d_bias = grad.to(rows.dtype), None, None, None
        with as_given(rows.device):
            if ctx.needs_input_grad[0]:
                d_rows = (dz @ weight[: ctx.vocabulary].to(rows.dtype)).mul_(grad)
            if ctx.needs_input_grad[1]:
                d_weight, scaled = torch.empty_like(weight), rows * grad  # [R, D] is scaled, not [C, D]
                if weight.dtype == rows.dtype:
                    torch.mm(dz.T, scaled, out=d_weight[: ctx.vocabulary])
                else:
                    d_weight[: ctx.vocabulary] = product(dz.T, scaled, weight.dtype)
                d_weight[ctx.vocabulary :].zero_()
        if bias is not None and ctx.needs_input_grad[2]:
            d_bias = torch.zeros_like(bias)
            d_bias[: ctx.vocabulary] = dz.sum(0, dtype=torch.promote_types(dz.dtype, torch.float32)) * grad
        return d_rows, d_weight, d_bias, None, None, None, None


@TOKEN_LOSS.register("reference", "a linear layer and torch's cross-entropy")
def _reference(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore: int, vocabulary: int, ranks: bool
) -> Found:
    compute = torch.promote_types(rows.dtype, torch.float32)
    scored = None if bias is None else bias[:vocabulary].to(compute)
    with as_given(rows.device):
        z = F.linear(rows.to(compute), weight[:vocabulary].to(compute), scored)
    real = targets != ignore
    loss = F.cross_entropy(z, targets.long(), ignore_index=ignore, reduction="sum")
    correct = ((z.argmax(1) == targets) & real).sum() if len(z) else real.sum()
    label = torch.where(real, targets, 0).long()[:, None]
    return loss, real.sum(), correct, ranks_of(z.detach(), label, real) if ranks else None


@overload
def masked_token_loss(
    rows_RD: Tensor,
    weight_CD: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore: int = ...,
    vocabulary: int | None = ...,
    ranks: Literal[False] = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
def masked_token_loss(
    rows_RD: Tensor,
    weight_CD: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore: int = ...,
    vocabulary: int | None = ...,
    *,
    ranks: Literal[True],
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


def masked_token_loss(
    rows_RD: Tensor,
    weight_CD: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore: int = -1,
    vocabulary: int | None = None,
    ranks: bool = False,
) -> tuple[Tensor, ...]:
    """(sum of -log p(target), rows with a target, rows whose best word is the target): three 0-d tensors.

    rows [R, D]; weight [C, D]; bias [C] or None; targets int64 [R], `ignore` where there is none;
    vocabulary: words scored (default C; less where C was padded); ranks: also give int32 [R], how many words stand
    before the target when they are sorted by score (-1: no target). Rows may be narrower than the weight: bfloat16 rows
    over a float32 weight, as mixed precision has them, are multiplied in bfloat16, and the gradient of the weight is
    float32. Autocast changes nothing. Raises ValueError for shapes that do not fit.
    """
    vocabulary = weight_CD.shape[0] if vocabulary is None else vocabulary
    if rows_RD.dim() != 2 or rows_RD.shape[1] != weight_CD.shape[1] or targets.shape != rows_RD.shape[:1]:
        raise ValueError(
            f"rows must be [R, {weight_CD.shape[1]}] with one target each; got {tuple(rows_RD.shape)} and "
            f"targets {tuple(targets.shape)}."
        )
    if not -(2**31) <= ignore < 2**31:
        raise ValueError(f"ignore must fit into 32 bits, as kernels compare it; got {ignore}.")
    if not 0 < vocabulary <= weight_CD.shape[0]:
        raise ValueError(f"vocabulary must lie in 1..{weight_CD.shape[0]} (rows of the weight); got {vocabulary}.")
    found = TOKEN_LOSS(rows_RD, weight_CD, bias, targets, ignore, vocabulary, ranks)
    return found if ranks else found[:3]
