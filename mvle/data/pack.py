"""Pack image files and captions into WebDataset shards: `python -m mvle.data pack`.

One JSON line an image: {"image": path under the images folder, "captions": [...], "split": ...} -> NUMBER.SUFFIX (the
bytes as they are, decodable or not: indexing sorts out the bad ones) and NUMBER.json {"captions", "id", ...}. The
same input gives the same bytes; shards appear under their names only when all of a pack is written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from .errors import DataError
from .index import index_path
from .indexing import IMAGE_SUFFIXES
from .tar import TarWriter

SHARD_BYTES = 256 * 2**20
DEFAULT_SPLIT = "train"  # of rows that name none
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tif", b"MM\0*": "tif"}


@dataclass
class PackReport:
    """What a pack wrote: the shards, images and captions of each split, and the image files that were not there."""

    shards: list[Path] = field(default_factory=list)
    images: dict[str, int] = field(default_factory=dict)
    captions: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def pack_jsonl(
    input_file: str | os.PathLike[str],
    images: str | os.PathLike[str],
    output: str | os.PathLike[str],
    split: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> PackReport:
    """Write OUTPUT/SPLIT-00000.tar, ... for every split (or `split` alone), each at most about shard_bytes large.

    Missing image files are left out and reported. Raises DataError: a line that is no such row, no row of the split,
    no image found, or shards of the split in the folder already (overwrite=True replaces them and their indexes).
    """
    source, folder = Path(input_file), Path(output)
    if not source.is_file():
        raise DataError(f"--input must be a file of JSON lines; there is no {source}.")
    if not Path(images).is_dir():
        raise DataError(f"--images must be the folder of the image files; there is no folder {images}.")
    rows = [row for row in read_rows(source) if split in (None, row["split"])]
    if not rows:
        raise DataError(
            f"{source} has no row" + (f" of split {split}. Leave out --split to pack all." if split else ".")
        )
    splits = sorted({row["split"] for row in rows})
    old = [path for name in splits for path in sorted(folder.glob(f"{name}-*.tar"))]
    if old and not overwrite:
        raise DataError(f"{folder} holds shards already ({old[0].name}). Name another --output, or add --overwrite.")

    report = PackReport()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".packing.{os.getpid()}"
    temporary.mkdir()
    try:
        for name in splits:
            _pack_split(
                name, [row for row in rows if row["split"] == name], Path(images), temporary, shard_bytes, report
            )
        if not report.shards:
            raise DataError(f"none of the {len(rows)} image files is under {images}; {report.missing[0]} is the first.")
        for path in old:
            Path(str(index_path(path))).unlink(missing_ok=True)
            path.unlink()
        for i, path in enumerate(report.shards):
            report.shards[i] = path.rename(folder / path.name)
    finally:
        shutil.rmtree(temporary)
    return report


def read_rows(source: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON-lines file, with "captions" a list of str and "split" filled in. Raises DataError by line."""
    expected = 'expected {"image": "file.jpg", "captions": ["...", ...], "split": "train"}'
    with open(source, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{source}, line {number}: {expected}; it is not JSON: {error}.") from error
            if not isinstance(row, dict) or not isinstance(row.get("image"), str):
                raise DataError(f"{source}, line {number}: {expected}; it names no image.")
            image = PurePath(row["image"])
            if image.is_absolute() or ".." in image.parts:  # else any file here could end up in shards to be shared
                raise DataError(f"{source}, line {number}: an image must lie under --images; got {row['image']!r}.")
            captions = row.pop("captions", row.pop("caption", None))
            captions = [captions] if isinstance(captions, str) else captions
            if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
                raise DataError(f"{source}, line {number}: {expected}; its captions are no list of texts.")
            name = row.pop("split", DEFAULT_SPLIT)
            if not isinstance(name, str) or not name or set(name) & set("/\\.*?[{"):
                raise DataError(f"{source}, line {number}: a split must be a plain name; got {name!r}.")
            yield {**row, "captions": captions, "split": name}


def _pack_split(
    name: str, rows: list[dict[str, Any]], images: Path, folder: Path, shard_bytes: int, report: PackReport
) -> None:
    tar: TarWriter | None = None
    report.images[name] = report.captions[name] = 0
    try:
        for number, row in enumerate(rows):
            path = images / row["image"]
            try:
                data = path.read_bytes()
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                report.missing.append(row["image"])
                continue
            if tar is not None and tar.size + len(data) > shard_bytes:
                tar.__exit__(None, None, None)
                tar = None
            if tar is None:
                tar = TarWriter(folder / f"{name}-{sum(p.name.startswith(f'{name}-') for p in report.shards):05d}.tar")
                report.shards.append(tar.path)
            record = {"id": row["image"], **{k: v for k, v in row.items() if k not in ("image", "split")}}
            key = f"{name}{number:08d}"
            tar.add(f"{key}.{_suffix(row['image'], data)}", data)
            tar.add(f"{key}.json", json.dumps(record, ensure_ascii=False).encode())
            report.images[name] += 1
            report.captions[name] += len(row["captions"])
    except BaseException as error:
        if tar is not None:
            tar.__exit__(type(error), error, error.__traceback__)
        raise
    if tar is not None:
        tar.__exit__(None, None, None)


def _suffix(name: str, data: bytes) -> str:
    """The file's own suffix; where it has none that an image has, the one that its bytes suggest."""
    own = Path(name).suffix[1:].lower()
    if own in IMAGE_SUFFIXES:
        return own
    return next((suffix for magic, suffix in _MAGIC.items() if data.startswith(magic)), "img")
