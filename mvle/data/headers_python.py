"""The header pass over tar shards in Python: the twin of csrc/host/headers.cpp, read by read and rule by rule.

headers.py says what it gives. It serves where no compiler was, and says in readable form what the C++ does.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

BLOCK = 512
WINDOW = 4096  # bytes of one read: a header, and what begins behind it
RECORD = 1 << 20  # bytes of the longest name or pax record that is read
SEGMENTS = 4096  # of a JPEG, before its size must have come
OTHER, JPEG, PNG, WEBP, GIF, BMP = range(6)  # as decode.FORMATS numbers them


class _Wrong(Exception):
    """A rule that a shard breaks, the byte, and a number."""


# ---- bytes of a file -------------------------------------------------------------------------------------------------


class _File:
    """A file in windows: most headers and the first bytes behind them are one read."""

    def __init__(self, name: str) -> None:
        try:
            if not os.path.isfile(name):
                raise FileNotFoundError(name)
            self._descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _Wrong("unreadable", 0, 0) from error
        self.size = os.fstat(self._descriptor).st_size
        self._begin, self._window = 0, b""

    def close(self) -> None:
        os.close(self._descriptor)

    def read(self, at: int, count: int) -> bytes:
        """As many bytes as there are, `count` at most."""
        return os.pread(self._descriptor, count, at)

    def look(self, at: int, count: int) -> bytes | None:
        """`count` bytes, or None where the file has not as many."""
        if at > self.size - count:
            return None
        begin = at - self._begin
        if begin < 0 or begin + count > len(self._window):
            self._begin, self._window, begin = at, self.read(at, WINDOW), 0
            if len(self._window) < count:
                return None
        return self._window[begin : begin + count]


class _Part:
    """The part of a file that one member is."""

    def __init__(self, file: _File, offset: int, size: int) -> None:
        self.file, self.offset, self.size = file, offset, size

    def look(self, at: int, count: int) -> bytes | None:
        return None if at > self.size - count else self.file.look(self.offset + at, count)


# ---- images ----------------------------------------------------------------------------------------------------------

_Image = tuple[int, int, int, int]  # format, orientation, width, height


def _orientation(part: _Part, at: int, size: int) -> int:
    head = part.look(at, 8) if size >= 8 else None
    if head is None or head[:4] not in (b"II*\0", b"MM\0*"):
        return 1
    order = "<" if head[:1] == b"I" else ">"
    (directory,) = struct.unpack_from(order + "I", head, 4)
    found = part.look(at + directory, 2) if directory <= size - 2 else None
    for i in range(struct.unpack(order + "H", found)[0] if found else 0):
        entry = directory + 2 + 12 * i
        line = part.look(at + entry, 12) if entry <= size - 12 else None
        if line is None:
            return 1
        tag, kind, _, value = struct.unpack(order + "HHIH2x", line)
        if tag == 0x0112:
            return value if kind == 3 and 1 <= value <= 8 else 1
    return 1


def _jpeg(part: _Part) -> _Image:
    at, orientation = 2, 1
    for _ in range(SEGMENTS):
        head = part.look(at, 4)
        if head is None or head[0] != 0xFF:
            break
        marker = head[1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            at += 2
            continue
        length = head[2] << 8 | head[3]
        if marker in (0xD9, 0xDA) or length < 2:
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame = part.look(at + 4, 5)
            if frame is None:
                break
            return JPEG, orientation, frame[3] << 8 | frame[4], frame[1] << 8 | frame[2]
        if marker == 0xE1 and length >= 8 and part.look(at + 4, 6) == b"Exif\0\0":
            orientation = _orientation(part, at + 10, length - 8)
        at += 2 + length
    return JPEG, orientation, 0, 0


def _webp(part: _Part) -> _Image:
    head = part.look(12, 18)
    if head is None:
        return WEBP, 1, 0, 0
    if head[:4] == b"VP8 " and head[11:14] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", head, 14)
        return WEBP, 1, width & 0x3FFF, height & 0x3FFF
    if head[:4] == b"VP8L" and head[8] == 0x2F:
        (bits,) = struct.unpack_from("<I", head, 9)
        return WEBP, 1, (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if head[:4] == b"VP8X":
        return WEBP, 1, int.from_bytes(head[12:15], "little") + 1, int.from_bytes(head[15:18], "little") + 1
    return WEBP, 1, 0, 0


def _sized(format: int, width: int, height: int) -> _Image:
    there = 0 < width < 1 << 31 and 0 < height < 1 << 31
    return (format, 1, width, height) if there else (format, 1, 0, 0)


def _image(part: _Part) -> _Image:
    nothing = OTHER, 1, 0, 0
    head = part.look(0, 12)
    if head is None:
        return nothing
    if head[:3] == b"\xff\xd8\xff":
        return _jpeg(part)
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        first = part.look(8, 16)
        if first is None or first[4:8] != b"IHDR":
            return _sized(PNG, 0, 0)
        return _sized(PNG, *struct.unpack_from(">II", first, 8))
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return _webp(part)
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return _sized(GIF, *struct.unpack_from("<HH", head, 6))
    if head[:2] == b"BM":
        first = part.look(14, 12)
        if first is None:
            return nothing
        size = int.from_bytes(first[:4], "little")
        if size == 12:
            return _sized(BMP, *struct.unpack_from("<HH", first, 4))
        if 40 <= size <= 124:
            width, height = struct.unpack_from("<ii", first, 4)
            return _sized(BMP, width, abs(height))
    return nothing


# ---- tar -------------------------------------------------------------------------------------------------------------


def _number(field: bytes) -> int | None:
    """An octal field, or GNU's base 256; None for anything else, and for what 63 bits do not hold."""
    if field[:1] == b"\x80":
        value = int.from_bytes(field[1:], "big")
        return value if value < 1 << 63 else None
    text = field.lstrip(b" ")
    digits = text[: len(text) - len(text.lstrip(b"01234567"))]
    rest = text[len(digits) :].lstrip(b" ")
    return int(digits or b"0", 8) if not rest or rest[0] == 0 else None


def _checksum_holds(header: bytes) -> bool:
    total = sum(header) - sum(header[148:156]) + 8 * 32
    noted = _number(header[148:156])
    if noted == total:
        return True
    high = sum(byte > 127 for byte in header) - sum(byte > 127 for byte in header[148:156])
    return noted == total - 256 * high  # of old tars, which took bytes as signed


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    folder = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return folder + b"/" + name if folder else name


def _pax(records: bytes, found: dict[str, Any]) -> None:
    """pax records, LENGTH KEY=VALUE and a newline; what is no record ends them."""
    at = 0
    while at < len(records):
        digits = at
        while digits < len(records) and 48 <= records[digits] <= 57 and digits - at < 8:
            digits += 1
        if digits == at or records[digits : digits + 1] != b" ":
            return
        length = int(records[at:digits])
        if length <= digits + 1 - at or length > len(records) - at:
            return
        key, _, value = records[digits + 1 : at + length - 1].partition(b"=")
        if key == b"path":
            found["name"] = value.rstrip(b"/")
        elif key.startswith(b"GNU.sparse."):
            found["sparse"] = 1
        elif key == b"size":
            plain = 0 < len(value) <= 18 and not value.strip(b"0123456789")
            found["size"] = int(value) if plain else None
        at += length


def scan_one(name: str, images: bool) -> tuple[Any, ...]:
    """As csrc/host gives it: names and columns as bytes, or (rule, byte, number)."""
    names: list[bytes] = []
    rows: list[tuple[int, int, int, int, int, int]] = []
    try:
        file = _File(name)
        try:
            for member, offset, size, image in _members(file, images):
                names.append(member)
                rows.append((offset, size, *image))
        finally:
            file.close()
    except _Wrong as wrong:
        return wrong.args
    offsets, sizes, formats, orientations, widths, heights = zip(*rows, strict=True) if rows else ((),) * 6
    ends = np.cumsum([len(member) for member in names], dtype=np.int64)
    columns: list[np.ndarray[Any, Any]] = [
        *(np.array(c, np.int64) for c in (ends, offsets, sizes)),
        *(np.array(c, np.uint8) for c in (formats, orientations)),
        *(np.array(c, np.int32) for c in (widths, heights)),
    ]
    return b"".join(names), *(column.tobytes() for column in columns)


def _members(file: _File, images: bool) -> Iterator[tuple[bytes, int, int, _Image]]:
    """(name, offset, size, image) of each regular file."""
    size, at, found = file.size, 0, dict[str, Any]()
    if size < BLOCK:
        raise _Wrong("damaged", 0, 0)
    while at + BLOCK <= size:
        header = file.look(at, BLOCK)
        if header is None:
            raise _Wrong("unreadable", at, 0)
        if not header.strip(b"\0"):  # the mark of the end
            return
        length, kind = _number(header[124:136]), header[156:157]
        if length is None or not _checksum_holds(header):
            raise _Wrong("damaged", at, 0)
        if kind == b"\0" and "name" not in found and header[:100].split(b"\0", 1)[0].endswith(b"/"):
            kind = b"5"  # a folder of old tars
        regular = kind in (b"0", b"\0", b"7")
        record = kind in (b"L", b"K", b"x", b"X", b"g")  # of members behind it
        if not record and "size" in found:
            length = found["size"]
        if b"1" <= kind <= b"6":  # links, devices, folders: a size is not of bytes behind the header
            length = 0
        if length is None:
            raise _Wrong("damaged", at, 0)
        start = at + BLOCK
        if length > size - start:
            raise _Wrong("cut", at, length)
        if record and kind != b"K":
            if length > RECORD:
                raise _Wrong("long", at, length)
            text = file.read(start, length)
            if len(text) < length:
                raise _Wrong("unreadable", start, 0)
            if kind == b"L":
                found["name"] = text.split(b"\0", 1)[0]
            else:
                of_all = dict[str, Any]()
                _pax(text, of_all if kind == b"g" else found)
                if of_all:
                    raise _Wrong("global", at, 0)
        elif not record:
            if kind == b"S" or "sparse" in found:
                raise _Wrong("sparse", at, 0)
            if regular:
                image = _image(_Part(file, start, length)) if images else (OTHER, 1, 0, 0)
                yield found.get("name", _name(header)), start, length, image
            found = {}
        at = start + -(-length // BLOCK) * BLOCK
