"""Pack image files and captions into WebDataset shards: `python -m mvle.data pack`.

Whatever the input (rows.py), a pair becomes NUMBER.SUFFIX (the image's bytes as they are, decodable or not: indexing
sorts out the bad ones) and NUMBER.json {"captions", "id", ...}. The same input gives the same bytes; shards appear
under their names only when all of a pack is written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from .errors import DataError
from .files import is_url, temporary_beside
from .index import index_path
from .indexing import IMAGE_SUFFIXES
from .left_out import left_out_lines
from .locks import locked
from .rows import Found, Row, RowOptions, check_splits, checked_split, without_captions
from .rows_folder import read_folder
from .rows_json import read_jsonl, read_karpathy
from .rows_table import read_table
from .tar import TarWriter

SHARD_BYTES = 256 * 2**20
READERS: Mapping[str, Callable[[Path, RowOptions], Found]] = {
    "jsonl": read_jsonl,
    "karpathy": read_karpathy,
    "csv": read_table,
    "tsv": lambda source, options: read_table(source, replace(options, separator=options.separator or "\t")),
}
FORMATS = (*READERS, "folder")  # a folder is its own input
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tif", b"MM\0*": "tif"}

_PACKING, _LOCK = "packing", ".lock"


@dataclass
class PackReport:
    """What a pack wrote: shards, images and captions of each split; (name, reason) of what it left out; rows of splits
    that were not asked for; and what else there is to say."""

    shards: list[Path] = field(default_factory=list)
    images: dict[str, int] = field(default_factory=dict)
    captions: dict[str, int] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    unasked: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def pack(
    form: str,
    source: str | os.PathLike[str] | None,
    options: RowOptions,
    output: str | os.PathLike[str],
    split: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> PackReport:
    """Write OUTPUT/SPLIT-00000.tar, ... for every split (or `split` alone), each at most about shard_bytes large.

    form: one of FORMATS · source: the input file; None for a folder. Raises DataError: an input that is not of that
    form, no row of the split, no image found, or shards of the split in the folder already (overwrite=True replaces
    them and their indexes).
    """
    if is_url(os.fspath(output)):
        raise DataError(f"--output must be a folder on a disk; got {output}. Pack there, then copy the shards.")
    found, folder = _read(form, source, options), Path(output)
    what = str(source or options.images)
    check_splits(found.rows)
    rows, silent = without_captions(found.rows)
    if not rows:
        reasons = left_out_lines(found.left_out + silent, 5)
        raise DataError("\n".join([f"{what} has no row with an image and a caption.", *reasons]))
    counts = Counter(row.split for row in rows)
    rows = [row for row in rows if split in (None, row.split)]
    if not rows:
        raise DataError(f"{what} has no row of split {split} (it has {', '.join(counts)}). Leave out --split for all.")
    splits = sorted({row.split for row in rows})
    old = [path for name in splits for path in sorted(folder.glob(f"{name}-*.tar"))]
    if old and not overwrite:
        raise DataError(f"{folder} holds shards already ({old[0].name}). Name another --output, or add --overwrite.")

    report = PackReport(left_out=found.left_out + silent, notes=found.notes)
    report.unasked = {name: count for name, count in counts.items() if name not in splits}
    folder.mkdir(parents=True, exist_ok=True)
    report.notes += [f"removed {path}, which a pack had left that was killed" for path in _sweep(folder)]
    with _folder_of_its_own(folder) as temporary:
        for name in splits:
            _pack_split(name, [r for r in rows if r.split == name], options.images, temporary, shard_bytes, report)
        if not report.shards:
            raise DataError(
                f"none of the {len(rows)} image files is under {options.images}; {rows[0].image} is the first."
            )
        for path in old:
            Path(str(index_path(path))).unlink(missing_ok=True)
            path.unlink()
        for i, path in enumerate(report.shards):
            report.shards[i] = path.rename(folder / path.name)
    return report


@contextmanager
def _folder_of_its_own(folder: Path) -> Iterator[Path]:
    """Where shards are until all are whole. A lock beside it says that this process is at work: it is held before there
    is a folder, and until there is none."""
    place = temporary_beside(folder / _PACKING)
    lock = place.with_suffix(_LOCK)
    with ExitStack() as stack:
        stack.callback(lock.unlink, missing_ok=True)
        with suppress(OSError):  # a file system without locks: then nobody sweeps there either
            stack.enter_context(locked(lock))
        place.mkdir()
        stack.callback(shutil.rmtree, place)
        yield place


def _sweep(folder: Path) -> list[Path]:
    """Remove what packs have left in a folder that were killed: (what was removed)."""
    left = {path.with_suffix(_LOCK) for path in folder.glob(f".{_PACKING}.*") if path.suffix in (".tmp", _LOCK)}
    swept = []
    for lock in sorted(left):
        place = lock.with_suffix(".tmp")
        with suppress(OSError), locked(lock, wait=False) as alone:  # no locks, or not ours to remove
            if alone:
                if place.is_dir():
                    shutil.rmtree(place)
                    swept.append(place)
                lock.unlink()
    return swept


def _read(form: str, source: str | os.PathLike[str] | None, options: RowOptions) -> Found:
    checked_split(options.default_split, "--default-split")
    checked_split(options.restval, "--restval")
    if not options.images.is_dir():
        raise DataError(f"--images must be the folder of the image files; there is no folder {options.images}.")
    if form == "folder":
        if source is not None:
            raise DataError(f"--input is not for --format folder, whose input is --images; got {source}.")
        return read_folder(options)
    if form not in READERS:
        raise DataError(f"--format must be one of {', '.join(FORMATS)}; got {form}.")
    if source is None or not Path(source).is_file():
        raise DataError(f"--input must be a {form} file; there is no {source or 'file named'}.")
    return READERS[form](Path(source), options)


def _pack_split(
    name: str, rows: Sequence[Row], images: Path, folder: Path, shard_bytes: int, report: PackReport
) -> None:
    """Write the shards of one split. Image files that are not there are left out."""
    report.images[name] = report.captions[name] = shards = 0
    with ExitStack() as stack:
        tar: TarWriter | None = None
        for number, row in enumerate(rows):
            try:
                data = (images / row.image).read_bytes()
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                report.left_out.append((row.image, "no such image file"))
                continue
            if tar is not None and tar.size + len(data) > shard_bytes:
                stack.close()  # the shard is whole
                tar = None
            if tar is None:
                tar = stack.enter_context(TarWriter(folder / f"{name}-{shards:05d}.tar"))
                report.shards.append(tar.path)
                shards += 1
            record = {"id": row.image, **row.record, "captions": row.captions}
            key = f"{name}{number:08d}"
            tar.add(f"{key}.{_suffix(row.image, data)}", data)
            tar.add(f"{key}.json", json.dumps(record, ensure_ascii=False).encode("utf-8", "replace"))
            report.images[name] += 1
            report.captions[name] += len(row.captions)


def _suffix(name: str, data: bytes) -> str:
    """The file's own suffix; where it has none that an image has, the one that its bytes suggest."""
    own = Path(name).suffix[1:].lower()
    if own in IMAGE_SUFFIXES:
        return own
    return next((suffix for magic, suffix in _MAGIC.items() if data.startswith(magic)), "img")
