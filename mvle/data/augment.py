"""Colour augmentation and RandAugment: what the training step does with its images (data.augment).

After the images are on the device, and in training alone: validation and evaluation show them as they are. Which ops a
pair gets, and how strongly, comes from the four words that the plan drew for it, and from nothing else: the same on any
number of ranks, in any micro-batch and behind any decoder. A batch waits for nobody: parameters are tensors [B], and
an op that not every image gets is computed for all and taken where it was drawn (augment_ops.py says what each costs).

A caption stays true. Nothing is mirrored here (the plan mirrors, where no caption says left or right), rotations and
shifts are small, nothing is inverted, and an image whose caption names a colour keeps its colours, brightness and
contrast unless data.augment.colour_words says otherwise.

RandAugment: Cubuk et al., arXiv 1909.13719, without Solarize, Posterize and Invert, as ALBEF (arXiv 2107.07651) has it
for captions; there N = 2 and M = 7 of 10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from mvle_kernels.random import philox, uniform
from torch import Tensor

from . import augment_ops as ops
from .augment_config import (
    COLOURS,
    GEOMETRIC,
    MOST_DEGREES,
    MOST_FACTOR,
    MOST_SHEAR,
    MOST_SHIFT,
    RANDAUGMENT,
    SMALLEST_SIGMA,
    AugmentConfig,
    FactorConfig,
)
from .batch import Batch
from .plan import Draw

BRIGHTNESS, CONTRAST, SATURATION, GREY, BLUR, LAYERS = range(6)  # the Philox block of each op; a layer each from LAYERS


class Numbers(NamedTuple):
    """Random numbers of each image: uniform float64 [B, blocks, 4], and the words that they come from, int64."""

    uniform: Tensor
    words: Tensor


def plan_words(draws: Sequence[Draw]) -> Tensor:
    """What a Batch carries of these draws: int64 [B, 5], the plan's four words and 1 where a caption names a colour."""
    return torch.tensor([(*d.augmentation, int(d.names_colour)) for d in draws], dtype=torch.int64).reshape(-1, 5)


def augmented(batch: Batch, config: AugmentConfig) -> Batch:
    """The batch with its images changed, on the device where they are; itself where augmentation is off.

    Raises ValueError for a batch that does not carry the plan's words.
    """
    if not config.on:
        return batch
    if batch.augmentation is None:
        raise ValueError(
            "data.augment needs the plan's words: expected Batch.augmentation, int64 [B, 5]; got None. Make batches "
            "with the loader, or fill it with plan_words(draws)."
        )
    return replace(batch, images=augment(batch.images, batch.augmentation, config))


def augment(images: Tensor, words: Tensor, config: AugmentConfig) -> Tensor:
    """uint8 [B, height, width, 3] -> the same, changed. words int64 [B, 5] as `plan_words` gives them.

    In this order: RandAugment's ops, brightness, contrast, saturation, grey, blur. Every op has numbers of its own, so
    that switching one on changes no other.
    """
    images = images.permute(0, 3, 1, 2).contiguous()  # planes, as the ops want them
    numbers = draw(words, LAYERS + config.randaugment.ops)
    fixed = torch.zeros_like(words[:, 4], dtype=torch.bool) if config.colour_words else words[:, 4] != 0
    for layer in range(config.randaugment.ops):
        images = randaugment(images, numbers, LAYERS + layer, config.randaugment.magnitude, fixed)
    if config.brightness.probability:
        images = ops.linear(images, ops.brightness(_factor(numbers, BRIGHTNESS, config.brightness, fixed)))
    if config.contrast.probability:
        images = ops.linear(images, ops.contrast(images, _factor(numbers, CONTRAST, config.contrast, fixed)))
    if config.saturation.probability:
        images = ops.linear(images, ops.saturation(_factor(numbers, SATURATION, config.saturation, fixed)))
    if config.grey.probability:
        drawn = _chosen(numbers, GREY, config.grey.probability) & ~fixed
        images = ops.linear(images, ops.saturation(torch.where(drawn, 1 - config.grey.strength, 1.0)))
    if config.blur.probability:
        most = config.blur.strength
        sigma = SMALLEST_SIGMA + (most - SMALLEST_SIGMA) * numbers.uniform[:, BLUR, 1].float()
        images = ops.blur(images, torch.where(_chosen(numbers, BLUR, config.blur.probability), sigma, 0.0), most)
    return images.permute(0, 2, 3, 1).contiguous()


def draw(words: Tensor, blocks: int) -> Numbers:
    """Philox with the plan's words of each pair as key and counter; block k belongs to one op."""
    block = torch.arange(blocks, device=words.device, dtype=torch.int64)
    first, second, third, key = (words[:, i : i + 1] for i in range(4))
    # the key is a tensor here, one a pair; the arithmetic is that of any seed
    found = torch.stack(philox((block, first, second, third), (key, 0)), -1)  # type: ignore[arg-type]
    return Numbers(uniform(found), found)


def _chosen(numbers: Numbers, block: int, probability: float) -> Tensor:
    return numbers.uniform[:, block, 0] < probability


def _factor(numbers: Numbers, block: int, config: FactorConfig, fixed: Tensor) -> Tensor:
    """float32 [B]; 1, which changes nothing, for images that do not get the op."""
    factor = 1 + config.strength * (2 * numbers.uniform[:, block, 1].float() - 1)
    return torch.where(_chosen(numbers, block, config.probability) & ~fixed, factor, 1.0)


# ---- RandAugment ----------------------------------------------------------------------------------------------------


def randaugment(images: Tensor, numbers: Numbers, block: int, magnitude: float, fixed: Tensor) -> Tensor:
    """One op for each image (planes), drawn evenly from RANDAUGMENT, with a drawn sign; fixed bool [B]: none of
    COLOURS."""
    choice = (numbers.words[:, block, 0] * len(RANDAUGMENT)) >> 32
    choice = torch.where(fixed & (choice >= RANDAUGMENT.index(COLOURS[0])), RANDAUGMENT.index("identity"), choice)
    sign = torch.where(numbers.uniform[:, block, 1] < 0.5, -1.0, 1.0)
    return by_choice(images, choice, sign * (magnitude / 10))


def by_choice(images: Tensor, choice: Tensor, strength: Tensor) -> Tensor:
    """Image i of uint8 [B, 3, height, width] changed by RANDAUGMENT[choice[i]]; strength float32 [B], -1 .. 1 of what
    magnitude 10 means."""

    def chosen(name: str) -> Tensor:
        return choice == RANDAUGMENT.index(name)

    def where(picked: Tensor, changed: Tensor) -> Tensor:
        return torch.where(picked[:, None, None, None], changed, images)

    factor = 1 + MOST_FACTOR * strength
    moved = (choice >= RANDAUGMENT.index(GEOMETRIC[0])) & (choice <= RANDAUGMENT.index(GEOMETRIC[-1]))
    images = where(moved, ops.warp(images, *geometry(choice, strength, images.shape[2:])))
    images = ops.sharpness(images, torch.where(chosen("sharpness"), factor, 1.0))
    images = where(chosen("equalize"), ops.equalize(images))
    # the rest are linear maps: one pass with the terms of whichever was drawn
    neutral = torch.ones_like(factor)
    scale, share, offset = neutral[:, None].expand(-1, 3), torch.zeros_like(factor)[:, None], 0 * neutral[:, None]
    for name, terms in (
        ("brightness", ops.brightness(factor)),
        ("contrast", ops.contrast(images, factor)),
        ("saturation", ops.saturation(factor)),
        ("autocontrast", ops.autocontrast(images)),
    ):
        picked = chosen(name)[:, None]
        scale, offset = torch.where(picked, terms.scale, scale), torch.where(picked, terms.offset, offset)
        if terms.share is not None:
            share = torch.where(picked, terms.share, share)
    return ops.linear(images, ops.Linear(scale, share, offset))


def geometry(choice: Tensor, strength: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The map of each image for `augment_ops.warp`: (matrix [B, 2, 2], shift [B, 2]); the identity for those whose op
    moves nothing. size: (height, width) in pixels."""

    def amount(name: str, most: float) -> Tensor:
        return torch.where(choice == RANDAUGMENT.index(name), most * strength, 0.0)

    angle = amount("rotate", math.radians(MOST_DEGREES))
    cosine, sine = torch.cos(angle), torch.sin(angle)
    across, down = amount("shear_x", MOST_SHEAR), amount("shear_y", MOST_SHEAR)
    matrix = torch.stack([torch.stack([cosine, across - sine], -1), torch.stack([down + sine, cosine], -1)], -2)
    height, width = size
    shift = torch.stack([amount("translate_x", MOST_SHIFT * width), amount("translate_y", MOST_SHIFT * height)], -1)
    return matrix, shift
