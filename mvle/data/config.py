"""Which pairs a run has, and how they are shown: the section `data`, and the shards that it names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from ..config_keys import NamedMistakes, checked, shown
from ..section import Section
from .augment_config import AugmentConfig
from .cache import ShardCache
from .errors import DataError
from .index import ShardIndex
from .shards import ShardSet
from .sources import Source

MOST_SOURCES = 256  # their number is eight bits of what their order is drawn by


class SourceConfig(Section):
    """One of several sources of pairs to train on."""

    shards: tuple[str, ...] = Field(min_length=1, description="its shards, named as in a list of data.train")
    weight: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="share of the pairs, relative to the other weights; null, for every source: they are one set",
    )

    @field_validator("shards", mode="before")
    @classmethod
    def one_or_many(cls, value: Any) -> Any:
        """One pattern is a list of one."""
        return (value,) if isinstance(value, str) else value


class DataConfig(Section):
    """Which pairs, and how they are shown."""

    train: tuple[str, ...] | dict[str, SourceConfig] | None = Field(
        None,
        description="shards to train on: paths, URLs, globs, {000..127}, or shapes:train (the demo set); or several "
        "sources by name, {coco: {shards: ..., weight: 1}, cc3m: {shards: ..., weight: 3}}",
    )
    val: tuple[str, ...] | None = Field(None, description="shards of validation while training")
    test: tuple[str, ...] | None = Field(None, description="shards that pick no setting, for the final figures")
    shapes_folder: str = Field("data/shapes", description="where shapes:SPLIT is drawn, once")
    shapes_captions: Literal["sentence", "short"] = Field(
        "sentence", description="form of the captions of shapes: sentence, or short (without filler words)"
    )
    index_folder: str | None = Field(
        None, description="where the indexes are of shards that nothing can be written beside (index --index-folder)"
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
    decoder: Literal["auto", "dali", "torch"] = Field(
        "auto",
        description="dali: on the GPU, or on a CPU without one; torch: CPU threads; auto: dali where there are a GPU "
        "and DALI, else torch",
    )
    crop_scale: tuple[float, float] = Field(
        (0.2, 1.0), description="random crop: share of the image's area; [1, 1] shows whole images"
    )
    crop_aspect: tuple[float, float] = Field((3 / 4, 4 / 3), description="random crop: width / height")
    flip: bool = Field(True, description="mirror half of the images, never where the caption says left or right")
    augment: AugmentConfig = Field(default_factory=AugmentConfig, description="changes of colour and shape in training")
    window: int = Field(8, ge=1, description="shards of a shuffling window; more shuffle better and read more widely")
    threads: int = Field(2, ge=1, description="threads that read, and threads that decode, on each rank")
    prefetch: int = Field(
        2, ge=1, description="batches that wait ready on each rank while the model works; two more are in the making"
    )
    read_ahead: int = Field(
        256, ge=0, description="MiB of the images of the next step that a disk is told of beforehand; 0: it is not"
    )
    cache_folder: str | None = Field(
        None, description="where shards behind URLs are kept, each fetched once and whole; null: read by parts"
    )
    cache_gib: float = Field(
        100, gt=0, allow_inf_nan=False, description="most that is kept there, GiB; what was used longest ago leaves"
    )
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

    @field_validator("train", mode="before")
    @classmethod
    def named_sources(cls, value: Any) -> Any:
        """Sources by name; one that is null is left out, so that an override can do that."""
        if not isinstance(value, Mapping):
            return value
        found, problems = {}, []
        for name, given in value.items():
            try:
                if given is not None:
                    found[name] = _source(name, given)
            except NamedMistakes as mistakes:
                problems.append(str(mistakes))
        if problems:
            raise NamedMistakes("\n".join(problems))
        return found

    @field_validator("train")
    @classmethod
    def weights_together(cls, value: Any) -> Any:
        """Sources are one set, or each has its share."""
        if not isinstance(value, dict):
            return value
        if len(value) > MOST_SOURCES:
            raise ValueError(f"expected at most {MOST_SOURCES} sources; got {len(value)}")
        without = [name for name, source in value.items() if source.weight is None]
        if 0 < len(without) < len(value):
            raise ValueError(f"expected a weight for each source, or for none; {', '.join(without)} got none")
        return value

    @field_validator("train", "val", "test")
    @classmethod
    def not_empty(cls, value: Any) -> Any:
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

    def patterns(self, split: Literal["train", "val", "test"]) -> list[str]:
        """Every pattern that a split names, those of its sources in order."""
        return [pattern for source in self.sources(split).values() for pattern in source.shards]

    def sources(self, split: Literal["train", "val", "test"]) -> dict[str, SourceConfig]:
        """The sources of a split; shards that are named in a list are one source without a name."""
        given = getattr(self, split)
        if not given:
            return {}
        return given if isinstance(given, dict) else {"": SourceConfig(shards=given)}


def open_shards(config: DataConfig, split: Literal["train", "val", "test"]) -> ShardSet:
    """The shards of data.train, data.val or data.test. Raises DataError where there are none, or no index."""
    named = config.sources(split)
    if not named:
        raise DataError(f"data.{split} must name shards; it is null. Try data.{split}=shapes:{split}.")
    indexes: list[ShardIndex] = []
    sources: list[Source] = []
    owners: dict[Any, str] = {}
    for name, source in named.items():
        found = ShardSet.open(source.shards, config.shapes_folder, config.shapes_captions, config.index_folder).indexes
        for index in found:
            if (other := owners.setdefault(index.path, name)) != name:
                raise DataError(
                    f"a shard must belong to one source; {index.path} is in data.{split}.{other} and .{name}."
                )
        sources.append(Source(name, range(len(indexes), len(indexes) + len(found)), source.weight))
        indexes += found
    cache = None
    if config.cache_folder is not None:
        cache = ShardCache(config.cache_folder, int(config.cache_gib * 2**30))
    return ShardSet(indexes, sources, cache)


def _source(name: Any, given: Any) -> SourceConfig:
    """What data.train says of a source. Raises NamedMistakes."""
    key = f"data.train.{name}"
    if not isinstance(name, str):  # an override of data.train.2017.weight would mean another source than 2017
        raise NamedMistakes(
            f"config key data.train: expected names that are text; got {shown(name)}. Put it in quotes."
        )
    if not re.fullmatch(r"[\w-]+", name):
        raise NamedMistakes(f"config key data.train: expected names of letters, digits, _ and -; got {name!r}.")
    if isinstance(given, SourceConfig):
        return given
    if isinstance(given, (str, list, tuple)):
        given = {"shards": given}
    if not isinstance(given, Mapping):
        raise NamedMistakes(f"config key {key}: expected shards, or shards and weight; got {shown(given)}.")
    if "shards" not in given:
        raise NamedMistakes(f"config key {key}.shards: expected the shards of this source; got none.")
    return checked(SourceConfig, given, key)
