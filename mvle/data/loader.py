"""The loader: the plan's draws -> bytes -> windows -> a Batch, one step ahead of the model.

A thread of its own prepares the next batch while the model works on this one; worker threads decode (torchvision,
Pillow and torch let go of the interpreter while they do). Everything random comes from the plan, so the batches of a
step are the same on any number of ranks and threads.

A bad image: every image was decoded once when it was indexed, so a checksum or decode error now means that a disk or a
copy went wrong. The pair is replaced by the row that its slot would get next of the same source
(SamplingPlan.replacement), the key is named once in a warning, and the run stops with the list when more than
data.max_bad_share of the images fail. Which row replaces it depends on the counter and the disk alone, not on what this
process met before: a resumed run and any number of ranks choose the same.

A bad file (gone, cut, another one in its place) is no bad image: DataError at once, with its name.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
import torch
from mvle_kernels import Packed

from .batch import Batch
from .config import DataConfig
from .decode import MAX_PIXELS, DecodeError, Pixels, centred_square, decode_mask_window, decode_window
from .errors import DataError
from .plan import Draw, SamplingPlan
from .shards import ShardSet
from .tokenizer import Tokenizer
from .workers import Workers

log = logging.getLogger(__name__)

_ATTEMPTS = 64  # rows tried in place of a bad one before the run stops
_EARLY_PAIRS = 1000  # before so many pairs were read, max_bad_share is a share of this number
_RECENT_PAIRS = 10_000  # bad images found longer ago do not count: a disk may begin to fail after months
_CLOSE_SECONDS = 5.0  # how long close() waits for a thread that hangs in a read


class BadImageError(DataError):
    """An image whose bytes are not those that were indexed, or do not decode any more."""


class Loader:
    """Batches of one rank for steps start_step .. steps - 1 (steps None: for ever), one step ahead. Iterate it once.

    image_size: side of the windows in pixels, or what gives it for a step (on a thread of the loader) · max_tokens:
    longest caption with bos and eos · row_multiple: the packed text is rounded up to it · pin_memory: put batches where
    a GPU fetches them while the CPU goes on.
    wait_seconds: how long the consumer waited for batches · bad: key and shard -> reason. A failure in the threads is
    raised by the iterator.
    """

    def __init__(
        self,
        config: DataConfig,
        plan: SamplingPlan,
        shards: ShardSet,
        tokenizer: Tokenizer,
        image_size: int | Callable[[int], int],
        max_tokens: int,
        row_multiple: int = 1,
        rank: int = 0,
        ranks: int = 1,
        start_step: int = 0,
        steps: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        plan.positions(0, rank, ranks)  # says at once if the ranks do not divide the slots
        self.config, self.plan, self.shards, self.tokenizer = config, plan, shards, tokenizer
        self.max_tokens, self.row_multiple = max_tokens, row_multiple
        self.image_size = image_size if callable(image_size) else lambda step: image_size
        self.rank, self.ranks, self.start_step, self.steps = rank, ranks, start_step, steps
        self.pin_memory = pin_memory
        self._whose = f"rank {rank}: " if ranks > 1 else ""  # how its messages begin
        self.wait_seconds = 0.0
        self.bad: dict[str, str] = {}
        self._bad_rows: set[int] = set()
        self._pairs = 0
        self._found: deque[int] = deque()  # pairs read when each of the recent bad images was found
        self._ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=1)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._workers: Workers | None = None
        self._stage = "not started"

    def doing(self) -> str:
        """What the threads are at, in a few words, for a message about a wait that is too long; never waits itself."""
        if reads := self.shards.reading():
            names = ", ".join(f"{path} (for {seconds:.0f} s)" for path, seconds in reads)
            return f"{self._stage}: reading {names}"
        return self._stage

    def __iter__(self) -> Iterator[Batch]:
        if self._stop.is_set():
            raise RuntimeError("this loader is closed: a loader is iterated once. Make another one.")
        if self._thread is None:
            self._workers = Workers(self.config.threads, "decode")
            self._thread = threading.Thread(target=self._run, daemon=True, name="loader")
            self._thread.start()
        try:
            while True:
                started = time.perf_counter()
                batch = self._ready.get()
                self.wait_seconds += time.perf_counter() - started
                if batch is None:
                    return
                if isinstance(batch, BaseException):
                    raise batch
                yield batch
        finally:
            self.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the threads. Safe to call twice. One that hangs in a read is waited for a few seconds, then left behind
        with a warning: it is a daemon, and the process can end without it."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self._thread is None or self._workers is None:
            return
        while not self._ready.empty():
            self._ready.get_nowait()
        until = time.monotonic() + _CLOSE_SECONDS
        self._thread.join(_CLOSE_SECONDS)  # before the workers end: it may still need them for the batch in hand
        self._workers.stop()
        for thread in self._workers.threads:
            thread.join(max(0.0, until - time.monotonic()))
        with contextlib.suppress(queue.Full):
            self._ready.put_nowait(None)  # ends the wait of a consumer in another thread
        if any(thread.is_alive() for thread in (self._thread, *self._workers.threads)):
            log.warning("%sclosing the loader leaves a thread behind that hangs: %s", self._whose, self.doing())

    # --- the loader's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        step = self.start_step
        try:
            while not self._stop.is_set() and (self.steps is None or step < self.steps):
                batch = self.load(step)
                self._stage = f"step {step}, waiting for the trainer"
                self._hand_over(batch)
                step += 1
            self._stage = "finished"
            self._hand_over(None)
        # The consumer raises it, with this thread's traceback. A panic of Rust (tokenizers) is no Exception.
        except BaseException as error:
            self._stage = f"{self._stage}, failed ({type(error).__name__})"
            self._hand_over(error)

    def _hand_over(self, batch: Batch | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(batch, timeout=0.1)
            except queue.Full:
                continue

    def load(self, step: int) -> Batch:
        """The batch of one step, made here and now: what the iterator gives for it."""
        self._stage = f"step {step}, preparing images"
        draws = self.plan.draws(self.plan.positions(step, self.rank, self.ranks))
        size = self.image_size(step)
        images = np.empty((len(draws), size, size, 3), np.uint8)
        failed = self._decode_all(draws, images)
        self._pairs += len(draws)
        replaced = 0
        for i, error in enumerate(failed):  # in the order of the batch, whichever thread was first
            if error is not None:
                draws[i] = self._replace(draws[i], error, images[i])
                replaced += 1

        self._stage = f"step {step}, preparing captions"
        captions = [self.shards.caption(draw.row, draw.caption) for draw in draws]
        ids, truncated = self.tokenizer.encode(captions, self.max_tokens)
        batch = _assemble(self.shards, draws, torch.from_numpy(images), ids, self.max_tokens, self.row_multiple)
        batch = replace(batch, replaced=replaced, truncated=truncated)
        return pinned(batch) if self.pin_memory else batch

    def _decode_all(self, draws: Sequence[Draw], images: Pixels) -> list[BadImageError | None]:
        if self._workers is None:
            return [self._decode(draw, image) for draw, image in zip(draws, images, strict=True)]
        # A few pairs a task: handing over single small pictures costs as much as decoding them.
        size = max(1, min(16, len(draws) // (2 * self.config.threads)))
        parts = self._workers.map(
            lambda at: [self._decode(draws[i], images[i]) for i in range(at, min(at + size, len(draws)))],
            range(0, len(draws), size),
        )
        return [error for part in parts for error in part]

    def _decode(self, draw: Draw, into: Pixels) -> BadImageError | None:
        try:
            into[:] = read_window(self.shards, draw, len(into), self.config.max_pixels)
        except BadImageError as error:
            return error
        return None

    def _replace(self, draw: Draw, error: BadImageError, into: Pixels) -> Draw:
        """Find the next row of the slot that decodes; count and name the bad one."""
        bad: tuple[int, BadImageError] | None = (draw.row, error)
        for attempt in range(1, _ATTEMPTS + 1):
            if bad is not None:
                self._note(*bad)
            other = self.plan.replacement(draw.counter, attempt)
            error_again = self._decode(other, into)
            if error_again is None:
                return other
            bad = (other.row, error_again)
        raise DataError(f"{self._whose}{_ATTEMPTS} images in a row cannot be read.\n{self._bad_list()}")

    def _note(self, row: int, error: BadImageError) -> None:
        if row in self._bad_rows:
            return
        self._bad_rows.add(row)
        name = f"{self.shards.name(row)} ({self.shards.shard_path(row)})"
        self.bad[name] = str(error)
        log.warning("%simage %s is bad and gets replaced: %s", self._whose, name, error)
        self._found.append(self._pairs)
        while self._found[0] <= self._pairs - _RECENT_PAIRS:
            self._found.popleft()
        share, recent = self.config.max_bad_share, min(self._pairs, _RECENT_PAIRS)
        if len(self._found) > share * max(recent, _EARLY_PAIRS):
            raise DataError(
                f"{self._whose}{len(self._found)} images failed within {recent} pairs, over "
                f"data.max_bad_share={share}.\n{self._bad_list()}"
            )

    def _bad_list(self) -> str:
        lines = [f"    {name}: {reason}" for name, reason in self.bad.items()]
        return "\n".join([*lines, "Fetch these shards again, then index them: python -m mvle.data index SHARDS"])


# --- evaluation ------------------------------------------------------------------------------------------------------


def evaluation_batch(
    shards: ShardSet,
    rows: Sequence[int],
    caption_indices: Sequence[int],
    tokenizer: Tokenizer,
    image_size: int,
    max_tokens: int,
    row_multiple: int = 1,
    image_ratio: float = 0.6,
    extras: bool = False,
) -> Batch:
    """Given pairs as they are: shorter side to image_size, centre crop, no flip; pair_ids are the row numbers.

    extras: also "objects" (uint8 [B, image_size, image_size], 1 = a pixel of an object; left out where a pair has no
    objects.png) and "scene" (list of dict or None; positions moved with the crop). Raises BadImageError with the key.
    """
    draws = []
    for row, caption in zip(rows, caption_indices, strict=True):
        window = centred_square(*shards.size(int(row)))
        draws.append(Draw(int(row), int(row), int(caption), window, False, float(image_ratio), (0, 0, 0, 0)))
    images = np.empty((len(draws), image_size, image_size, 3), np.uint8)
    for i, draw in enumerate(draws):
        try:
            images[i] = read_window(shards, draw, image_size, MAX_PIXELS)
        except BadImageError as error:
            raise BadImageError(f"{shards.name(draw.row)} in {shards.shard_path(draw.row)}: {error}") from error
    ids, _ = tokenizer.encode([shards.caption(draw.row, draw.caption) for draw in draws], max_tokens)
    batch = _assemble(shards, draws, torch.from_numpy(images), ids, max_tokens, row_multiple)
    if extras:
        batch.extras.update(_extras(shards, draws, image_size))
    return batch


def read_window(shards: ShardSet, draw: Draw, size: int, max_pixels: int) -> Pixels:
    """The drawn window: uint8 [size, size, 3]. Raises BadImageError where the bytes changed or do not decode, DataError
    where the shard is not the file that was opened."""
    data = shards.image_bytes(draw.row)
    if zlib.crc32(data) != shards.image_crc32(draw.row):
        shards.check_shard(draw.row)  # another file, or bad bytes in the right one?
        raise BadImageError("its bytes are not those that were indexed (checksum)")
    try:
        # The index holds whatever passed the bound of its own day; the bytes are the same, so a larger one is no news.
        width, height = shards.size(draw.row)
        return decode_window(data, draw.window, draw.flip, size, max(max_pixels, width * height))
    except DecodeError as error:
        raise BadImageError(str(error)) from error


def pinned(batch: Batch) -> Batch:
    """The batch in page-locked memory, from which a GPU copies while the CPU goes on."""
    text = replace(batch.text, rows=batch.text.rows.pin_memory(), offsets=batch.text.offsets.pin_memory(), cache={})
    return replace(
        batch,
        images=batch.images.pin_memory(),
        text=text,
        pair_ids=batch.pair_ids.pin_memory(),
        image_ids=batch.image_ids.pin_memory(),
        text_ids=batch.text_ids.pin_memory(),
    )


def _assemble(
    shards: ShardSet, draws: Sequence[Draw], images: torch.Tensor, ids: list[list[int]], max_tokens: int, multiple: int
) -> Batch:
    layout = Packed.layout_of([len(one) for one in ids], multiple, max_length=max_tokens)
    rows = torch.zeros(layout.total, dtype=torch.int32)
    flat = [token for one in ids for token in one]
    rows[: len(flat)] = torch.tensor(flat, dtype=torch.int32)
    return Batch(
        images=images,
        text=layout.with_rows(rows),
        pair_ids=torch.tensor([draw.counter for draw in draws], dtype=torch.int64),
        image_ids=torch.tensor([shards.image_id(draw.row) for draw in draws], dtype=torch.int64),
        text_ids=torch.tensor([shards.text_id(draw.row, draw.caption) for draw in draws], dtype=torch.int64),
        keys=[shards.name(draw.row) for draw in draws],
        image_ratio=tuple(draw.ratio for draw in draws),
    )


def _extras(shards: ShardSet, draws: Sequence[Draw], size: int) -> dict[str, Any]:
    import json

    scenes, masks = [], []
    for draw in draws:
        scene, mask = shards.extra(draw.row, "scene.json"), shards.extra(draw.row, "objects.png")
        scenes.append(_moved(json.loads(scene), draw.window, size) if scene is not None else None)
        if mask is not None:
            masks.append(decode_mask_window(mask, draw.window, size))
    found: dict[str, Any] = {"scene": scenes}
    if len(masks) == len(draws):
        found["objects"] = torch.from_numpy(np.stack(masks))
    return found


def _moved(scene: dict[str, Any], window: tuple[int, int, int, int], size: int) -> dict[str, Any]:
    """The scene with its positions in pixels of the shown window."""
    y, x, height, width = window
    objects = [
        {**o, "x": (o["x"] - x) * size / width, "y": (o["y"] - y) * size / height, "radius": o["radius"] * size / width}
        for o in scene.get("objects", [])
    ]
    return {**scene, "objects": objects}
