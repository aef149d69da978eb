"""Indexes of many shards: those that need one, several at once, and what came of each.

    for done in index_many(paths, IndexOptions(workers=8)):
        done.path, done.index or done.error, done.kept

A shard whose index is there, fits the options and is not stale is left alone, so that a run that was killed goes on
where it was; an index appears under its name when it is whole. Several at once are processes: decoding lets go of the
interpreter, but parsing captions and packing columns do not. A process takes seconds to start, so a set of a few MiB is
indexed by this one.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace

from .decode import MAX_PIXELS
from .errors import DataError
from .files import File, status
from .index import ShardIndex
from .indexing import IndexPlaceError, index_shard

SMALL = 64 * 2**20  # bytes of all shards that one process indexes as fast as several


@dataclass(frozen=True)
class IndexOptions:
    """How shards are indexed. caption_field, max_pixels, verify, index_folder, wds2idx: see `index_shard`.

    workers: processes; None: as many as there are cores and shards, one for less than SMALL · threads: that decode in
    each; None: two alone, one beside others · again: make every index anew
    """

    caption_field: str | None = None
    max_pixels: int = MAX_PIXELS
    verify: bool = True
    index_folder: str | None = None
    wds2idx: bool = False
    workers: int | None = None
    threads: int | None = None
    again: bool = False


@dataclass(frozen=True)
class Indexed:
    """What came of a shard: its index, or why it has none. kept: the index was there already."""

    path: File
    index: ShardIndex | None
    error: str | None
    seconds: float
    kept: bool = False


def index_many(paths: Sequence[File], options: IndexOptions) -> Iterator[Indexed]:
    """Index each shard that needs it; each as soon as it is done. Raises IndexPlaceError, which holds for all."""
    waiting: list[File] = []
    for path in paths:
        index = None if options.again else kept_index(path, options)
        if index is None:
            waiting.append(path)
        else:
            yield Indexed(path, index, None, 0.0, kept=True)
    workers = min(options.workers or _workers(waiting), max(1, len(waiting)))
    options = replace(options, threads=options.threads or (2 if workers == 1 else 1))
    if workers == 1:
        for path in waiting:
            yield _index(path, options)
        return
    # spawn: what was forked may hold a lock of a thread that it does not have
    left = dict.fromkeys(waiting)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(_index, path, options) for path in waiting]):
                done = future.result()
                del left[done.path]
                yield done
        except BrokenProcessPool:  # a process was killed, and with it the pool; which shard it had nobody says
            pass
        except BaseException:  # raised again: nothing that is queued is begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for path in left:
        yield _index_alone(path, options)


def _index_alone(path: File, options: IndexOptions) -> Indexed:
    """In a process of its own, which may be killed."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_index, path, options).result()
        except BrokenProcessPool:
            return Indexed(path, None, "the process that indexed it was killed. Is there enough memory for it?", 0.0)


def kept_index(path: File, options: IndexOptions) -> ShardIndex | None:
    """The index of a shard if it is one that these options would make, and the shard did not change; else None."""
    try:
        index = ShardIndex(path, options.index_folder)
        if index.stale():
            return None
    except (DataError, OSError):  # none, a damaged one, or a shard that cannot be asked for: indexing says why
        return None
    header = index.header
    same = (header["caption_field"], header["max_pixels"]) == (options.caption_field, options.max_pixels)
    return index if same and (index.verified or not options.verify) else None


def _workers(paths: Sequence[File]) -> int:
    total = 0
    for path in paths:
        try:
            total += status(path).size
        except (DataError, OSError):  # indexing says what is wrong with it
            continue
        if total > SMALL:
            return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1


def _index(path: File, options: IndexOptions) -> Indexed:
    started = time.perf_counter()
    index, error = None, None
    try:
        index = index_shard(
            path,
            options.caption_field,
            options.max_pixels,
            options.threads or 1,
            options.index_folder,
            options.verify,
            options.wds2idx,
        )
    except IndexPlaceError:
        raise
    except (DataError, OSError) as caught:
        error = str(caught)
    return Indexed(path, index, error, time.perf_counter() - started)
