"""One question: how fast are the headers of a shard read, names, places, and the sizes of its images?

    pytest benchmarks/test_headers.py --benchmark-only

Shape: one shard of 10,000 JPEGs of 640 x 480 pixels, each with its JSON, in the page cache; one thread. The peer is
what one writes without this: tarfile for the members, Pillow for the first bytes of each image. Both give the same
columns, which is looked at first.

A second question: how fast is a shard indexed? 1,000 of those images, decoded and not decoded, beside a walk by tarfile
that decodes each image with Pillow, and one that reads and hashes them alone; one thread each.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvle.data.headers import Headers, host, scan
from mvle.data.indexing import index_shard
from mvle.data.tar import TarWriter

from .loader_data import jpeg, photo

IMAGES = 10_000
INDEXED = 1_000


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("headers") / "shard.tar"
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((640, 480)).save(out, "JPEG", quality=60)
    with TarWriter(path) as tar:
        for i in range(IMAGES):
            tar.add(f"pair{i:06d}.jpg", out.getvalue())
            tar.add(f"pair{i:06d}.json", b'{"captions": ["a caption"]}')
    return path


def by_tarfile_and_pillow(path: Path) -> list[tuple[str, int, int, int, int]]:
    found = []
    with tarfile.open(path) as tar:
        for member in tar:
            width = height = 0
            if member.name.endswith(".jpg"):
                with Image.open(tar.extractfile(member)) as picture:  # type: ignore[arg-type]
                    width, height = picture.size
            found.append((member.name, member.offset_data, member.size, width, height))
    return found


def by_scan(path: Path, compiled: bool) -> Headers:
    (found,) = scan([path], compiled=compiled)
    assert isinstance(found, Headers)
    return found


@pytest.mark.parametrize("way", ["tarfile and Pillow", "Python", "C++"])
@pytest.mark.benchmark(group="headers of 20,000 members, 10,000 of them images", min_rounds=5, warmup=True)
def test_headers(benchmark: Any, shard: Path, way: str) -> None:
    if way == "tarfile and Pillow":
        benchmark.pedantic(by_tarfile_and_pillow, (shard,), rounds=5, warmup_rounds=1)
        return
    if way == "C++" and host()[0] is None:
        pytest.skip(host()[1])
    found = by_scan(shard, way == "C++")
    columns = found.offsets.tolist(), found.sizes.tolist(), found.widths.tolist(), found.heights.tolist()
    assert by_tarfile_and_pillow(shard) == list(zip(map(found.name, range(len(found))), *columns, strict=True))
    benchmark.pedantic(by_scan, (shard, way == "C++"), rounds=10, warmup_rounds=1)


# ---- whole indexes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("index") / "shard.tar"
    data = [jpeg(photo(seed, 640, 480), 87) for seed in range(8)]
    with TarWriter(path) as tar:
        for i in range(INDEXED):
            tar.add(f"pair{i:06d}.jpg", data[i % len(data)])
            tar.add(f"pair{i:06d}.json", b'{"captions": ["a caption"]}')
    return path


def walked(path: Path, decode: bool) -> int:
    """What is written without this: members by tarfile, each image's hash, and its pixels where asked."""
    images = 0
    with tarfile.open(path) as tar:
        for member in tar:
            data = tar.extractfile(member).read()  # type: ignore[union-attr]
            if member.name.endswith(".jpg"):
                zlib.crc32(data), hashlib.blake2b(data, digest_size=8).digest()
                images += 1
                if decode:
                    Image.open(io.BytesIO(data)).convert("RGB")
    return images


INDEXES = {
    "decoded": lambda path: index_shard(path, threads=1).images,
    "not decoded": lambda path: index_shard(path, threads=1, verify=False).images,
    "tarfile, Pillow decodes": lambda path: walked(path, True),
    "tarfile, hashes alone": lambda path: walked(path, False),
}


@pytest.mark.parametrize("way", INDEXES)
@pytest.mark.benchmark(group=f"an index of {INDEXED:,} photos of 640 x 480")
def test_index(benchmark: Any, photos: Path, way: str) -> None:
    assert benchmark.pedantic(INDEXES[way], (photos,), rounds=3, warmup_rounds=1) == INDEXED
