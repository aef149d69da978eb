"""DALI decodes: nvJPEG and its decoding engine on a GPU, and the same graph on a CPU where there is none.

Our own bytes go in (external_source), a window is decoded, resized and mirrored by DALI, and uint8 pixels come out.
DALI sees no file, no epoch and no random number: all of that is the plan's. Nor is it asked how an image is turned: it
reads EXIF otherwise than decode.py (LONG entries, several blocks, one behind the frame header), so it is given the
window as the image is stored, and the index says how to turn what comes out.

    what DALI is not given    GIF and other formats than JPEG, PNG and WebP; more or less than 8 bits; transparency,
                              palettes with it, CMYK; WebP files with more than an image in them. The torch decoder
                              shows these through the same windows
    an image that fails       makes DALI fail the batch, without its name, and the pipeline with it. Each image of that
                              batch is then decoded by torch, which says which are bad and why; a new pipeline decodes
                              the others again. What torch reads and DALI does not is shown by torch from then on
    damage                    DALI does not see all of it (a JPEG cut below the window, say). So it is given bytes alone
                              that torch decoded: when they were indexed (and the checksum is the same), or else here,
                              the first time that they are met in this process. Both decoders then replace the same

On a GPU the pixels stay there. DALI's buffers come back to it in the order of its own streams, whatever torch still
does with them, so torch does not keep them: they are copied to memory of torch's on the loader's stream, and the
loader's thread waits for that copy before it releases the buffer. So a batch is complete when it is handed over,
whichever stream uses it, and whoever uses it on another stream than the loader's calls record_stream (the loader does).
"""

from __future__ import annotations

import contextlib
import io
import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .counts import Counts
from .decode import ImageInfo, Pixels, Window
from .decoders import Decoded, Encoded, TorchDecoder, gpu_number
from .errors import DataError

log = logging.getLogger(__name__)

_CHANNELS = (1, 3)
_MANY = 4  # so many images of a batch are not all odd ones


def dali_reads(image: Encoded) -> bool:
    """Whether DALI is given an image: it decodes it as decode.py does, as far as index and header tell."""
    info = image.info
    if info.bit_depth != 8 or info.channels not in _CHANNELS:
        return False
    if info.format == "png":  # tRNS: one colour, or entries of a palette, are transparent
        return b"tRNS" not in image.data
    if info.format == "webp":  # VP8X: animation, alpha or an EXIF block, which DALI 2.4 cannot always parse
        return image.data[12:16] != b"VP8X"
    return info.format == "jpeg"


class Stored(NamedTuple):
    """How a displayed window is made from the image as it is stored: cut out, mirrored, and then its axes exchanged if
    EXIF's orientation is 5 or more."""

    window: Window  # y, x, height, width in stored pixels
    horizontal: bool
    vertical: bool


def stored(window: Window, flip: bool, info: ImageInfo) -> Stored:
    """The way from a stored image to a displayed window of it, mirrored where `flip` says so. The other way round than
    decode.upright, which exchanges axes first."""
    y, x, height, width = window
    vertical, horizontal = info.orientation in (3, 4, 7, 8), info.orientation in (2, 3, 6, 7)
    if vertical:
        y = info.height - y - height
    if horizontal:
        x = info.width - x - width
    if info.orientation < 5:
        return Stored((y, x, height, width), horizontal != flip, vertical)
    return Stored((x, y, width, height), vertical, horizontal != flip)


class _Flight(NamedTuple):
    """A submitted batch. dali, others: positions of its images by who decodes them; others have the missing ones and
    those that failed before DALI saw them, bad (position -> reason)."""

    images: Sequence[Encoded | None]
    size: int
    dali: list[int]
    others: list[int]
    bad: dict[int, str]

    def given(self) -> list[Encoded]:
        """The images that DALI is given."""
        return [image for i in self.dali if (image := self.images[i]) is not None]


class DaliDecoder:
    """Batches of at most `batch` images; pixels on `device`, a GPU or the CPU.

    threads: of DALI's own, and as many of Python for what DALI is not given.
    """

    ahead = 2  # as many as the pipeline holds: the CPU part of one batch runs beside the GPU part of the other

    def __init__(self, threads: int, batch: int, device: torch.device, counts: Counts) -> None:
        self._threads, self._batch, self._device, self._counts = threads, batch, device, counts
        self._torch = TorchDecoder(threads, counts)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pipeline: Any = None  # built when it is needed, by the thread that uses it
        self._flying: deque[_Flight] = deque()
        self._refused: set[int] = set()  # rows of images that torch reads and DALI does not

    def start(self) -> None:
        """Start the threads for what DALI is not given."""
        self._torch.start()

    @property
    def threads(self) -> Sequence[threading.Thread]:
        """The threads for what DALI is not given."""
        return self._torch.threads

    def submit(self, images: Sequence[Encoded | None], size: int) -> None:
        """Begin with a batch. Waits until torch has decoded what nobody decoded before, while DALI is at the batch
        before."""
        mine = [image is not None and dali_reads(image) and image.row not in self._refused for image in images]
        bad = self._verify([image if is_mine else None for image, is_mine in zip(images, mine, strict=True)], size)
        dali = [i for i, is_mine in enumerate(mine) if is_mine and i not in bad]
        others = [i for i, is_mine in enumerate(mine) if not is_mine or i in bad]
        flight = _Flight(images, size, dali, others, bad)
        self._torch.submit([None if is_mine else image for image, is_mine in zip(images, mine, strict=True)], size)
        with self._counts.timed("decode"):
            self._feed(flight.given(), size)
        self._flying.append(flight)

    def collect(self) -> Decoded:
        """Wait for the oldest batch submitted. Raises RuntimeError or DataError where no image is why DALI fails."""
        flight = self._flying.popleft()
        rest = self._torch.collect()
        failed = rest.failed | flight.bad
        if not flight.dali:
            return Decoded(rest.images.to(self._device), failed)
        try:
            with self._counts.timed("decode"):
                pixels = self._take(flight.given())
        except RuntimeError as error:
            pixels, bad = self._recover(flight, error)
            failed |= {flight.dali[k]: reason for k, reason in bad.items()}
        if not flight.others:
            return Decoded(pixels, failed)
        with self._on_stream():
            whole = torch.empty((len(flight.images), *pixels.shape[1:]), dtype=torch.uint8, device=self._device)
            whole[flight.dali] = pixels
            whole[flight.others] = rest.images[flight.others].to(self._device)
        return Decoded(whole, failed)

    def put(self, images: Tensor, position: int, pixels: Pixels) -> None:
        """Overwrite one image."""
        with self._on_stream():
            images[position].copy_(torch.from_numpy(pixels.copy()))  # as in decoders.py

    def close(self) -> None:
        """End the threads, DALI's too."""
        self._torch.close()
        self._pipeline = None

    def _verify(self, images: Sequence[Encoded | None], size: int) -> dict[int, str]:
        """Decode by torch what was never decoded; position -> reason of what is bad."""
        unseen = [image if image is not None and not image.verified else None for image in images]
        if not any(unseen):
            return {}
        with self._counts.timed("verify"):
            return self._torch.begin(unseen, size).wait().failed

    # --- the pipeline ------------------------------------------------------------------------------------------------

    def _feed(self, images: Sequence[Encoded], size: int) -> None:
        """Hand images to the pipeline, which begins with them at once."""
        if not images:
            return
        if self._pipeline is None:
            self._pipeline = self._build()
        ways = [stored(image.window, image.flip, image.info) for image in images]
        rows = [[*way.window, way.horizontal, way.vertical, size, size] for way in ways]
        self._pipeline.feed_input("encoded", [np.frombuffer(image.data, np.uint8) for image in images])
        self._pipeline.feed_input("shown", np.array(rows, np.int32))
        self._pipeline.schedule_run()

    def _build(self) -> Any:
        return _build(self._batch, self._threads, self.ahead, self._device)

    def _take(self, images: Sequence[Encoded]) -> Tensor:
        """The pixels of the oldest images fed, uint8 [n, size, size, 3], complete. Raises RuntimeError."""
        turned = [k for k, image in enumerate(images) if image.info.orientation >= 5]
        pipeline = self._pipeline
        (shown,) = pipeline.share_outputs()  # waits until DALI has written them
        with self._on_stream():
            pixels = torch.from_dlpack(shown.as_tensor()).clone()
            if turned:
                pixels[turned] = pixels[turned].transpose(1, 2)
        pipeline.release_outputs()  # DALI may write there again
        return pixels

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        """On the loader's own stream, and wait for what was done there: this thread has nothing else to do, and the one
        that trains does not notice."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    def _try(self, images: Sequence[Encoded], size: int) -> Tensor | None:
        """The pixels of some images out of turn, or None where DALI fails; the next try has a new pipeline then."""
        if self._pipeline is None:
            self._pipeline = self._build()  # what fails here is no image's fault
        try:
            self._feed(images, size)
            return self._take(images)
        except RuntimeError:
            self._pipeline = None
            return None

    def _recover(self, flight: _Flight, error: RuntimeError) -> tuple[Tensor, dict[int, str]]:
        """The pixels of a batch that DALI failed, and what is bad in it (position among DALI's -> reason); the pipeline
        is a new one then, and has what was fed after that batch."""
        self._pipeline = None
        images, size = flight.given(), flight.size
        checked = self._torch.begin(images, size).wait()
        good = [k for k in range(len(images)) if k not in checked.failed]
        again = self._try([images[k] for k in good], size) if good and checked.failed else None
        if good and again is None:
            good = self._refuse([k for k in good if self._try([images[k]], size) is None], good, images, error)
            again = self._try([images[k] for k in good], size) if good else None
            if good and again is None:
                raise error
        with self._on_stream():
            pixels = checked.images.to(self._device)
            if again is not None:
                pixels[good] = again
        for later in self._flying:
            self._feed(later.given(), later.size)
        return pixels, checked.failed

    def _refuse(self, refused: list[int], good: list[int], images: Sequence[Encoded], error: RuntimeError) -> list[int]:
        """Leave some images to torch from now on; the positions of the others. Raises DataError where that is all."""
        if len(refused) == len(good) >= _MANY:
            raise DataError(
                f"DALI fails each of the {len(good)} images of a batch that torch reads: {_reason(error)}. Find out "
                "why, or set data.decoder=torch."
            ) from error
        for k in refused:
            log.warning("DALI does not read image %s (%s): torch shows it.", images[k].name, _reason(error))
            self._refused.add(images[k].row)
        return [k for k in good if k not in refused]


def _build(batch: int, threads: int, depth: int, device: torch.device) -> Any:
    """A pipeline with inputs `encoded` (uint8 [n] each) and `shown` (int32 [8] each: y, x, height, width as stored, how
    to mirror left and right, up and down, size, size); one output, uint8 [size, size, 3], its axes as stored."""
    from nvidia.dali import Pipeline, fn, types

    gpu = device.type == "cuda"
    pipeline = Pipeline(
        batch_size=batch,
        num_threads=threads,
        device_id=gpu_number(device) if gpu else None,
        prefetch_queue_depth=depth,
    )
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, batch=True)
        shown = fn.external_source(name="shown", dtype=types.INT32, ndim=1, batch=True)
        images = fn.decoders.image_slice(
            encoded,
            shown[0:2],
            shown[2:4],
            axis_names="HW",
            adjust_orientation=False,
            output_type=types.RGB,
            jpeg_fancy_upsampling=True,  # as libjpeg-turbo does
            device="mixed" if gpu else "cpu",
        )
        images = fn.resize(
            images, size=fn.cast(shown[6:8], dtype=types.FLOAT), interp_type=types.INTERP_LINEAR, antialias=True
        )
        pipeline.set_outputs(fn.flip(images, horizontal=shown[4], vertical=shown[5]))
    pipeline.build()
    # The first schedule_run begins as many batches as the pipeline holds, so all of them must be there: small ones.
    small = np.frombuffer(_small_jpeg(), np.uint8)
    for _ in range(depth):
        pipeline.feed_input("encoded", [small])
        pipeline.feed_input("shown", np.array([[0, 0, 8, 8, 0, 0, 8, 8]], np.int32))
    pipeline.schedule_run()
    for _ in range(depth):
        pipeline.share_outputs()
        pipeline.release_outputs()
    return pipeline


def _small_jpeg() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    return buffer.getvalue()


def _reason(error: RuntimeError) -> str:
    """What DALI says beside where its operator stands in our source."""
    said = str(error).rpartition("encountered:")[2].split("Current pipeline object")[0]
    return " ".join(said.split()) or "no reason given"
