"""Names of shards as people write them: paths, globs, {000..003} and {a,b} -> files, in a fixed order."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from .errors import DataError

_BRACES = re.compile(r"\{([^{}]*)\}")


def expand_pattern(pattern: str) -> list[Path]:
    """The shards that a pattern names: braces first, then globs (sorted). Raises DataError where nothing matches."""
    pattern = os.path.expanduser(pattern)
    found = []
    for name in expand_braces(pattern):
        matches = sorted(glob.glob(name)) if glob.has_magic(name) and not os.path.exists(name) else [name]
        if not matches:
            raise DataError(
                f"no shard matches {name} (from {Path.cwd()}). Make shards: python -m mvle.data pack --help"
            )
        for match in matches:
            if not os.path.isfile(match):
                raise DataError(f"there is no shard {match} (from {Path.cwd()}), which {pattern} names.")
        found += [Path(match) for match in matches]
    return found


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
