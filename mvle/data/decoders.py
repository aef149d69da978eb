"""The seam between the loader and what turns encoded images into pixels.

    a batch of Encoded (bytes, window, flip; None where reading failed)  ->  uint8 [B, size, size, 3], and what failed

A decoder is given batches with `submit` and gives them back in the same order with `collect`, so that one batch is
being decoded while the next is handed over. The windows and flips come from the plan, so every decoder shows the same
of the same image; how far the pixels may differ is bounded by tests/unit/test_decoder_dali.py.

TorchDecoder decodes on CPU threads, one image after the other (decode.py). decoder_dali.py has the other one.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .counts import Counts
from .decode import DecodeError, ImageInfo, Pixels, Window, decode_window
from .errors import DataError
from .workers import Workers

INSTALL = "pip install 'mvle[dali]'"


@dataclass(frozen=True, slots=True)
class Encoded:
    """One image to be shown.

    row: which of its set · name: for messages · window (y, x, height, width): displayed pixels · info: as the index has
    it · verified: torch decoded these bytes before, and they are good.
    """

    row: int
    name: str
    data: bytes
    window: Window
    flip: bool
    info: ImageInfo
    verified: bool = True


class Decoded(NamedTuple):
    """images: uint8 [B, size, size, 3], on the GPU where the decoder works there, complete; anything where it failed or
    there was nothing · failed: position in the batch -> reason."""

    images: Tensor
    failed: dict[int, str]


class Decoder(Protocol):
    """What decodes the batches of a loader. All but the constructor is called from one thread."""

    ahead: int  # batches that may be submitted and not collected

    def start(self) -> None:
        """Start threads. Without it everything is done by the caller."""

    def submit(self, images: Sequence[Encoded | None], size: int) -> None:
        """Begin with a batch."""

    def collect(self) -> Decoded:
        """Wait for the oldest batch submitted."""

    def put(self, images: Tensor, position: int, pixels: Pixels) -> None:
        """Overwrite one image of what `collect` gave."""

    def close(self) -> None:
        """End the threads after what they do now. Safe to call twice, from any thread."""

    @property
    def threads(self) -> Sequence[threading.Thread]:
        """Threads of Python that `start` started."""


# --- torch -----------------------------------------------------------------------------------------------------------


def decode_one(image: Encoded, size: int) -> Pixels:
    """uint8 [size, size, 3]. Raises DecodeError, also for another size or orientation than the index has."""
    # The index holds whatever passed the bound of its own day; the bytes are the same, so a larger one is no news.
    most = image.info.width * image.info.height
    return decode_window(image.data, image.window, image.flip, size, most, image.info)


class Pieces:
    """A batch that worker threads decode image by image. Made: begun; `wait` gives it."""

    def __init__(self, workers: Workers, images: Sequence[Encoded | None], size: int, counts: Counts) -> None:
        self._pixels = np.empty((len(images), size, size, 3), np.uint8)
        self._counts = counts
        there = [i for i, image in enumerate(images) if image is not None]
        # A few images a task: handing over single small pictures costs as much as decoding them.
        piece = max(1, min(16, len(there) // (2 * max(1, len(workers.threads)))))
        parts = [there[at : at + piece] for at in range(0, len(there), piece)]
        self._parts: list[Future[dict[int, str]]] = workers.start(functools.partial(self._decode, images, size), parts)

    def wait(self) -> Decoded:
        """The batch, once every image was tried."""
        failed: dict[int, str] = {}
        for part in self._parts:
            failed |= part.result()
        return Decoded(torch.from_numpy(self._pixels), failed)

    def _decode(self, images: Sequence[Encoded | None], size: int, positions: list[int]) -> dict[int, str]:
        failed = {}
        with self._counts.timed("decode"):
            for i in positions:
                image = images[i]
                assert image is not None
                try:
                    self._pixels[i] = decode_one(image, size)
                except DecodeError as error:
                    failed[i] = str(error)
        return failed


class TorchDecoder:
    """Images one by one on `count` threads; pixels on the CPU."""

    ahead = 2  # no thread idles while the last images of a batch are decoded

    def __init__(self, count: int, counts: Counts) -> None:
        self._count, self._counts = count, counts
        self._workers = Workers(0, "decode")
        self._flying: deque[Pieces] = deque()

    def start(self) -> None:
        """Start the threads."""
        self._workers = Workers(self._count, "decode")

    @property
    def threads(self) -> Sequence[threading.Thread]:
        """The threads."""
        return self._workers.threads

    def begin(self, images: Sequence[Encoded | None], size: int) -> Pieces:
        """Begin with a batch outside the order of `submit` and `collect`."""
        return Pieces(self._workers, images, size, self._counts)

    def submit(self, images: Sequence[Encoded | None], size: int) -> None:
        """Begin with a batch."""
        self._flying.append(self.begin(images, size))

    def collect(self) -> Decoded:
        """Wait for the oldest batch submitted."""
        return self._flying.popleft().wait()

    def put(self, images: Tensor, position: int, pixels: Pixels) -> None:
        """Overwrite one image."""
        images[position] = torch.from_numpy(pixels.copy())  # of Pillow's read-only buffers torch warns

    def close(self) -> None:
        """End the threads."""
        self._workers.stop()


# --- the choice ------------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """Which decoder a run has, and why."""

    name: Literal["dali", "torch"]
    why: str


def choose_decoder(wanted: str, device: torch.device) -> Choice:
    """The decoder that data.decoder means on a device. Raises DataError, with what to type, if it is dali and cannot
    be had."""
    if wanted == "torch":
        return Choice("torch", "data.decoder=torch")
    if wanted == "auto" and device.type != "cuda":
        return Choice("torch", "no GPU here")
    version, missing = _find_dali()
    if missing is None:
        where = f"GPU {gpu_number(device)}" if device.type == "cuda" else "the CPU"
        return Choice("dali", f"DALI {version} on {where}")
    if wanted == "auto":
        return Choice("torch", missing)
    raise DataError(f"data.decoder=dali needs DALI; {missing}. Or leave it at data.decoder=auto.")


def build_decoder(choice: Choice, threads: int, batch: int, device: torch.device, counts: Counts) -> Decoder:
    """The decoder of a choice. batch: images of the largest batch."""
    if choice.name == "torch":
        return TorchDecoder(threads, counts)
    from .decoder_dali import DaliDecoder

    return DaliDecoder(threads, batch, device, counts)


def gpu_number(device: torch.device) -> int:
    """The number of a CUDA device."""
    return torch.cuda.current_device() if device.index is None else device.index


def _find_dali() -> tuple[str | None, str | None]:
    """(version, None), or (None, why it cannot be used)."""
    try:
        return str(importlib.import_module("nvidia.dali").__version__), None
    except ModuleNotFoundError as error:
        if error.name in ("nvidia", "nvidia.dali"):
            return None, f"DALI is not installed: {INSTALL}"
        return None, f"DALI lacks {error.name}: {INSTALL}"
    except (ImportError, OSError) as error:  # OSError: a library that it loads
        return None, f"DALI cannot be imported ({error}): {INSTALL}"
