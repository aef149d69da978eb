"""What was left out, as lines for people: how many for each reason, and the first by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def left_out_lines(found: Sequence[tuple[str, str]], most: int, how_more: str = "") -> list[str]:
    """found: (name, reason); a reason is its kind, and after a colon what is special to this one. All are counted by
    kind, at most `most` are listed. how_more: what shows the others."""
    if not found:
        return ["left out: nothing"]
    kinds = Counter(reason.split(":")[0] for _, reason in found)
    lines = [f"left out: {len(found):,} ({', '.join(f'{printable(kind)} {n:,}' for kind, n in kinds.most_common())})"]
    lines += [f"    {printable(name)}: {printable(reason)}" for name, reason in found[:most]]
    more = f" ({how_more})" if how_more else ""
    return lines + ([f"    and {len(found) - most:,} more{more}"] if len(found) > most else [])


def printable(text: str) -> str:
    """Names out of foreign files without what would move a terminal's cursor or cannot be written as UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
