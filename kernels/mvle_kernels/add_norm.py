"""The start of a branch of a block: the sum of what came and what was added, and the layer norm of it.

Math     s = x + y (or x itself, where nothing was added), h = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias, a row
         at a time; var divides by D. A block goes on with s and branches off with h, so a backward gets both gradients
         and adds them in the pass that makes that of the norm.
Cost     bound by bytes. Rows of T D values: forward reads x and y, writes s and h; backward reads s and both gradients,
         writes one: 4 passes each. Torch's own ops make 5 and 8: the norm reads again what the sum wrote, the norm's
         backward reads everything twice, and the sum of the two gradients is a pass of its own.
Exact    float32 within a row, s rounded to its dtype before its norm is taken, as two ops would do it. Gradients of
         weight and bias are added in a fixed order, without atomics.
Limits   rows contiguous in their last dimension; D <= 8192.
Measured H200, 2026-11-27, in a step of base at 256 pairs: torch's norms and sums took 36 ms of it, these 20.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import triton_support
from .dispatch import Op

ADD_NORM = Op("add_norm")
WIDEST = 8192


def _refuse(x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> str | None:
    if x.shape[-1] > WIDEST:
        return f"takes rows of at most {WIDEST} values; got {x.shape[-1]}"
    if reason := triton_support.looked_at():
        return reason
    others = (weight, bias) if y is None else (weight, bias, y)
    if any(t.dtype != x.dtype for t in others):
        return f"takes tensors of one dtype; got {sorted({str(t.dtype) for t in (x, *others)})}"
    return triton_support.refuse(x, *others)


@ADD_NORM.register("triton", "sum and norm in one pass, both gradients in one", _refuse, triton_support.unasked)
def _triton(x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from .add_norm_triton import AddNorm

    return AddNorm.apply(x, y, weight, bias, eps)


@ADD_NORM.register("dense", "torch's own ops, which torch.compile fuses")
def _dense(x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    s = x if y is None else x + y
    return s, F.layer_norm(s, s.shape[-1:], weight, bias, eps)


@ADD_NORM.register("reference", "the formula, in float32 at least")
def _reference(x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    s = x if y is None else (x.to(compute) + y.to(compute)).to(x.dtype)
    rows = s.to(compute)
    variance, mean = torch.var_mean(rows, -1, correction=0, keepdim=True)
    h = (rows - mean) / torch.sqrt(variance + eps) * weight.to(compute) + bias.to(compute)
    return s, h.to(x.dtype)


def add_norm(x_TD: Tensor, y_TD: Tensor | None, weight_D: Tensor, bias_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(s, h), each [T, D] of the dtype of x: x + y, and its layer norm; y None: x, and its layer norm.

    Go on with s, not with x: a backward adds what comes by either. Raises ValueError where shapes differ.
    """
    shapes = [x_TD.shape, None if y_TD is None else y_TD.shape, weight_D.shape, bias_D.shape]
    if x_TD.ndim != 2 or shapes[1] not in (None, shapes[0]) or shapes[2:] != [x_TD.shape[1:]] * 2:
        said = ", ".join(str(None if shape is None else tuple(shape)) for shape in shapes)
        raise ValueError(f"add_norm takes rows [T, D], others [T, D] or None, weight [D] and bias [D]; got {said}.")
    return ADD_NORM(x_TD, y_TD, weight_D, bias_D, eps)
