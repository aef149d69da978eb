"""Bytes out of shards by offset: `pread` on cached file handles, safe to call from many threads at once."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path


class _Handle:
    """An open file that closes itself when the last thread that reads from it lets go."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class ShardReader:
    """Reads (shard, offset, size) from a list of files; at most `max_open` stay open, the least used goes first."""

    def __init__(self, paths: Sequence[Path], max_open: int = 128) -> None:
        self._paths = list(paths)
        self._max_open = max_open
        self._handles: OrderedDict[int, _Handle] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes of shard number `shard` from `offset` on; fewer where the file ends before that."""
        handle = self._handle(shard)
        parts, missing = [], size
        while missing:  # a signal or a network file system may give less than was asked for
            part = os.pread(handle.fd, missing, offset)
            if not part:
                break
            parts.append(part)
            offset, missing = offset + len(part), missing - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Forget every open file."""
        with self._lock:
            self._handles.clear()

    def _handle(self, shard: int) -> _Handle:
        with self._lock:
            handle = self._handles.get(shard)
            if handle is None:
                handle = self._handles[shard] = _Handle(self._paths[shard])
                while len(self._handles) > self._max_open:
                    self._handles.popitem(last=False)
            self._handles.move_to_end(shard)
            return handle
