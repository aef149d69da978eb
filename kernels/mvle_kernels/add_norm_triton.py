"""Sum and layer norm in one pass, and the gradients of both in one. Maths and cost: add_norm.py.

A program of the forward takes a few whole rows, which stay in registers between their statistics and their norm. One of
the backward walks a run of rows, and keeps what they add to the gradients of weight and bias: those partial sums are
added up behind it, in a fixed order.
Measured H200, 2026-11-27, in a step of base at 256 pairs: 51 forwards 4.7 ms, 51 backwards 11.0 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launches import config
from .recipes import RECIPES
from .triton_support import allocate, launch, power_of_2

PROGRAMS = 1056  # of a backward: eight for each of the 132 multiprocessors of an H100

# ---- launch choice --------------------------------------------------------------------------------------------------


def rule(width: int, values: int) -> dict[str, int]:
    """About so many `values` in the registers of a program at once, at most 24 of them a thread in a forward.

    A backward has three times as many arrays, and takes half. (Of 1024, with four warps, Triton 3.6 would put some into
    memory.)"""
    block = power_of_2(width, 32)
    rows = max(1, values // block)
    return {"ROWS": rows, "BLOCK_D": block, "num_warps": 4 if rows * width < values else 8, "num_stages": 1}


FORWARD, BACKWARD = 4096, 2048


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def add_norm_kernel(
    # inputs
    x,
    y,
    weight,
    bias,
    # outputs
    s,
    h,
    mean,
    deviation,
    # sizes, strides, scalars
    T,
    stride_x,
    stride_y,
    eps,
    # compile-time
    D: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """ROWS rows: their sum, its mean and 1 / deviation, its norm."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    real = (t < T)[:, None] & (d < D)[None, :]
    value = tl.load(x + t[:, None] * stride_x + d[None, :], mask=real, other=0).to(tl.float32)
    if ADD:
        value += tl.load(y + t[:, None] * stride_y + d[None, :], mask=real, other=0).to(tl.float32)
        rounded = value.to(s.dtype.element_ty)
        tl.store(s + t[:, None] * D + d[None, :], rounded, mask=real)
        value = rounded.to(tl.float32)  # the norm is of what the block goes on with
    middle = tl.sum(value, 1) / D
    centred = tl.where(real, value - middle[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    w = tl.load(weight + d, mask=d < D, other=0).to(tl.float32)
    b = tl.load(bias + d, mask=d < D, other=0).to(tl.float32)
    normed = centred * scale[:, None] * w[None, :] + b[None, :]
    tl.store(h + t[:, None] * D + d[None, :], normed.to(h.dtype.element_ty), mask=real)
    tl.store(mean + t, middle, mask=t < T)
    tl.store(deviation + t, scale, mask=t < T)


@triton.jit
def add_norm_backward_kernel(
    # inputs
    s,
    grad_s,
    grad_h,
    weight,
    mean,
    deviation,
    # outputs
    grad,
    partial,
    # sizes and strides
    T,
    run,  # rows of a program
    stride_s,
    stride_gs,
    stride_gh,
    # compile-time
    D: tl.constexpr,
    BOTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A run of rows: their gradient, and what they add to the gradients of weight (partial[p, 0]) and bias ([p, 1])."""
    p = tl.program_id(0).to(tl.int64)
    start = p * run
    stop = tl.minimum(start + run, T)
    d = tl.arange(0, BLOCK_D)
    w = tl.load(weight + d, mask=d < D, other=0).to(tl.float32)
    of_weight = tl.zeros([BLOCK_D], tl.float32)
    of_bias = tl.zeros([BLOCK_D], tl.float32)
    for first in range(start, stop, ROWS):
        t = (first + tl.arange(0, ROWS)).to(tl.int64)
        real = (t < stop)[:, None] & (d < D)[None, :]
        value = tl.load(s + t[:, None] * stride_s + d[None, :], mask=real, other=0).to(tl.float32)
        g = tl.load(grad_h + t[:, None] * stride_gh + d[None, :], mask=real, other=0).to(tl.float32)
        middle = tl.load(mean + t, mask=t < stop, other=0)
        scale = tl.load(deviation + t, mask=t < stop, other=0)
        unit = (value - middle[:, None]) * scale[:, None]
        of_weight += tl.sum(g * unit, 0)
        of_bias += tl.sum(g, 0)
        g = g * w[None, :]
        along = tl.sum(g * unit, 1) / D
        g = scale[:, None] * (g - (tl.sum(g, 1) / D)[:, None] - unit * along[:, None])
        if BOTH:
            g += tl.load(grad_s + t[:, None] * stride_gs + d[None, :], mask=real, other=0).to(tl.float32)
        tl.store(grad + t[:, None] * D + d[None, :], g.to(grad.dtype.element_ty), mask=real)
    tl.store(partial + p * 2 * D + d, of_weight, mask=d < D)
    tl.store(partial + (p * 2 + 1) * D + d, of_bias, mask=d < D)


# ---- launchers ------------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(
    x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(s, h, mean, 1 / deviation); s is x where y is None."""
    x, y = _rows(x), None if y is None else _rows(y)
    T, D = x.shape
    chosen = config("add_norm", x.device, x.dtype, {"d": D}, rule(D, FORWARD))
    s = x if y is None else allocate((T, D), x.dtype, x.device)
    h = allocate((T, D), x.dtype, x.device)
    mean, deviation = (allocate((T,), torch.float32, x.device) for _ in range(2))
    added = x if y is None else y
    launch(
        add_norm_kernel,
        (-(-T // chosen["ROWS"]),),
        chosen,
        x=x,
        y=added,
        weight=weight,
        bias=bias,
        s=s,
        h=h,
        mean=mean,
        deviation=deviation,
        T=T,
        stride_x=x.stride(0),
        stride_y=added.stride(0),
        eps=eps,
        D=D,
        ADD=y is not None,
    )
    return s, h, mean, deviation


def backward(
    s: Tensor, grad_s: Tensor | None, grad_h: Tensor, weight: Tensor, mean: Tensor, deviation: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of s (and so of x and of y), weight and bias, each in its dtype."""
    T, D = s.shape
    grad_h, other = _rows(grad_h), _rows(grad_h if grad_s is None else grad_s)
    chosen = config("add_norm_backward", s.device, s.dtype, {"d": D}, rule(D, BACKWARD))
    run = max(chosen["ROWS"], -(-T // PROGRAMS))
    programs = -(-T // run)
    grad = allocate((T, D), s.dtype, s.device)
    partial = allocate((programs, 2, D), torch.float32, s.device)
    launch(
        add_norm_backward_kernel,
        (programs,),
        chosen,
        s=s,
        grad_s=other,
        grad_h=grad_h,
        weight=weight,
        mean=mean,
        deviation=deviation,
        grad=grad,
        partial=partial,
        T=T,
        run=run,
        stride_s=s.stride(0),
        stride_gs=other.stride(0),
        stride_gh=grad_h.stride(0),
        D=D,
        BOTH=grad_s is not None,
    )
    of_weight, of_bias = partial.sum(0).to(weight.dtype)
    return grad, of_weight, of_bias


class AddNorm(torch.autograd.Function):
    """x, y or None, weight, bias, eps -> (s, h)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        s, h, mean, deviation = forward(x, y, weight, bias, eps)
        ctx.save_for_backward(s, weight, mean, deviation)
        ctx.added = y is not None
        ctx.set_materialize_grads(False)
        return s, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_s: Tensor | None, grad_h: Tensor | None) -> tuple[Tensor | None, ...]:
        s, weight, mean, deviation = ctx.saved_tensors
        if grad_h is None:
            return grad_s, grad_s if ctx.added else None, None, None, None
        grad, of_weight, of_bias = backward(s, grad_s, grad_h, weight, mean, deviation)
        return grad, grad if ctx.added else None, of_weight, of_bias, None


# ---- what base and large launch -------------------------------------------------------------------------------------


def variants(device: str = "meta") -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of each launch that is held by the regression check, over tensors without memory; and on a GPU,
    where the tuner times them, over tensors that such a call may have."""
    made = partial(torch.randn, dtype=torch.bfloat16, device=device)
    for name, recipe in RECIPES.items():
        T, D = recipe.pairs * (recipe.patches + 1), recipe.width
        x, y, g, h = (made(T, D) for _ in range(4))
        weight, bias = (made(D) for _ in range(2))
        mean, deviation = (torch.rand(T, dtype=torch.float32, device=device) for _ in range(2))
        yield f"{name}, forward", partial(forward, x, None, weight, bias, 1e-6)
        yield f"{name}, forward of a sum", partial(forward, x, y, weight, bias, 1e-6)
        yield f"{name}, backward of a norm alone", partial(backward, x, None, h, weight, mean, deviation)
        yield f"{name}, backward", partial(backward, x, g, h, weight, mean, deviation)
