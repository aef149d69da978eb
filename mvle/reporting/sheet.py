"""reconstructions.png: rows image | masked | rebuilt three ways, with captions, as one picture for a README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .gather import COLUMNS, Rebuilt

CELL, GAP, TEXT, LINE = 112, 8, 13, 17  # sides and heights, pixels
INK, SOFT, PAPER = (29, 35, 39), (102, 112, 122), (255, 255, 255)


def write_sheet(rebuilt: Sequence[Rebuilt], path: Path) -> None:
    """Draw and write it, whole or not at all."""
    from PIL import Image, ImageDraw, ImageFont

    font: Any = ImageFont.load_default(TEXT)
    width = GAP + len(COLUMNS) * (CELL + GAP)
    texts = [
        [
            *wrap(f"its caption: {one.caption}", font, width - 2 * GAP),
            *wrap(f"another: {one.another_caption}", font, width - 2 * GAP),
        ]
        for one in rebuilt
    ]
    height = LINE + 2 * GAP + sum(CELL + GAP // 2 + LINE * len(lines) + 2 * GAP for lines in texts)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(COLUMNS):
        draw.text((GAP + column * (CELL + GAP), GAP), name, INK, font)
    top = LINE + 2 * GAP
    for one, lines in zip(rebuilt, texts, strict=True):
        for column, pixels in enumerate(one.pictures):
            way = Image.Resampling.NEAREST if pixels.shape[0] < CELL else Image.Resampling.LANCZOS
            cell = Image.fromarray(pixels).resize((CELL, CELL), way)
            sheet.paste(cell, (GAP + column * (CELL + GAP), top))
        top += CELL + GAP // 2
        for line in lines:
            draw.text((GAP, top), line, SOFT, font)
            top += LINE
        top += 2 * GAP
    temporary = path.with_name(f".{path.name}.writing")
    sheet.save(temporary, "PNG", optimize=True)
    temporary.replace(path)


def wrap(text: str, font: Any, width: int) -> list[str]:
    """Lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
