"""Columns in a file: named arrays and one JSON header, as safetensors lays them out. Read whole, no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DataError
from .files import File, read_bytes, write_bytes

Bytes = NDArray[np.uint8]

_DTYPES = {"U8": np.uint8, "I32": np.int32, "U32": np.uint32, "I64": np.int64}


def write_columns(path: File, columns: Mapping[str, NDArray[Any]], header: Mapping[str, Any], name: str) -> None:
    """Write the file whole or not at all. `header` (JSON) is stored as metadata entry `name`. Raises OSError."""
    from safetensors.numpy import save

    write_bytes(path, save(dict(columns), metadata={name: json.dumps(header, sort_keys=True)}))


def read_columns(path: File, name: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """(columns as read-only arrays, the JSON header). Raises DataError if it is not such a file, OSError if it
    cannot be read.

    Read into memory, not mapped: a map of a file that is cut under it ends the process by SIGBUS, and while a page of
    it comes from a server that hangs, the interpreter is locked: no watchdog and no signal gets through.
    """
    wrong = f"{path} must be a safetensors file with a {name} header"
    data: Bytes = np.frombuffer(read_bytes(path), np.uint8)
    if len(data) < 8:
        raise DataError(f"{wrong}; it is shorter than any.")
    length = int.from_bytes(data[:8].tobytes(), "little")
    try:
        tensors = json.loads(data[8 : 8 + length].tobytes())
        header = json.loads(tensors.pop("__metadata__")[name])
        columns = {key: _view(data, 8 + length, entry) for key, entry in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{wrong}; it is damaged: {type(error).__name__}: {error}.") from error
    return columns, header


def _view(data: Bytes, start: int, entry: Mapping[str, Any]) -> NDArray[Any]:
    begin, end = entry["data_offsets"]
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    if not 0 <= begin <= end <= len(data) - start or end - begin != dtype.itemsize * int(np.prod(entry["shape"])):
        raise ValueError("a column lies outside the file")
    return data[start + begin : start + end].view(dtype).reshape(entry["shape"])


def pack_strings(strings: list[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Byte strings end to end, and where each begins: uint8 [sum], int64 [n + 1]."""
    offsets = np.zeros(len(strings) + 1, np.int64)
    np.cumsum([len(s) for s in strings], out=offsets[1:])
    return np.frombuffer(b"".join(strings), np.uint8), offsets
