"""The figures of evaluation.json as aligned lines of text. No torch here: the report uses them too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

DIRECTIONS = {"image_to_text": "image to caption", "text_to_image": "caption to image"}
PARTS = {"retrieval": ("retrieval", "itm"), "conditional": ("conditional",)}  # what -> keys of evaluation.json
Rows = list[list[str]]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """First row = heads. The first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def number(value: float | None, places: int = 3) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:.{places}f}"


def retrieval_rows(found: Mapping[str, Any]) -> Rows:
    """R@1/5/10 by way and order."""
    rows = [["retrieval", "R@1", "R@5", "R@10"]]
    for order, name in (("itc", "by similarity"), ("reranked", f"reranked, k = {found['k']}")):
        for way, label in DIRECTIONS.items() if order in found else ():
            rows.append([f"{label}, {name}", *(number(found[order][way][r]) for r in ("r1", "r5", "r10"))])
    return rows


def matching_rows(found: Mapping[str, float]) -> Rows:
    """Balanced accuracy of the matching head."""
    return [
        ["matching, balanced accuracy", "random", "hard"],
        ["true pair or not", number(found["balanced_accuracy_random"]), number(found["balanced_accuracy_hard"])],
    ]


def word_rows(found: Mapping[str, Any]) -> Rows:
    """Masked words by partner."""
    classes = list(found["true"].get("classes", {}))
    heads = [*(f"a {name} word alone" for name in classes), *(f"{name} among others" for name in classes)]
    rows = [["masked words", "nats a token", "right", *heads]]
    for partner, label in (
        ("true", "with the true image"),
        ("wrong", "with a wrong image"),
        ("none", "without an image"),
    ):
        figures = found[partner]
        known = [number(figures[how][name]) for how in ("classes", "together") for name in classes]
        rows.append([label, number(figures["loss"]), number(figures["accuracy"]), *known])
    return rows


def pixel_rows(found: Mapping[str, Any]) -> Rows:
    """Masked pixels by partner."""
    rows = [["masked pixels, mean |difference| of 0..1", "masked", "of objects", "caption alone"]]
    labels = {
        "true": "with the true caption",
        "wrong": "with a wrong caption",
        "none": "without a caption",
        "background": "painting the background",
    }
    for partner, label in labels.items():
        columns = (found, found.get("objects", {}), found["caption_alone"])
        rows.append([label, *(number(column.get(partner)) for column in columns)])
    return rows


def likelihood_rows(found: Mapping[str, Any]) -> Rows:
    """What a partner leaves unknown, in nats: of words and pixel values that are masked, and with all of them masked.
    Columns of what was not trained, or not measured by the mvle that evaluated, are left out."""
    words, pixels = found.get("mlm", {}), found.get("mim", {}).get("nats", {})
    columns: dict[str, Mapping[str, float | None]] = {}
    if alone := {name: part["image_alone"] for name, part in words.items() if "image_alone" in part}:
        columns["a masked word"] = {name: part["loss"] for name, part in words.items()}
        columns["a word, all masked"] = {name: part["loss"] for name, part in alone.items()}
        columns["a caption, all masked"] = {name: part["caption"] for name, part in alone.items()}
    if pixels:
        columns["a masked pixel value"] = pixels["masked"]
        columns["a value, all masked"] = pixels["caption_alone"]
    labels = {"true": "with the true partner", "wrong": "with a wrong partner", "none": "without a partner"}
    rows = [[label, *(number(column.get(name)) for column in columns.values())] for name, label in labels.items()]
    return [["-log p, nats", *columns], *rows] if columns else []


def retrieval_tables(retrieval: Mapping[str, Any], itm: Mapping[str, float] | None) -> list[str]:
    """Lines of what `evaluate retrieval` found."""
    lines = aligned(retrieval_rows(retrieval))
    return lines if itm is None else [*lines, "", *aligned(matching_rows(itm))]


def conditional_tables(found: Mapping[str, Any]) -> list[str]:
    """Lines of what `evaluate conditional` found."""
    parts = []
    if "mlm" in found:
        parts.append(aligned(word_rows(found["mlm"])))
    if "mim" in found:
        parts.append(aligned(pixel_rows(found["mim"])))
    if likelihoods := likelihood_rows(found):
        parts.append(aligned(likelihoods))
    return [line for i, part in enumerate(parts) for line in ([""] if i else []) + part]
