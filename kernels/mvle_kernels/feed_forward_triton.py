"""What the backward of a feed-forward part does to its widest rows, in one pass. Maths and cost: feed_forward.py.

A program takes a band of columns and walks a run of rows: d_z in the place of d_a, a, and the band's share of the sum
for b1, which is added up behind it in a fixed order.

Measured H200, 2026-11-27, all 33 calls of a step of base at 256 pairs: 31 ms, where torch's three ops (gelu_backward,
         gelu, the sum) took 23. That kernel had erf from a library, about 60 instructions a value, and was bound by
         them. The one below shares the exponential between Phi and its density: not measured yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launches import config
from .recipes import RECIPES
from .triton_support import allocate, launch

PROGRAMS = 1056  # about: eight for each of the 132 multiprocessors of an H100

# ---- launch choice --------------------------------------------------------------------------------------------------


def rule(inner: int) -> dict[str, int]:
    """16 bytes a thread in a row, 8 rows at once."""
    return {"BLOCK_T": 8, "BLOCK_I": 256, "num_warps": 4, "num_stages": 1}


# ---- kernel ---------------------------------------------------------------------------------------------------------


@triton.jit
def gelu_backward_kernel(
    # input
    z,
    # in the gradient of a, out that of z
    grad,
    # outputs
    a,
    partial,
    # sizes and strides
    T,
    I,  # noqa: E741  the inner width, as everywhere
    run,  # rows of a program
    stride_z,
    stride_g,
    # compile-time
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """A band of columns of a run of rows."""
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    p = tl.program_id(1).to(tl.int64)
    start = p * run
    stop = tl.minimum(start + run, T)
    of_bias = tl.zeros([BLOCK_I], tl.float32)
    for first in range(start, stop, BLOCK_T):
        t = (first + tl.arange(0, BLOCK_T)).to(tl.int64)
        real = (t < stop)[:, None] & (i < I)[None, :]
        value = tl.load(z + t[:, None] * stride_z + i[None, :], mask=real, other=0).to(tl.float32)
        g = tl.load(grad + t[:, None] * stride_g + i[None, :], mask=real, other=0).to(tl.float32)
        # Phi and its density from one exponential: Abramowitz and Stegun 7.1.26, |error of erf| < 1.5e-7
        bell = tl.exp(-0.5 * value * value)
        u = 1.0 / (1.0 + 0.23164190 * tl.abs(value))  # 0.3275911 / sqrt(2)
        beyond = 1.061405429 * u - 1.453152027
        beyond = ((beyond * u + 1.421413741) * u - 0.284496736) * u + 0.254829592
        beyond = 0.5 * beyond * u * bell  # Phi(-|z|)
        below = tl.where(value > 0, 1.0 - beyond, beyond)
        below = tl.where(value == value, below, value)
        density = 0.3989422804014327 * bell
        g = (g * (below + value * density)).to(grad.dtype.element_ty)
        tl.store(grad + t[:, None] * stride_g + i[None, :], g, mask=real)
        tl.store(a + t[:, None] * I + i[None, :], (value * below).to(a.dtype.element_ty), mask=real)
        of_bias += tl.sum(g.to(tl.float32), 0)
    tl.store(partial + p * I + i, of_bias, mask=i < I)


# ---- launcher -------------------------------------------------------------------------------------------------------


def gelu_backward(z: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """(gelu(z), sum over rows of the gradient of z as float32 [I]). grad [T, I]: the gradient of gelu(z), in the place
    of which that of z is left. Both contiguous in their last dimension."""
    T, inner = z.shape
    chosen = config("gelu_backward", z.device, z.dtype, {"i": inner}, rule(inner))
    bands = -(-inner // chosen["BLOCK_I"])
    run = max(chosen["BLOCK_T"], -(-T // max(1, PROGRAMS // bands)))
    runs = -(-T // run)
    a = allocate((T, inner), z.dtype, z.device)
    partial = allocate((runs, inner), torch.float32, z.device)
    launch(
        gelu_backward_kernel,
        (bands, runs),
        chosen,
        z=z,
        grad=grad,
        a=a,
        partial=partial,
        T=T,
        I=inner,
        run=run,
        stride_z=z.stride(0),
        stride_g=grad.stride(0),
    )
    return a, partial.sum(0)


class FeedForward(torch.autograd.Function):
    """x [T, D], w1 [I, D], b1 [I], w2 [O, I], b2 [O] -> [T, O]; x and z are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        z = F.linear(x, w1, b1)
        ctx.save_for_backward(x, z, w1, w2)
        return F.linear(F.gelu(z), w2, b2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, w1, w2 = ctx.saved_tensors
        d_z = grad @ w2  # as yet the gradient of a
        a, of_b1 = gelu_backward(z, d_z)
        of_w2, of_b2 = grad.T @ a, grad.sum(0)
        del a
        of_x = d_z @ w1 if ctx.needs_input_grad[0] else None
        return of_x, d_z.T @ x, of_b1.to(w1.dtype), of_w2, of_b2


# ---- what base and large launch -------------------------------------------------------------------------------------


def variants(device: str = "meta") -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of each launch that is held by the regression check, over tensors without memory; and on a GPU,
    where the tuner times them, over tensors that such a call may have."""
    for name, recipe in RECIPES.items():
        rows = recipe.pairs * (recipe.patches + 1)
        z, grad = (torch.randn(rows, recipe.mlp, dtype=torch.bfloat16, device=device) for _ in range(2))
        yield f"{name}, backward", partial(gelu_backward, z, grad)
