"""Small image files and shards for the tests of mvle.data: generated, never read from elsewhere."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mvle.data.indexing import index_shard
from mvle.data.shards import ShardSet
from mvle.data.tar import TarWriter


def picture(seed: int = 0, height: int = 24, width: int = 32, channels: int = 3) -> np.ndarray:
    """A coarse random picture, which JPEG keeps nearly as it is: uint8 [height, width, channels]."""
    cells = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), channels))
    return np.kron(cells, np.ones((8, 8, 1))).astype(np.uint8)[:height, :width]


def encode(pixels: np.ndarray | Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    """The bytes of an image file."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels.squeeze())
    buffer = io.BytesIO()
    image.save(buffer, form, **({"quality": 95, "subsampling": 0} if form == "JPEG" else {}) | options)
    return buffer.getvalue()


def oriented(pixels: np.ndarray, orientation: int, form: str = "JPEG", **options: Any) -> bytes:
    """The bytes of an image with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(pixels, form, exif=exif, **options)


def write_shard(path: Path, pairs: Sequence[tuple[str, Mapping[str, bytes]]]) -> Path:
    """A tar of (key, suffix -> bytes)."""
    with TarWriter(path) as tar:
        for key, parts in pairs:
            for suffix, data in parts.items():
                tar.add(f"{key}.{suffix}", data)
    return path


def pair(seed: int, *captions: str, **size: int) -> dict[str, bytes]:
    """The parts of one pair: a JPEG and its captions."""
    record = {"captions": list(captions or (f"picture number {seed}", f"number {seed} again"))}
    return {"jpg": encode(picture(seed, **size)), "json": json.dumps(record).encode()}


def make_shards(folder: Path, sizes: Sequence[int], **size: int) -> ShardSet:
    """Indexed shards of so many pairs each, with keys s0p0, s0p1, ..."""
    paths = []
    for shard, count in enumerate(sizes):
        pairs = [(f"s{shard}p{i}", pair(100 * shard + i, **size)) for i in range(count)]
        path = write_shard(folder / f"part-{shard:03d}.tar", pairs)
        index_shard(path)
        paths.append(str(path))
    return ShardSet.open(paths)


def spoil(shards: ShardSet, row: int) -> None:
    """Bit rot: flip a byte of an image where it lies, and leave the shard looking untouched."""
    path = shards.shard_path(row)
    stat, whole = path.stat(), bytearray(path.read_bytes())
    at = whole.find(shards.image_bytes(row))
    whole[at + 300] ^= 0xFF
    with open(path, "r+b") as file:
        file.write(whole)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
