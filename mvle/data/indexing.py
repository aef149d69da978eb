"""Making an index: every image of a shard is really decoded, once, and what cannot be used is listed with the reason.

Called by index_many.py (`python -m mvle.data index`) and by the shapes demo set. What the columns mean is in index.py.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .captions import CaptionError, bytes_id, caption_flags, captions_of, text_id
from .columns import pack_strings, write_columns
from .decode import FORMATS, MAX_PIXELS, DecodeError, ImageInfo, PixelBoundError, examine_image, identify_image
from .errors import DataError
from .files import File, is_read_only, local_copy, locate, status
from .index import HEADER, VERSION, ShardIndex, ends_of, index_path
from .reader import ShardReader
from .remote import RemoteFile
from .tar import Member, members, split_name
from .wds2idx import place_of, read_wds2idx

IMAGE_SUFFIXES = (
    "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm", "pgm", "pnm", "img",
)  # fmt: skip


class _Row(NamedTuple):
    key: str
    image: Member
    info: ImageInfo
    crc32: int
    image_id: int
    captions: list[str]
    extras: dict[str, Member]


class IndexPlaceError(DataError):
    """Indexes cannot be written where they should lie, which holds for every further shard too."""


def index_shard(
    path: str | os.PathLike[str] | RemoteFile,
    caption_field: str | None = None,
    max_pixels: int = MAX_PIXELS,
    threads: int = 2,
    index_folder: str | os.PathLike[str] | None = None,
    verify: bool = True,
    wds2idx: bool = False,
) -> ShardIndex:
    """Decode every image of a tar and write its index, beside it or under index_folder.

    caption_field: see `captions_of` · verify False: images are read, since their bytes have a checksum and an id, and
    told by their headers, not decoded; one that is damaged behind its header is met, and replaced, while training ·
    wds2idx: where members are stands in SHARD.idx beside a shard on a disk; nobody walks over their headers.
    A shard behind a URL is fetched whole for that, once, into a temporary folder. The index of an unchanged shard comes
    out the same, whatever the machine. Raises DataError where the tar itself is damaged, IndexPlaceError where no index
    can be written, OSError where there is no such shard.
    """
    shard, place = locate(path), index_path(path, index_folder)
    if is_read_only(place):
        raise _no_place(place, "it is read-only", index_folder)
    state = status(shard)
    with local_copy(shard) as copy:
        if wds2idx:
            found: Iterable[Member] = read_wds2idx(place_of(copy), copy)
        else:
            found = members(copy, str(shard))
        results = _examine_all(copy, found, caption_field, max_pixels, threads, verify)
        ends = ends_of(copy)
    if status(shard, refresh=True) != state:
        raise DataError(f"{shard} was written while it was indexed. Index it again when it is whole.")

    rows: dict[str, _Row] = {}
    left_out: list[tuple[str, str]] = []
    for result in results:
        if not isinstance(result, _Row):
            left_out.append(result)
        elif result.key in rows:
            left_out.append((result.key, "repeated key: an earlier pair of this shard has it"))
        else:
            rows[result.key] = result
    columns = _columns(list(rows.values()))
    header = {
        "version": VERSION,
        "shard": shard.name,
        "size": state.size,
        "time_ns": state.time_ns,
        "caption_field": caption_field,
        "max_pixels": max_pixels,
        "images": len(rows),
        "captions": len(columns["caption.text_id"]),
        "left_out": left_out,
        "digest": _digest(columns),
        "ends": ends,
        **({} if verify else {"verified": False}),
    }
    try:
        write_columns(place, columns, header, HEADER)
    except OSError as error:
        raise _no_place(place, str(error), index_folder) from error
    return ShardIndex(shard, index_folder)


def _no_place(place: File, why: str, index_folder: str | os.PathLike[str] | None) -> IndexPlaceError:
    mend = (
        "Name another --index-folder."
        if index_folder is not None
        else "Where shards lie on a read-only place, keep their indexes elsewhere: --index-folder DIR here, and "
        "data.index_folder=DIR for a run."
    )
    return IndexPlaceError(f"the index {place} cannot be written: {why}. {mend}")


def _examine_all(
    copy: Path, found: Iterable[Member], caption_field: str | None, max_pixels: int, threads: int, verify: bool
) -> list[_Row | tuple[str, str]]:
    """The row of each pair, or (key, why it is left out), in the order of the tar."""
    reader = ShardReader([copy])

    def examine(groups: list[_Group]) -> list[_Row | tuple[str, str]]:
        return [_examine(reader, group, caption_field, max_pixels, verify) for group in groups]

    # Tasks of 64 pairs: one a pair spends as long on locks as on small pictures.
    groups = list(_groups(found))
    with ThreadPoolExecutor(threads) as pool:
        parts = pool.map(examine, [groups[i : i + 64] for i in range(0, len(groups), 64)])
        results = [result for part in parts for result in part]
    reader.close()
    return results


class _Group(NamedTuple):
    key: str
    components: dict[str, Member]


def _groups(found: Iterable[Member]) -> Iterator[_Group]:
    """Consecutive members of one key. A component that comes twice begins a new group, which repeats the key."""
    key, components = None, dict[str, Member]()
    for member in found:
        stem, suffix = split_name(member.name)
        base = stem.rpartition("/")[2]
        if not suffix or base == "" or (base.startswith("__") and base.endswith("__")):
            continue  # a note beside the pairs, a dot file, or WebDataset's word about the shard
        if stem != key or suffix in components:
            if key is not None:
                yield from _by_image(key, components)
            key, components = stem, {}
        components[suffix] = member
    if key is not None:
        yield from _by_image(key, components)


def _by_image(key: str, components: dict[str, Member]) -> list[_Group]:
    """The pairs of one key: itself, or one for each image where no image ends the key at its first dot.

    By WebDataset's rule my.cat.jpg and my.dog.jpg are two parts of "my". Who named files so meant two pairs. A single
    one, as in k.input.jpg and k.txt, has all parts of its key.
    """
    if any(suffix in components for suffix in IMAGE_SUFFIXES):
        return [_Group(key, components)]
    parts = {suffix: suffix.rpartition(".") for suffix in components}
    stems = dict.fromkeys(stem for stem, _, last in parts.values() if last in IMAGE_SUFFIXES)
    found: dict[str, dict[str, Member]] = {stem: {} for stem in stems}
    rest: dict[str, Member] = {}
    for suffix, (stem, _, last) in parts.items():
        if stem in found:
            found[stem][last] = components[suffix]
        else:
            rest[suffix] = components[suffix]
    if len(found) == 1:
        ((stem, own),) = found.items()
        return [_Group(f"{key}.{stem}", rest | own)]
    return [_Group(f"{key}.{stem}", own) for stem, own in found.items()] + ([_Group(key, rest)] if rest else [])


def _examine(
    reader: ShardReader, group: _Group, caption_field: str | None, max_pixels: int, verify: bool
) -> _Row | tuple[str, str]:
    """The row of a pair, or (key, why it is left out)."""
    parts = group.components
    texts: dict[str, bytes] = {s: reader.read(0, parts[s].offset, parts[s].size) for s in ("json", "txt") if s in parts}
    suffix = next((s for s in IMAGE_SUFFIXES if s in parts), None)
    if suffix is None:
        return group.key, f"no image among its parts ({', '.join(sorted(parts))}){_download_error(texts)}"
    data = reader.read(0, parts[suffix].offset, parts[suffix].size)
    try:
        captions = captions_of(texts, caption_field)
        info = examine_image(data, max_pixels)[0] if verify else identify_image(data, max_pixels)
    except CaptionError as error:
        return group.key, f"no caption: {error}{_origin(texts)}"
    except PixelBoundError as error:
        return group.key, f"over the pixel bound: {error} (--max-pixels){_origin(texts)}"
    except DecodeError as error:
        return group.key, f"undecodable: {error}{_origin(texts)}"
    extras = {s: member for s, member in parts.items() if s != suffix}
    return _Row(group.key, parts[suffix], info, zlib.crc32(data), bytes_id(data), captions, extras)


def _origin(texts: Mapping[str, bytes]) -> str:
    """The name that the image had before it was packed, if its JSON says so: people look for that one."""
    name = _record(texts).get("id")
    return f" ({name})" if isinstance(name, str) else ""


def _download_error(texts: Mapping[str, bytes]) -> str:
    """What img2dataset notes of an image that it could not fetch: {"status": ..., "error_message": ...}."""
    record = _record(texts)
    notes = [record[name] for name in ("status", "error_message") if isinstance(record.get(name), str)]
    return f": {', '.join(notes)}" if notes else ""


def _record(texts: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        record = json.loads(texts.get("json", b"null"))
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _columns(rows: list[_Row]) -> dict[str, NDArray[Any]]:
    def column(values: Sequence[int], dtype: type[np.generic]) -> NDArray[Any]:
        return np.array(values, dtype=dtype)

    infos = [row.info for row in rows]
    captions = [caption for row in rows for caption in row.captions]
    keys, key_offsets = pack_strings([row.key.encode("utf-8", "surrogateescape") for row in rows])
    texts, text_offsets = pack_strings([caption.encode("utf-8", "replace") for caption in captions])
    columns = {
        "image.offset": column([row.image.offset for row in rows], np.int64),
        "image.size": column([row.image.size for row in rows], np.int64),
        "width": column([info.width for info in infos], np.int32),
        "height": column([info.height for info in infos], np.int32),
        "orientation": column([info.orientation for info in infos], np.uint8),
        "format": column([FORMATS.index(info.format) for info in infos], np.uint8),
        "bit_depth": column([info.bit_depth for info in infos], np.uint8),
        "channels": column([info.channels for info in infos], np.uint8),
        "image.crc32": column([row.crc32 for row in rows], np.uint32),
        "image_id": column([row.image_id for row in rows], np.int64),
        "key.bytes": keys,
        "key.offsets": key_offsets,
        "caption.bytes": texts,
        "caption.offsets": text_offsets,
        "caption.first": np.cumsum([0, *(len(row.captions) for row in rows)], dtype=np.int64),
        "caption.text_id": column([text_id(caption) for caption in captions], np.int64),
        "caption.flags": column([caption_flags(caption) for caption in captions], np.uint8),
    }
    for suffix in sorted({suffix for row in rows for suffix in row.extras}):
        found = [row.extras.get(suffix) for row in rows]
        # safetensors asks for UTF-8, a tar does not
        name = suffix.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        columns[f"extra.{name}.offset"] = column([m.offset if m else -1 for m in found], np.int64)
        columns[f"extra.{name}.size"] = column([m.size if m else -1 for m in found], np.int64)
    return columns


def _digest(columns: dict[str, NDArray[Any]]) -> str:
    digest = blake2b(digest_size=16)
    for name in sorted(columns):
        digest.update(name.encode("utf-8", "surrogateescape"))
        digest.update(np.ascontiguousarray(columns[name]).tobytes())
    return digest.hexdigest()
