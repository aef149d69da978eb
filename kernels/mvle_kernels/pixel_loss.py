"""The loss of rebuilt pixels, on masked patches only, straight from the uint8 image.

Math     target = (pixel / 255 - mean) / std of the patch that a row names (with per_patch: minus the patch's own mean,
         over sqrt(unbiased variance + 1e-6), as MAE defines it); d = prediction - target;
         l1: sum |d|      mse: sum d^2      l1+mse: their sum.
Cost     R rows of X values: reads the prediction and X bytes of image a row, writes one number; bound by bytes.
Exact    float32 accumulation (float64 stays float64); rows that name no patch (-1) count nothing and get zero gradient.
Limits   patches that divide the image.
Measured not yet measured on a GPU
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import cuda_support, triton_support
from .dispatch import Op
from .patches import as_patches, check_images, patchify, scale_and_shift

PIXEL_LOSS = Op("masked_pixel_loss")
KINDS = ("l1", "mse", "l1+mse")


def normalised(target_RX: Tensor) -> Tensor:
    """Each patch by its own mean and deviation, as MAE does: (x - mean) / sqrt(variance + 1e-6)."""
    variance, mean = torch.var_mean(target_RX, -1, keepdim=True)
    return (target_RX - mean) / torch.sqrt(variance + 1e-6)


def _distance(prediction: Tensor, target: Tensor, real: Tensor, kind: str, per_patch: bool) -> Tensor:
    compute = torch.promote_types(prediction.dtype, torch.float32)
    target = target.to(compute)
    if per_patch:
        target = normalised(target)
    d = torch.where(real[:, None], prediction.to(compute) - target, target.new_zeros(()))
    if kind == "l1":
        return d.abs().sum()
    if kind == "mse":
        return d.square().sum()
    return (d.abs() + d.square()).sum()


def _refuse(prediction: Tensor, images: Tensor, rows: Tensor, *_: Any) -> str | None:
    if prediction.shape[1] > 4096:
        return f"takes patches of at most 4096 values; got {prediction.shape[1]}"
    return triton_support.refuse(prediction, images, rows)


def _refuse_cuda(prediction: Tensor, images: Tensor, rows: Tensor, *_: Any) -> str | None:
    if prediction.shape[1] > 4096:
        return f"takes patches of at most 4096 values; got {prediction.shape[1]}"
    return cuda_support.refuse(prediction, images, rows)


@PIXEL_LOSS.register("triton", "targets, loss and gradient in one pass", _refuse, triton_support.unasked)
def _triton(*arguments: Any) -> Tensor:
    from .pixel_loss_op import masked_pixel_loss

    return masked_pixel_loss(*(*arguments, "triton"))


@PIXEL_LOSS.register("cuda", "the same, a warp for each patch", _refuse_cuda, cuda_support.unasked)
def _cuda(*arguments: Any) -> Tensor:
    from .pixel_loss_op import masked_pixel_loss

    return masked_pixel_loss(*(*arguments, "cuda"))


@PIXEL_LOSS.register("dense", "reads the masked patches only")
def _dense(
    prediction: Tensor,
    images: Tensor,
    rows: Tensor,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    kind: str,
    per_patch: bool,
) -> Tensor:
    real, which = rows >= 0, rows.long().clamp(min=0)
    patches = as_patches(images, patch)
    _, across, down = patches.shape[:3]
    b, n = which // (across * down), which % (across * down)
    pixels = patches[b, n // down, n % down].flatten(1, 2)  # [R, patch * patch, 3]
    compute = torch.promote_types(prediction.dtype, torch.float32)
    scale, shift = scale_and_shift(mean, std, compute, images.device)
    target = pixels.to(compute).mul_(scale).add_(shift).flatten(1)
    if per_patch:
        target = normalised(target)
    return _PixelLoss.apply(prediction, target, real, kind)


class _PixelLoss(torch.autograd.Function):
    """The gradient is made with the loss, in the memory of the targets: each value is read once."""

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, target: Tensor, real: Tensor, kind: str) -> Tensor:
        d = torch.sub(prediction, target, out=target).masked_fill_(~real[:, None], 0)
        if kind == "l1":
            loss, slope = d.abs().sum(), d.sign_
        elif kind == "mse":
            loss, slope = d.square().sum(), lambda: d.mul_(2)
        else:
            loss = d.abs().sum() + d.square().sum()
            slope = lambda: torch.add(d.sign(), d, alpha=2, out=d)  # noqa: E731
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(slope().to(prediction.dtype))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * grad.to(slope.dtype), None, None, None


@PIXEL_LOSS.register("reference", "all patches, then the masked ones")
def _reference(
    prediction: Tensor,
    images: Tensor,
    rows: Tensor,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    kind: str,
    per_patch: bool,
) -> Tensor:
    compute = torch.promote_types(prediction.dtype, torch.float32)
    target = patchify(images, patch, mean, std, compute).flatten(0, 1)
    return _distance(prediction, target[rows.long().clamp(min=0)], rows >= 0, kind, per_patch)


def masked_pixel_loss(
    prediction_RX: Tensor,
    images: Tensor,
    rows: Tensor,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    kind: str = "l1",
    per_patch: bool = False,
) -> Tensor:
    """Sum over all values of the named patches of the distance to the prediction; the caller divides.

    prediction [R, X]; images uint8 [B, height, width, 3]; rows int [R]: patch b * N + n, or -1 for a row to ignore;
    kind l1 | mse | l1+mse. Returns a 0-d tensor of at least float32. Raises ValueError for an unknown kind or shape.
    """
    check_images(images, patch)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}; got {kind!r}.")
    if prediction_RX.shape != (rows.numel(), patch * patch * 3):
        raise ValueError(
            f"prediction must be [{rows.numel()}, {patch * patch * 3}] (rows x patch values); "
            f"got {tuple(prediction_RX.shape)}."
        )
    return PIXEL_LOSS(prediction_RX, images, rows, patch, mean, std, kind, per_patch)
