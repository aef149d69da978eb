"""The index of a shard.

`SHARD.tar.index.safetensors` lies beside `SHARD.tar` or, where nothing can be written there, in a folder of indexes. It
is columnar (one row an image) and is read into memory when a set is opened: 150 to 250 bytes an image, mostly its
captions, 2 to 3 GB a rank for twelve million images. Not mapped, see columns.py. indexing.py makes the index, and its
header lists what was left out, with the reason.

    image.offset, image.size int64 · width, height int32 (displayed) · orientation, format, bit_depth, channels uint8
    image.crc32 uint32 · image_id int64 · key.bytes, key.offsets · caption.bytes, caption.offsets
    caption.first int64 [R + 1] · caption.text_id int64 · caption.flags uint8 · extra.SUFFIX.offset, .size (-1: none)
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, TypeVar

from .columns import read_columns
from .errors import DataError
from .files import File, below, beside, locate, open_ranges, patiently, status
from .remote import RemoteFile
from .workers import Workers

VERSION = 1
HEADER = "mvle.index"
SUFFIX = ".index.safetensors"
ENDS = 65536
_ABOUT_THE_FILE = ("time_ns", "ends", "verified")  # of the header: they change no row
_OPENERS = 32  # indexes behind URLs that are opened at once: each is two or three round trips

Result = TypeVar("Result")


def index_path(shard: str | os.PathLike[str] | RemoteFile, index_folder: str | os.PathLike[str] | None = None) -> File:
    """Where the index of a shard lies: beside it, or under index_folder by the shard's whole path, so that shards of
    one name do not meet there."""
    file = locate(shard)
    return beside(file, SUFFIX) if index_folder is None else below(index_folder, file, SUFFIX)


def index_command(paths: Sequence[str], index_folder: str | os.PathLike[str] | None = None) -> str:
    """The command that makes the missing indexes."""
    place = f" --index-folder {shlex.quote(os.fspath(index_folder))}" if index_folder is not None else ""
    return f"python -m mvle.data index {' '.join(p if '*' in p or '{' in p else shlex.quote(p) for p in paths)}{place}"


def shard_changed(shard: File, expected: str, now: str, what: str = "the shard") -> DataError:
    """The error for a file that is gone or is another one than when the run began, with what mends it."""
    return DataError(
        f"{what} {shard} changed while it is in use: expected {expected}; {now}. Put the file back and make its index "
        f"again (the same file gives the same index, and then a run goes on from its last checkpoint):\n"
        f"    {index_command([str(shard)])}"
    )


def ends_of(file: File) -> str:
    """A hash of the first and last ENDS bytes of a file. Raises OSError, DataError."""

    def read() -> bytes:
        ranges = open_ranges(file)
        return ranges.read(0, ENDS) + ranges.read(max(0, ranges.size() - ENDS), ENDS)

    return blake2b(patiently(read, f"{file} cannot be read"), digest_size=8).hexdigest()


class ShardIndex:
    """The index of one shard, in memory. `columns` are read-only arrays, `header` is the JSON header, `path` is the
    shard, `status` what its file system said of it when the index was opened.

    Raises DataError for an index that is damaged or of another version, FileNotFoundError where there is no shard or no
    index of it (under index_folder, or else beside it).
    """

    def __init__(
        self, shard: str | os.PathLike[str] | RemoteFile, index_folder: str | os.PathLike[str] | None = None
    ) -> None:
        self.path = locate(shard)
        self.status = status(self.path)
        command = index_command([str(self.path)], index_folder)
        try:
            self.file, (self.columns, self.header) = self._read(index_folder)
        except DataError as error:
            raise DataError(f"{error} Make it again:\n    {command}") from error
        if self.header.get("version") != VERSION:
            raise DataError(
                f"the index of {self.path} has format {self.header.get('version')}; this mvle reads {VERSION}. Make it "
                f"again:\n    {command}"
            )

    def _read(self, index_folder: str | os.PathLike[str] | None) -> tuple[File, tuple[Any, dict[str, Any]]]:
        if index_folder is not None:
            file = index_path(self.path, index_folder)
            with contextlib.suppress(FileNotFoundError):  # then it lies beside the shard
                return file, read_columns(file, HEADER)
        file = index_path(self.path)
        return file, read_columns(file, HEADER)

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
        """The header as one line of JSON, without what does not change rows: a copy of the same data is the same data,
        and so is an index that was made without decoding, where it left out the same."""
        return json.dumps({k: v for k, v in self.header.items() if k not in _ABOUT_THE_FILE}, sort_keys=True)

    @property
    def verified(self) -> bool:
        """Whether every image was decoded when the index was made."""
        return self.header.get("verified", True)

    def stale(self) -> str | None:
        """Why the shard is not the one that was indexed, or None. A copy (both files new, index last) is fine.

        The time of the index: nothing is read. Another time: a copy, or another file of the same size, and the first
        and last bytes tell mostly which.
        """
        size, time_ns, _ = self.status
        if size != self.header["size"]:
            return f"the shard has {size} bytes and had {self.header['size']} when it was indexed"
        if time_ns is None or time_ns == self.header["time_ns"]:  # None: a server that does not say
            return None
        if (ends := self.header.get("ends")) is not None and ends != ends_of(self.path):
            return "its first or last bytes are others than when it was indexed"
        if time_ns <= (self.header["time_ns"] or 0):
            return None
        if time_ns > (status(self.file).time_ns or 0):
            return "the shard was written after it was indexed"
        return None

    def text(self, name: str, i: int) -> str:
        """Entry i of a string column ("key" or "caption")."""
        start, stop = self.columns[f"{name}.offsets"][i : i + 2]
        return self.columns[f"{name}.bytes"][start:stop].tobytes().decode("utf-8", "surrogateescape")


def open_indexes(paths: Sequence[File], index_folder: str | os.PathLike[str] | None = None) -> list[ShardIndex]:
    """The index of each shard. Raises DataError, with the command that mends it, where one is missing or stale, or a
    shard is not there."""

    def opened(path: File) -> tuple[ShardIndex | None, str | None]:
        try:
            index = ShardIndex(path, index_folder)
        except FileNotFoundError:
            _require_shard(path)
            return None, None
        except OSError as error:
            raise DataError(f"the shard {path} or its index cannot be read: {error}.") from error
        return index, index.stale()

    found = list(zip(paths, _each(opened, paths), strict=True))
    missing = [str(path) for path, (index, _) in found if index is None]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} shards have no index, {missing[0]} first. Make it:\n"
            f"    {index_command(missing, index_folder)}"
        )
    stale = [(str(path), reason) for path, (_, reason) in found if reason]
    if stale:
        raise DataError(
            f"{len(stale)} of {len(paths)} shards changed since they were indexed, {stale[0][0]} first: {stale[0][1]}. "
            f"Index them again:\n    {index_command([path for path, _ in stale], index_folder)}"
        )
    return [index for _, (index, _) in found if index is not None]


def _require_shard(path: File) -> None:
    try:
        status(path)
    except FileNotFoundError as error:
        raise DataError(f"there is no shard {path}. Look at the name, or put it back.") from error


def _each(function: Callable[[File], Result], files: Sequence[File]) -> list[Result]:
    """[function(file) for file in files]; side by side where some lie behind URLs, since that is mostly waiting."""
    if not any(isinstance(file, RemoteFile) for file in files):
        return [function(file) for file in files]
    workers = Workers(min(_OPENERS, len(files)), "open")
    try:
        return workers.map(function, files)
    finally:
        workers.stop()
