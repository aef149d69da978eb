"""A lock that goes with the process that holds it, and whose file may be removed by whoever holds it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Alone with a file, which is made where there is none; False where somebody else is, and nobody waits.

    Raises OSError, also where the file system has no locks.
    """
    while True:
        with open(path, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            if _is_at(path, file.fileno()):
                yield True
                return
        # who held it removed it after it was opened here: the next to come would be alone with another file


def _is_at(path: Path, number: int) -> bool:
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(number), os.stat(path))
    except FileNotFoundError:
        return False
