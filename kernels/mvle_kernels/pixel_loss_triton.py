"""The pixel loss in one pass: targets from the uint8 image, their statistics, the loss and its gradient.

Math     pixel_loss.py has it. A program takes one row r: t = the X values of the patch that rows[r] names, normalised
         in registers; d = prediction - t; partial[r] = sum of |d|, d^2 or both; slope[r] = sign(d), 2 d or both.
         The loss is the sum of `partial`; the gradient is slope times the gradient of the loss.
Cost     a row reads s X bytes of prediction (s: bytes of its dtype), X bytes of image, and writes 4 bytes, and s X more
         where there is a backward. Floor of base at 256 pairs, bfloat16, forward with gradient: 120 masked patches of
         256 images, 768 values of 5 bytes = 118 MB. Plain torch makes the targets in float32 first, and reads and
         writes them again.
Exact    float32; a row's sums are one program's, rows are added by torch in a fixed order: bitwise repeatable.
Limits   X <= 4096; the last dimension of the prediction contiguous.
Measured not yet measured on a GPU
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import config
from .patches_triton import normalised_pixels, pixel_arguments
from .recipes import RECIPES
from .triton_support import allocate, launch, power_of_2

# ---- launch choice --------------------------------------------------------------------------------------------------


def rule(values: int) -> dict[str, int]:
    """A row of `values` values is one program: about 16 of them a thread, whose loads are in flight at once."""
    block = power_of_2(values, 32)
    return {"BLOCK_X": block, "num_warps": max(1, min(8, block // 512)), "num_stages": 1}


# ---- kernel ---------------------------------------------------------------------------------------------------------


@triton.jit
def pixel_loss_kernel(
    # inputs
    prediction,
    images,
    rows,
    # outputs
    partial,
    slope,
    # sizes
    down,  # patches of an image, from top to bottom and from side to side
    across,
    # strides
    stride_r,
    stride_b,
    stride_h,
    stride_w,
    stride_c,
    # scalars: pixel * scale + shift, of each channel
    scale_0,
    scale_1,
    scale_2,
    shift_0,
    shift_1,
    shift_2,
    # compile-time
    PATCH: tl.constexpr,
    TOGETHER: tl.constexpr,
    L1: tl.constexpr,
    MSE: tl.constexpr,
    PER_PATCH: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """One row of the prediction against its patch."""
    X: tl.constexpr = 3 * PATCH * PATCH
    r = tl.program_id(0).to(tl.int64)
    which = tl.load(rows + r).to(tl.int64)
    x = tl.arange(0, BLOCK_X)
    real = (x < X) & (which >= 0)

    which = tl.maximum(which, 0)
    target = normalised_pixels(
        images,
        which // (down * across),
        which % (down * across),
        x,
        real,
        across,
        stride_b,
        stride_h,
        stride_w,
        stride_c,
        scale_0,
        scale_1,
        scale_2,
        shift_0,
        shift_1,
        shift_2,
        PATCH,
        TOGETHER,
    )
    if PER_PATCH:  # two passes in registers: a difference of large sums would lose the small deviations
        mean = tl.sum(tl.where(real, target, 0.0), 0) / X
        centred = tl.where(real, target - mean, 0.0)
        target = centred / tl.sqrt(tl.sum(centred * centred, 0) / (X - 1) + 1e-6)

    rebuilt = tl.load(prediction + r * stride_r + x, mask=real, other=0).to(tl.float32)
    d = tl.where(real, rebuilt - target, 0.0)
    loss = tl.zeros_like(d)
    gradient = tl.zeros_like(d)
    if L1:
        loss += tl.abs(d)
        gradient += tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))  # d itself where it is 0 or not a number
    if MSE:
        loss += d * d
        gradient += 2 * d

    tl.store(partial + r, tl.sum(loss, 0))
    if SLOPE:
        tl.store(slope + r * X + x, gradient.to(slope.dtype.element_ty), mask=x < X)


# ---- launcher -------------------------------------------------------------------------------------------------------


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
    _, height, width, _ = images.shape
    device = prediction.device
    partial = allocate((R,), torch.float32, device)
    slope = allocate((R if with_slope else 0, X), prediction.dtype, device)
    chosen: Mapping[str, int] = config("pixel_loss", device, prediction.dtype, {"x": X}, rule(X))
    launch(
        pixel_loss_kernel,
        (R,),
        chosen,
        prediction=prediction,
        images=images,
        rows=rows,
        partial=partial,
        slope=slope,
        down=height // patch,
        across=width // patch,
        stride_r=prediction.stride(0),
        **pixel_arguments(images, patch, scale, shift),
        L1=l1,
        MSE=mse,
        PER_PATCH=per_patch,
        SLOPE=with_slope,
    )
    return partial.sum(), slope


# ---- what base and large launch --------------------------------------------------------------------------------------


def variants(device: str = "meta") -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of each launch that is held by the regression check, over tensors without memory; and on a GPU,
    where the tuner times them, over tensors that such a call may have."""
    for name, recipe in RECIPES.items():
        for per_patch in (False, True):
            rows = recipe.pairs * recipe.masked
            prediction = torch.randn(rows, recipe.values, dtype=torch.bfloat16, device=device)
            side = int(recipe.patches**0.5) * recipe.patch
            images = torch.randint(0, 256, (recipe.pairs, side, side, 3), dtype=torch.uint8, device=device)
            patches = recipe.pairs * recipe.patches
            # spread over all images; int64, as a step has them: a cast would be a launch more, and saves 4 bytes a row
            which = torch.arange(rows, device=device).mul(patches).floor_divide(rows)
            scale, shift = [1 / 127.5] * 3, [-1.0] * 3
            call = partial(forward, prediction, images, which, recipe.patch, scale, shift, True, False, per_patch, True)
            yield f"{name}, {'targets normalised by patch' if per_patch else 'plain targets'}", call
