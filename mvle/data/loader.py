"""The loader: the plan's draws -> bytes -> windows -> a Batch, some steps ahead of the model.

    loader-read     asks the plan which pairs a step has; `read` threads fetch their bytes, and a `text` thread
                    tokenises their captions meanwhile
    loader          gives the bytes to the decoder (decoders.py), replaces what is bad, puts the batch together
    whoever iterates takes it

At most data.prefetch batches are ready, one is being put together behind them while the decoder is at the next, and the
bytes of two more are read. (torchvision, Pillow, DALI, torch and zlib let go of the interpreter while they work.)
Everything random comes from the plan, so the batches of a step are the same on any number of ranks and threads.

A bad image: every image was decoded once when it was indexed (or is, by torch, before anything shows it), so a checksum
or decode error now means that a disk or a copy went wrong. The pair is replaced by the row that its slot would get next
of the same source (SamplingPlan.replacement), the key is named once in a warning, and the run stops with the list when
more than data.max_bad_share of the images fail. Which row replaces it depends on the counter and the disk alone, not on
what this process met before: a resumed run and any number of ranks choose the same.

A bad file (gone, cut, another one in its place) is no bad image: DataError at once, with its name.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from types import TracebackType

import torch

from .bad_images import BadImageError, BadImages
from .batch import Batch
from .channel import Channel, ClosedError
from .config import DataConfig
from .counts import Counts
from .decode import Pixels
from .decoders import Encoded, build_decoder, choose_decoder
from .errors import DataError
from .pairs import assemble, fetch, pinned, read_window
from .plan import Draw, SamplingPlan
from .shards import ShardSet
from .tokenizer import Tokenizer
from .workers import Workers

log = logging.getLogger(__name__)

_ATTEMPTS = 64  # rows tried in place of a bad one before the run stops
_CLOSE_SECONDS = 5.0  # how long close() waits for a thread that hangs in a read
_READ_AHEAD = 1  # batches of bytes that wait for the decoder; one more is in the hands of the thread that reads
_CPU = torch.device("cpu")


@dataclass
class _Step:
    """A batch in the making. images: None where reading failed, and then errors has the reason, by position."""

    number: int
    size: int
    draws: list[Draw]
    images: list[Encoded | None]
    errors: dict[int, BadImageError]
    text: Future[tuple[list[list[int]], int]]  # tokens of each caption, how many captions were cut


class Loader:
    """Batches of one rank for steps start_step .. steps - 1 (steps None: for ever), some ahead. Iterate it once.

    image_size: side of the windows in pixels, or what gives it for a step (on a thread of the loader) · max_tokens:
    longest caption with bos and eos · row_multiple: the packed text is rounded up to it · pin_memory: put batches where
    a GPU fetches them while the CPU goes on · device: whose GPU DALI uses.
    decoder: which one, and why · wait_seconds: how long the consumer waited for batches · bad: key and shard -> reason
    counts: where the time goes. A failure in the threads is raised by the iterator. Raises DataError where
    data.decoder cannot be had.
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
        device: torch.device = _CPU,
    ) -> None:
        pairs = len(plan.positions(0, rank, ranks))  # says at once if the ranks do not divide the slots
        self.config, self.plan, self.shards, self.tokenizer = config, plan, shards, tokenizer
        self.max_tokens, self.row_multiple = max_tokens, row_multiple
        self.image_size = image_size if callable(image_size) else lambda step: image_size
        self.rank, self.ranks, self.start_step, self.steps = rank, ranks, start_step, steps
        self.pin_memory = pin_memory
        self._whose = f"rank {rank}: " if ranks > 1 else ""  # how its messages begin
        self.wait_seconds = 0.0
        self.counts = Counts()
        self.decoder = choose_decoder(config.decoder, device)
        self._decoder = build_decoder(self.decoder, config.threads, pairs, device, self.counts)
        self._bad = BadImages(shards, config.max_bad_share, self._whose)
        self._stop = threading.Event()
        self._read_steps: Channel[_Step | BaseException | None] = Channel(_READ_AHEAD, self._stop)
        self._ready: Channel[Batch | BaseException | None] = Channel(config.prefetch, self._stop)
        self._readers, self._writers = Workers(0, "read"), Workers(0, "text")  # nothing is ahead before the iteration
        self._threads: list[threading.Thread] = []
        self._stage = "not started"
        self._coming: tuple[int, list[Draw]] = (-1, [])  # a step that is not read yet

    @property
    def bad(self) -> dict[str, str]:
        """The bad images so far: key and shard -> reason."""
        return self._bad.reasons

    def doing(self) -> str:
        """What the threads are at, in a few words, for a message about a wait that is too long; never waits itself."""
        if reads := self.shards.reading():
            names = ", ".join(f"{path} (for {seconds:.0f} s)" for path, seconds in reads)
            return f"{self._stage}: reading {names}"
        return self._stage

    def __iter__(self) -> Iterator[Batch]:
        if self._stop.is_set():
            raise RuntimeError("this loader is closed: a loader is iterated once. Make another one.")
        if not self._threads:
            self._start()
        try:
            while True:
                started = time.perf_counter()
                self.counts.add(takes=1, ready=len(self._ready))
                batch = self._ready.get()
                self.wait_seconds += time.perf_counter() - started
                if batch is None:
                    return
                if isinstance(batch, BaseException):
                    raise batch
                if batch.images.is_cuda:
                    batch.images.record_stream(torch.cuda.current_stream(batch.images.device))
                yield batch
        except ClosedError:
            return
        finally:
            self.close()

    def _start(self) -> None:
        self._decoder.start()
        self._readers, self._writers = Workers(self.config.threads, "read"), Workers(1, "text")
        self._threads = [
            threading.Thread(target=self._read_ahead, daemon=True, name="loader-read"),
            threading.Thread(target=self._make_ahead, daemon=True, name="loader"),
        ]
        for thread in self._threads:
            thread.start()

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
        until = time.monotonic() + _CLOSE_SECONDS
        for thread in self._threads:  # before the workers end: they may still need them for the batch in hand
            thread.join(max(0.0, until - time.monotonic()))
        self._readers.stop()
        self._writers.stop()
        self._decoder.close()
        workers = [*self._readers.threads, *self._writers.threads, *self._decoder.threads]
        for thread in workers:
            thread.join(max(0.0, until - time.monotonic()))
        if any(thread.is_alive() for thread in (*self._threads, *workers)):
            log.warning("%sclosing the loader leaves a thread behind that hangs: %s", self._whose, self.doing())

    # --- the loader's threads ----------------------------------------------------------------------------------------

    def _read_ahead(self) -> None:
        """Read step after step; what ends it goes the way of the steps."""
        step = self.start_step
        try:
            while self.steps is None or step < self.steps:
                self._read_steps.put(self._read(step))
                step += 1
            self._read_steps.put(None)
        except ClosedError:
            pass
        # The consumer raises it, with this thread's traceback. A panic of Rust (tokenizers) is no Exception.
        except BaseException as error:
            self._pass_on(self._read_steps, error)

    def _make_ahead(self) -> None:
        """Decode and put together step after step, in order, with as many in the decoder as it holds."""
        flying: deque[_Step] = deque()
        end: BaseException | bool = False  # True: no step follows those that fly; an error: what comes behind them
        step = self.start_step
        try:
            while not end or flying:
                while not end and len(flying) < self._decoder.ahead and (not flying or len(self._read_steps)):
                    self._stage = f"step {step}, preparing images"
                    with self.counts.timed("late_reading"):
                        given = self._read_steps.get()
                    if isinstance(given, _Step):
                        with self.counts.timed("late_decoding"):
                            self._decoder.submit(given.images, given.size)
                        flying.append(given)
                    else:
                        end = True if given is None else given
                if flying:
                    batch = self._finish(flying.popleft())
                    self._stage = f"step {step}, waiting for the trainer"
                    self._ready.put(batch)
                    step += 1
            if isinstance(end, BaseException):
                raise end
            self._stage = "finished"
            self._ready.put(None)
        except ClosedError:
            pass
        except BaseException as error:  # as above
            self._stage = f"{self._stage}, failed ({type(error).__name__})"
            self._pass_on(self._ready, error)

    @staticmethod
    def _pass_on(channel: Channel, error: BaseException) -> None:
        try:
            channel.put(error)
        except ClosedError:
            log.debug("the loader was closed before it could say: %s", error)

    # --- a step ------------------------------------------------------------------------------------------------------

    def load(self, step: int) -> Batch:
        """The batch of one step, made here and now: what the iterator gives for it. Not while it is iterated."""
        self._stage = f"step {step}, preparing images"
        read = self._read(step)
        self._decoder.submit(read.images, read.size)
        return self._finish(read)

    def _draws(self, step: int) -> list[Draw]:
        """The draws of a step; a disk may begin with those of the next, which are kept until then."""
        known, draws = self._coming
        if known != step:
            draws = self.plan.draws(self.plan.positions(step, self.rank, self.ranks))
        if self.config.read_ahead and (self.steps is None or step + 1 < self.steps):
            coming = self.plan.draws(self.plan.positions(step + 1, self.rank, self.ranks))
            self.shards.expect((draw.row for draw in coming), self.config.read_ahead * 2**20)
            self._coming = step + 1, coming
        return draws

    def _read(self, number: int) -> _Step:
        draws = self._draws(number)
        (text,) = self._writers.start(self._tokens, [list(draws)])
        # A few pairs a task, as in decoders.py.
        piece = max(1, min(16, len(draws) // (2 * self.config.threads)))
        parts = self._readers.map(self._fetch_all, [draws[at : at + piece] for at in range(0, len(draws), piece)])
        fetched = [image for part in parts for image in part]
        errors = {i: image for i, image in enumerate(fetched) if isinstance(image, BadImageError)}
        images = [None if isinstance(image, BadImageError) else image for image in fetched]
        return _Step(number, self.image_size(number), draws, images, errors, text)

    def _fetch_all(self, draws: Sequence[Draw]) -> list[Encoded | BadImageError]:
        found: list[Encoded | BadImageError] = []
        with self.counts.timed("read"):
            for draw in draws:
                try:
                    found.append(fetch(self.shards, draw))
                except BadImageError as error:
                    found.append(error)
        self.counts.add(bytes=sum(len(image.data) for image in found if isinstance(image, Encoded)))
        return found

    def _tokens(self, draws: Sequence[Draw]) -> tuple[list[list[int]], int]:
        with self.counts.timed("text"):
            captions = [self.shards.caption(draw.row, draw.caption) for draw in draws]
            return self.tokenizer.encode(captions, self.max_tokens)

    def _finish(self, step: _Step) -> Batch:
        """What the decoder gives of the oldest batch in it, with whatever is bad replaced, and its captions."""
        self._stage = f"step {step.number}, preparing images"
        with self.counts.timed("late_decoding"):
            images, failed = self._decoder.collect()
        for i, (draw, image) in enumerate(zip(step.draws, step.images, strict=True)):
            if image is not None and not image.verified and i not in failed:
                self.shards.verify(draw.row)
        errors = step.errors | {i: BadImageError(reason) for i, reason in failed.items()}
        self._bad.pairs += len(step.draws)
        for i in sorted(errors):  # in the order of the batch, whichever thread was first
            step.draws[i], pixels = self._replace(step.draws[i], errors[i], step.size)
            self._decoder.put(images, i, pixels)

        self._stage = f"step {step.number}, preparing captions"
        with self.counts.timed("late_text"):
            ids, truncated = step.text.result() if not errors else self._tokens(step.draws)
        batch = assemble(self.shards, step.draws, images, ids, self.max_tokens, self.row_multiple)
        batch = replace(batch, replaced=len(errors), truncated=truncated)
        return pinned(batch) if self.pin_memory else batch

    def _replace(self, draw: Draw, error: BadImageError, size: int) -> tuple[Draw, Pixels]:
        """Find the next row of the slot that decodes, and its window; count and name the bad one. By torch whatever the
        decoder is, so that each gives the same row."""
        bad = draw.row
        for attempt in range(1, _ATTEMPTS + 1):
            self._bad.note(bad, str(error))
            other = self.plan.replacement(draw.counter, attempt)
            try:
                return other, read_window(self.shards, other, size)
            except BadImageError as again:
                bad, error = other.row, again
        raise DataError(f"{self._whose}{_ATTEMPTS} images in a row cannot be read.\n{self._bad.listed()}")
