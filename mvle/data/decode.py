"""Encoded bytes -> upright RGB pixels, or a DecodeError that says why not. Used by the index, the loader, inference.

JPEG goes through torchvision (0.20 ms for a 176-pixel photo; Pillow 0.35). Everything else goes through Pillow, PNG
too: torchvision 0.29 ends the *process* on a PNG with a bad filter byte, and gains only a quarter there.
What one gets, whichever decoder ran:

    EXIF orientation   applied: `width`, `height` and windows are in displayed coordinates
    16 bits a channel  scaled to 8, never clipped
    transparency       laid on white, as a page shows it; dropping alpha would uncover colours nobody was meant to see
    palette, CMYK, grey, bilevel   to RGB
    animations         the first frame
    damaged or cut off DecodeError, also where a tolerant decoder would fill in grey. But what is wrong within a JPEG's
                       scan and ends in an end mark, libjpeg goes on after, and shows noise

A pixel bound is checked on the header, before anything is decompressed. Resizing is torch's antialiased bilinear on
uint8: a photo window to 112 pixels takes 0.06 ms against 0.17 with Pillow, a 1-megapixel window to 224 0.9 against 3.8.
"""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Loaded = TypeVar("Loaded")
Window = tuple[int, int, int, int]  # y, x, height, width in displayed coordinates

MAX_PIXELS = 64_000_000  # 8,000 x 8,000: 192 MB once decoded
FORMATS = ("other", "jpeg", "png", "webp", "gif", "bmp", "tiff", "ppm", "avif", "jpeg2000")  # number = index column
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000")
_NAMES = {"MPO": "jpeg", "DIB": "bmp"}
_ORIENTATION_TAG = 0x0112
_TELLS_NOTHING = (b"IDAT", b"tEXt", b"zTXt", b"iTXt", b"tIME")  # of how an image is shown; writers put words last


class DecodeError(ValueError):
    """These bytes do not give a picture; the message is the reason."""


class PixelBoundError(DecodeError):
    """The header announces more pixels than are allowed."""


class ImageInfo(NamedTuple):
    """What the index keeps of an image. width, height: as displayed, pixels; format: a name of FORMATS; orientation:
    EXIF 1..8; bit_depth and channels: as stored (a palette counts as 3 or 4 channels)."""

    format: str
    width: int
    height: int
    orientation: int
    bit_depth: int
    channels: int


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Pixels:
    """The whole image upright: uint8 [height, width, 3] RGB. Raises DecodeError."""
    return examine_image(data, max_pixels)[1]


def decode_window(
    data: bytes,
    window: Window | None,
    flip: bool,
    size: int,
    max_pixels: int = MAX_PIXELS,
    expected: ImageInfo | None = None,
) -> Pixels:
    """A window of the image at size x size: uint8 [size, size, 3] RGB, contiguous.

    window = (y, x, height, width) in displayed pixels, inside the image; None: the largest centred square.
    flip mirrors left and right afterwards. expected: what the image was when the window was chosen. Raises DecodeError,
    also for another size or orientation than expected; ValueError for a window that leaves the image.
    """
    info, pixels = examine_image(data, max_pixels)
    if expected is not None and (info.width, info.height) != (expected.width, expected.height):
        raise DecodeError(
            f"it has {info.width} x {info.height} pixels, and its index says {expected.width} x {expected.height}"
        )
    if expected is not None and info.orientation != expected.orientation:
        raise DecodeError(f"its EXIF orientation is {info.orientation}, and its index says {expected.orientation}")
    pixels = crop(pixels, window)
    if pixels.shape[:2] != (size, size):
        pixels = _resize(pixels, size)
    return np.ascontiguousarray(pixels[:, ::-1] if flip else pixels)


def decode_mask_window(data: bytes, window: Window | None, size: int, max_pixels: int = MAX_PIXELS) -> Pixels:
    """A mask image through the same window: uint8 [size, size], 1 where the mask is bright. Nearest pixel."""
    pixels = crop(decode_image(data, max_pixels), window)[:, :, 0]
    rows, columns = (np.arange(size) * 2 + 1) * pixels.shape[0], (np.arange(size) * 2 + 1) * pixels.shape[1]
    return (pixels[rows // (2 * size)][:, columns // (2 * size)] > 127).astype(np.uint8)


def prepare_pixels(image: Any, size: int) -> Pixels:
    """An upright Pillow image of any mode -> uint8 [size, size, 3]: what `decode_window` without a window gives."""
    pixels = crop(_to_rgb(image), None)
    return np.ascontiguousarray(pixels if pixels.shape[:2] == (size, size) else _resize(pixels, size))


def centred_square(width: int, height: int) -> Window:
    """The largest square in the middle: what "resize the shorter side, then crop the centre" shows."""
    side = min(width, height)
    return (height - side) // 2, (width - side) // 2, side, side


def crop(pixels: Pixels, window: Window | None) -> Pixels:
    """The window of [height, width, ...] as a view; None: the largest centred square."""
    height, width = pixels.shape[:2]
    y, x, h, w = window or centred_square(width, height)
    if min(y, x) < 0 or min(h, w) < 1 or y + h > height or x + w > width:
        raise ValueError(f"window must lie inside the image ({height} x {width}); got y, x, height, width = {window}.")
    return pixels[y : y + h, x : x + w]


def examine_image(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[ImageInfo, Pixels]:
    """Decode everything and say what it is: (ImageInfo, uint8 [height, width, 3]). Raises DecodeError."""
    if not data:
        raise DecodeError("the file is empty")
    if data[:3] == b"\xff\xd8\xff":
        return _decode_jpeg(data, max_pixels)
    if data[:4] == b"GIF8" and len(data) >= 10:
        width, height = struct.unpack_from("<HH", data, 6)
        _check_bound(width, height, max_pixels)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        _check_png(data, max_pixels)
        return _decode_pillow(data, max_pixels, None, ("PNG",))
    return _decode_pillow(data, max_pixels, None)


def identify_image(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageInfo:
    """What examine_image says of a good image, from its header where that tells (JPEG, PNG, WebP, BMP); an image of
    another format is decoded, and so is a PNG that has more than words behind its pixels: an EXIF block there turns it.
    Damage behind the header is not seen. Raises DecodeError."""
    if data[:3] == b"\xff\xd8\xff":
        header = jpeg_header(data)
        if header is None:
            raise DecodeError("a JPEG without a frame header")
        width, height, components, precision, orientation = header
        _check_bound(width, height, max_pixels)
        if orientation >= 5:
            width, height = height, width
        return ImageInfo("jpeg", width, height, orientation, precision, components)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        if not _check_png(data, max_pixels):
            return examine_image(data, max_pixels)[0]
    elif not (data[:4] == b"RIFF" and data[8:12] == b"WEBP") and data[:2] != b"BM":
        return examine_image(data, max_pixels)[0]
    return _by_pillow(data, max_pixels, None, None, lambda image: None)[0]


# --- JPEG ------------------------------------------------------------------------------------------------------------


def _decode_jpeg(data: bytes, max_pixels: int) -> tuple[ImageInfo, Pixels]:
    from torchvision.io import ImageReadMode, decode_jpeg

    header = jpeg_header(data)
    if header is None:
        raise DecodeError("a JPEG without a frame header")
    width, height, components, precision, orientation = header
    _check_bound(width, height, max_pixels)
    if precision == 8 and components in (1, 3):
        try:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            pixels = decode_jpeg(buffer, mode=ImageReadMode.RGB).permute(1, 2, 0).numpy()
        except RuntimeError:  # what libjpeg-turbo refuses here Pillow may still read; if not, its reason is reported
            pass
        else:
            pixels = upright(pixels, orientation)
            info = ImageInfo("jpeg", pixels.shape[1], pixels.shape[0], orientation, precision, components)
            return info, pixels
    return _decode_pillow(data, max_pixels, orientation)


def jpeg_header(data: bytes) -> tuple[int, int, int, int, int] | None:
    """(stored width, stored height, components, bits, EXIF orientation) from the markers; None without a frame."""
    position, orientation = 2, 1
    while True:
        position = data.find(b"\xff", position)  # junk between markers is skipped, as libjpeg does
        while 0 <= position < len(data) and data[position] == 0xFF:
            position += 1
        if position < 0 or position + 3 > len(data):
            return None
        marker = data[position]
        if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # these carry no length
            position += 1
            continue
        if marker in (0xD9, 0xDA):
            return None
        length = int.from_bytes(data[position + 1 : position + 3], "big")
        body = data[position + 3 : position + 1 + length]
        if marker == 0xE1 and body[:6] == b"Exif\0\0" and orientation == 1:
            orientation = exif_orientation(body[6:])
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if len(body) < 6:
                return None
            precision, height, width, components = struct.unpack(">BHHB", body[:6])
            return width, height, components, precision, orientation
        position += 1 + max(length, 2)


def exif_orientation(tiff: bytes) -> int:
    """The orientation in an EXIF block (a TIFF header and its first directory); 1 where it has none or is damaged."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return 1
    directory = struct.unpack_from(order + "I", tiff, 4)[0]
    if directory + 2 > len(tiff):
        return 1
    entries = struct.unpack_from(order + "H", tiff, directory)[0]
    for i in range(entries):
        at = directory + 2 + 12 * i
        if at + 12 > len(tiff):
            return 1
        tag, kind, _ = struct.unpack_from(order + "HHI", tiff, at)
        if tag == _ORIENTATION_TAG:
            value = struct.unpack_from(order + ("H" if kind == 3 else "I"), tiff, at + 8)[0]
            return value if 1 <= value <= 8 else 1
    return 1


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Stored [height, width, 3] -> displayed, as a view. Orientation: EXIF 1..8."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


# --- everything else -------------------------------------------------------------------------------------------------


def _check_png(data: bytes, max_pixels: int) -> bool:
    """Every chunk there, in one piece, up to the end mark. Pillow alone would show a cut file as if it were whole.
    Returns whether what stands before its pixels tells all."""
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise DecodeError("a PNG without a header")
    width, height = struct.unpack_from(">II", data, 16)
    _check_bound(width, height, max_pixels)
    position, pixels, last = 8, False, True
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        if not (kind.isalpha() and kind.isascii()):
            raise DecodeError(f"a PNG damaged at byte {position}: no chunk begins there")
        if kind == b"IEND":
            return last
        exif = kind == b"tEXt" and data[position + 8 : position + 13] == b"exif\0"  # which Pillow believes
        last = last and ((kind in _TELLS_NOTHING and not exif) or not pixels)
        pixels = pixels or kind == b"IDAT"
        position += 12 + length
    raise DecodeError(f"a PNG cut off: it ends after {len(data)} bytes without its end mark")


def _decode_pillow(
    data: bytes, max_pixels: int, orientation: int | None, formats: tuple[str, ...] | None = None
) -> tuple[ImageInfo, Pixels]:
    """orientation None: read it from the file's EXIF block (JPEG brings its own, so that both decoders agree)."""

    def load(image: Any) -> Pixels:
        image.load()
        return _to_rgb(image)

    info, stored = _by_pillow(data, max_pixels, orientation, formats, load)
    pixels = upright(stored, info.orientation)
    return info._replace(width=pixels.shape[1], height=pixels.shape[0]), pixels


def _by_pillow(
    data: bytes,
    max_pixels: int,
    orientation: int | None,
    formats: tuple[str, ...] | None,
    load: Callable[[Any], Loaded],
) -> tuple[ImageInfo, Loaded]:
    """What the header says, and what `load` makes of the open image."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=formats or _pillow_formats()) as image:
            _check_bound(*image.size, max_pixels)
            depth, channels = _stored(image, data)
            width, height = image.size
            loaded = load(image)
            name = _NAMES.get(image.format or "", (image.format or "other").lower())
            if orientation is None:  # Pillow turns TIFF upright by itself
                block = b"" if name == "tiff" else image.info.get("exif", b"")
                orientation = exif_orientation(block[6:] if block[:6] == b"Exif\0\0" else block)
    except DecodeError:
        raise
    except Image.DecompressionBombError as error:
        raise PixelBoundError(f"more pixels than Pillow opens at all: {error}") from error
    except UnidentifiedImageError as error:  # its own message holds a memory address
        raise DecodeError(f"no image format that is known here; the file begins with {data[:12]!r}") from error
    except Exception as error:  # hostile bytes make Pillow's plugins raise nearly every type there is; none is hidden
        raise DecodeError(f"{type(error).__name__}: {str(error) or 'no reason given'}") from error
    if orientation >= 5:
        width, height = height, width
    return ImageInfo(name if name in FORMATS else "other", width, height, orientation, depth, channels), loaded


@functools.cache
def _pillow_formats() -> tuple[str, ...]:
    """The formats of ours that this Pillow was built with. Never EPS, which would start another program."""
    from PIL import Image

    Image.init()
    return tuple(name for name in _PILLOW_FORMATS if name in Image.OPEN)


def _to_rgb(image: Any) -> Pixels:
    mode = image.mode
    if mode == "F":
        raise DecodeError("floating-point pixels have no known range; save the image with 8 or 16 bits")
    if mode.startswith("I"):  # 16-bit grey; convert("RGB") would clip it at 255
        grey = np.asarray(image).astype(np.int64)
        if grey.size and (grey.min() < 0 or grey.max() > 65535):
            raise DecodeError("32-bit integer pixels have no known range; save the image with 8 or 16 bits")
        return np.repeat(((grey * 255 + 32767) // 65535).astype(np.uint8)[:, :, None], 3, axis=2)
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA")).astype(np.uint16)
        alpha = rgba[:, :, 3:]
        return ((rgba[:, :, :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return np.asarray(image.convert("RGB"))


def _stored(image: Any, data: bytes) -> tuple[int, int]:
    """(bits a channel, channels) as stored."""
    bands = len(image.getbands())
    if image.mode in ("P", "PA"):
        bands = 4 if "transparency" in image.info or image.mode == "PA" else 3
    if image.format == "PNG":
        return data[24], bands
    if image.format == "TIFF":
        bits = image.tag_v2.get(258, 8)
        return int(bits[0] if isinstance(bits, tuple) else bits), bands
    return {"1": 1, "I": 16, "F": 32}.get(image.mode, 16 if image.mode.startswith("I;16") else 8), bands


def _check_bound(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise PixelBoundError(f"{width} x {height} pixels are over the bound of {max_pixels}")
    if width * height == 0:
        raise DecodeError(f"a picture without pixels: {width} x {height}")


def _resize(pixels: Pixels, size: int) -> Pixels:
    # numpy makes the copy, not torch, whose copy of a strided window opens a parallel region: with two intra-op
    # threads beside a busy model that took 10 ms instead of 0.1. Of Pillow's read-only buffers torch warns, and strides
    # below zero it refuses: a mirrored view of one row or column has them although numpy calls it contiguous.
    as_it_is = pixels.flags.c_contiguous and pixels.flags.writeable and min(pixels.strides) > 0
    pixels = pixels if as_it_is else pixels.copy()
    # The batch's own stride must be that of a batch: else torch takes the pixels for planes, and turns every result.
    stored = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    scaled = torch.nn.functional.interpolate(stored, size=(size, size), mode="bilinear", antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()
