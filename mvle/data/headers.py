"""The headers of tar shards: names, places and sizes of their members, and format and size of their images.

`scan` reads headers alone, many shards side by side: by csrc/host where it was compiled, else by its twin in
headers_python.py, which gives the same for every file. Rules of both:

    members    regular files, with ustar, GNU and pax names (also those of Solaris); a pax size counts for the member
               behind it; folders, links and devices are passed over, and nothing lies behind them, whatever size they
               note. An empty block, or the end of the file, ends a shard
    refused    a header whose checksum or size is wrong, a member that the file does not hold whole, sparse files, names
               and pax records of more than 1 MiB, a name or size for all members at once (global pax): each with its
               place
    images     by their first bytes, whatever their name: jpeg, png, webp, gif, bmp. Width and height as stored (0: not
               found), and the EXIF orientation of a JPEG, read from as many bytes as its segments ask for
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DataError
from .headers_python import BLOCK, scan_one

COMPRESSED = (
    (b"\x1f\x8b", "gzip", "gunzip"), (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"), (b"BZh", "bzip2", "bunzip2"),
    (b"\xfd7zXZ", "xz", "unxz"), (b"PK\x03\x04", "zip", "unzip and tar"),
)  # fmt: skip
FORM = 2  # of what csrc/host gives, and by which rules
_COLUMNS: tuple[Any, ...] = (*(np.int64,) * 3, *(np.uint8,) * 2, *(np.int32,) * 2)


@dataclass(frozen=True)
class Headers:
    """Members in their order. names: bytes of all, of which member i has name_ends[i - 1] .. name_ends[i]; offsets,
    sizes int64; formats, orientations uint8; widths, heights int32 (0: no image, or not found)."""

    names: bytes
    name_ends: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    formats: NDArray[np.uint8]
    orientations: NDArray[np.uint8]
    widths: NDArray[np.int32]
    heights: NDArray[np.int32]

    def name(self, i: int) -> str:
        """Of member i; bytes that are no UTF-8 as surrogates."""
        begin = int(self.name_ends[i - 1]) if i else 0
        return self.names[begin : int(self.name_ends[i])].decode("utf-8", "surrogateescape")

    def __len__(self) -> int:
        return len(self.offsets)


@cache
def host() -> tuple[ModuleType | None, str]:
    """The compiled pass, or None; and which of the two is used, and why."""
    try:
        module = import_module("mvle._host")
    except ImportError as error:
        return None, f"Python, since C++ is not there: {error}"
    if getattr(module, "FORM", None) != FORM:
        return None, f"Python, since {module.__file__} is of another version: install mvle again"
    return module, "C++"


def scan(
    paths: Sequence[str | os.PathLike[str]],
    threads: int = 1,
    images: bool = True,
    compiled: bool | None = None,
    called: Sequence[str] | None = None,
) -> list[Headers | DataError]:
    """The headers of each shard, or what is wrong with it. images: look at the first bytes of members, too.

    compiled: None takes csrc/host where it is; True or False one of the two (ImportError where it is not). called: what
    messages call the shards, where paths are those of copies.
    """
    module, why = host()
    if compiled and module is None:
        raise ImportError(why)
    names = [os.fspath(path) for path in paths]
    if module is not None and compiled is not False:
        found = module.scan(list(map(os.fsencode, names)), threads, images)
    else:
        with ThreadPoolExecutor(max(1, threads)) as pool:
            found = list(pool.map(lambda name: scan_one(name, images), names))
    return [_result(*each) for each in zip(names, called or names, found, strict=True)]


def _result(path: str, name: str, found: tuple[Any, ...]) -> Headers | DataError:
    if len(found) == 3:
        return DataError(_complaint(path, name, *found))
    names, *columns = found
    arrays: list[Any] = [np.frombuffer(column, dtype) for column, dtype in zip(columns, _COLUMNS, strict=True)]
    return Headers(names, *arrays)


# ---- what is wrong --------------------------------------------------------------------------------------------------


def _complaint(path: str, name: str, rule: str, at: int, number: int) -> str:
    again = "Fetch or pack the shard again."
    if rule == "unreadable":
        return f"{name} cannot be read at byte {at}: it is no file, may not be read, or became shorter."
    if rule == "cut":
        size = os.path.getsize(path)
        return f"{name} is cut off: a member at byte {at} needs {number} bytes, and the file ends after {size}. {again}"
    if rule == "sparse":
        return (
            f"{name} holds a sparse file at byte {at}, whose bytes do not lie side by side. Pack it without --sparse."
        )
    if rule == "global":
        return (
            f"{name} sets a name or a size for all of its members at once, in a global pax header at byte {at}: "
            f"members need their own. Pack it again without such headers."
        )
    if rule == "long":
        return f"{name} holds a name or attributes of {number} bytes at byte {at}, which is no name. {again}"
    if at:
        return f"{name} must be a tar; the header at byte {at} is damaged. {again}"
    with open(path, "rb") as file:
        header = file.read(BLOCK)
    if not header:
        return f"{name} must be a tar; it is empty. {again}"
    for magic, kind, command in COMPRESSED:
        if header.startswith(magic):
            return (
                f"{name} must be an uncompressed tar; it is {kind}, and images are read where they lie. Unpack it "
                f"first: {command}, then name the .tar file."
            )
    if header.startswith(b"PAR1"):
        return f"{name} must be a tar; it is parquet, a table that lies beside shards. Name the .tar files alone."
    return f"{name} must be a tar; it begins with {header[:8]!r}. Name another file, or fetch or pack the shard again."
