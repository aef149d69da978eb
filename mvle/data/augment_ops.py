"""Changes of pixels for augmentation: batched ops on uint8 planes [B, 3, height, width], each with parameters [B].

Every op gives each image of a batch what it would get alone, bit for bit: what is summed is integers, everything else
is computed pixel by pixel in one order. So the pixels of a pair do not depend on the batch, micro-batch or rank that it
comes in. Nothing waits for the device, and no op looks at an image from the host. Results are rounded, not cut off as
torchvision's are, so that many ops on end do not darken.

Planes, since whole rows of one channel are what processors read at once: `augment` brings images there and back.

Cost, for E = B * height * width * 3 values; the floor of each op is 2 E bytes, one read and one write. Counted by what
torch's separate ops read and write, a linear map moves 42 E bytes in 5 E FLOPs (80 E and 8 E with a grey share), a blur
of radius r 58 E + 48 r E bytes in 7 E + 6 r E FLOPs, sharpness about 95 E bytes, equalize 45 E (its indexes are int64),
a warp about 85 E. At 224 pixels and 256 pairs E is 38.5M: a linear map moves 1.6 GB, a layer of RandAugment, which
makes all of them, 13 GB. Nothing of it is measured on a GPU yet.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

GREY_WEIGHTS = (19595, 38470, 7471)  # ITU-R BT.601 in 1/65536, as Pillow's convert("L") has it
FILL = 128.0  # what a warp shows from outside of the image


class Linear(NamedTuple):
    """value' = scale * value + share * grey(pixel) + offset: float32 [B, 1 or 3] each; share None: no grey in it."""

    scale: Tensor
    share: Tensor | None
    offset: Tensor


def grey(images: Tensor) -> Tensor:
    """Luma: int32 [B, height, width], 0..255, Pillow's rounding."""
    parts = [images[:, c].to(torch.int32) * weight for c, weight in enumerate(GREY_WEIGHTS)]
    return (parts[0] + parts[1] + parts[2] + 0x8000) >> 16


def linear(images: Tensor, terms: Linear) -> Tensor:
    """The map of each image, rounded and clipped to 0..255."""
    scale, share, offset = (None if t is None else t[:, :, None, None] for t in terms)
    assert scale is not None and offset is not None
    values = images.float() * scale
    if share is not None:
        values += share * grey(images)[:, None]
    return to_pixels(values + offset)


def to_pixels(values: Tensor) -> Tensor:
    """float32 -> uint8, rounded and clipped."""
    return values.round_().clamp_(0, 255).to(torch.uint8)


# ---- linear maps ----------------------------------------------------------------------------------------------------


def brightness(factor: Tensor) -> Linear:
    """Towards black (0) or beyond the image (above 1); factor float32 [B]."""
    return Linear(factor[:, None], None, torch.zeros_like(factor)[:, None])


def contrast(images: Tensor, factor: Tensor) -> Linear:
    """Towards the mean grey of each image (0), or away from it (above 1)."""
    pixels = images.shape[2] * images.shape[3]
    mean = grey(images).sum(dim=(1, 2), dtype=torch.int64).float() / pixels
    return Linear(factor[:, None], None, ((1 - factor) * mean)[:, None])


def saturation(factor: Tensor) -> Linear:
    """Towards each pixel's grey (0: a grey picture), or away from it (above 1)."""
    return Linear(factor[:, None], (1 - factor)[:, None], torch.zeros_like(factor)[:, None])


def autocontrast(images: Tensor) -> Linear:
    """Each channel stretched to 0..255; one of a single value stays."""
    low, high = images.flatten(2).amin(2).float(), images.flatten(2).amax(2).float()
    flat = high == low
    scale = torch.where(flat, 1.0, 255 / (high - low).clamp(min=1))
    return Linear(scale, None, torch.where(flat, 0.0, -low * scale))


# ---- others ---------------------------------------------------------------------------------------------------------


def equalize(images: Tensor) -> Tensor:
    """Each channel with a flat histogram: Pillow's ImageOps.equalize, bit for bit."""
    values = images.flatten(2).long()
    count = torch.zeros(*values.shape[:2], 256, dtype=torch.int64, device=images.device)
    count.scatter_add_(2, values, torch.ones((), dtype=torch.int64, device=images.device).expand_as(values))
    below = count.cumsum(2)
    most = values.amax(dim=2, keepdim=True)  # the brightest value of a channel is not counted in a step
    step = (values.shape[2] - count.gather(2, most)) // 255
    table = ((below - count + step // 2) // step.clamp(min=1)).clamp(max=255)
    found = table.to(torch.uint8).gather(2, values).view_as(images)
    return torch.where((step == 0)[..., None], images, found)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Towards a smoothed picture (0), or away from it (above 1); the outermost pixels stay. factor float32 [B]."""
    if min(images.shape[2:]) < 3:
        return images
    values = images.to(torch.int16)
    rows = values[:, :, :-2] + values[:, :, 1:-1] + values[:, :, 2:]
    inner = values[:, :, 1:-1, 1:-1]
    smooth = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner + 6) // 13  # 13 is odd: no ties
    share = factor[:, None, None, None]
    changed = images.clone()
    changed[:, :, 1:-1, 1:-1] = to_pixels(share * inner + (1 - share) * smooth)
    return changed


def blur(images: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """Gaussian, mirrored at the border. sigma: pixels, float32 [B], at most `largest` (a number of the host, which
    decides the radius: 3 * largest, and no more than an image has to mirror); 0 leaves an image as it is."""
    radius = min(math.ceil(3 * largest), *(side - 1 for side in images.shape[2:]))
    if radius < 1:
        return images
    taps = torch.arange(radius + 1, dtype=torch.float32, device=images.device)
    bell = torch.exp(-0.5 * (taps / sigma.clamp(min=1e-3)[:, None]) ** 2)
    weights = (bell / (2 * bell.sum(1, keepdim=True) - 1)).unbind(1)  # tap 0 once, the others on both sides
    values = images.float()
    for dim in (2, 3):
        size = values.shape[dim]
        before = values.narrow(dim, 1, radius).flip(dim)
        behind = values.narrow(dim, size - 1 - radius, radius).flip(dim)
        wide = torch.cat([before, values, behind], dim)
        values = wide.narrow(dim, radius, size) * weights[0][:, None, None, None]
        for tap in range(1, radius + 1):
            pair = wide.narrow(dim, radius - tap, size) + wide.narrow(dim, radius + tap, size)
            values.addcmul_(pair, weights[tap][:, None, None, None])
    return to_pixels(values)


def warp(images: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """Pixels from elsewhere: the output at p, in pixels from the image's centre, shows the input at matrix @ p + shift.

    matrix float32 [B, 2, 2], shift float32 [B, 2] in pixels, both in order (x, y). Bilinear; FILL from outside.
    """
    height, width = images.shape[2:]
    y = (torch.arange(height, dtype=torch.float32, device=images.device) - (height - 1) / 2)[:, None]
    x = torch.arange(width, dtype=torch.float32, device=images.device) - (width - 1) / 2
    sides = []
    for row, side in enumerate((width, height)):
        a, b, c = (t[:, None, None] for t in (matrix[:, row, 0], matrix[:, row, 1], shift[:, row]))
        sides.append((a * x + b * y + c) * (2 / side))
    found = functional.grid_sample(
        images.float() - FILL, torch.stack(sides, -1), padding_mode="zeros", align_corners=False
    )
    return to_pixels(found + FILL)
