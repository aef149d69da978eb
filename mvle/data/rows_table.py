"""Rows out of a table: csv and tsv with a header, one caption a line; lines of one image are one row."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from .errors import DataError
from .rows import Found, Row, RowOptions, checked_split, image_name, read_text

IMAGE_COLUMNS = ("image", "filepath", "filename", "file_name", "path", "image_path", "image_name")
CAPTION_COLUMNS = ("caption", "title", "text", "comment")


def read_table(source: Path, options: RowOptions) -> Found:
    """The images in the order of their first lines, with their captions in the order of the file; no other column is
    kept. Quotes are read as Python's csv module does, strictly. Raises DataError by line."""
    lines = _lines(source, options)
    _, header = next(lines, (1, []))
    names = [name.strip() for name in header]
    image_at = _column(source, names, "image", options.image_column, IMAGE_COLUMNS)
    caption_at = _column(source, names, "caption", options.caption_column, CAPTION_COLUMNS)
    split_at = None
    if options.split_column is not None or "split" in map(str.lower, names):
        split_at = _column(source, names, "split", options.split_column, ("split",))

    found = Found()
    rows: dict[tuple[str, str], Row] = {}
    for number, line in lines:
        where = f"{source}, line {number}"
        if len(line) != len(names):
            reason = f"columns differ from the header's: line {number} has {len(line)}, the header {len(names)}"
            found.left_out.append((line[0].strip() or "a line", reason))
            continue
        if not (name := line[image_at].strip()):
            found.left_out.append(("a line", f"no image named: line {number}"))
            continue
        image = image_name(name, options.images, where)
        split = line[split_at].strip() if split_at is not None else ""
        split = checked_split(split or options.default_split, where)
        row = rows.setdefault((image, split), Row(image, [], split, where))
        if line[caption_at].strip():
            row.captions.append(line[caption_at])
        else:
            found.left_out.append((image, f"blank caption: line {number}"))
    found.rows = list(rows.values())
    return found


def _lines(source: Path, options: RowOptions) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, fields) of each record that is not blank."""
    separator = {None: ",", "\\t": "\t"}.get(options.separator, options.separator)
    if separator is None or len(separator) != 1 or separator in '"\r\n':
        raise DataError(f"--separator must be one character, or \\t for a tab; got {options.separator!r}.")
    reader = csv.reader(
        io.StringIO(read_text(source), newline=""),
        delimiter=separator,
        quoting=csv.QUOTE_MINIMAL if options.quotes else csv.QUOTE_NONE,
        strict=True,
    )
    number = 1
    try:
        for fields in reader:
            if fields:
                yield number, fields
            number = reader.line_num + 1
    except csv.Error as error:
        hint = " If quotes are plain signs in this file, add --no-quotes." if options.quotes else ""
        raise DataError(f"{source}, the record that begins in line {number}: {error}.{hint}") from error


def _column(source: Path, names: Sequence[str], what: str, asked: str | None, usual: Sequence[str]) -> int:
    lower = [name.lower() for name in names]
    for name in (asked,) if asked is not None else usual:
        if name in names or name.lower() in lower:
            return names.index(name) if name in names else lower.index(name.lower())
    url = " URLs are not fetched here: img2dataset does, and `index` reads its shards." if "url" in lower else ""
    raise DataError(
        f"{source}, line 1: expected a header with a column for the {what} ({asked or ', '.join(usual)}); it has "
        f"{', '.join(repr(name) for name in names[:10]) or 'nothing'}. Name it with --{what}-column, and what parts "
        f"columns with --separator.{url}"
    )
