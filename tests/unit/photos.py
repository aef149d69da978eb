"""Images that look more like photos than data_files.picture, for comparing decoders: smooth, with edges and some noise,
in every form that a shard may hold."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from PIL import Image

from .data_files import encode, oriented


def photo(seed: int, height: int, width: int) -> np.ndarray:
    """Hills of colour, one hard edge, grain: uint8 [height, width, 3]."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = random.uniform(1, 12, (3, 4, 2))
    levels = np.stack([sum(np.sin(a * y + b * x + a) for a, b in channel) for channel in waves], axis=2)
    levels = 128 + 24 * levels + 30 * (x + y > 0.8)[:, :, None] + random.normal(0, 4, levels.shape)
    return levels.clip(0, 255).astype(np.uint8)


def forms(height: int = 149, width: int = 211) -> dict[str, bytes]:
    """name -> bytes of a photo of odd size; what each is says its name."""
    pixels = photo(1, height, width)
    grey = Image.fromarray(pixels).convert("L")
    found = {
        **{f"jpeg 4:{name}": encode(pixels, subsampling=number) for number, name in enumerate(("4:4", "2:2", "2:0"))},
        "jpeg, grey": encode(grey),
        "jpeg, progressive": encode(pixels, subsampling=2, progressive=True),
        "jpeg, restart markers": encode(pixels, subsampling=2, restart_marker_blocks=3),
        "png": encode(pixels, "PNG"),
        "png, grey": encode(grey, "PNG"),
        "png, palette": encode(Image.fromarray(pixels).quantize(64), "PNG"),
        "webp": encode(pixels, "WEBP", quality=90),
        "webp, lossless": encode(pixels, "WEBP", lossless=True),
    }
    for orientation in range(1, 9):
        found[f"jpeg, orientation {orientation}"] = oriented(pixels, orientation, subsampling=2)
        found[f"png, orientation {orientation}"] = oriented(pixels, orientation, "PNG")
    return found | oddly_turned(pixels)


def tiff(orientation: int, order: str = "<", kind: int = 3, magic: int = 42) -> bytes:
    """An EXIF block with an orientation alone. kind: 3 SHORT, 4 LONG."""
    value = struct.pack(order + ("HH" if kind == 3 else "I"), orientation, *([0] if kind == 3 else []))
    start = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", magic, 8)
    return start + struct.pack(order + "HHHI", 1, 0x0112, kind, 1) + value + bytes(4)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def oddly_turned(pixels: np.ndarray) -> dict[str, bytes]:
    """Orientations in forms that Pillow does not write, and that readers of EXIF understand differently."""
    plain, png = encode(pixels, subsampling=2), encode(pixels, "PNG")

    def app1(block: bytes) -> bytes:
        return b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block

    scan = plain.index(b"\xff\xda")
    return {
        "jpeg, orientation as LONG": plain[:2] + app1(tiff(6, kind=4)) + plain[2:],
        "jpeg, orientation as LONG, big-endian": plain[:2] + app1(tiff(8, ">", 4)) + plain[2:],
        "jpeg, two orientations": plain[:2] + app1(tiff(1)) + app1(tiff(6)) + plain[2:],
        "jpeg, two other orientations": plain[:2] + app1(tiff(3)) + app1(tiff(7)) + plain[2:],
        "jpeg, orientation behind the frame header": plain[:scan] + app1(tiff(5)) + plain[scan:],
        "jpeg, orientation under a bad number": plain[:2] + app1(tiff(4, magic=41)) + plain[2:],
        "png, orientation as LONG, big-endian": png[:33] + png_chunk(b"eXIf", tiff(6, ">", 4)) + png[33:],
        "png, orientation behind the pixels": png[:-12] + png_chunk(b"eXIf", tiff(6)) + png[-12:],
    }


def forms_for_torch() -> dict[str, bytes]:
    """What DALI is not given, or would show otherwise."""
    pixels = photo(2, 64, 80)
    image = Image.fromarray(pixels)
    png, first = encode(image, "PNG"), struct.pack(">HHH", *(int(v) for v in pixels[0, 0]))
    clear = image.convert("RGBA")
    clear.putalpha(Image.fromarray(pixels[:, :, 0]))
    return {
        "jpeg, cmyk": encode(image.convert("CMYK")),
        "png, alpha": encode(clear, "PNG"),
        "png, one transparent colour": encode(image, "PNG", transparency=tuple(int(v) for v in pixels[0, 0])),
        "png, grey with a transparent level": encode(image.convert("L"), "PNG", transparency=int(pixels[0, 0, 0])),
        "png, transparent palette": encode(image.quantize(16), "PNG", transparency=0),
        "png, a transparent colour behind the pixels": png[:-12] + png_chunk(b"tRNS", first) + png[-12:],
        "png, 16 bits": encode(Image.fromarray(pixels[:, :, 0].astype(np.uint16) << 8), "PNG"),
        "png, bilevel": encode(image.convert("1"), "PNG"),
        "webp, alpha": encode(clear, "WEBP"),
        "webp, orientation 6": oriented(pixels, 6, "WEBP"),
        "gif": encode(image, "GIF"),
        "bmp": encode(image, "BMP"),
        "tiff": encode(image, "TIFF"),
    }
