"""Images that look more like photos than data_files.picture, for comparing decoders: smooth, with edges and some noise,
in every form that a shard may hold."""

from __future__ import annotations

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
    return found


def forms_for_torch() -> dict[str, bytes]:
    """What DALI is not given, or would show otherwise."""
    pixels = photo(2, 64, 80)
    image = Image.fromarray(pixels)
    clear = image.convert("RGBA")
    clear.putalpha(Image.fromarray(pixels[:, :, 0]))
    return {
        "jpeg, cmyk": encode(image.convert("CMYK")),
        "png, alpha": encode(clear, "PNG"),
        "png, one transparent colour": encode(image, "PNG", transparency=tuple(int(v) for v in pixels[0, 0])),
        "png, grey with a transparent level": encode(image.convert("L"), "PNG", transparency=int(pixels[0, 0, 0])),
        "png, transparent palette": encode(image.quantize(16), "PNG", transparency=0),
        "png, 16 bits": encode(Image.fromarray(pixels[:, :, 0].astype(np.uint16) << 8), "PNG"),
        "png, bilevel": encode(image.convert("1"), "PNG"),
        "webp, alpha": encode(clear, "WEBP"),
        "webp, orientation 6": oriented(pixels, 6, "WEBP"),
        "gif": encode(image, "GIF"),
        "bmp": encode(image, "BMP"),
        "tiff": encode(image, "TIFF"),
    }
