"""Names of shards as people write them: paths and URLs, globs, {000..003} and {a,b} -> files, in a fixed order."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from .errors import DataError
from .files import File, has_magic, locate, matches
from .index import SUFFIX, index_path
from .remote import RemoteFile

_BRACES = re.compile(r"\{([^{}]*)\}")


def expand_pattern(pattern: str) -> list[File]:
    """The shards that a pattern names: braces first, then globs (sorted). Raises DataError where nothing matches.

    A URL without a glob is not asked for here: whoever opens it does, and a second question each takes minutes where
    there are thousands.
    """
    found: list[File] = []
    for name in expand_braces(os.path.expanduser(pattern)):
        file = locate(name)
        is_glob = has_magic(name) and not (isinstance(file, Path) and file.exists())
        named = _matches(name) if is_glob else [file]
        for match in named:
            if isinstance(match, Path) and not match.is_file():
                raise DataError(f"there is no shard {match} (from {Path.cwd()}), which {pattern} names.")
        found += named
    return found


def _matches(name: str) -> list[File]:
    shown = locate(name)
    try:
        found = matches(name)
    except OSError as error:
        raise DataError(
            f"{shown} cannot be listed: {error}. Few web servers list their files: write names with braces, as in "
            "https://host/train-{000..127}.tar."
        ) from error
    if not found:
        where = "" if isinstance(shown, RemoteFile) else f" (from {Path.cwd()})"
        raise DataError(f"no shard matches {shown}{where}. Make shards: python -m mvle.data pack --help")
    return found


def refuse_lost_shards(
    pattern: str, shards: Sequence[File], index_folder: str | os.PathLike[str] | None = None
) -> None:
    """Raise DataError for an index whose shard is gone: a glob would go on without it, and nobody would know.

    shards: what `expand_pattern` makes of the pattern.
    """
    for name in expand_braces(os.path.expanduser(pattern)):
        if not has_magic(name):
            continue
        for folder in {None, index_folder}:
            known = {str(index_path(shard, folder)) for shard in shards}
            place = index_path(name, folder)
            for index in matches(place.url if isinstance(place, RemoteFile) else str(place)):
                if str(index) not in known:
                    shard = str(index).removesuffix(SUFFIX)
                    raise DataError(
                        f"the shard {shard} is gone, and its index is there ({locate(pattern)} names it). Put it back; "
                        f"if the data is meant to be without it, remove {index} too."
                    )


def expand_braces(pattern: str) -> list[str]:
    """The names that {000..003} and {a,b} stand for."""
    found = _BRACES.search(pattern)
    if not found:
        return [pattern]
    body = found.group(1)
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", body)
    if numbers:
        low, high = numbers.groups()
        parts = [f"{i:0{len(low)}d}" for i in range(int(low), int(high) + 1)]
        if not parts:
            raise DataError(f"a range of shards must go up; got {{{body}}} in {pattern}.")
    elif "," in body:
        parts = body.split(",")
    else:
        return [pattern]
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [expanded for part in parts for expanded in expand_braces(head + part + tail)]
