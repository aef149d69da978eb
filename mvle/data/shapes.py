"""The grounded demo set: small pictures of coloured shapes, and captions that say exactly what is where.

It needs no download, and a tiny model learns both conditionals on it in minutes on a CPU: the words of a masked
caption from the picture, and the picture from the caption alone. Nothing about it is special to the rest of mvle: it is
written as shards and indexed like any other data ("shapes:train", "shapes:val", "shapes:test").

    picture   64 x 64, dark with a little noise; 1 to 3 objects, one a quadrant, centres jittered by 1.5 pixels
    object    one of 6 colours, 5 shapes, 2 sizes (radius 8 or 13 pixels)
    caption   "a small red circle in the top left and a large ..." (sentence), or "small red circle top left large ..."
              (short); the objects in random order, two captions where there are two orders
    scene     the set of (colour, shape, size, quadrant). No two splits share one; val and test repeat none.
    parts     KEY.png · KEY.json {"captions"} · KEY.scene.json {"objects", "words"} · KEY.objects.png (bright = object)

Shares of 1, 2 and 3 objects: .5 / .4 / .1 in train (single objects are where position and word are bound first),
.25 / .60 / .15 in val and test. There are only 240 scenes of one object: 64 each are held out for val and test, which
is why these have 256 pictures.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from mvle_kernels.random import Stream, uniform, words
from numpy.typing import NDArray

from .errors import DataError
from .tar import TarWriter

SIZE = 64
BACKGROUND = (24, 24, 24)  # RGB, 0..255; evaluation paints it where a model would know nothing
NOISE = 2  # levels of grey noise, at most
COLOURS = {
    "red": (226, 52, 52), "green": (52, 190, 74), "blue": (64, 92, 240), "yellow": (240, 220, 64),
    "purple": (186, 72, 216), "cyan": (64, 216, 226),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
SIZES = {"small": 8.0, "large": 13.0}  # radius, pixels
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
JITTER = 1.5
SPLITS: dict[str, tuple[int, tuple[float, float, float]]] = {  # pictures, share of those with 1, 2, 3 objects
    "val": (256, (0.25, 0.60, 0.15)),
    "test": (256, (0.25, 0.60, 0.15)),
    "train": (20_000, (0.5, 0.4, 0.1)),
}
CAPTIONS = ("sentence", "short")
SHARD_IMAGES = 5_000
_SEED = 0x5EED
_VERSION = 1
_KINDS = len(COLOURS) * len(SHAPES) * len(SIZES)  # objects that differ in more than place

Scenes = NDArray[np.int64]  # [n, 4]: what stands in each quadrant, -1 nothing, else (colour * 5 + shape) * 2 + size


def shape_shards(split: str, folder: str | os.PathLike[str], captions: str = "sentence") -> list[Path]:
    """The shards of a split, drawn first if they are not there yet (a few seconds, once; safe from many processes).

    Raises DataError for an unknown split or form of caption, or where the folder holds something else.
    """
    if split not in SPLITS:
        raise DataError(f"shapes:SPLIT must be one of {', '.join(sorted(SPLITS))}; got shapes:{split}.")
    if captions not in CAPTIONS:
        raise DataError(f"data.shapes_captions must be one of {', '.join(CAPTIONS)}; got {captions}.")
    home = Path(folder) / captions
    if not _is_built(home, captions):
        _build(home, captions)
    return sorted(home.glob(f"{split}-*.tar"))


# --- building --------------------------------------------------------------------------------------------------------


def _parameters(captions: str) -> dict[str, Any]:
    """What decides the files. A set with other parameters is drawn again."""
    return {
        "version": _VERSION, "seed": _SEED, "captions": captions, "splits": {k: list(v) for k, v in SPLITS.items()},
        "colours": COLOURS, "shapes": SHAPES, "sizes": SIZES, "jitter": JITTER, "noise": NOISE,
    }  # fmt: skip


def _is_built(home: Path, captions: str) -> bool:
    note = home / "shapes.json"
    if not note.is_file():
        return False
    return json.loads(note.read_text()) == json.loads(json.dumps(_parameters(captions)))


def _build(home: Path, captions: str) -> None:
    """Draw and index everything under a temporary name, then rename. Other processes wait for the one that draws."""
    import fcntl

    from .indexing import index_shard

    home.parent.mkdir(parents=True, exist_ok=True)
    with open(home.parent / f".{captions}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_built(home, captions):
            return
        if home.exists() and any(home.iterdir()) and not (home / "shapes.json").is_file():
            raise DataError(f"data.shapes_folder: {home} holds something else than shapes. Name another folder.")
        temporary = home.parent / f".{captions}.building"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            with ThreadPoolExecutor(1) as indexer:  # indexes a shard while the next one is drawn
                written = (
                    path for split in split_scenes().items() for path in _write_split(temporary, *split, captions)
                )
                for indexed in [indexer.submit(index_shard, path, threads=1) for path in written]:
                    indexed.result()
            (temporary / "shapes.json").write_text(json.dumps(_parameters(captions), indent=1))
            if home.exists():
                shutil.rmtree(home)
            os.replace(temporary, home)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_split(folder: Path, split: str, scenes: Scenes, captions: str) -> Iterator[Path]:
    """Write the shards of a split, one by one."""
    first = {name: 1_000_000 * i for i, name in enumerate(SPLITS)}[split]  # ids of random numbers: none shared
    for shard, start in enumerate(range(0, len(scenes), SHARD_IMAGES)):
        path = folder / f"{split}-{shard:05d}.tar"
        with TarWriter(path) as tar:
            for key, parts in _pairs(scenes[start : start + SHARD_IMAGES], first + start, split, captions):
                for suffix, data in parts.items():
                    tar.add(f"{key}.{suffix}", data)
        yield path


def _pairs(scenes: Scenes, first: int, split: str, captions: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, suffix -> bytes) of every scene."""
    known = {"colour": list(COLOURS), "shape": list(SHAPES)}
    with ThreadPoolExecutor(2) as pool:  # zlib lets the other thread run
        for at in range(0, len(scenes), 500):
            ids = np.arange(first + at, first + at + len(scenes[at : at + 500]))
            objects = place(scenes[at : at + 500], ids)
            pixels, masks = draw(objects, ids)
            encoded = pool.map(lambda many: [png(one) for one in many], [*np.array_split(pixels, 4), masks])
            *quarters, drawn = list(encoded)
            images = [image for quarter in quarters for image in quarter]
            noise = words(_SEED, Stream.CAPTION, ids, 8)
            for i, found in enumerate(objects):
                record = {"captions": describe(found, noise[i], captions), "id": f"{split}-{ids[i]}"}
                yield (
                    f"{split}{ids[i]:08d}",
                    {
                        "png": images[i],
                        "json": json.dumps(record).encode(),
                        "scene.json": json.dumps({"objects": found, "words": known}).encode(),
                        "objects.png": drawn[i],
                    },
                )


# --- scenes ----------------------------------------------------------------------------------------------------------


def split_scenes() -> dict[str, Scenes]:
    """The scenes of each split, [n, 4] each. val and test are chosen first, train is what is left."""
    taken = np.empty(0, np.int64)
    found = {}
    for number, (split, (count, shares)) in enumerate(SPLITS.items()):
        parts = [round(count * share) for share in shares]
        parts[1] += count - sum(parts)
        chosen = []
        for objects, wanted in enumerate(parts, start=1):
            scenes = _candidates(objects, 2 * wanted + 4000, number * 8 + objects)
            scenes = scenes[~np.isin(_codes(scenes), taken)]
            if split != "train":
                scenes = scenes[np.sort(np.unique(_codes(scenes), return_index=True)[1])]
            chosen.append(scenes[:wanted])
        mixed = np.concatenate(chosen)
        if len(mixed) != count:
            raise DataError(f"split {split} asks for {count} scenes; only {len(mixed)} are left that no other has.")
        order = np.argsort(words(_SEED, Stream.WINDOW_ORDER, np.array([number]), count)[0], kind="stable")
        found[split] = mixed[order]
        if split != "train":
            taken = np.concatenate([taken, _codes(mixed)])
    return found


def _candidates(objects: int, count: int, stream_id: int) -> Scenes:
    """Random scenes of so many objects, repeats included."""
    drawn = words(_SEED, Stream.SPARE, (stream_id << 32) + np.arange(count, dtype=np.int64), 8)
    quadrants = np.argsort(drawn[:, :4], axis=1, kind="stable")[:, :objects]
    kinds = (drawn[:, 4 : 4 + objects] * _KINDS) >> 32
    scenes = np.full((count, 4), -1, np.int64)
    np.put_along_axis(scenes, quadrants, kinds, axis=1)
    return scenes


def _codes(scenes: Scenes) -> NDArray[np.int64]:
    """One number for each scene; equal scenes have equal numbers."""
    return (scenes + 1) @ ((_KINDS + 1) ** np.arange(4))


def place(scenes: Scenes, ids: NDArray[np.int64]) -> list[list[dict[str, Any]]]:
    """The objects of each scene with centre (x, y) and radius in pixels, in the order of the quadrants."""
    jitter = (uniform(words(_SEED, Stream.CROP, ids, 8)) * 2 - 1) * JITTER
    colours, sizes = list(COLOURS), list(SIZES)
    placed = []
    for scene, moved in zip(scenes.tolist(), jitter.tolist(), strict=True):
        objects = []
        for quadrant, kind in enumerate(scene):
            if kind < 0:
                continue
            rest, size = divmod(kind, len(SIZES))
            colour, shape = divmod(rest, len(SHAPES))
            half = SIZE / 4
            objects.append({
                "colour": colours[colour], "shape": SHAPES[shape], "size": sizes[size], "place": QUADRANTS[quadrant],
                "x": round(half + (quadrant % 2) * 2 * half + moved[2 * quadrant], 2),
                "y": round(half + (quadrant // 2) * 2 * half + moved[2 * quadrant + 1], 2),
                "radius": SIZES[sizes[size]],
            })  # fmt: skip
        placed.append(objects)
    return placed


def describe(objects: Sequence[dict[str, Any]], noise: NDArray[np.int64], form: str) -> list[str]:
    """Two captions that name the objects in two orders; one caption where there is one object."""
    if form == "short":
        phrases, glue = [f"{o['size']} {o['colour']} {o['shape']} {o['place']}" for o in objects], " "
    else:
        phrases, glue = [f"a {o['size']} {o['colour']} {o['shape']} in the {o['place']}" for o in objects], " and "
    order = np.argsort(noise[:4][: len(phrases)], kind="stable").tolist()
    turn = 1 + int(noise[4]) % max(len(phrases) - 1, 1)
    orders = [order, order[turn:] + order[:turn]] if len(phrases) > 1 else [order]
    return [glue.join(phrases[i] for i in chosen) for chosen in orders]


# --- pixels ----------------------------------------------------------------------------------------------------------


def draw(
    placed: Sequence[Sequence[dict[str, Any]]], ids: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pictures uint8 [n, 64, 64, 3] and masks of object pixels uint8 [n, 64, 64] (255 = object)."""
    n, tile = len(placed), SIZE // 2
    ground = np.array(BACKGROUND, np.float32)
    images = np.empty((n, SIZE, SIZE, 3), np.int16)
    images[:] = BACKGROUND
    masks = np.zeros((n, SIZE, SIZE), np.uint8)
    image_tiles, mask_tiles = images.reshape(n, 2, tile, 2, tile, 3), masks.reshape(n, 2, tile, 2, tile)
    for shape in SHAPES:
        found = [(i, o) for i, objects in enumerate(placed) for o in objects if o["shape"] == shape]
        if not found:
            continue
        y, x, radius = np.array([[o["y"], o["x"], o["radius"]] for _, o in found], np.float32).T[:, :, None, None]
        colour = np.array([COLOURS[o["colour"]] for _, o in found], np.float32)[:, None, None]
        steps = np.arange(tile, dtype=np.float32) + 0.5
        cover = np.clip(0.5 - _distance(shape, steps - x % tile, steps[:, None] - y % tile, radius), 0, 1)
        # One object a quadrant, so every tile is painted once.
        i, down, across = (
            np.array([i for i, _ in found]),
            (y // tile).astype(int).ravel(),
            (x // tile).astype(int).ravel(),
        )
        tiles = np.rint(ground + cover[..., None] * (colour - ground))
        image_tiles[i, down, :, across] = tiles.astype(np.int16)
        mask_tiles[i, down, :, across] = (cover >= 0.5) * np.uint8(255)
    # The bare bit stream of numpy's Philox: numpy promises that it never changes, which it does not of distributions.
    raw = np.stack([np.random.Philox(key=(_SEED << 64) | int(i)).random_raw(SIZE * SIZE // 8) for i in ids])
    noise = (raw.view(np.uint8).reshape(n, SIZE, SIZE, 1) & (2 * NOISE - 1)).astype(np.int16) - NOISE
    return (images + noise).clip(0, 255).astype(np.uint8), masks


def _distance(
    shape: str, x: NDArray[np.float32], y: NDArray[np.float32], radius: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Signed distance to the outline, pixels, negative inside; y grows downwards."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - 0.95 * radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.82 * radius
    if shape == "diamond":
        return (np.abs(x) + np.abs(y) - 1.08 * radius) / np.float32(np.sqrt(2))
    if shape == "triangle":  # on its base; the sides fall 2 for each 1 that they go out
        return np.maximum(y - 0.8 * radius, (2 * np.abs(x) - (y + radius)) / np.float32(np.sqrt(5)))
    arm = 0.32 * radius
    across = np.maximum(np.abs(x) - radius, np.abs(y) - arm)
    return np.minimum(across, np.maximum(np.abs(x) - arm, np.abs(y) - radius))


def png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG of uint8 [height, width, 3] or [height, width]: no filter, light compression (0.1 ms)."""
    height, width = pixels.shape[:2]
    lines = np.zeros((height, 1 + pixels[0].size), np.uint8)
    lines[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    body = zlib.compress(lines.tobytes(), 1)
    chunks = ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
