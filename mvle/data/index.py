"""The index of a shard, and ShardSet: the images of many shards as rows 0 .. images - 1.

`SHARD.tar.index.safetensors` lies beside `SHARD.tar`, is columnar (one row an image) and is read memory-mapped, so a
thousand shards open in a moment. indexing.py makes it, and its header lists what was left out, with the reason.

    image.offset, image.size int64 · width, height int32 (displayed) · orientation, format, bit_depth, channels uint8
    image.crc32 uint32 · image_id int64 · key.bytes, key.offsets · caption.bytes, caption.offsets
    caption.first int64 [R + 1] · caption.text_id int64 · caption.flags uint8 · extra.SUFFIX.offset, .size (-1: none)
"""

from __future__ import annotations

import json
import os
import shlex
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path

from .captions import bytes_id
from .columns import read_columns
from .errors import DataError
from .patterns import expand_pattern
from .reader import ShardReader

VERSION = 1
HEADER = "mvle.index"
SHAPES = "shapes:"


def index_path(shard: str | os.PathLike[str]) -> Path:
    """Where the index of a shard lies."""
    return Path(f"{os.fspath(shard)}.index.safetensors")


def index_command(paths: Sequence[str]) -> str:
    """The command that makes the missing indexes."""
    return f"python -m mvle.data index {' '.join(p if '*' in p or '{' in p else shlex.quote(p) for p in paths)}"


class ShardIndex:
    """The index of one shard, memory-mapped. `columns` are read-only arrays, `header` is the JSON header."""

    def __init__(self, shard: str | os.PathLike[str]) -> None:
        self.path = Path(shard)
        self.columns, self.header = read_columns(index_path(shard), HEADER)
        if self.header.get("version") != VERSION:
            raise DataError(
                f"the index of {self.path} has format {self.header.get('version')}; this mvle reads {VERSION}. Make it "
                f"again:\n    {index_command([str(self.path)])}"
            )

    @property
    def images(self) -> int:
        """How many images (rows)."""
        return len(self.columns["image.offset"])

    @property
    def pairs(self) -> int:
        """How many captions."""
        return len(self.columns["caption.text_id"])

    @property
    def left_out(self) -> list[tuple[str, str]]:
        """(key, reason) of what the shard holds and the index does not."""
        return [(key, reason) for key, reason in self.header["left_out"]]

    @property
    def identity(self) -> str:
        """The header as one line of JSON, without the time: a copy of the same data is the same data."""
        return json.dumps({k: v for k, v in self.header.items() if k != "time_ns"}, sort_keys=True)

    def stale(self) -> str | None:
        """Why the shard is not the one that was indexed, or None. A copy (both files new, index last) is fine."""
        stat = self.path.stat()
        if stat.st_size != self.header["size"]:
            return f"the shard has {stat.st_size} bytes and had {self.header['size']} when it was indexed"
        if stat.st_mtime_ns > max(self.header["time_ns"], index_path(self.path).stat().st_mtime_ns):
            return "the shard was written after it was indexed"
        return None

    def text(self, name: str, i: int) -> str:
        """Entry i of a string column ("key" or "caption")."""
        start, stop = self.columns[f"{name}.offsets"][i : i + 2]
        return self.columns[f"{name}.bytes"][start:stop].tobytes().decode("utf-8", "surrogateescape")


class ShardSet:
    """Rows of several shards. Lookups are O(log shards) and read the mapped indexes; images are read by `pread`."""

    def __init__(self, indexes: Sequence[ShardIndex]) -> None:
        if not indexes:
            raise DataError("a set of shards needs at least one shard; got none.")
        self.indexes = list(indexes)
        self.shard_sizes = tuple(index.images for index in self.indexes)  # images of each shard
        self._starts = [0, *accumulate(self.shard_sizes)]
        self._reader = ShardReader([index.path for index in self.indexes])
        self.images = self._starts[-1]
        self.pairs = sum(index.pairs for index in self.indexes)
        if self.images == 0:
            names = ", ".join(str(index.path) for index in self.indexes[:3])
            raise DataError(
                f"these shards hold no usable image ({names}). See why: python -m mvle.data inspect {names}"
            )

    @staticmethod
    def open(
        patterns: Sequence[str] | str, shapes_folder: str = "data/shapes", shapes_captions: str = "sentence"
    ) -> ShardSet:
        """The shards that the patterns name, with their indexes checked.

        A pattern is a path, a glob (sorted), braces ({000..003}, {a,b}), or shapes:SPLIT (SPLIT = train, val or test),
        which draws the demo set once, under shapes_folder. Raises DataError: nothing matches, or an index is missing
        or stale (with the command that makes it).
        """
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        paths: list[Path] = []
        for pattern in patterns:
            if pattern.startswith(SHAPES):
                from .shapes import shape_shards

                paths += shape_shards(pattern[len(SHAPES) :], shapes_folder, shapes_captions)
            else:
                paths += expand_pattern(pattern)
        repeated = [str(path) for path, times in Counter(paths).items() if times > 1]
        if repeated:
            raise DataError(f"each shard must be named once; {', '.join(repeated[:3])} comes twice in {patterns}.")
        return ShardSet(_open_indexes(paths))

    @cached_property
    def fingerprint(self) -> str:
        """What the data is, as hex: a hash over the headers of the indexes, in order. Copies have the same."""
        digest = blake2b(digest_size=16)
        for index in self.indexes:
            digest.update(index.identity.encode() + b"\n")
        return digest.hexdigest()

    def locate(self, row: int) -> tuple[int, int]:
        """(shard number, row in it)."""
        if not 0 <= row < self.images:
            raise IndexError(f"row must be in 0..{self.images - 1}; got {row}.")
        shard = bisect_right(self._starts, row) - 1
        return shard, row - self._starts[shard]

    def key(self, row: int) -> str:
        """The shard key of the image."""
        shard, i = self.locate(row)
        return self.indexes[shard].text("key", i)

    def key_hash(self, row: int) -> int:
        """64 bits of the key, as int64: what data.fraction decides by."""
        return bytes_id(self.key(row).encode("utf-8", "surrogateescape"))

    def shard_path(self, row: int) -> Path:
        """The tar that holds the image."""
        return self.indexes[self.locate(row)[0]].path

    def size(self, row: int) -> tuple[int, int]:
        """(width, height) as displayed, pixels."""
        shard, i = self.locate(row)
        columns = self.indexes[shard].columns
        return int(columns["width"][i]), int(columns["height"][i])

    def image_id(self, row: int) -> int:
        """Hash of the image's bytes, int64."""
        shard, i = self.locate(row)
        return int(self.indexes[shard].columns["image_id"][i])

    def caption_count(self, row: int) -> int:
        """How many captions the image has; at least one."""
        _, first, last = self._caption_range(row)
        return last - first

    def captions(self, row: int) -> list[str]:
        """All captions of the image."""
        shard, first, last = self._caption_range(row)
        return [self.indexes[shard].text("caption", c) for c in range(first, last)]

    def caption(self, row: int, caption: int) -> str:
        """One caption of the image."""
        shard, c = self._caption(row, caption)
        return self.indexes[shard].text("caption", c)

    def text_id(self, row: int, caption: int) -> int:
        """Hash of the caption lower-cased with single spaces, int64."""
        shard, c = self._caption(row, caption)
        return int(self.indexes[shard].columns["caption.text_id"][c])

    def flags(self, row: int, caption: int) -> int:
        """Bit 0: a flip would make the caption false; bit 1: it names a colour."""
        shard, c = self._caption(row, caption)
        return int(self.indexes[shard].columns["caption.flags"][c])

    def image_bytes(self, row: int) -> bytes:
        """The encoded image as it lies in the shard, unchecked."""
        shard, i = self.locate(row)
        columns = self.indexes[shard].columns
        return self._reader.read(shard, int(columns["image.offset"][i]), int(columns["image.size"][i]))

    def image_crc32(self, row: int) -> int:
        """Checksum of the image's bytes when it was indexed."""
        shard, i = self.locate(row)
        return int(self.indexes[shard].columns["image.crc32"][i])

    def extra(self, row: int, suffix: str) -> bytes | None:
        """Another component of the pair (KEY.SUFFIX), or None where it has none."""
        shard, i = self.locate(row)
        columns = self.indexes[shard].columns
        name = f"extra.{suffix}.offset"
        if name not in columns or columns[name][i] < 0:
            return None
        return self._reader.read(shard, int(columns[name][i]), int(columns[f"extra.{suffix}.size"][i]))

    def close(self) -> None:
        """Close the files that are open; the set stays usable."""
        self._reader.close()

    def _caption_range(self, row: int) -> tuple[int, int, int]:
        shard, i = self.locate(row)
        first, last = self.indexes[shard].columns["caption.first"][i : i + 2]
        return shard, int(first), int(last)

    def _caption(self, row: int, caption: int) -> tuple[int, int]:
        shard, first, last = self._caption_range(row)
        if not 0 <= caption < last - first:
            raise IndexError(f"caption must be in 0..{last - first - 1} for {self.key(row)}; got {caption}.")
        return shard, first + caption


def _open_indexes(paths: Sequence[Path]) -> list[ShardIndex]:
    missing = [str(path) for path in paths if not index_path(path).is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} shards have no index, {missing[0]} first. Make it:\n"
            f"    {index_command(missing)}"
        )
    indexes, stale = [], []
    for path in paths:
        index = ShardIndex(path)
        if reason := index.stale():
            stale.append((str(path), reason))
        indexes.append(index)
    if stale:
        raise DataError(
            f"{len(stale)} of {len(paths)} shards changed since they were indexed, {stale[0][0]} first: {stale[0][1]}. "
            f"Index them again:\n    {index_command([path for path, _ in stale])}"
        )
    return indexes
