"""Bytes out of shards by offset, from open files that are kept; safe to call from many threads at once.

files.py knows how a part of a file is read: `pread` on a disk, a byte range behind a URL.

What can go wrong with a file while a run reads it, and what is said:

    gone, cut, or of another size   DataError at once, which names the shard. Looked for when a file is opened and when
                                    a read comes short, not on each read
    EIO, ESTALE, ETIMEDOUT, and     opened and read again after each of files.RETRY_SECONDS, then DataError
    what may be a server's mood
    some bytes differ               not seen here: whoever has the checksum finds it
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from .errors import DataError
from .files import File, Ranges, open_ranges, patiently
from .index import shard_changed


class ShardReader:
    """Reads (shard, offset, size) from a list of files; at most `max_open` stay open, the least used goes first.

    sizes: bytes that each file must have. Without them a file may have any size, and a read may come short. opener:
    what opens one; ShardCache.open keeps what lies behind URLs.
    """

    def __init__(
        self,
        paths: Sequence[File],
        sizes: Sequence[int] | None = None,
        max_open: int = 128,
        opener: Callable[[File], Ranges] = open_ranges,
    ) -> None:
        self._paths, self._sizes, self._opener = list(paths), sizes, opener
        self._max_open = max_open
        self._open: OrderedDict[int, Ranges] = OrderedDict()
        self._lock = threading.Lock()
        self._reading: dict[int, tuple[File, float]] = {}  # thread -> what it reads, and since when

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes of shard number `shard` from `offset` on; without `sizes`, fewer where the file ends.

        Raises DataError: the file is gone, is not of its size, or cannot be read after some tries.
        """
        thread = threading.get_ident()
        self._reading[thread] = self._paths[shard], time.monotonic()
        try:
            return self._read_patiently(shard, offset, size)
        finally:
            del self._reading[thread]

    def expect(self, shard: int, offset: int, size: int) -> None:
        """These bytes are read soon. Only a file that is open is told: opening may hang, and who reads says so."""
        with self._lock:
            ranges = self._open.get(shard)
        if ranges is not None:
            ranges.expect(offset, size)

    def reading(self) -> list[tuple[File, float]]:
        """What each thread reads at the moment: (file, for how many seconds), the longest first."""
        now = time.monotonic()
        return sorted(((path, now - since) for path, since in self._reading.copy().values()), key=lambda r: -r[1])

    def close(self) -> None:
        """Forget every open file."""
        with self._lock:
            self._open.clear()

    def _read_patiently(self, shard: int, offset: int, size: int) -> bytes:
        path = self._paths[shard]

        def forget() -> None:  # a stale handle stays stale
            with self._lock:
                self._open.pop(shard, None)

        try:
            return patiently(
                lambda: self._read_once(shard, offset, size), failed=f"the shard {path} cannot be read", renew=forget
            )
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._changed(shard, "it is gone") from error
        except OSError as error:
            raise DataError(f"the shard {path} cannot be read: {error}.") from error

    def _read_once(self, shard: int, offset: int, size: int) -> bytes:
        ranges = self._ranges(shard)
        data = ranges.read(offset, size)
        if len(data) < size and self._sizes is not None:
            self._check_size(shard, ranges)
            raise self._changed(shard, f"reading it ends at byte {offset + len(data):,}")
        return data

    def _ranges(self, shard: int) -> Ranges:
        with self._lock:
            ranges = self._open.get(shard)
            if ranges is not None:
                self._open.move_to_end(shard)
                return ranges
        opened = self._opener(self._paths[shard])  # without the lock: an open that hangs holds up nobody else
        self._check_size(shard, opened)
        with self._lock:
            if self._opener is not open_ranges:  # what a cache has let go takes room on the disk while it is open
                for other in [k for k, r in self._open.items() if getattr(r, "unlinked", bool)()]:
                    del self._open[other]
            ranges = self._open.setdefault(shard, opened)
            self._open.move_to_end(shard)
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)
            return ranges

    def _check_size(self, shard: int, ranges: Ranges) -> None:
        if self._sizes is not None and (size := ranges.size()) != self._sizes[shard]:
            raise self._changed(shard, f"it has {size:,} bytes")

    def _changed(self, shard: int, now: str) -> DataError:
        expected = f"{self._sizes[shard]:,} bytes, as its index says" if self._sizes is not None else "a file"
        return shard_changed(self._paths[shard], expected, now)
