"""Indexes of DALI's own WebDataset reader: SHARD.idx, as its tool wds2idx makes them.

    v1.2 SAMPLES
    EXTENSION OFFSET SIZE NAME EXTENSION OFFSET SIZE NAME ...         a line a sample; offsets in bytes from the start

`write_wds2idx` gives them to shards that DALI reads itself, `read_wds2idx` reads what somebody has made. Format: DALI
2.4, tools/wds2idx.py.
"""

from __future__ import annotations

from pathlib import Path

from .errors import DataError
from .files import open_ranges, write_bytes
from .tar import Member, members, split_name

VERSION = "v1.2"
SUFFIX = ".idx"


def place_of(shard: Path) -> Path:
    """SHARD.idx for SHARD.tar, as DALI names it."""
    return shard.with_suffix(SUFFIX)


def write_wds2idx(shard: Path) -> tuple[Path, int]:
    """Write the file beside the shard: (where, samples). Raises DataError where the tar is damaged, or a name has a
    blank, which the format cannot hold."""
    lines: list[str] = []
    last: str | None = None
    for member in members(shard):
        key, suffix = split_name(member.name)
        base = key.rpartition("/")[2]
        if not suffix or base == "" or (base.startswith("__") and base.endswith("__")):
            continue
        if set(member.name) & set(" \t\n\r\v\f"):
            raise DataError(
                f"{shard}: {member.name!r} has a blank in it, which no {SUFFIX} file can hold. Pack it anew."
            )
        part = f"{suffix} {member.offset} {member.size} {member.name}"
        if key == last:
            lines[-1] += f" {part}"
        else:
            lines.append(part)
        last = key
    place = place_of(shard)
    text = "\n".join([f"{VERSION} {len(lines)}", *lines]) + "\n"
    write_bytes(place, text.encode("utf-8", "surrogateescape"))
    return place, len(lines)


def _is_header_of(block: bytes, member: Member) -> bool:
    """Whether a tar's header block is that of a member, as far as it tells: long names and sizes stand elsewhere."""
    name = member.name.encode("utf-8", "surrogateescape")
    stored, prefix = (block[a:b].partition(b"\0")[0] for a, b in ((0, 100), (345, 500)))
    digits = block[124:136].strip(b" \0")
    octal = digits and set(digits) <= set(b"01234567")
    same_size = not octal or int(digits, 8) in (member.size, 0)
    whole = b"/".join(part for part in (prefix, stored) if part)
    return same_size and (whole == name or (len(name) > 100 and bool(stored)) or not name.isascii())


def read_wds2idx(file: Path, shard: Path) -> list[Member]:
    """The members that a file of wds2idx names, in its order, held against the size of the shard.

    Raises DataError for another version, a damaged line, a wrong count, and members that leave the shard or overlap.
    """
    wrong = f"{file} must be an index of DALI's wds2idx for {shard}"
    # Only what the writer takes for a blank or an end is one: names may have the rarer ones of Unicode.
    first, *lines = file.read_bytes().decode("utf-8", "surrogateescape").removesuffix("\n").split("\n")
    version, _, count = first.partition(" ")
    if version != VERSION or not count.isdecimal():
        raise DataError(
            f"{wrong}, beginning with {VERSION!r} and a number; it begins with {first[:40]!r}. Make it again."
        )
    if int(count) != len(lines):
        raise DataError(f"{wrong}; it announces {count} samples and has {len(lines)}. Make it again.")
    found: list[Member] = []
    size, behind = shard.stat().st_size, 0
    ranges = open_ranges(shard)
    for number, line in enumerate(lines, 2):
        fields = line.split(" ")
        for i in range(0, max(len(fields), 1), 4):
            extension, offset, length, name = (*fields[i : i + 4], "", "", "", "")[:4]
            if not (name and offset.isdecimal() and length.isdecimal()) or split_name(name)[1] != extension.lower():
                raise DataError(f"{wrong}; line {number} is damaged: {line[:80]!r}. Make it again.")
            member = Member(name, int(offset), int(length))
            if member.offset < behind or member.offset % 512 or member.offset + member.size > size:
                raise DataError(
                    f"{wrong}; line {number} puts {name} at bytes {offset} to {member.offset + member.size} of {size}, "
                    f"behind {behind}: no tar has it there. Make it again."
                )
            behind = member.offset + member.size
            found.append(member)
    for member in found:
        if not _is_header_of(ranges.read(member.offset - 512, 512), member):
            raise DataError(
                f"{wrong}; it puts {member.name} at byte {member.offset}, and the header before it is another's: the "
                "shard was written since. Make it again."
            )
    return found
