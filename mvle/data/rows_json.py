"""Rows out of JSON: one line an image (jsonl), or one object as Karpathy's splits of COCO and Flickr come in."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from .errors import DataError
from .rows import Found, Row, RowOptions, checked_split, image_name, read_text

_JSONL = 'expected {"image": "file.jpg", "captions": ["...", ...], "split": "train"}'
_KARPATHY = 'expected {"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": "..."}]}, ...]}'


def read_jsonl(source: Path, options: RowOptions) -> Found:
    """One object a line; fields of other names are kept in the pair's JSON. Raises DataError by line."""
    found = Found()
    for number, line in enumerate(read_text(source).split("\n"), start=1):
        where = f"{source}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: {_JSONL}; it is not JSON: {error}.") from error
        if not isinstance(row, dict) or not isinstance(row.get("image"), str):
            raise DataError(f"{where}: {_JSONL}; it names no image.")
        image = image_name(row.pop("image"), options.images, where)
        captions = row.pop("captions", row.pop("caption", None))
        captions = [captions] if isinstance(captions, str) else captions
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise DataError(f"{where}: {_JSONL}; its captions are no list of texts.")
        split = checked_split(row.pop("split", options.default_split), where)
        found.rows.append(Row(image, captions, split, where, row))
    return found


def read_karpathy(source: Path, options: RowOptions) -> Found:
    """dataset_coco.json, dataset_flickr30k.json, dataset_flickr8k.json: images with `sentences`, of which `raw` is
    taken. COCO's files lie in `filepath`. restval goes into options.restval. Raises DataError by image."""
    try:
        data = json.loads(read_text(source))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: {_KARPATHY}; it is not JSON: {error}.") from error
    images = data.get("images") if isinstance(data, dict) else None
    if not isinstance(images, list):
        raise DataError(f"{source}: {_KARPATHY}; it has no list `images`.")
    found, rest = Found(), Counter[str]()
    for number, image in enumerate(images):
        where = f"{source}, images[{number}]"
        if not isinstance(image, dict) or not isinstance(image.get("filename"), str):
            raise DataError(f"{where}: {_KARPATHY}; it has no filename.")
        folder = image.get("filepath") or ""
        if not isinstance(folder, str):
            raise DataError(f"{where}: filepath must be the name of a folder; got {folder!r}.")
        name = image_name(f"{folder}/{image['filename']}" if folder else image["filename"], options.images, where)
        split = image.get("split", options.default_split)
        rest[split if isinstance(split, str) else ""] += 1
        split = checked_split(options.restval if split == "restval" else split, where)
        record = {key: image[key] for key in ("cocoid", "imgid") if key in image}
        found.rows.append(Row(name, _sentences(image, where), split, where, record))
    if rest["restval"] and options.restval != "restval":
        found.notes.append(f"restval: {rest['restval']:,} images go into {options.restval} (--restval NAME: elsewhere)")
    return found


def _sentences(image: dict[str, Any], where: str) -> list[str]:
    sentences = image.get("sentences")
    if not isinstance(sentences, list) or not all(
        isinstance(sentence, dict) and isinstance(sentence.get("raw"), str) for sentence in sentences
    ):
        raise DataError(f"{where}: {_KARPATHY}; its sentences are no list of objects with `raw`.")
    return [sentence["raw"] for sentence in sentences]
