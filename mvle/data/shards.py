"""ShardSet: the images of many shards as rows 0 .. images - 1, found by their indexes and read by parts."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate

import numpy as np

from .cache import ShardCache
from .captions import bytes_id
from .decode import FORMATS, ImageInfo
from .errors import DataError
from .files import File, open_ranges, status
from .index import ShardIndex, open_indexes, shard_changed
from .patterns import expand_pattern, refuse_lost_shards
from .reader import ShardReader
from .remote import shown
from .shapes import shape_shards
from .sources import Source, weights_of

SHAPES = "shapes:"


class ShardSet:
    """Rows of several shards. Lookups are O(log shards) and read the indexes in memory; images are read by parts."""

    def __init__(
        self, indexes: Sequence[ShardIndex], sources: Sequence[Source] = (), cache: ShardCache | None = None
    ) -> None:
        """sources: what the shards belong to, each consecutive ones, in order (none: one source without a name).
        cache: where shards behind URLs are kept."""
        if not indexes:
            raise DataError("a set of shards needs at least one shard; got none.")
        self.indexes = list(indexes)
        self.sources = tuple(sources) or (Source("", range(len(self.indexes))),)
        self.shard_sizes = tuple(index.images for index in self.indexes)  # images of each shard
        self._starts = [0, *accumulate(self.shard_sizes)]
        self._reader = ShardReader(
            [index.path for index in self.indexes],
            [index.header["size"] for index in self.indexes],
            opener=open_ranges if cache is None else cache.open,
        )
        self.images = self._starts[-1]
        # Of each shard: which of its images were decoded since, where none was when it was indexed.
        self._decoded = [None if index.verified else np.zeros(index.images, bool) for index in self.indexes]
        self.pairs = sum(index.pairs for index in self.indexes)
        if self.images == 0:
            names = ", ".join(str(index.path) for index in self.indexes[:3])
            raise DataError(f"these shards hold no usable image ({names}). See why: python -m mvle.data index {names}")

    @staticmethod
    def open(
        patterns: Sequence[str] | str,
        shapes_folder: str = "data/shapes",
        shapes_captions: str = "sentence",
        index_folder: str | os.PathLike[str] | None = None,
    ) -> ShardSet:
        """The shards that the patterns name, with their indexes checked.

        A pattern is a path or URL, a glob (sorted), braces ({000..003}, {a,b}), or shapes:SPLIT (SPLIT = train, val or
        test), which draws the demo set once, under shapes_folder. index_folder: where indexes are that do not lie
        beside their shards. Raises DataError: nothing matches, or an index is missing or stale (with the command that
        makes it).
        """
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        paths: list[File] = []
        for pattern in patterns:
            if pattern.startswith(SHAPES):
                paths += shape_shards(pattern[len(SHAPES) :], shapes_folder, shapes_captions)
            else:
                found = expand_pattern(pattern)
                refuse_lost_shards(pattern, found, index_folder)
                paths += found
        repeated = [str(path) for path, times in Counter(paths).items() if times > 1]
        if repeated:
            raise DataError(
                f"each shard must be named once; {', '.join(repeated[:3])} comes twice in {shown(str(patterns))}."
            )
        return ShardSet(open_indexes(paths, index_folder))

    @cached_property
    def fingerprint(self) -> str:
        """What the data is, as hex: a hash over the headers of the indexes, in order, and over which of them have which
        weight. Copies have the same, whatever their paths and the names of their sources."""
        digest, weights = blake2b(digest_size=16), weights_of(self.sources)
        starts = {source.shards.start: weight for source, weight in zip(self.sources, weights, strict=False)}
        for shard, index in enumerate(self.indexes):
            if len(weights) > 1 and shard in starts:
                digest.update(f"weight {starts[shard]}\n".encode())
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

    def name(self, row: int) -> str:
        """The image as messages name it: its key, after its source where there are several."""
        if len(self.sources) == 1:
            return self.key(row)
        shard, _ = self.locate(row)
        source = self.sources[bisect_right([source.shards.start for source in self.sources], shard) - 1]
        return f"{source.name}:{self.key(row)}"

    def key_hash(self, row: int) -> int:
        """64 bits of the key, as int64: what data.fraction decides by."""
        return bytes_id(self.key(row).encode("utf-8", "surrogateescape"))

    def shard_path(self, row: int) -> File:
        """The tar that holds the image."""
        return self.indexes[self.locate(row)[0]].path

    def size(self, row: int) -> tuple[int, int]:
        """(width, height) as displayed, pixels."""
        shard, i = self.locate(row)
        columns = self.indexes[shard].columns
        return int(columns["width"][i]), int(columns["height"][i])

    def image_info(self, row: int) -> ImageInfo:
        """What the image is, as its index says."""
        shard, i = self.locate(row)
        columns = self.indexes[shard].columns
        numbers = (int(columns[name][i]) for name in ("width", "height", "orientation", "bit_depth", "channels"))
        return ImageInfo(FORMATS[columns["format"][i]], *numbers)

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
        """The encoded image as it lies in the shard, unchecked. Raises DataError: the file is gone, of another size, or
        cannot be read."""
        shard, i = self.locate(row)
        columns = self.indexes[shard].columns
        return self._reader.read(shard, int(columns["image.offset"][i]), int(columns["image.size"][i]))

    def expect(self, rows: Iterable[int], limit: int) -> None:
        """The images of these rows are read soon: a disk may begin with up to `limit` bytes of them."""
        for row in rows:
            shard, i = self.locate(row)
            columns = self.indexes[shard].columns
            size = int(columns["image.size"][i])
            if (limit := limit - size) < 0:
                return
            self._reader.expect(shard, int(columns["image.offset"][i]), size)

    def image_crc32(self, row: int) -> int:
        """Checksum of the image's bytes when it was indexed."""
        shard, i = self.locate(row)
        return int(self.indexes[shard].columns["image.crc32"][i])

    def verified(self, row: int) -> bool:
        """Whether the image, as its checksum has it, is known to decode: it did when it was indexed, or since."""
        shard, i = self.locate(row)
        decoded = self._decoded[shard]
        return decoded is None or bool(decoded[i])

    def verify(self, row: int) -> None:
        """The image was decoded, and is good."""
        shard, i = self.locate(row)
        if (decoded := self._decoded[shard]) is not None:
            decoded[i] = True

    @property
    def unverified_shards(self) -> int:
        """How many shards were indexed without decoding."""
        return sum(not index.verified for index in self.indexes)

    def extra(self, row: int, suffix: str) -> bytes | None:
        """Another component of the pair (KEY.SUFFIX), or None where it has none."""
        shard, i = self.locate(row)
        columns = self.indexes[shard].columns
        name = f"extra.{suffix}.offset"
        if name not in columns or columns[name][i] < 0:
            return None
        return self._reader.read(shard, int(columns[name][i]), int(columns[f"extra.{suffix}.size"][i]))

    def check_shard(self, row: int) -> None:
        """Raise DataError if the shard of a row whose bytes are wrong is gone, or was written since the set was opened:
        then it is another file, and all its images are wrong."""
        shard, _ = self.locate(row)
        index = self.indexes[shard]
        expected = f"the {index.header['size']:,} bytes that were indexed"
        try:
            now = status(index.path, refresh=True)
        except FileNotFoundError:
            raise shard_changed(index.path, expected, "it is gone") from None
        if now != index.status:
            what = f"it was written since the run began, and the bytes of {self.key(row)} are others"
            raise shard_changed(index.path, expected, what)

    def reading(self) -> list[tuple[File, float]]:
        """What threads read at the moment: (shard, for how many seconds), the longest first."""
        return self._reader.reading()

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
