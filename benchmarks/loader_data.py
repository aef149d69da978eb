"""Photos that nobody took, in shards: what the benchmark of loaders reads.

A photo is what a lens shows, in numbers: clouds (noise whose size falls with its frequency), things with edges and
shading in front, and the grain of a sensor. As JPEG of quality 85 to 90 with 4:2:0 colours it takes about as many
bits a pixel as a real one, and decoding takes as long for a byte.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mvle.data.indexing import index_shard
from mvle.data.tar import TarWriter

ASPECTS = ((4, 3), (3, 4), (3, 2), (1, 1))  # width : height
THINGS = 40
WORDS = ("a", "dog", "man", "woman", "two", "people", "on", "the", "street", "near", "water", "with", "tree", "house")


@dataclass(frozen=True)
class PhotoShards:
    """Indexed shards of photos whose shorter side has `side` pixels; mean_bytes: of a JPEG."""

    side: int
    paths: tuple[str, ...]
    images: int
    mean_bytes: float


def photo(seed: int, width: int, height: int) -> NDArray[np.uint8]:
    """uint8 [height, width, 3]."""
    draw = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3), np.float32)
    cells = 4
    while cells < max(width, height) // 2:  # octaves: half as large, twice as fine
        noise = draw.normal(0, 1, (cells, cells, 3)).astype(np.float32)
        noise = 0.7 * noise[..., :1] + 0.3 * noise  # most of a photo's detail is in its brightness
        planes = [Image.fromarray(noise[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
        pixels += np.stack([np.asarray(plane) for plane in planes], -1) * (150.0 / cells)
        cells *= 2
    canvas = Image.fromarray((pixels + draw.uniform(60, 190, 3)).clip(0, 255).astype(np.uint8))
    ink = ImageDraw.Draw(canvas)
    for _ in range(THINGS):
        x, y = draw.uniform(0, width), draw.uniform(0, height)
        radius = min(width, height) * draw.uniform(0.01, 0.2)
        colour = tuple(int(v) for v in draw.uniform(0, 255, 3))
        angles = np.sort(draw.uniform(0, 2 * np.pi, int(draw.integers(3, 9))))
        ink.polygon([(x + radius * np.cos(a), y + radius * np.sin(a)) for a in angles], fill=colour)
    shade = np.linspace(0.85, 1.1, width, dtype=np.float32)[None, :, None]
    grain = draw.normal(0, 3, (height, width, 1)).astype(np.float32)
    return (np.asarray(canvas, np.float32) * shade + grain).clip(0, 255).astype(np.uint8)


def jpeg(pixels: NDArray[np.uint8], quality: int) -> bytes:
    """4:2:0, as cameras and the web have it."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=quality, subsampling="4:2:0")
    return out.getvalue()


def make_shards(folder: Path, side: int, images: int, distinct: int, shards: int = 4) -> PhotoShards:
    """So many images, of `distinct` photos by turns, in indexed tars: jpg, txt (a caption), and json with the same."""
    photos = []
    for seed in range(distinct):
        w, h = ASPECTS[seed % len(ASPECTS)]
        width, height = (round(side * v / min(w, h)) for v in (w, h))
        photos.append(jpeg(photo(seed, width, height), 85 + seed % 6))
    words = np.random.default_rng(side)
    folder.mkdir(parents=True, exist_ok=True)
    paths, total = [], 0
    for number in range(shards):
        path = folder / f"photos-{side}-{number:03d}.tar"
        with TarWriter(path) as tar:
            for i in range(number, images, shards):
                caption = " ".join(words.choice(WORDS, 12))
                data = photos[i % distinct]
                total += len(data)
                tar.add(f"{i:06d}.jpg", data)
                tar.add(f"{i:06d}.txt", caption.encode())
                tar.add(f"{i:06d}.json", json.dumps({"captions": [caption]}).encode())
        index_shard(path)
        paths.append(str(path))
    return PhotoShards(side, tuple(paths), images, total / images)
