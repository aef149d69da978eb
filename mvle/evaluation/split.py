"""Split: images of a set with their captions, as every evaluation reads them.

All images, or as many as asked for, chosen by evaluation.seed: the same ones whatever the model and the machine.
One pair an image (its first caption) everywhere but in retrieval, which may rank all captions. Images are decoded
upright, shorter side resized, centre cropped; chunk by chunk, so that a split of any size fits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from mvle_kernels import Packed, exact_count, mask_of, sample_patch_mask, sample_token_mask
from torch import Tensor

from ..data.batch import Batch

if TYPE_CHECKING:
    from ..config import Config
    from ..data.shards import ShardSet
    from ..data.tokenizer import Tokenizer

CHUNK = 64  # pairs of one forward


class SplitError(ValueError):
    """A split on which this evaluation means nothing."""


@dataclass(eq=False)
class Split:
    """Images 0 .. len - 1, which are `rows` of the shards, ascending.

    captions, text_ids   of each image, all of them · image_ids int64 hash of each image's bytes
    """

    config: Config
    shards: ShardSet
    tokenizer: Tokenizer
    pairs: int  # at most so many images; 0: all
    rows: list[int] = field(init=False)
    captions: list[list[str]] = field(init=False)
    text_ids: list[list[int]] = field(init=False)
    image_ids: list[int] = field(init=False)

    def __post_init__(self) -> None:
        from ..data.plan import evaluation_pairs

        shards = self.shards
        self.rows = evaluation_pairs(shards, self.pairs or shards.images, self.config.evaluation.seed).tolist()
        self.captions = [shards.captions(row) for row in self.rows]
        self.text_ids = [[shards.text_id(row, c) for c in range(shards.caption_count(row))] for row in self.rows]
        self.image_ids = [shards.image_id(row) for row in self.rows]

    def __len__(self) -> int:
        return len(self.captions)

    def chunks(self, size: int = CHUNK) -> Iterator[range]:
        """Images in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield range(start, min(start + size, len(self)))

    def batch(self, images: Sequence[int], extras: bool = False) -> Batch:
        """Pairs (image, first caption) on the CPU; pair_ids are rows of the shards, so masks do not depend on the
        number of pairs. extras: with what the set knows beside the pair."""
        from ..data.evaluation_batch import evaluation_batch

        model = self.config.model
        return evaluation_batch(
            self.shards,
            [self.rows[image] for image in images],
            [0] * len(images),
            self.tokenizer,
            model.image.size,
            model.text.max_tokens,
            self.config.kernels.row_multiple,
            low_ratio(self.config),
            extras=extras,
        )

    def text(self, captions: Sequence[str]) -> Packed:
        """Token ids int32 of some captions; too long ones are cut, as in training."""
        ids, _ = self.tokenizer.encode(list(captions), self.config.model.text.max_tokens)
        return pack_tokens(ids, self.config.kernels.row_multiple)

    def partners(self) -> list[int]:
        """For each image: the next one of the split (around its end) that shares neither image nor caption with it."""
        known = [set(ids) for ids in self.text_ids]
        found = []
        for image in range(len(self)):
            for step in range(1, len(self)):
                other = (image + step) % len(self)
                if self.image_ids[other] != self.image_ids[image] and not known[other] & known[image]:
                    found.append(other)
                    break
            else:
                key, images = self.shards.key(self.rows[image]), len(self)
                raise SplitError(
                    f"a wrong partner was expected for every pair; {key} shares its image or a caption with all "
                    f"{images} images of the split. Take more (--pairs, evaluation.pairs)."
                )
        return found

    def word_classes(self) -> dict[str, set[str]]:
        """Classes of words that the set names in its scene.json ("words": {"colour": [...]}); {} if it has none."""
        scene = self.shards.extra(self.rows[0], "scene.json")
        named = json.loads(scene).get("words") if scene else None
        return {name: {w.lower() for w in found} for name, found in named.items()} if isinstance(named, dict) else {}


def low_ratio(config: Config) -> float:
    """The share of cells masked in evaluation: masking.image_ratio, or the low end of its range."""
    return config.masking.ratio_range[0]


def pack_tokens(ids: Sequence[Sequence[int]], row_multiple: int) -> Packed:
    """Lists of token ids -> Packed int32."""
    return Packed.of([torch.tensor(list(i), dtype=torch.int32) for i in ids], row_multiple)


def patch_masks(config: Config, seed: int, pair_ids: Tensor, ratio: float) -> Tensor:
    """bool [B, N], True = masked: ceil(ratio * cells) cells of each image, fixed by (seed, pair id)."""
    image, masking = config.model.image, config.masking
    cell = masking.cell // image.patch
    rows, columns = image.grid
    masked_cells = exact_count(ratio, (rows // cell) * (columns // cell))
    _, masked = sample_patch_mask(seed, pair_ids, image.grid, cell, [masked_cells] * len(pair_ids))
    return mask_of(masked, rows * columns)


@dataclass(frozen=True, eq=False)
class MaskedText:
    """text Packed with the mask token in place · positions Packed int32 [R] rows of it · targets int64 [R_real]."""

    text: Packed
    positions: Packed
    targets: Tensor

    def to(self, device: torch.device | str) -> MaskedText:
        """The same on a device."""
        return MaskedText(self.text.to(device), self.positions.to(device), self.targets.to(device))


def mask_words(
    config: Config,
    seed: int,
    pair_ids: Tensor,
    text: Packed,
    mask_id: int,
    vocabulary: int,
    ratio: float | None = None,
) -> MaskedText:
    """Chosen as in training (ratio, or masking.text_ratio; at least one a caption), but every one becomes the mask
    token. A ratio of 1: all words, and bos and eos alone are left."""
    assert text.lengths is not None
    maskable = torch.ones(text.total, dtype=torch.bool)
    maskable[text.offsets[:-1].long()] = False
    maskable[(text.offsets[1:].long() - 1).clamp(min=0)] = False
    counts = [max(n - 2, 0) for n in text.lengths]
    ratio = config.masking.text_ratio if ratio is None else ratio
    _, positions, targets = sample_token_mask(seed, pair_ids, text, maskable, ratio, mask_id, vocabulary, counts)
    rows = text.rows.clone()
    real = sum(positions.lengths or ())
    rows[positions.rows[:real].long()] = mask_id
    return MaskedText(text.with_rows(rows), positions, targets[:real])


def to_images(patches_BNX: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """Values 0..1 in the order of `patchify` -> uint8 [B, height, width, 3], rounded and clipped."""
    rows, columns = grid
    pixels = patches_BNX.view(-1, rows, columns, patch, patch, 3).transpose(2, 3)
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8).reshape(-1, rows * patch, columns * patch, 3)


def patch_values(images: Tensor, patch: int) -> Tensor:
    """[B, height, width, C] of any dtype -> [B, N, patch * patch * C] in the order of `patchify`."""
    B, height, width, channels = images.shape
    view = images.reshape(B, height // patch, patch, width // patch, patch, channels).transpose(2, 3)
    return view.reshape(B, -1, patch * patch * channels)


def described(values: dict[str, Any]) -> dict[str, Any]:
    """Nested numbers rounded to six decimals, as they are stored and shown."""
    return {
        k: described(v) if isinstance(v, dict) else round(v, 6) if isinstance(v, float) else v
        for k, v in values.items()
    }
