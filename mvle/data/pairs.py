"""From draws to pairs: the bytes of an image, its pixels, and a Batch of what belongs together."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from mvle_kernels import Packed

from .augment import plan_words
from .bad_images import BadImageError
from .batch import Batch
from .decode import DecodeError, Pixels, centred_square
from .decoders import Encoded, decode_one
from .plan import Draw
from .shards import ShardSet


def fetch(shards: ShardSet, draw: Draw) -> Encoded:
    """The bytes of a draw's image and how it is to be shown. Raises BadImageError where they changed, DataError where
    the shard is not the file that was opened."""
    data = shards.image_bytes(draw.row)
    if zlib.crc32(data) != shards.image_crc32(draw.row):
        shards.check_shard(draw.row)  # another file, or bad bytes in the right one?
        raise BadImageError("its bytes are not those that were indexed (checksum)")
    name, info, verified = shards.name(draw.row), shards.image_info(draw.row), shards.verified(draw.row)
    return Encoded(draw.row, name, data, draw.window, draw.flip, info, verified)


def read_window(shards: ShardSet, draw: Draw, size: int) -> Pixels:
    """The drawn window: uint8 [size, size, 3]. Raises BadImageError where the bytes changed or do not decode, DataError
    where the shard is not the file that was opened."""
    image = fetch(shards, draw)
    try:
        return decode_one(image, size)
    except DecodeError as error:
        raise BadImageError(str(error)) from error


def centred(shards: ShardSet, row: int, caption: int, ratio: float = 0.0) -> Draw:
    """A pair as it is: the largest centred square of its image, no flip."""
    return Draw(row, row, caption, centred_square(*shards.size(row)), False, ratio, (0, 0, 0, 0))


def assemble(
    shards: ShardSet, draws: Sequence[Draw], images: torch.Tensor, ids: list[list[int]], max_tokens: int, multiple: int
) -> Batch:
    """The batch of draws with their pixels (uint8 [B, size, size, 3]) and the tokens of their captions; `multiple`: the
    packed text is rounded up to it."""
    layout = Packed.layout_of([len(one) for one in ids], multiple, max_length=max_tokens)
    rows = torch.zeros(layout.total, dtype=torch.int32)
    flat = [token for one in ids for token in one]
    rows[: len(flat)] = torch.tensor(flat, dtype=torch.int32)
    return Batch(
        images=images,
        text=layout.with_rows(rows),
        pair_ids=torch.tensor([draw.counter for draw in draws], dtype=torch.int64),
        image_ids=torch.tensor([shards.image_id(draw.row) for draw in draws], dtype=torch.int64),
        text_ids=torch.tensor([shards.text_id(draw.row, draw.caption) for draw in draws], dtype=torch.int64),
        keys=[shards.name(draw.row) for draw in draws],
        image_ratio=tuple(draw.ratio for draw in draws),
        augmentation=plan_words(draws),
    )


def pinned(batch: Batch) -> Batch:
    """The batch in page-locked memory, from which a GPU copies while the CPU goes on; what is on a GPU stays there."""
    text = replace(batch.text, rows=batch.text.rows.pin_memory(), offsets=batch.text.offsets.pin_memory(), cache={})
    return replace(
        batch,
        images=batch.images if batch.images.is_cuda else batch.images.pin_memory(),
        text=text,
        pair_ids=batch.pair_ids.pin_memory(),
        image_ids=batch.image_ids.pin_memory(),
        text_ids=batch.text_ids.pin_memory(),
        augmentation=batch.augmentation.pin_memory() if batch.augmentation is not None else None,
    )
