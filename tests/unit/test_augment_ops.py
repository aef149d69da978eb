"""Each op of augmentation beside torchvision's and Pillow's, and beside itself on another batch."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from mvle.data import augment_ops as ops

FACTORS = [0.0, 0.3, 1.0, 1.7]


def pictures(count: int = 4, height: int = 40, width: int = 48, seed: int = 0) -> Tensor:
    """Smooth colours with some noise, up to both ends of the range: uint8 [B, 3, height, width]."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=draw) * 300 - 20
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    noisy = fine + 8 * torch.randn(fine.shape, generator=draw)
    return noisy.round().clamp(0, 255).to(torch.uint8)


def each(factor: float, count: int = 4) -> Tensor:
    return torch.full((count,), factor)


def by_torchvision(op: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return op(images)


def by_pillow(op: Callable[[Image.Image], Image.Image], images: Tensor) -> Tensor:
    shown = [np.array(op(Image.fromarray(one.permute(1, 2, 0).numpy()))) for one in images]
    return torch.stack([torch.from_numpy(one).permute(2, 0, 1) for one in shown])


def furthest(ours: Tensor, other: Tensor) -> int:
    """In levels of 255."""
    assert ours.shape == other.shape and ours.dtype == torch.uint8
    return int((ours.int() - other.int()).abs().max())


OURS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": lambda images, factor: ops.linear(images, ops.brightness(factor)),
    "contrast": lambda images, factor: ops.linear(images, ops.contrast(images, factor)),
    "saturation": lambda images, factor: ops.linear(images, ops.saturation(factor)),
    "sharpness": ops.sharpness,
}
TORCHVISION = {
    "brightness": reference.adjust_brightness,
    "contrast": reference.adjust_contrast,
    "saturation": reference.adjust_saturation,
    "sharpness": reference.adjust_sharpness,
}
PILLOW = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
    "sharpness": ImageEnhance.Sharpness,
}


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("name", OURS)
def test_a_change_by_a_factor_is_torchvisions_and_pillows_but_for_rounding(name: str, factor: float) -> None:
    images = pictures()
    changed = OURS[name](images, each(factor))
    # both cut off where we round, and torchvision cuts off grey before it is mixed in
    bound = 0 if factor == 1 else 2 if name in ("saturation", "contrast") else 1
    assert furthest(changed, by_torchvision(lambda x: TORCHVISION[name](x, factor), images)) <= bound
    assert furthest(changed, by_pillow(lambda x: PILLOW[name](x).enhance(factor), images)) <= min(bound, 1)


def test_factors_belong_to_images_one_each() -> None:
    images, factors = pictures(), torch.tensor([0.2, 1.0, 1.5, 0.7])
    for name, op in OURS.items():
        alone = [op(images[i : i + 1], factors[i : i + 1]) for i in range(4)]
        assert torch.equal(op(images, factors), torch.cat(alone)), name
        assert torch.equal(alone[1], images[1:2]), name


def test_grey_is_pillows_bit_for_bit() -> None:
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = torch.stack(
        [torch.from_numpy(np.array(Image.fromarray(one.permute(1, 2, 0).numpy()).convert("L"))) for one in images]
    )
    assert torch.equal(ops.grey(images), expected.int())


@pytest.mark.parametrize("flat", [False, True])
def test_autocontrast_is_torchvisions_but_for_rounding(flat: bool) -> None:
    images = pictures() // 2 + 30
    if flat:
        images[1:3, 1] = 77  # a channel of one value stays
    changed = ops.linear(images, ops.autocontrast(images))
    assert furthest(changed, by_torchvision(reference.autocontrast, images)) <= 1
    assert int(changed[0].min()) == 0 and int(changed[0].max()) == 255


@pytest.mark.parametrize("size", [(40, 48), (9, 7)], ids=["more pixels than levels", "so few that nothing changes"])
def test_equalize_is_pillows_and_torchvisions_bit_for_bit(size: tuple[int, int]) -> None:
    images = pictures(4, *size)
    images[2] = 200
    assert furthest(ops.equalize(images), by_pillow(ImageOps.equalize, images)) == 0
    assert furthest(ops.equalize(images), by_torchvision(reference.equalize, images)) == 0


@pytest.mark.parametrize(("sigma", "largest"), [(0.1, 2.0), (0.7, 2.0), (2.0, 2.0), (2.0, 4.0)])
def test_blur_is_torchvisions_of_the_same_radius(sigma: float, largest: float) -> None:
    images, side = pictures(), 2 * math.ceil(3 * largest) + 1
    blurred = ops.blur(images, each(sigma), largest)
    assert furthest(blurred, by_torchvision(lambda x: reference.gaussian_blur(x, [side, side], [sigma]), images)) <= 1


def test_a_blur_without_sigma_leaves_its_image_and_small_images_blur_as_far_as_they_mirror() -> None:
    images, sigma = pictures(3, 5, 4), torch.tensor([0.0, 1.0, 0.0])
    blurred = ops.blur(images, sigma, 5.0)
    assert torch.equal(blurred[[0, 2]], images[[0, 2]]) and not torch.equal(blurred[1], images[1])
    assert torch.equal(ops.blur(images[:, :, :1], sigma, 5.0), images[:, :, :1])  # no pixel beside it, none to mirror


def as_torchvision_shows(images: Tensor, **how: object) -> Tensor:
    """Its bilinear map with zeros outside, about our grey: with a fill it weighs pixels at the edge twice."""
    how = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]} | how
    planes = images.float() - ops.FILL
    shown = reference.affine(planes, interpolation=InterpolationMode.BILINEAR, **how)  # type: ignore[arg-type]
    return (shown + ops.FILL).round().to(torch.uint8)


@pytest.mark.parametrize("size", [(40, 40), (40, 48)])
def test_warps_are_torchvisions(size: tuple[int, int]) -> None:
    images = pictures(1, *size)
    cosine, sine, slant = math.cos(math.radians(10)), math.sin(math.radians(10)), math.degrees(math.atan(0.2))
    for matrix, shift, how in (
        ([[cosine, -sine], [sine, cosine]], [0.0, 0.0], {"angle": -10.0}),
        ([[1.0, 0.2], [0.0, 1.0]], [0.0, 0.0], {"shear": [slant, 0.0]}),
        ([[1.0, 0.0], [0.2, 1.0]], [0.0, 0.0], {"shear": [0.0, slant]}),
        ([[1.0, 0.0], [0.0, 1.0]], [5.0, -3.0], {"translate": [-5, 3]}),
    ):
        moved = ops.warp(images, torch.tensor([matrix]), torch.tensor([shift]))
        assert furthest(moved, as_torchvision_shows(images, **how)) <= 1, how
        assert furthest(moved, images) > 20


def test_what_lies_outside_of_an_image_is_grey() -> None:
    moved = ops.warp(pictures(1, 40, 40), torch.eye(2)[None], torch.tensor([[10.0, 0.0]]))
    assert (moved[..., 30:] == ops.FILL).all() and not (moved[..., 29] == ops.FILL).all()
