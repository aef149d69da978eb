"""DALI and torch show the same windows of the same images: the graph runs for real, on a CPU."""

from __future__ import annotations

import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from mvle.data import decoder_dali
from mvle.data.counts import Counts
from mvle.data.decode import ImageInfo, examine_image
from mvle.data.decoder_dali import DaliDecoder, dali_reads
from mvle.data.decoders import Decoded, Encoded, TorchDecoder, choose_decoder
from mvle.data.errors import DataError

from .data_files import encode
from .photos import forms, forms_for_torch, photo

CPU = torch.device("cpu")
SIZE = 64


def encoded(name: str, data: bytes, window: tuple[int, int, int, int] | None = None, flip: bool = False) -> Encoded:
    info, pixels = examine_image(data)
    whole = (0, 0, *pixels.shape[:2])
    return Encoded(zlib.crc32(name.encode()), name, data, window or whole, flip, info)


def damaged(name: str, data: bytes) -> Encoded:
    """What a bad disk makes of an image that was indexed."""
    return Encoded(zlib.crc32(name.encode()), name, data, (0, 0, 20, 20), False, ImageInfo("jpeg", 20, 20, 1, 8, 3))


def dali(batch: int = 64) -> DaliDecoder:
    return DaliDecoder(2, batch, CPU, Counts())


def decode(decoder: DaliDecoder | TorchDecoder, images: list[Encoded | None], size: int = SIZE) -> Decoded:
    decoder.submit(images, size)
    return decoder.collect()


def plainly(images: list[Encoded | None], size: int = SIZE) -> Decoded:
    return decode(TorchDecoder(1, Counts()), images, size)


def windows(height: int, width: int) -> list[tuple[int, int, int, int]]:
    """The whole image, its middle, and windows that touch each edge."""
    return [
        (0, 0, height, width),
        (11, 17, 101, 97),
        (0, 0, 70, 131),
        (height - 80, width - 77, 80, 77),
        (0, width - 64, height, 64),
        (height - 33, 0, 33, 40),  # enlarged
    ]


# --- the same pixels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", forms())
def test_both_decoders_show_the_same_window(name: str) -> None:
    data = forms()[name]
    height, width = examine_image(data)[1].shape[:2]
    images: list[Encoded | None] = [
        encoded(name, data, window, flip) for window in windows(height, width) for flip in (False, True)
    ]
    assert all(dali_reads(image) for image in images if image)

    got, want = decode(dali(), images), plainly(images)

    assert got.images.dtype == torch.uint8 and got.images.shape == (len(images), SIZE, SIZE, 3)
    assert got.failed == want.failed == {}
    difference = got.images.double() - want.images.double()
    assert difference.abs().mean((1, 2, 3)).max() < 0.25  # measured: 0.08 to 0.14 a form, 0.20 of the worst window
    assert difference.mean((1, 2, 3)).abs().max() < 0.06  # measured: 0.03
    assert (difference.abs() > 1).double().mean() < 0.002  # measured: 0.0008 of a palette, below 0.0001 else


@pytest.mark.parametrize("name", ["jpeg 4:2:0", "jpeg, orientation 6", "png, orientation 3"])
def test_a_window_that_is_off_by_one_pixel_would_be_seen(name: str) -> None:
    data = forms()[name]
    right, shifted = encoded(name, data, (11, 17, 101, 97)), encoded(name, data, (12, 17, 101, 97))
    difference = decode(dali(), [right]).images.double() - plainly([shifted]).images.double()
    assert difference.abs().mean() > 0.5


def test_what_dali_would_show_otherwise_is_shown_by_torch() -> None:
    images: list[Encoded | None] = [encoded(name, data) for name, data in forms_for_torch().items()]
    assert not any(dali_reads(image) for image in images if image)
    images.insert(3, encoded("a photo", encode(photo(3, 90, 70))))
    images.append(None)

    got, want = decode(dali(), images), plainly(images)

    for i, image in enumerate(images):
        if image is not None and i != 3:
            assert torch.equal(got.images[i], want.images[i]), image.name
    assert (got.images[3].double() - want.images[3].double()).abs().mean() < 0.25


def test_a_batch_without_anything_for_dali_needs_no_pipeline() -> None:
    images: list[Encoded | None] = [encoded("gif", forms_for_torch()["gif"]), None]
    decoder = dali()
    assert torch.equal(decode(decoder, images).images[0], plainly(images).images[0])
    assert decode(decoder, [None, None]).failed == {}
    assert decoder._pipeline is None


def test_batches_in_flight_come_back_in_order_at_the_size_of_each() -> None:
    batches: list[list[Encoded | None]] = [
        [encoded(f"{b}.{i}", encode(photo(10 * b + i, 60, 80))) for i in range(3 - b % 2)] for b in range(4)
    ]
    decoder, sizes = dali(3), (16, 32, 16, 48)
    results = []
    for b, (batch, size) in enumerate(zip(batches, sizes, strict=True)):
        decoder.submit(batch, size)
        if b:
            results.append(decoder.collect())
    results.append(decoder.collect())
    for result, batch, size in zip(results, batches, sizes, strict=True):
        assert result.images.shape == (len(batch), size, size, 3)
        assert (result.images.double() - plainly(batch, size).images.double()).abs().mean() < 0.25
    kept = results[0].images.clone()
    decode(decoder, batches[1])  # DALI uses its buffers again, and what was given stays
    assert torch.equal(results[0].images, kept)


# --- what fails ------------------------------------------------------------------------------------------------------


def test_every_bad_image_of_a_batch_is_found_and_the_others_are_shown() -> None:
    whole = encode(photo(5, 80, 90))
    images: list[Encoded | None] = [
        encoded("good 0", whole),
        damaged("zeros", b"\xff\xd8\xff" + bytes(300)),
        encoded("good 1", encode(photo(6, 70, 60), "PNG")),
        damaged("a page", b"<html>"),
        encoded("turned", forms()["jpeg, orientation 6"], (3, 5, 90, 70)),
        encoded("a gif", forms_for_torch()["gif"]),
        damaged("empty", b""),
        replace(
            damaged("no gif", b"GIF89a" + bytes(60)), info=ImageInfo("gif", 20, 20, 1, 8, 3)
        ),  # which DALI never saw
    ]
    before: list[Encoded | None] = [encoded("before", whole)]
    after: list[Encoded | None] = [encoded("after", encode(photo(7, 50, 60))), None]
    decoder = dali()
    decoder.submit(before, SIZE)
    decoder.submit(images, SIZE)
    first = decoder.collect()
    decoder.submit(after, SIZE)  # under way while the pipeline breaks
    second, third = decoder.collect(), decoder.collect()

    assert first.failed == third.failed == {}
    assert sorted(second.failed) == [1, 3, 6, 7]
    assert second.failed == plainly(images).failed
    assert "JPEG without a frame header" in second.failed[1] and "no image format" in second.failed[3]
    for got, batch in ((first, before), (second, images), (third, after)):
        want = plainly(batch).images.double()
        for i, image in enumerate(batch):
            if image is not None and i not in got.failed:
                assert (got.images[i].double() - want[i]).abs().mean() < 0.25, image.name
    for i in (0, 2, 4):  # a bad neighbour changes no pixel of theirs
        assert torch.equal(second.images[i], decode(dali(), [images[i]]).images[0])


def test_a_batch_that_is_all_bad_is_all_named() -> None:
    decoder = dali()
    found = decode(decoder, [damaged("a", b"\xff\xd8\xff" + bytes(99)), damaged("b", b"junk")])
    assert list(found.failed) == [0, 1]
    good: list[Encoded | None] = [encoded("good", encode(photo(5, 80, 90)))]
    assert decode(decoder, good).failed == {}


def test_what_torch_reads_and_dali_does_not_is_shown_by_torch_from_then_on(caplog: pytest.LogCaptureFixture) -> None:
    gif = encoded("odd", forms_for_torch()["gif"])
    called = gif.info._replace(format="jpeg", channels=3)  # by the index
    odd = Encoded(7, "odd", gif.data, gif.window, True, called)
    images: list[Encoded | None] = [encoded("good", encode(photo(5, 80, 90))), odd]
    decoder = dali()

    got, pipeline = decode(decoder, images), decoder._pipeline
    again = decode(decoder, images)

    for result in (got, again):
        assert result.failed == {}
        assert torch.equal(result.images[1], plainly(images).images[1])
    assert decoder._pipeline is pipeline  # nothing broke the second time
    assert caplog.text.count("DALI does not read image odd") == 1


def test_a_failure_that_is_no_images_fault_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = dali()

    def out_of_memory(*_: object) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(decoder, "_take", out_of_memory)
    images: list[Encoded | None] = [encoded(f"good {i}", encode(photo(i, 80, 90))) for i in range(4)]
    with pytest.raises(DataError, match=r"each of the 4 images .*out of memory.*data\.decoder=torch"):
        decode(decoder, images)

    def no_device(*_: object) -> None:
        raise RuntimeError("no device")

    again = dali()
    decode(again, images[:1])
    monkeypatch.setattr(again, "_take", out_of_memory)
    monkeypatch.setattr(decoder_dali, "_build", no_device)
    with pytest.raises(RuntimeError, match="no device"):  # nor is a new pipeline's
        decode(again, images[:1])
    with pytest.raises(RuntimeError, match="no device"):
        decode(dali(), images)


def test_what_fails_together_and_not_alone_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = dali()
    take = decoder._take

    def too_many_at_once(images: list[Encoded]) -> torch.Tensor:
        pixels = take(images)
        if len(pixels) > 1:
            raise RuntimeError("too many at once")
        return pixels

    monkeypatch.setattr(decoder, "_take", too_many_at_once)
    with pytest.raises(RuntimeError, match="too many at once"):
        decode(decoder, [encoded(f"good {i}", encode(photo(i, 80, 90))) for i in range(4)])


def test_a_replacement_takes_the_place_of_one_image() -> None:
    images: list[Encoded | None] = [encoded("a", encode(photo(5, 80, 90))), encoded("b", encode(photo(6, 80, 90)))]
    decoder = dali()
    found = decode(decoder, images).images
    kept = found[0].clone()
    decoder.put(found, 1, np.full((SIZE, SIZE, 3), 7, np.uint8))
    assert torch.equal(found[0], kept) and (found[1] == 7).all()


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_on_a_gpu_pixels_stay_there_and_are_those_of_torch_in_order_and_with_bad_images() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    decoder, batches = DaliDecoder(2, 64, device, Counts()), []
    for name, data in forms().items():
        height, width = examine_image(data)[1].shape[:2]
        images: list[Encoded | None] = [encoded(name, data, window, True) for window in windows(height, width)]
        batches.append([*images, None, encoded("gif", forms_for_torch()["gif"]), damaged("zeros", b"\xff\xd8" * 99)])
    decoder.submit(batches[0], SIZE)
    for batch, later in zip(batches, [*batches[1:], None], strict=True):
        if later:
            decoder.submit(later, SIZE)
        got, want = decoder.collect(), plainly(batch)
        assert got.images.device == device
        assert got.failed == want.failed and list(got.failed) == [len(batch) - 1]
        shown = [i for i, image in enumerate(batch) if image and i not in got.failed]
        difference = (got.images.cpu()[shown].double() - want.images[shown].double()).abs().mean((1, 2, 3))
        assert difference.max() < 2.0  # not measured yet: nvJPEG's own transform and upsampling
        decoder.put(got.images, 0, np.full((SIZE, SIZE, 3), 7, np.uint8))
        assert (got.images[0] == 7).all()
    decoder.close()


# --- the choice ------------------------------------------------------------------------------------------------------


def test_dali_is_taken_with_a_gpu_and_when_it_is_asked_for() -> None:
    assert choose_decoder("auto", torch.device("cuda", 1)).name == "dali"
    assert "GPU 1" in choose_decoder("auto", torch.device("cuda", 1)).why
    assert choose_decoder("dali", CPU).name == "dali" and "the CPU" in choose_decoder("dali", CPU).why
    assert choose_decoder("torch", torch.device("cuda", 0)) == ("torch", "data.decoder=torch")


@pytest.mark.parametrize("hidden", ["nvidia.dali", "nvidia"])
def test_without_dali_it_says_what_to_type(monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, hidden, None)
    assert choose_decoder("auto", CPU) == ("torch", "no GPU here")
    assert choose_decoder("auto", torch.device("cuda", 0)) == (
        "torch",
        "DALI is not installed: pip install 'mvle[dali]'",
    )
    with pytest.raises(DataError, match=r"data\.decoder=dali needs DALI; .*pip install 'mvle\[dali\]'"):
        choose_decoder("dali", CPU)
