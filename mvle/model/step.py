"""What one forward knows: the batch, its random choices, the views' rows. Objectives read it and ask on top of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from mvle_kernels import Packed, Stream, exact_count, pack_patch_mask, row_index, sample_patch_mask, sample_token_mask
from torch import Tensor

from ..data.batch import Batch
from ..objectives.masking import MaskingConfig
from .config import ImageEncoderConfig
from .queries import View

if TYPE_CHECKING:
    from ..objectives.itc import ContrastPart


@dataclass(frozen=True)
class Choices:
    """The masks of a step. None where no objective wants that side masked."""

    keep: Packed | None = None
    masked: Packed | None = None
    tokens: Packed | None = None
    positions: Packed | None = None  # rows of `tokens` that are masked
    read: Packed | None = None  # the same as positions in each caption
    targets: Tensor | None = None
    clean: Packed | None = None  # patches that the clean image view shows; None: all


@dataclass(eq=False)
class Step:
    """One forward over one (micro-)batch."""

    batch: Batch
    seed: int
    row_multiple: int
    choices: Choices
    views: dict[View, Packed] = field(default_factory=dict)
    image_z: Tensor | None = None
    text_z: Tensor | None = None
    temperature: Tensor | None = None
    itm_valid: Tensor | None = None  # bool [B]: the pair has a negative
    contrast: ContrastPart | None = None  # the contrastive loss was taken over the whole batch already


def masked_cells(ratio: float, masking: MaskingConfig, image: ImageEncoderConfig) -> int:
    """How many cells of an image a ratio masks: ceil(ratio * cells)."""
    return exact_count(ratio, (image.size // masking.cell) ** 2)


def choose_clean_patches(
    batch: Batch, seed: int, masking: MaskingConfig, image: ImageEncoderConfig, row_multiple: int
) -> Packed:
    """The patches of each image that its clean view shows: ceil(masking.clean_keep * N), whatever is masked beside it.

    Single patches, not cells: nobody predicts what is left out, so nothing is gained by leaving it out in one piece.
    """
    rows, columns = image.of(batch.images).grid
    left_out = rows * columns - exact_count(masking.clean_keep, rows * columns)
    counts = [left_out] * len(batch)
    return sample_patch_mask(seed, batch.pair_ids, (rows, columns), 1, counts, row_multiple, Stream.CLEAN_PATCHES)[0]


def masked_patches(batch: Batch, masking: MaskingConfig, image: ImageEncoderConfig) -> int:
    """How many patches of the batch are masked; known on the host unless masks were given."""
    if batch.masks and "image" in batch.masks:
        return int(batch.masks["image"].sum())
    image, patches = image.of(batch.images), (masking.cell // image.patch) ** 2
    return patches * sum(masked_cells(r, masking, image) for r in batch.image_ratio)


def masked_token_count(length: int, ratio: float) -> int:
    """How many tokens of a caption of `length` (with bos and eos) are masked."""
    maskable = max(length - 2, 0)
    return 0 if maskable == 0 else max(1, exact_count(ratio, maskable))


def choose_image_masks(
    batch: Batch, seed: int, masking: MaskingConfig, image: ImageEncoderConfig, row_multiple: int
) -> tuple[Packed, Packed]:
    """(keep, masked) of each image: given with the batch, or drawn."""
    if batch.masks and "image" in batch.masks:
        masked_BN = batch.masks["image"]
        return pack_patch_mask(masked_BN, masked_BN.sum(1).tolist(), row_multiple)  # sync: evaluation only
    image = image.of(batch.images)
    counts = [masked_cells(r, masking, image) for r in batch.image_ratio]
    return sample_patch_mask(seed, batch.pair_ids, image.grid, masking.cell // image.patch, counts, row_multiple)


def choose_token_masks(
    batch: Batch, seed: int, masking: MaskingConfig, mask_id: int, vocabulary: int, row_multiple: int
) -> tuple[Packed, Packed, Packed, Tensor]:
    """(tokens with masks in place, masked rows, the same as positions in each caption, targets)."""
    text = batch.text
    assert text.lengths is not None
    first, last = text.offsets[:-1].long(), text.offsets[1:].long() - 1
    if batch.masks and "text" in batch.masks:
        flags = batch.masks["text"]
        lengths = [int(part.sum()) for part in text.with_rows(flags).unpack()]  # sync: evaluation only
        layout = Packed.layout_of(lengths, row_multiple, flags.device)
        rows = flags.nonzero().squeeze(1)  # sync: evaluation only
        rows = torch.cat([rows, rows.new_zeros(layout.total - len(rows))])
        targets = text.rows.long()[rows]
        targets[sum(lengths) :] = -1
        tokens = text.with_rows(torch.where(flags, mask_id, text.rows))
        positions = layout.with_rows(rows.to(torch.int32))
    else:
        maskable = torch.ones(text.total, dtype=torch.bool, device=text.rows.device)
        maskable.index_fill_(0, first, False)
        maskable.index_fill_(0, last.clamp(min=0), False)
        tokens, positions, targets = sample_token_mask(
            seed,
            batch.pair_ids,
            text,
            maskable,
            masking.text_ratio,
            mask_id,
            vocabulary,
            [max(n - 2, 0) for n in text.lengths],
            row_multiple,
        )
    sequence, _, real = row_index(positions)
    within = (positions.rows.long() - text.offsets.long()[sequence.clamp(max=text.sequences - 1)]) * real
    return tokens, positions, positions.with_rows(within.to(torch.int32)), targets
