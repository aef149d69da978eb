"""Shards behind URLs, kept on a disk of this machine: each is fetched once, whole, and read from there.

    cache = ShardCache("/local/mvle", 200 * 2**30)
    ranges = cache.open(RemoteFile("s3://bucket/00000.tar"))       as open_ranges gives them

A run reads each image of a shuffling window by itself, here and there in eight shards: behind a URL that is a request
an image, in every epoch. A whole shard is one request after the other in large pieces, once.

    place      FOLDER/HASH-NAME, by URL (without its query), size, time and version: what was replaced has another
    ranks      of a machine share the folder. Who holds a shard's lock fetches it, the others wait; the lock goes with
               its process. What is being fetched has another name until it is whole, so nothing half is ever read
    room       never more than `limit` bytes, those on their way counted: the shards that were opened longest ago leave.
               Who has one of them open closes it when it opens the next (ShardReader), and its bytes are free then
    no room    a shard larger than the limit, a full disk, a folder that cannot be written: read by ranges as without a
               cache, and one warning says so
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import threading
from functools import partial
from hashlib import blake2b
from pathlib import Path

from .errors import DataError
from .files import File, Ranges, Status, open_ranges, patiently, status
from .locks import locked
from .remote import RemoteFile, query_apart

log = logging.getLogger(__name__)

PIECE = 8 * 2**20  # bytes of a request
_PART, _LOCK = ".part", ".lock"
_OURS = re.compile(r"[0-9a-f]{24}-")  # how names begin that `place` gives; whatever else lies there is left alone
_TRIES = 5
_NO_ROOM = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.ENOLCK,
    errno.ENOSYS,
)


class ShardCache:
    """A folder of whole shards, of at most `limit` bytes. Safe to use from many threads and processes."""

    def __init__(self, folder: str | os.PathLike[str], limit: int) -> None:
        self.folder, self.limit = Path(folder), limit
        self._warned = False
        self._lock = threading.Lock()

    def open(self, file: File) -> Ranges:
        """The file for reading by parts: from the cache, where it is one behind a URL. Raises OSError, DataError as
        open_ranges does."""
        if not isinstance(file, RemoteFile):
            return open_ranges(file)
        state = status(file)
        if state.size > self.limit:
            return self._without(file, f"it has {state.size:,} bytes, and data.cache_gib allows {self.limit:,}")
        place = self.place(file, state)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for _ in range(_TRIES):
                try:
                    return self._open(file, state.size, place)
                except FileNotFoundError:  # somebody who made room was faster: it is fetched again
                    continue
            return self._without(file, f"others need its room, {_TRIES} times in a row")
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            return self._without(file, str(error))

    def _open(self, file: RemoteFile, size: int, place: Path) -> Ranges:
        with self._locked(place) as held:
            assert held
            if not place.is_file() or place.stat().st_size != size:
                self._make_room(size, place)
                self._fetch(file, size, place)
            os.utime(place)  # it was opened now
            return open_ranges(place)

    def place(self, file: RemoteFile, state: Status) -> Path:
        """Where the file lies when it is whole."""
        url = query_apart(file.url)[0]
        name = blake2b(f"{url}\n{state}".encode(), digest_size=12).hexdigest()
        return self.folder / f"{name}-{re.sub(r'[^A-Za-z0-9._-]', '_', file.name)[-60:]}"

    # --- fetching ---

    def _locked(self, place: Path, wait: bool = True) -> contextlib.AbstractContextManager[bool]:
        """Alone with a place; False where somebody else is, and nobody waits."""
        return locked(Path(f"{place}{_LOCK}"), wait)

    def _forget(self, place: Path) -> None:
        """Remove the lock of a shard that was let go, unless somebody has it to fetch the shard again."""
        with self._locked(place, wait=False) as held:
            if held:
                Path(f"{place}{_LOCK}").unlink(missing_ok=True)

    def _fetch(self, file: RemoteFile, size: int, place: Path) -> None:
        part = Path(f"{place}{_PART}")
        source, at = open_ranges(file), 0
        try:
            with open(part, "r+b") as out:  # _make_room has made it
                if hasattr(os, "posix_fallocate") and size:
                    os.posix_fallocate(out.fileno(), 0, size)  # a full disk says so before anything is fetched
                while at < size:
                    piece = partial(source.read, at, min(PIECE, size - at))
                    data = patiently(piece, f"{file} cannot be fetched")
                    if not data:
                        raise DataError(f"{file} ends after {at:,} of {size:,} bytes while it is fetched. Start again.")
                    out.seek(at)
                    out.write(data)
                    at += len(data)
                out.flush()
                os.fsync(out.fileno())
            os.replace(part, place)
        finally:
            part.unlink(missing_ok=True)

    # --- room ---

    def _make_room(self, size: int, place: Path) -> None:
        """Let shards go until `size` bytes more fit. Raises OSError (ENOSPC) where what is on its way leaves none."""
        with self._locked(self.folder / "room"):
            self._sweep()
            there: dict[Path, os.stat_result] = {}
            for path in self._files():
                for name in (path, path.with_name(path.name.removesuffix(_PART))):  # it may just have become whole
                    with contextlib.suppress(FileNotFoundError):
                        there[name] = name.stat()
                        break
            there.pop(place, None)
            used = sum(stat.st_size for stat in there.values())
            whole = sorted((p for p in there if p.suffix != _PART), key=lambda p: there[p].st_mtime_ns)
            for path in whole:
                if used + size <= self.limit:
                    break
                path.unlink(missing_ok=True)
                self._forget(path)
                used -= there[path].st_size
            if used + size > self.limit:
                raise OSError(errno.ENOSPC, f"{used:,} bytes are on their way into the cache of {self.limit:,}")
            # what is on its way counts from now on, for others who make room
            with open(f"{place}{_PART}", "wb") as out:
                out.truncate(size)

    def _sweep(self) -> None:
        """Remove what a process left that died while it fetched."""
        for part in (path for path in self._files() if path.suffix == _PART):
            place = part.with_name(part.name.removesuffix(_PART))
            with self._locked(place, wait=False) as held:
                if held:
                    part.unlink(missing_ok=True)
            if held and not place.is_file():
                self._forget(place)

    def _files(self) -> list[Path]:
        # By their names alone: one that is asked for by itself may have got its other name meanwhile.
        return [path for path in self.folder.iterdir() if _OURS.match(path.name) and path.suffix != _LOCK]

    def _without(self, file: RemoteFile, why: str) -> Ranges:
        with self._lock:
            first, self._warned = not self._warned, True
        if first:
            log.warning("%s is not kept in data.cache_folder=%s, but read by parts: %s", file, self.folder, why)
        return open_ranges(file)
