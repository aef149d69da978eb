"""Rows to pack: the one form that every input format is read into, and what all of them check.

rows_json.py, rows_table.py and rows_folder.py read; pack.py writes. A file that is not what it claims to be is a
DataError by file and line. A row that cannot be used is left out, and counted with its reason.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from .errors import DataError

DEFAULT_SPLIT = "train"


@dataclass(frozen=True)
class Row:
    """One image: its path under the images folder, its captions, its split, where the input says so, and what else its
    JSON keeps."""

    image: str
    captions: list[str]
    split: str
    where: str
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RowOptions:
    """How an input is read.

    images: the folder that image paths start from · default_split: of rows that name none · restval: the split that
    karpathy's restval goes into · separator, quotes, *_column: of a table; a column of None is looked for by its usual
    names · split_folders: the first folder of a path is its split
    """

    images: Path
    default_split: str = DEFAULT_SPLIT
    restval: str = "train"
    separator: str | None = None
    quotes: bool = True
    image_column: str | None = None
    caption_column: str | None = None
    split_column: str | None = None
    split_folders: bool = False


@dataclass
class Found:
    """What a reader found: rows in their order, (name, reason) of what it left out, and what else there is to say."""

    rows: list[Row] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_text(source: Path) -> str:
    """A UTF-8 file, with or without a byte order mark. Raises DataError by line where it is no UTF-8."""
    data = source.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{source}, line {line}: expected UTF-8; {error.reason}. Save the file as UTF-8.") from error


def image_name(name: str, images: Path, where: str) -> str:
    """The path under the images folder. Raises DataError for one that leaves it: else any file of this machine could
    end up in shards that are given away."""
    if "://" in name:
        raise DataError(
            f"{where}: an image must be a file under --images; {name!r} is a URL. URLs are not fetched here: "
            "img2dataset does, and `index` reads the shards that it writes."
        )
    path = PurePath(name)
    if path.is_absolute():
        path = PurePath(os.path.relpath(os.path.normpath(path), os.path.abspath(images)))
    if ".." in path.parts or not path.parts:
        raise DataError(f"{where}: an image must lie under --images; got {name!r}.")
    return path.as_posix()


def checked_split(name: Any, where: str) -> str:
    """The split, which names shards. Raises DataError for what is no plain name."""
    if not isinstance(name, str) or not name or set(name) & set("/\\.*?[{"):
        raise DataError(f"{where}: a split must be a plain name; got {name!r}.")
    return name


def check_splits(rows: Iterable[Row]) -> None:
    """Raise DataError where an image is in two splits: it would be trained on and tested with."""
    first: dict[str, Row] = {}
    for row in rows:
        before = first.setdefault(row.image, row)
        if before.split != row.split:
            raise DataError(
                f"{row.where}: {row.image} is in split {row.split}, and in {before.split} by {before.where}. An image "
                "must be in one split alone: else it would be trained on and tested with."
            )


def without_captions(rows: Iterable[Row]) -> tuple[list[Row], list[tuple[str, str]]]:
    """(the rows that have a caption with a word in it, the others as left out)."""
    kept: list[Row] = []
    left_out: list[tuple[str, str]] = []
    for row in rows:
        if any(caption.strip() for caption in row.captions):
            kept.append(row)
        else:
            left_out.append((row.image, "no caption"))
    return kept, left_out
