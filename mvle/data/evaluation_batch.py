"""Pairs as they are, for evaluation: the middle of each image, no flip, a caption by number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .bad_images import BadImageError
from .batch import Batch
from .decode import decode_mask_window
from .pairs import assemble, centred, read_window
from .plan import Draw
from .shards import ShardSet
from .tokenizer import Tokenizer


def evaluation_batch(
    shards: ShardSet,
    rows: Sequence[int],
    caption_indices: Sequence[int],
    tokenizer: Tokenizer,
    image_size: int,
    max_tokens: int,
    row_multiple: int = 1,
    image_ratio: float = 0.6,
    extras: bool = False,
) -> Batch:
    """Given pairs as they are: shorter side to image_size, centre crop, no flip; pair_ids are the row numbers.

    extras: also "objects" (uint8 [B, image_size, image_size], 1 = a pixel of an object; left out where a pair has no
    objects.png) and "scene" (list of dict or None; positions moved with the crop). Raises BadImageError with the key.
    """
    draws = [
        centred(shards, int(row), int(caption), float(image_ratio))
        for row, caption in zip(rows, caption_indices, strict=True)
    ]
    images = np.empty((len(draws), image_size, image_size, 3), np.uint8)
    for i, draw in enumerate(draws):
        try:
            images[i] = read_window(shards, draw, image_size)
        except BadImageError as error:
            raise BadImageError(f"{shards.name(draw.row)} in {shards.shard_path(draw.row)}: {error}") from error
    ids, _ = tokenizer.encode([shards.caption(draw.row, draw.caption) for draw in draws], max_tokens)
    batch = assemble(shards, draws, torch.from_numpy(images), ids, max_tokens, row_multiple)
    if extras:
        batch.extras.update(_extras(shards, draws, image_size))
    return batch


def _extras(shards: ShardSet, draws: Sequence[Draw], size: int) -> dict[str, Any]:
    import json

    scenes, masks = [], []
    for draw in draws:
        scene, mask = shards.extra(draw.row, "scene.json"), shards.extra(draw.row, "objects.png")
        scenes.append(_moved(json.loads(scene), draw.window, size) if scene is not None else None)
        if mask is not None:
            masks.append(decode_mask_window(mask, draw.window, size))
    found: dict[str, Any] = {"scene": scenes}
    if len(masks) == len(draws):
        found["objects"] = torch.from_numpy(np.stack(masks))
    return found


def _moved(scene: dict[str, Any], window: tuple[int, int, int, int], size: int) -> dict[str, Any]:
    """The scene with its positions in pixels of the shown window."""
    y, x, height, width = window
    objects = [
        {**o, "x": (o["x"] - x) * size / width, "y": (o["y"] - y) * size / height, "radius": o["radius"] * size / width}
        for o in scene.get("objects", [])
    ]
    return {**scene, "objects": objects}
