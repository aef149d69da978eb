"""The pixel loss as a torch op: what its launchers share, whoever wrote the kernel.

A launcher is `forward` of pixel_loss_triton.py or pixel_loss_cuda.py; `by` names which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .patches import channel_scales
from .triton_support import define, launcher


def forward(
    prediction: Tensor,
    images: Tensor,
    rows: Tensor,
    patch: int,
    scale: Sequence[float],
    shift: Sequence[float],
    l1: bool,
    mse: bool,
    per_patch: bool,
    with_slope: bool,
    by: str,
) -> tuple[Tensor, Tensor]:
    """(loss, slope [R, X]; [0, X] without a backward)."""
    run = launcher("pixel_loss", by).forward
    return run(prediction, images, rows, patch, scale, shift, l1, mse, per_patch, with_slope)


def _fake(prediction: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    rows = prediction.shape[0] if others[-2] else 0
    return prediction.new_empty((), dtype=torch.float32), prediction.new_empty(rows, prediction.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    slope = output[1]
    ctx.mark_non_differentiable(slope)
    ctx.save_for_backward(slope)


def _backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    (slope,) = ctx.saved_tensors
    return slope * gradient.to(slope.dtype), *[None] * 10


pixel_loss = define(
    "masked_pixel_loss",
    "(Tensor prediction, Tensor images, Tensor rows, SymInt patch, float[] scale, float[] shift, bool l1, bool mse, "
    "bool per_patch, bool with_slope, str by) -> (Tensor, Tensor)",
    forward,
    _fake,
    setup=_setup,
    backward=_backward,
)


def masked_pixel_loss(
    prediction: Tensor,
    images: Tensor,
    rows: Tensor,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    kind: str,
    per_patch: bool,
    by: str,
) -> Tensor:
    """The backend: as pixel_loss.py asks for it."""
    if prediction.stride(-1) != 1:
        prediction = prediction.contiguous()
    rows = rows.contiguous()  # kernels walk them as a dense list
    scale, shift = channel_scales(mean, std)
    with_slope = prediction.requires_grad and torch.is_grad_enabled()
    call = prediction, images, rows, patch, scale, shift, "l1" in kind, "mse" in kind, per_patch, with_slope, by
    return pixel_loss(*call)[0]
