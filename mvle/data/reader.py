"""Bytes out of shards by offset: `pread` on cached file handles, safe to call from many threads at once.

What can go wrong with a file while a run reads it, and what is said:

    gone, cut, or of another size   DataError at once, which names the shard. Looked for (fstat) when a file is opened
                                    and when a read comes short, not on each read
    EIO, ESTALE, ETIMEDOUT          opened and read again after each of RETRY_SECONDS, then DataError
    some bytes differ               not seen here: whoever has the checksum finds it
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from .errors import DataError
from .index import shard_changed

log = logging.getLogger(__name__)

RETRY_SECONDS = (0.1, 0.5, 2.0)  # a server that fails over takes seconds; one that takes longer is for an operator
_TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)


class _Handle:
    """An open file that closes itself when the last thread that reads from it lets go."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class ShardReader:
    """Reads (shard, offset, size) from a list of files; at most `max_open` stay open, the least used goes first.

    sizes: bytes that each file must have. Without them a file may have any size, and a read may come short.
    """

    def __init__(self, paths: Sequence[Path], sizes: Sequence[int] | None = None, max_open: int = 128) -> None:
        self._paths, self._sizes = list(paths), sizes
        self._max_open = max_open
        self._handles: OrderedDict[int, _Handle] = OrderedDict()
        self._lock = threading.Lock()
        self._reading: dict[int, tuple[Path, float]] = {}  # thread -> what it reads, and since when

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

    def reading(self) -> list[tuple[Path, float]]:
        """What each thread reads at the moment: (file, for how many seconds), the longest first."""
        now = time.monotonic()
        return sorted(((path, now - since) for path, since in self._reading.copy().values()), key=lambda r: -r[1])

    def close(self) -> None:
        """Forget every open file."""
        with self._lock:
            self._handles.clear()

    def _read_patiently(self, shard: int, offset: int, size: int) -> bytes:
        path = self._paths[shard]
        for wait in (*RETRY_SECONDS, None):
            try:
                return self._read_once(shard, offset, size)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise self._changed(shard, "it is gone") from error
            except OSError as error:
                if error.errno not in _TRANSIENT:
                    raise DataError(f"the shard {path} cannot be read: {error}.") from error
                if wait is None:
                    raise DataError(
                        f"the shard {path} cannot be read, after {1 + len(RETRY_SECONDS)} tries: {error}. Look after "
                        "the disk or the file system, then start the run again: it goes on from its last checkpoint."
                    ) from error
                log.warning("reading %s failed (%s); trying again in %s s", path, error, wait)
                with self._lock:
                    self._handles.pop(shard, None)  # a stale handle stays stale
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _read_once(self, shard: int, offset: int, size: int) -> bytes:
        handle = self._handle(shard)
        parts, missing = [], size
        while missing:  # a signal or a network file system may give less than was asked for
            part = os.pread(handle.fd, missing, offset)
            if not part:
                break
            parts.append(part)
            offset, missing = offset + len(part), missing - len(part)
        if missing and self._sizes is not None:
            self._check_size(shard, handle)
            raise self._changed(shard, f"reading it ends at byte {offset:,}")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _handle(self, shard: int) -> _Handle:
        with self._lock:
            handle = self._handles.get(shard)
            if handle is not None:
                self._handles.move_to_end(shard)
                return handle
        opened = _Handle(self._paths[shard])  # without the lock: an open that hangs holds up nobody else
        self._check_size(shard, opened)
        with self._lock:
            handle = self._handles.setdefault(shard, opened)
            self._handles.move_to_end(shard)
            while len(self._handles) > self._max_open:
                self._handles.popitem(last=False)
            return handle

    def _check_size(self, shard: int, handle: _Handle) -> None:
        if self._sizes is not None and (size := os.fstat(handle.fd).st_size) != self._sizes[shard]:
            raise self._changed(shard, f"it has {size:,} bytes")

    def _changed(self, shard: int, now: str) -> DataError:
        expected = f"{self._sizes[shard]:,} bytes, as its index says" if self._sizes is not None else "a file"
        return shard_changed(self._paths[shard], expected, now)
