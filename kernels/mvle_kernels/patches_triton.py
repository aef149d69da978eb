"""Images to patch rows by Triton, and how every kernel reads pixels.

Math     row n of image b, value x = pixel * scale + shift of its channel; patches.py has the order of values.
Cost     reads a byte and writes s bytes a value (s: bytes of the dtype). Floor of base at 256 pairs, bfloat16: 256
         images of 150528 values of 3 bytes = 116 MB. Plain torch passes over float32: by count, 6 launches, 1349 MB.
Exact    one multiplication and one addition in float32, which a compiler may fuse, and one rounding.
Limits   an image of fewer than 2^31 values.
Measured not yet measured on a GPU
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import config
from .patches import channel_scales
from .recipes import RECIPES
from .triton_support import allocate, define, launch, power_of_2

# ---- launch choice --------------------------------------------------------------------------------------------------


def rule(values: int) -> dict[str, int]:
    """A program takes a piece of an image's values: 16 bytes of it a load, two loads a thread."""
    block = min(power_of_2(values, 32), 4096)
    return {"BLOCK": block, "num_warps": max(1, min(4, block // 1024)), "num_stages": 1}


# ---- kernel ---------------------------------------------------------------------------------------------------------


@triton.jit
def normalised_pixels(
    images,
    b,
    n,
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
    PATCH: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """float32 values x of patch n of image b (n and b int64, any shapes that broadcast with x).

    x may count on over patches (n says which): the compiler loses sight of neighbours behind two remainders.
    TOGETHER: a row of pixels is contiguous. Then it sees that 3 * PATCH bytes are, and loads 16 at once.
    """
    channel = x % 3
    if TOGETHER:
        beside = x % (3 * PATCH)
    else:
        beside = (x // 3 % PATCH).to(tl.int64) * stride_w + channel.to(tl.int64) * stride_c
    corner = b * stride_b + (n // across) * PATCH * stride_h + (n % across) * PATCH * stride_w
    below = (x // (3 * PATCH) % PATCH).to(tl.int64) * stride_h
    pixel = tl.load(images + corner + below + beside, mask=real, other=0).to(tl.float32)
    scale = tl.where(channel == 0, scale_0, tl.where(channel == 1, scale_1, scale_2))
    shift = tl.where(channel == 0, shift_0, tl.where(channel == 1, shift_1, shift_2))
    return pixel * scale + shift


@triton.jit
def patchify_kernel(
    # inputs
    images,
    # outputs
    rows,
    # sizes
    patches,  # of an image, and from side to side
    across,
    # strides
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
    BLOCK: tl.constexpr,
):
    """A piece of one image's rows, which follow one another in the result."""
    X: tl.constexpr = 3 * PATCH * PATCH
    pieces = tl.cdiv(patches * X, BLOCK)
    b = (tl.program_id(0) // pieces).to(tl.int64)
    e = (tl.program_id(0) % pieces) * BLOCK + tl.arange(0, BLOCK)
    real = e < patches * X
    values = normalised_pixels(
        images,
        b,
        (e // X).to(tl.int64),
        e,
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
    tl.store(rows + b * (patches * X) + e, values.to(rows.dtype.element_ty), mask=real)


# ---- launcher -------------------------------------------------------------------------------------------------------


def forward(images: Tensor, patch: int, scale: Sequence[float], shift: Sequence[float], dtype: torch.dtype) -> Tensor:
    """[B, N, X]."""
    B, height, width, _ = images.shape
    across, values = width // patch, 3 * height * width
    rows = allocate((B, height // patch * across, 3 * patch * patch), dtype, images.device)
    chosen: Mapping[str, int] = config("patchify", images.device, dtype, {"x": 3 * patch * patch}, rule(values))
    launch(
        patchify_kernel,
        (B * -(-values // chosen["BLOCK"]),),
        chosen,
        images=images,
        rows=rows,
        patches=height // patch * across,
        across=across,
        **pixel_arguments(images, patch, scale, shift),
    )
    return rows


def pixel_arguments(images: Tensor, patch: int, scale: Sequence[float], shift: Sequence[float]) -> dict[str, Any]:
    """What `normalised_pixels` needs to know of images, by name."""
    strides = images.stride()
    return {
        **dict(zip(("stride_b", "stride_h", "stride_w", "stride_c"), strides, strict=True)),
        **{f"scale_{i}": s for i, s in enumerate(scale)},
        **{f"shift_{i}": s for i, s in enumerate(shift)},
        "PATCH": patch,
        "TOGETHER": strides[2:] == (3, 1),
    }


# ---- registration ---------------------------------------------------------------------------------------------------


def _fake(images: Tensor, patch: int, scale: Any, shift: Any, dtype: torch.dtype) -> Tensor:
    B, height, width, _ = images.shape
    return images.new_empty(B, (height // patch) * (width // patch), 3 * patch * patch, dtype=dtype)


patchify_op = define(
    "patchify",
    "(Tensor images, SymInt patch, float[] scale, float[] shift, ScalarType dtype) -> Tensor",
    forward,
    _fake,
)


# ---- the backend, as patches.py asks for it -------------------------------------------------------------------------


def patchify(images: Tensor, patch: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """The backend of `patchify`."""
    return patchify_op(images, patch, *channel_scales(mean, std), dtype)


# ---- what base and large launch -------------------------------------------------------------------------------------


def variants(device: str = "meta") -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of each launch that is held by the regression check, over tensors without memory; and on a GPU,
    where the tuner times them, over tensors that such a call may have."""
    for name, recipe in RECIPES.items():
        side = int(recipe.patches**0.5) * recipe.patch
        images = torch.randint(0, 256, (recipe.pairs, side, side, 3), dtype=torch.uint8, device=device)
        yield name, partial(forward, images, recipe.patch, [1 / 127.5] * 3, [-1.0] * 3, torch.bfloat16)
