"""Making an index: every image of a shard is really decoded, once, and what cannot be used is listed with the reason.

Called by `python -m mvle.data index` and by the shapes demo set. What the columns mean is in index.py.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .captions import CaptionError, bytes_id, caption_flags, captions_of, text_id
from .columns import pack_strings, write_columns
from .decode import FORMATS, MAX_PIXELS, DecodeError, ImageInfo, PixelBoundError, examine_image
from .index import HEADER, VERSION, ShardIndex, index_path
from .reader import ShardReader
from .tar import Member, members, split_name

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


def index_shard(
    path: str | os.PathLike[str], caption_field: str | None = None, max_pixels: int = MAX_PIXELS, threads: int = 2
) -> ShardIndex:
    """Decode every image of a tar and write its index beside it. Raises DataError where the tar itself is damaged.

    caption_field: see `captions_of`. The index of an unchanged shard comes out the same, whatever the machine.
    """
    shard = Path(path)
    stat = shard.stat()
    reader = ShardReader([shard])

    def examine(groups: list[_Group]) -> list[_Row | tuple[str, str]]:
        return [_examine(reader, group, caption_field, max_pixels) for group in groups]

    # Tasks of 64 pairs: one a pair spends as long on locks as on small pictures.
    groups = list(_groups(shard))
    with ThreadPoolExecutor(threads) as pool:
        parts = pool.map(examine, [groups[i : i + 64] for i in range(0, len(groups), 64)])
        results = [result for part in parts for result in part]
    reader.close()

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
        "size": stat.st_size,
        "time_ns": stat.st_mtime_ns,
        "caption_field": caption_field,
        "max_pixels": max_pixels,
        "images": len(rows),
        "captions": len(columns["caption.text_id"]),
        "left_out": left_out,
        "digest": _digest(columns),
    }
    write_columns(index_path(shard), columns, header, HEADER)
    return ShardIndex(shard)


class _Group(NamedTuple):
    key: str
    components: dict[str, Member]


def _groups(shard: Path) -> Iterator[_Group]:
    """Consecutive members of one key. A component that comes twice begins a new group, which repeats the key."""
    key, components = None, dict[str, Member]()
    for member in members(shard):
        stem, suffix = split_name(member.name)
        if not suffix or stem.rpartition("/")[2] == "":  # a note beside the pairs, or a dot file
            continue
        if stem != key or suffix in components:
            if key is not None:
                yield _Group(key, components)
            key, components = stem, {}
        components[suffix] = member
    if key is not None:
        yield _Group(key, components)


def _examine(reader: ShardReader, group: _Group, caption_field: str | None, max_pixels: int) -> _Row | tuple[str, str]:
    """The row of a pair, or (key, why it is left out)."""
    parts = group.components
    suffix = next((s for s in IMAGE_SUFFIXES if s in parts), None)
    if suffix is None:
        return group.key, f"no image among its parts ({', '.join(sorted(parts))})"
    texts: dict[str, bytes] = {s: reader.read(0, parts[s].offset, parts[s].size) for s in ("json", "txt") if s in parts}
    data = reader.read(0, parts[suffix].offset, parts[suffix].size)
    try:
        captions = captions_of(texts, caption_field)
        info, _ = examine_image(data, max_pixels)
    except CaptionError as error:
        return group.key, f"no caption: {error}{_origin(texts)}"
    except PixelBoundError as error:
        return group.key, f"over the pixel bound: {error}{_origin(texts)}"
    except DecodeError as error:
        return group.key, f"undecodable: {error}{_origin(texts)}"
    extras = {s: member for s, member in parts.items() if s != suffix}
    return _Row(group.key, parts[suffix], info, zlib.crc32(data), bytes_id(data), captions, extras)


def _origin(texts: Mapping[str, bytes]) -> str:
    """The name that the image had before it was packed, if its JSON says so: people look for that one."""
    try:
        record = json.loads(texts.get("json", b"null"))
    except (ValueError, RecursionError):
        return ""
    name = record.get("id") if isinstance(record, dict) else None
    return f" ({name})" if isinstance(name, str) else ""


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
        columns[f"extra.{suffix}.offset"] = column([m.offset if m else -1 for m in found], np.int64)
        columns[f"extra.{suffix}.size"] = column([m.size if m else -1 for m in found], np.int64)
    return columns


def _digest(columns: dict[str, NDArray[Any]]) -> str:
    digest = blake2b(digest_size=16)
    for name in sorted(columns):
        digest.update(name.encode("utf-8", "surrogateescape"))
        digest.update(np.ascontiguousarray(columns[name]).tobytes())
    return digest.hexdigest()
