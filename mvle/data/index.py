"""The index of a shard.

`SHARD.tar.index.safetensors` lies beside `SHARD.tar`, is columnar (one row an image) and is read into memory when
a set is opened: 150 to 250 bytes an image, mostly its captions, 2 to 3 GB a rank for twelve million images. Not mapped,
see columns.py. indexing.py makes the index, and its header lists what was left out, with the reason.

    image.offset, image.size int64 · width, height int32 (displayed) · orientation, format, bit_depth, channels uint8
    image.crc32 uint32 · image_id int64 · key.bytes, key.offsets · caption.bytes, caption.offsets
    caption.first int64 [R + 1] · caption.text_id int64 · caption.flags uint8 · extra.SUFFIX.offset, .size (-1: none)
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from .columns import read_columns
from .errors import DataError

VERSION = 1
HEADER = "mvle.index"


def index_path(shard: str | os.PathLike[str]) -> Path:
    """Where the index of a shard lies."""
    return Path(f"{os.fspath(shard)}.index.safetensors")


def index_command(paths: Sequence[str]) -> str:
    """The command that makes the missing indexes."""
    return f"python -m mvle.data index {' '.join(p if '*' in p or '{' in p else shlex.quote(p) for p in paths)}"


def shard_changed(shard: Path, expected: str, now: str, what: str = "the shard") -> DataError:
    """The error for a file that is gone or is another one than when the run began, with what mends it."""
    return DataError(
        f"{what} {shard} changed while it is in use: expected {expected}; {now}. Put the file back and make its index "
        f"again (the same file gives the same index, and then a run goes on from its last checkpoint):\n"
        f"    {index_command([str(shard)])}"
    )


class ShardIndex:
    """The index of one shard, in memory. `columns` are read-only arrays, `header` is the JSON header."""

    def __init__(self, shard: str | os.PathLike[str]) -> None:
        self.path = Path(shard)
        try:
            self.columns, self.header = read_columns(index_path(shard), HEADER)
        except DataError as error:
            raise DataError(f"{error} Make it again:\n    {index_command([str(self.path)])}") from error
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


def open_indexes(paths: Sequence[Path]) -> list[ShardIndex]:
    """The index of each shard. Raises DataError, with the command that mends it, where one is missing or stale."""
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
