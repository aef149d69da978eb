"""The feed-forward part of a block: linear, GELU, linear.

Math     z = x W1^T + b1, a = gelu(z) = z Phi(z), out = a W2^T + b2; Phi: the normal distribution function.
         backward, of g: d_a = g W2, d_z = d_a (Phi(z) + z phi(z)), dW2 = g^T a, db2 = sum g, dW1 = d_z^T x,
         db1 = sum d_z, d_x = d_z W1.
Cost     12 T D I FLOPs in products, forward and backward. Beside them rows [T, I] pass through memory: the widest of a
         block, kept once (z, not a: a quarter less memory for a GELU more). In the backward torch's ops read and write
         them 7 times (gelu_backward 3, gelu 2, the sum of d_z 1 and the products' own); `triton` makes a, d_z and the
         sum for b1 in one pass that reads 2 and writes 2.
Exact    products as torch makes them; GELU in float32, with the error function, which `triton` has to 1.5e-7 in the
         backward. The sum for b1 is of d_z as rounded, in
         a fixed order.
Limits   first derivatives.
Measured H200, 2026-11-27: torch's ops win over the first version of the kernel (see there), so they are what is taken.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import triton_support
from .dispatch import Op

FEED_FORWARD = Op("feed_forward")


def _refuse(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> str | None:
    if reason := triton_support.looked_at():
        return reason
    return triton_support.refuse(x, w1, b1, w2, b2)


def _unasked(x: Tensor, *_: Tensor) -> str | None:
    return (
        triton_support.unasked(x) or "torch's own ops were faster on an H200; the kernel has changed since, unmeasured"
    )


@FEED_FORWARD.register("triton", "one pass over the widest rows in a backward", _refuse, _unasked)
def _triton(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    from .feed_forward_triton import FeedForward

    return FeedForward.apply(x, w1, b1, w2, b2)


@FEED_FORWARD.register("dense", "torch's own ops; GELU again in the backward, in the place of its result")
def _dense(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return _GeluLinear.apply(F.linear(x, w1, b1), w2, b2)


@FEED_FORWARD.register("reference", "three ops, all kept")
def _reference(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


class _GeluLinear(torch.autograd.Function):
    """GELU, then a linear layer: rows [T, I], weight [D, I], bias [D] -> [T, D]; GELU's result is not kept."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(z, weight)
        return F.linear(F.gelu(z), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, weight = ctx.saved_tensors
        d_z = torch.ops.aten.gelu_backward(grad @ weight, z)
        return d_z, grad.T @ F.gelu(z), grad.sum(0)


def feed_forward(x_TD: Tensor, w1_ID: Tensor, b1_I: Tensor, w2_DI: Tensor, b2_D: Tensor) -> Tensor:
    """linear(gelu(linear(x, w1, b1)), w2, b2), rows [T, D] -> [T, D_out], all of one dtype.

    Raises ValueError where shapes do not fit.
    """
    inner, width = w1_ID.shape
    if x_TD.shape[-1] != width or b1_I.shape != (inner,) or w2_DI.shape[1] != inner or b2_D.shape != w2_DI.shape[:1]:
        raise ValueError(
            f"feed_forward takes rows [T, D], weights [I, D] and [O, I], biases [I] and [O]; got {tuple(x_TD.shape)}, "
            f"{tuple(w1_ID.shape)}, {tuple(w2_DI.shape)}, {tuple(b1_I.shape)}, {tuple(b2_D.shape)}."
        )
    return FEED_FORWARD(x_TD, w1_ID, b1_I, w2_DI, b2_D)
