"""Batch: one whole optimizer step of one rank, as the loader gives it and the model takes it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from mvle_kernels import Packed
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """B pairs, ready for the device.

    images      uint8 [B, height, width, 3]
    text        Packed int32 token ids, with bos and eos; lengths on the host
    pair_ids    int64 [B], the global counter of each pair: the id of all its random draws
    image_ids   int64 [B], hash of the image's bytes; text_ids int64 [B], hash of the caption lower-cased
    keys        the shard key of each pair, after its source where there are several; for messages
    image_ratio the share of cells to mask in each image, on the host (drawn by the plan, so known before the step)
    augmentation int64 [B, 5], the plan's four words for augmentation, and 1 where the caption names a colour
    extras      what a set knows beside the pair: e.g. "objects" uint8 [B, height, width], "scene" list of dict
    replaced    how many of the pairs stand in for a bad image; truncated: how many captions were cut (host ints)
    masks       given masks instead of drawn ones: {"image": bool [B, N]} and/or {"text": bool [T]}, True = masked
    """

    images: Tensor
    text: Packed
    pair_ids: Tensor
    image_ids: Tensor
    text_ids: Tensor
    keys: list[str]
    image_ratio: tuple[float, ...]
    extras: dict[str, Any] = field(default_factory=dict)
    masks: dict[str, Tensor] | None = None
    augmentation: Tensor | None = None
    replaced: int = 0
    truncated: int = 0

    def __len__(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on `device`; host-side fields stay."""
        move: dict[str, Any] = {"device": device, "non_blocking": True}
        return replace(
            self,
            images=self.images.to(**move),
            text=self.text.to(device),
            pair_ids=self.pair_ids.to(**move),
            image_ids=self.image_ids.to(**move),
            text_ids=self.text_ids.to(**move),
            augmentation=self.augmentation.to(**move) if self.augmentation is not None else None,
            masks={k: v.to(**move) for k, v in self.masks.items()} if self.masks else self.masks,
        )

    def micro(self, start: int, stop: int, row_multiple: int = 1) -> Batch:
        """Pairs start .. stop as a batch of their own. Batches with given masks are not split; the counts of replaced
        pairs and cut captions stay with the whole."""
        if self.masks is not None:
            raise ValueError("a batch with given masks cannot be split into micro-batches.")
        if start == 0 and stop == len(self):
            return self
        return replace(
            self,
            images=self.images[start:stop],
            text=self.text.slice(start, stop, row_multiple),
            pair_ids=self.pair_ids[start:stop],
            image_ids=self.image_ids[start:stop],
            text_ids=self.text_ids[start:stop],
            keys=self.keys[start:stop],
            image_ratio=self.image_ratio[start:stop],
            augmentation=self.augmentation[start:stop] if self.augmentation is not None else None,
            extras={},
            replaced=0,
            truncated=0,
        )
