"""Which pairs a run has, and how they are shown: the section `data`, and the shards that it names."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator

from ..section import Section
from .decode import MAX_PIXELS
from .errors import DataError
from .shards import ShardSet


class DataConfig(Section):
    """Which pairs, and how they are shown."""

    train: tuple[str, ...] | None = Field(
        None, description="shards to train on: paths, globs, {000..127}, or shapes:train (the built-in demo set)"
    )
    val: tuple[str, ...] | None = Field(None, description="shards of validation while training")
    test: tuple[str, ...] | None = Field(None, description="shards that pick no setting, for the final figures")
    shapes_folder: str = Field("data/shapes", description="where shapes:SPLIT is drawn, once")
    shapes_captions: Literal["sentence", "short"] = Field(
        "sentence", description="form of the captions of shapes: sentence, or short (without filler words)"
    )
    slots: int | None = Field(
        None,
        ge=1,
        description="pieces into which an epoch is cut; divides batch.total, and ranks divide it, since it decides the "
        "order (None: the greatest common divisor of batch.total and 64)",
    )
    fraction: float = Field(
        1.0, gt=0, le=1, description="share of the images used, chosen by key; a smaller share is a subset"
    )
    decoder: Literal["auto", "torch"] = Field("auto", description="auto: the fastest one here; torch: CPU threads")
    crop_scale: tuple[float, float] = Field(
        (0.2, 1.0), description="random crop: share of the image's area; [1, 1] shows whole images"
    )
    crop_aspect: tuple[float, float] = Field((3 / 4, 4 / 3), description="random crop: width / height")
    flip: bool = Field(True, description="mirror half of the images, never where the caption says left or right")
    window: int = Field(8, ge=1, description="shards of a shuffling window; more shuffle better and read more widely")
    threads: int = Field(2, ge=1, description="threads that decode, on each rank")
    max_pixels: int = Field(MAX_PIXELS, ge=1, description="larger images are left out when a shard is indexed")
    max_bad_share: float = Field(
        0.01,
        ge=0,
        le=1,
        description="stop when more than so large a share of a rank's last 10,000 images turns out bad",
    )

    @field_validator("train", "val", "test", mode="before")
    @classmethod
    def one_or_many(cls, value: Any) -> Any:
        """One pattern is a list of one."""
        return (value,) if isinstance(value, str) else value

    @field_validator("train", "val", "test")
    @classmethod
    def not_empty(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """No shards is null, not an empty list."""
        return value or None

    @field_validator("crop_scale", "crop_aspect")
    @classmethod
    def ascending(cls, value: tuple[float, float]) -> tuple[float, float]:
        """0 < low <= high."""
        if not 0 < value[0] <= value[1]:
            raise ValueError(f"expected [low, high] with 0 < low <= high; got {list(value)}")
        return value

    @field_validator("crop_scale")
    @classmethod
    def inside(cls, value: tuple[float, float]) -> tuple[float, float]:
        """A window is no larger than its image."""
        if value[1] > 1:
            raise ValueError(f"expected shares of the image's area, at most 1; got {list(value)}")
        return value

    def slots_for(self, batch_total: int) -> int:
        """data.slots, or its default for that many pairs a step."""
        return self.slots or math.gcd(batch_total, 64)


def open_shards(config: DataConfig, split: Literal["train", "val", "test"]) -> ShardSet:
    """The shards of data.train, data.val or data.test. Raises DataError where there are none, or no index."""
    patterns = getattr(config, split)
    if patterns is None:
        raise DataError(f"data.{split} must name shards; it is null. Try data.{split}=shapes:{split}.")
    return ShardSet.open(patterns, config.shapes_folder, config.shapes_captions)
