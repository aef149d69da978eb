"""Small image files and shards for the tests of mvle.data: generated, never read from elsewhere. On a disk, or behind
URLs of a file system in memory."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from mvle.data import files
from mvle.data.config import DataConfig
from mvle.data.indexing import index_shard
from mvle.data.loader import Loader
from mvle.data.patterns import expand_pattern
from mvle.data.plan import SamplingPlan
from mvle.data.shards import ShardSet
from mvle.data.tar import TarWriter
from mvle.data.tokenizer import Tokenizer, train_bpe

ROOT = "memory://shards-of-tests"


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


def number_words() -> Tokenizer:
    """A tokenizer of the captions that `pair` gives."""
    return train_bpe([f"picture number {i} again" for i in range(10)] * 3, 320)


# ---- behind URLs ----------------------------------------------------------------------------------------------------


def in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """For a fixture: URL of a folder in memory with part-000.tar .. part-002.tar, whose indexes lie in `folder`/disk
    alone. Further tries come at once."""
    monkeypatch.setattr(files, "RETRY_SECONDS", (0.0, 0.0))
    (folder / "disk").mkdir()
    make_shards(folder / "disk", [5, 4, 6])
    memory = fsspec.filesystem("memory")
    for path in sorted((folder / "disk").glob("*.tar")):
        memory.pipe_file(f"{ROOT}/{path.name}", path.read_bytes())
    yield ROOT
    memory.rm(ROOT, recursive=True)


def shown(shards: ShardSet, tokenizer: Tokenizer) -> list[tuple[Any, ...]]:
    """What the model gets of the first steps."""
    plan = SamplingPlan(shards, seed=3, batch_total=6, slots=6)
    with Loader(DataConfig(), plan, shards, tokenizer, image_size=16, max_tokens=12, steps=3) as loader:
        return [
            (b.keys, b.pair_ids.tolist(), b.image_ids.tolist(), b.text.rows.tolist(), b.images.tolist()) for b in loader
        ]


def index_all(pattern: str, **options: Any) -> None:
    for path in expand_pattern(pattern):
        index_shard(path, **options)
