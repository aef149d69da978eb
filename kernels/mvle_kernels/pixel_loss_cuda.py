"""The pixel loss by CUDA: csrc/cuda/pixel_loss.cu has the maths, the cost and the kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cuda_support import native
from .triton_support import allocate


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
) -> tuple[Tensor, Tensor]:
    """(loss, slope [R, X]; [0, X] without a backward)."""
    R, X = prediction.shape
    partial = allocate((R,), torch.float32, prediction.device)
    slope = allocate((R if with_slope else 0, X), prediction.dtype, prediction.device)
    run = native(prediction).masked_pixel_loss
    run(prediction, images, rows.int(), partial, slope, patch, scale, shift, l1, mse, per_patch)
    return partial.sum(), slope
