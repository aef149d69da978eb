"""What is in a set of shards: counts, sizes, caption lengths, what was left out, and a contact sheet to look at."""

from __future__ import annotations

import os
import textwrap
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .bad_images import BadImageError
from .captions import NAMES_COLOUR, NO_FLIP
from .decode import FORMATS
from .left_out import left_out_lines, printable
from .pairs import centred, read_window
from .shards import ShardSet

_BAR = 40  # characters of the longest bar
_TILE, _TEXT_LINES, _LINE = 192, 4, 13  # contact sheet: pixels


def describe(shards: ShardSet, reasons: int = 20) -> str:
    """The report as text: at most `reasons` left-out images are listed by key, all are counted by reason."""
    lines = [f"{shards.images:,} images, {shards.pairs:,} captions in {len(shards.indexes)} shards"]
    lines += [f"fingerprint {shards.fingerprint}", ""]
    lines += [*_image_lines(shards), "", *_caption_lines(shards), "", *_left_out_lines(shards, reasons)]
    extras = sorted(
        {n[6:-7] for i in shards.indexes for n in i.columns if n.startswith("extra.") and n.endswith(".offset")}
    )
    lines += ["", "other parts of a pair: " + (printable(", ".join(extras)) or "none")]
    return "\n".join(lines)


def contact_sheet(shards: ShardSet, path: str | os.PathLike[str], rows: int = 4, columns: int = 6) -> Path:
    """A PNG of rows x columns images, evenly spread over the set, each with its first caption."""
    from PIL import Image, ImageDraw, ImageFont

    count = min(rows * columns, shards.images)
    height = _TILE + _TEXT_LINES * _LINE + 8
    sheet = Image.new("RGB", (columns * (_TILE + 8) + 8, -(-count // columns) * height + 8), "white")
    ink, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for i in range(count):
        row = i * shards.images // count
        left, top = 8 + (i % columns) * (_TILE + 8), 8 + (i // columns) * height
        try:
            sheet.paste(Image.fromarray(read_window(shards, centred(shards, row, 0), _TILE)), (left, top))
            text = shards.caption(row, 0)
        except BadImageError as error:
            text = f"{shards.key(row)}: {error}"
        wrapped = textwrap.wrap(text, 32)[:_TEXT_LINES]
        printable = "\n".join(wrapped).encode("latin-1", "replace").decode("latin-1")  # what the built-in font has
        ink.multiline_text((left, top + _TILE + 1), printable, fill="black", font=font, spacing=1)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target)
    return target


def histogram(values: Any, edges: list[int], unit: str) -> list[str]:
    """Bars of how many values lie in edges[i] .. edges[i + 1] - 1 (the last one and above)."""
    values = np.asarray(values)
    counts = [
        int(((values >= low) & (values < high)).sum()) for low, high in zip(edges, [*edges[1:], 2**62], strict=True)
    ]
    names = [f"{low}-{high - 1}" if high - low > 1 else f"{low}" for low, high in pairwise(edges)]
    most = max(max(counts), 1)
    return [
        f"    {name:>9} {unit}  {count:>9,}  {'#' * -(-count * _BAR // most)}"
        for name, count in zip([*names, f"{edges[-1]}+"], counts, strict=True)
        if count
    ]


def _image_lines(shards: ShardSet) -> list[str]:
    def column(name: str) -> Any:
        return np.concatenate([index.columns[name] for index in shards.indexes])

    width, height, size = column("width"), column("height"), column("image.size")
    formats = Counter(FORMATS[f] for f in column("format").tolist())
    turned, deep = int((column("orientation") > 1).sum()), int((column("bit_depth") > 8).sum())
    channels = column("channels")
    repeated = shards.images - len(np.unique(column("image_id")))
    return [
        "images",
        f"    width {width.min()}..{width.max()}, height {height.min()}..{height.max()}, median "
        f"{int(np.median(width))} x {int(np.median(height))} pixels",
        f"    bytes {size.min():,}..{size.max():,}, {size.sum() / 2**20:,.1f} MiB in all",
        "    " + ", ".join(f"{name} {count:,}" for name, count in formats.most_common()),
        f"    {turned:,} turned by EXIF, {deep:,} deeper than 8 bits, {int((channels == 1).sum()):,} grey, "
        f"{int(np.isin(channels, (2, 4)).sum()):,} with alpha or CMYK, {repeated:,} exact repeats",
    ]


def _caption_lines(shards: ShardSet) -> list[str]:
    lengths, flags, per_image = [], [], []
    for index in shards.indexes:
        lengths += [len(index.text("caption", i).split()) for i in range(index.pairs)]
        flags.append(index.columns["caption.flags"])
        per_image.append(np.diff(index.columns["caption.first"]))
    flag, count = np.concatenate(flags), np.concatenate(per_image)
    return [
        f"captions: {count.min()}..{count.max()} an image, {min(lengths)}..{max(lengths)} words, median "
        f"{int(np.median(lengths))}; {int((flag & NO_FLIP > 0).sum()):,} say left or right (never flipped), "
        f"{int((flag & NAMES_COLOUR > 0).sum()):,} name a colour",
        *histogram(lengths, [1, 2, 4, 6, 8, 10, 12, 15, 20, 25, 30, 40, 60, 100], "words"),
    ]


def _left_out_lines(shards: ShardSet, reasons: int) -> list[str]:
    found = [(f"{index.path.name} {key}", why) for index in shards.indexes for key, why in index.left_out]
    return left_out_lines(found, reasons, "--reasons N")
