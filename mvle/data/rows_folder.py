"""Rows out of a folder: name.jpg with name.txt beside it, one caption a line, at any depth."""

from __future__ import annotations

import os
from pathlib import Path

from .captions import lines_of
from .errors import DataError
from .indexing import IMAGE_SUFFIXES
from .rows import Found, Row, RowOptions, checked_split


def read_folder(options: RowOptions) -> Found:
    """Every image below options.images that has a text, sorted by path. Images without a text, texts without an image
    and other files are left out with their reasons. Raises DataError where a folder's name can be no split."""
    found = Found()
    texts: dict[str, str] = {}  # path without suffix -> the text file
    images: list[str] = []
    for name in _files(options.images, found):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() == ".txt":
            texts[stem] = name
        elif suffix[1:].lower() in IMAGE_SUFFIXES:
            images.append(name)
        else:
            found.left_out.append((name, "neither an image nor a .txt"))
    for name in images:
        text = texts.get(os.path.splitext(name)[0])
        if text is None:
            found.left_out.append((name, "an image without a .txt"))
            continue
        try:
            captions = lines_of((options.images / text).read_text("utf-8-sig"))
        except UnicodeDecodeError as error:
            found.left_out.append((name, f"a text that is not UTF-8: {error.reason}"))
            continue
        split = options.default_split
        if options.split_folders:
            split, inside, _ = name.partition("/")
            if not inside:
                found.left_out.append((name, "in no folder of a split"))
                continue
            checked_split(split, f"{options.images}/{split}")
        found.rows.append(Row(name, [caption for caption in captions if caption.strip()], split, name))
    stems = {os.path.splitext(name)[0] for name in images}
    found.left_out += [(text, "a .txt without an image") for stem, text in texts.items() if stem not in stems]
    return found


def _files(images: Path, found: Found) -> list[str]:
    """Paths under the folder with /, sorted. Hidden files are left out; so are links to folders, which may lead in a
    circle."""

    def failed(error: OSError) -> None:
        raise DataError(f"--images: a folder cannot be read: {error}.") from error

    names = []
    for folder, folders, files in os.walk(images, onerror=failed):
        inside = Path(folder).relative_to(images)
        for name in sorted(folders):
            if name.startswith(".") or os.path.islink(os.path.join(folder, name)):
                why = "a hidden folder" if name.startswith(".") else "a link to a folder"
                found.left_out.append(((inside / name).as_posix(), why))
                folders.remove(name)
        for name in files:
            path = (inside / name).as_posix()
            if name.startswith("."):
                found.left_out.append((path, "a hidden file"))
            else:
                names.append(path)
    return sorted(names)
