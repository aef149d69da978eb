"""Every kind of image file gives the right upright RGB pixels, or a DecodeError with a reason."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mvle.data.decode import DecodeError, PixelBoundError, decode_image, decode_mask_window, decode_window
from mvle.data.decode import examine_image as examine

from .data_files import encode, oriented, picture

LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}}


def search_path() -> dict[str, str]:
    return {"PYTHONPATH": ":".join(sys.path)}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, body: bytes, depth: int = 8, colour: int = 2, before: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", *LOSSLESS])
def test_every_exif_orientation_is_shown_upright(form: str, orientation: int) -> None:
    data = oriented(picture(), orientation, form, **LOSSLESS.get(form, {}))

    info, pixels = examine(data)

    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(picture())
    stored.info["exif"] = exif.tobytes()
    expected = np.asarray(ImageOps.exif_transpose(stored))
    assert pixels.shape == expected.shape == (info.height, info.width, 3)
    assert np.abs(pixels.astype(int) - expected).mean() < (8 if form == "JPEG" else 1e-9)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pillow_turns_a_jpeg_as_torchvision_does(orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = oriented(picture(1), orientation)
    first = decode_image(data)

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("not today")

    monkeypatch.setattr("torchvision.io.decode_jpeg", refuse)
    second = decode_image(data)

    assert first.shape == second.shape
    assert np.abs(first.astype(int) - second).max() <= 4


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    levels = np.array([[0, 255, 257, 32768, 65535]], np.uint16)
    data = png(5, 1, b"\0" + levels.astype(">u2").tobytes(), depth=16, colour=0)

    info, pixels = examine(data)

    assert (info.bit_depth, info.channels) == (16, 1)
    assert pixels[0, :, 0].tolist() == [0, 1, 1, 128, 255]


def test_sixteen_bit_colour_keeps_its_range() -> None:
    levels = np.array([[[0, 0x80FF, 0xFFFF]]], np.uint16)
    pixels = decode_image(png(1, 1, b"\0" + levels.astype(">u2").tobytes(), depth=16))
    assert pixels[0, 0].tolist() == [0, 128, 255]


def test_transparency_is_laid_on_white() -> None:
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 51]]], np.uint8)
    pixels = decode_image(encode(Image.fromarray(rgba, "RGBA"), "PNG"))
    assert pixels[0].tolist() == [[200, 0, 0], [255, 255, 255], [244, 204, 204]]


def test_a_transparent_palette_entry_becomes_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    pixels = decode_image(encode(image, "PNG", transparency=1))
    assert pixels[0].tolist() == [[10, 20, 30], [255, 255, 255]]


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_grey_bilevel_palette_and_cmyk_become_rgb(mode: str) -> None:
    image = Image.fromarray(picture(2)).convert(mode)
    pixels = decode_image(encode(image, "TIFF"))
    assert np.array_equal(pixels, np.asarray(image.convert("RGB")))


def test_a_grey_jpeg_becomes_three_equal_channels() -> None:
    info, pixels = examine(encode(picture(channels=1)))
    assert info.channels == 1
    assert (pixels == pixels[:, :, :1]).all()


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    pixels = decode_image(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert pixels[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.95])
def test_a_file_cut_off_anywhere_is_refused(form: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    data = encode(noise, form)
    with pytest.raises(DecodeError):
        decode_image(data[: int(len(data) * share)])


def test_bytes_that_are_no_image_are_refused_with_their_beginning() -> None:
    with pytest.raises(DecodeError, match="begins with b'<!DOCTYPE"):
        decode_image(b"<!DOCTYPE html><html>404</html>")


def test_the_pixel_bound_is_checked_on_the_header_alone() -> None:
    bomb = png(60_000, 60_000, b"")  # 10.8 GB once decoded
    with pytest.raises(PixelBoundError, match=r"60000 x 60000 pixels are over the bound of 64000000"):
        decode_image(bomb)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
def test_an_image_over_a_small_bound_is_refused_in_every_format(form: str) -> None:
    data = encode(picture(), form)
    decode_image(data, max_pixels=24 * 32)
    with pytest.raises(PixelBoundError):
        decode_image(data, max_pixels=24 * 32 - 1)


def test_a_text_chunk_that_inflates_without_bound_is_refused() -> None:
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 80_000_000, 9))
    with pytest.raises(DecodeError, match="too large"):
        decode_image(png(1, 1, b"\0\1\2\3", before=text))


def test_a_png_with_a_bad_filter_byte_does_not_end_the_process() -> None:
    lines = b"".join(bytes([9]) + bytes(3 * 16) for _ in range(16))  # filters are 0..4
    code = (
        "import sys; from mvle.data.decode import DecodeError, decode_image\n"
        "try: decode_image(sys.stdin.buffer.read())\nexcept DecodeError: pass"
    )
    done = subprocess.run([sys.executable, "-c", code], input=png(16, 16, lines), env=search_path())
    assert done.returncode == 0


def test_a_window_of_the_right_size_is_copied_and_not_resampled() -> None:
    pixels = picture(3, 40, 40)
    shown = decode_window(encode(pixels, "PNG"), (8, 4, 24, 24), False, 24)
    assert np.array_equal(shown, pixels[8:32, 4:28])
    assert shown.flags.c_contiguous


def test_resizing_agrees_with_pillow_within_two_levels() -> None:
    pixels = picture(4, 64, 80)
    shown = decode_window(encode(pixels, "PNG"), (5, 7, 50, 61), False, 32)
    expected = Image.fromarray(pixels[5:55, 7:68]).resize((32, 32), Image.Resampling.BILINEAR)
    assert np.abs(shown.astype(int) - np.asarray(expected)).max() <= 2


def test_torch_gets_windows_in_one_piece_so_that_it_starts_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    resize = torch.nn.functional.interpolate
    monkeypatch.setattr(torch.nn.functional, "interpolate", lambda x, **options: seen.append(x) or resize(x, **options))
    for data in (encode(picture(), "PNG"), encode(picture()), oriented(picture(), 7)):
        decode_window(data, (1, 2, 20, 21), False, 16)
    assert len(seen) == 3
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


def test_a_flip_mirrors_left_and_right() -> None:
    data = encode(picture(5, 16, 16), "PNG")
    assert np.array_equal(decode_window(data, None, True, 16), picture(5, 16, 16)[:, ::-1])


def test_windows_are_in_displayed_coordinates() -> None:
    data = oriented(picture(6), 6, "PNG")  # stored 24 x 32, shown 32 x 24
    upright = decode_image(data)
    assert upright.shape == (32, 24, 3)
    assert np.array_equal(decode_window(data, (10, 2, 20, 20), False, 20), upright[10:30, 2:22])


def test_a_window_that_leaves_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"window must lie inside the image \(24 x 32\)"):
        decode_window(encode(picture()), (10, 0, 20, 20), False, 16)


def test_a_mask_goes_through_the_same_window() -> None:
    mask = np.zeros((40, 40), np.uint8)
    mask[10:20, 20:30] = 255
    shown = decode_mask_window(encode(mask, "PNG"), (0, 20, 20, 20), 40)
    assert shown.shape == (40, 40)
    assert shown[20:, :20].all() and shown.sum() == 400


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("flip", [False, True])
def test_a_window_of_one_pixel_is_shown_at_any_size_however_the_image_is_turned(orientation: int, flip: bool) -> None:
    data = oriented(picture(), orientation, "PNG")
    for y, x in ((0, 0), (5, 7), (20, 3)):
        pixel = decode_image(data)[y, x]
        for size in (1, 4):
            shown = decode_window(data, (y, x, 1, 1), flip, size)
            assert shown.shape == (size, size, 3) and (shown == pixel).all()


def test_a_resized_window_is_not_turned_from_planes_to_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch writes it as pixels; turning planes took as long as the resizing itself."""
    resized: list[torch.Tensor] = []
    interpolate = torch.nn.functional.interpolate

    def noted(*arguments: object, **options: object) -> torch.Tensor:
        resized.append(interpolate(*arguments, **options))
        return resized[-1]

    monkeypatch.setattr(torch.nn.functional, "interpolate", noted)
    for window in (None, (3, 2, 17, 13)):
        shown = decode_window(encode(picture()), window, False, 16)
        assert resized.pop().is_contiguous(memory_format=torch.channels_last) and shown.flags.c_contiguous
