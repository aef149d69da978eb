"""The stages of the loader: how far ahead they are, what they count, and that none of them outlives it."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mvle.data import decoders
from mvle.data import loader as loader_module
from mvle.data.channel import Channel, ClosedError
from mvle.data.config import DataConfig
from mvle.data.loader import Loader
from mvle.data.plan import SamplingPlan
from mvle.data.shards import ShardSet
from mvle.data.tokenizer import Tokenizer
from mvle.data.workers import Workers

from .data_files import make_shards, number_words
from .faulty_shards import TOTAL, loader_of


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return number_words()


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    return make_shards(tmp_path, [48])


def settled(number: Callable[[], int]) -> int:
    """What a count is once it stays."""
    last, same = -1, 0
    while same < 20:
        now = number()
        last, same = now, same + 1 if now == last else 0
        time.sleep(0.01)
    return last


def loader_threads() -> list[str]:
    begins = ("loader", "read", "text", "decode")
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(begins)]


def native_threads() -> int:
    """Threads of the process, those that Python does not know too; 0 where that cannot be told."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else 0


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_the_loader_is_as_far_ahead_as_it_is_told_and_no_further(
    shards: ShardSet, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, prefetch: int
) -> None:
    decoded, read = [], []
    decode, fetch = decoders.decode_one, loader_module.fetch
    monkeypatch.setattr(decoders, "decode_one", lambda *given: (decoded.append(1), decode(*given))[1])
    monkeypatch.setattr(loader_module, "fetch", lambda *given: (read.append(1), fetch(*given))[1])
    config = DataConfig(prefetch=prefetch)
    with loader_of(shards, tokenizer, steps=None, config=config) as loader:
        batches = iter(loader)
        for taken in (1, 2, 3):
            next(batches)
            # ready ones, one in the loader's hand, and one in the decoder if its bytes had come before that
            assert prefetch + 1 <= settled(lambda: len(decoded)) // TOTAL - taken <= prefetch + 2
            assert prefetch + 3 <= settled(lambda: len(read)) // TOTAL - taken <= prefetch + 4
            assert len(loader._ready) == prefetch


def test_texts_are_made_while_images_are_decoded(
    shards: ShardSet, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, go = threading.Event(), threading.Event()
    encode, decode = tokenizer.encode, decoders.decode_one
    names: list[str] = []

    def watched(*arguments: Any) -> Any:
        names.append(threading.current_thread().name)
        encoded.set()
        return encode(*arguments)

    def held(*arguments: Any) -> Any:
        assert go.wait(20)
        return decode(*arguments)

    monkeypatch.setattr(tokenizer, "encode", watched)
    monkeypatch.setattr(decoders, "decode_one", held)
    with loader_of(shards, tokenizer) as loader:
        batches = iter(loader)
        threading.Thread(target=lambda: (encoded.wait(20), go.set()), daemon=True).start()  # no text, no image
        next(batches)
    assert set(names) == {"text-0"}


def test_a_batch_that_is_decoded_does_not_wait_for_the_bytes_of_the_next(
    shards: ShardSet, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, in_time = threading.Event(), []
    with loader_of(shards, tokenizer, steps=2) as loader:
        read = loader._read

        def held(step: int) -> Any:
            if step == 1:
                in_time.append(taken.wait(2))
            return read(step)

        monkeypatch.setattr(loader, "_read", held)
        batches = iter(loader)
        next(batches)
        taken.set()
        next(batches)
    assert in_time == [True]


@pytest.mark.parametrize("decoder", ["torch", "dali"])
@pytest.mark.parametrize("take", [0, 2])
def test_no_thread_outlives_the_loader(shards: ShardSet, tokenizer: Tokenizer, take: int, decoder: str) -> None:
    if decoder == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    gc.collect()  # pipelines of other tests
    before, all_before = set(loader_threads()), native_threads()
    loader = loader_of(shards, tokenizer, steps=None, config=DataConfig(decoder=decoder))
    batches = iter(loader)
    for _ in range(take):
        next(batches)
    if take:
        assert {"loader", "loader-read", "read-0", "text-0", "decode-1"} <= set(loader_threads())
    loader.close()
    assert set(loader_threads()) <= before
    assert settled(native_threads) <= all_before


def fail_while_reading(loader: Loader, patch: pytest.MonkeyPatch, error: BaseException) -> None:
    read = loader._read
    patch.setattr(loader, "_read", lambda step: read(step) if step < 3 else throw(error))


def fail_in_a_reader(loader: Loader, patch: pytest.MonkeyPatch, error: BaseException) -> None:
    patch.setattr("mvle.data.loader.fetch", lambda *_: throw(error))


def fail_in_the_text(loader: Loader, patch: pytest.MonkeyPatch, error: BaseException) -> None:
    patch.setattr(loader.tokenizer, "encode", lambda *_: throw(error))


def fail_in_a_decoder(loader: Loader, patch: pytest.MonkeyPatch, error: BaseException) -> None:
    patch.setattr(decoders, "decode_one", lambda *_: throw(error))


def throw(error: BaseException) -> Any:
    raise error


class PanicError(BaseException):
    """As Rust's panics come out of tokenizers: no Exception."""


@pytest.mark.parametrize("error", [MemoryError("no room"), PanicError("no room")], ids=["an exception", "a panic"])
@pytest.mark.parametrize("fail", [fail_while_reading, fail_in_a_reader, fail_in_the_text, fail_in_a_decoder])
def test_whatever_dies_is_raised_where_the_batches_are_taken(
    shards: ShardSet,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    fail: Callable[[Loader, pytest.MonkeyPatch, BaseException], None],
    error: BaseException,
) -> None:
    loader, taken = loader_of(shards, tokenizer), []
    fail(loader, monkeypatch, error)
    with pytest.raises(type(error), match="no room"):
        for batch in loader:
            taken.append(batch.pair_ids[0].item() // TOTAL)
    assert taken == ([0, 1, 2] if fail is fail_while_reading else [])  # whatever came before is handed over
    assert "failed" in loader.doing()
    assert not loader_threads()


def test_the_loader_counts_what_it_does(shards: ShardSet, tokenizer: Tokenizer) -> None:
    loader = loader_of(shards, tokenizer, steps=4)
    draws = [draw for step in range(4) for draw in loader.plan.draws(loader.plan.positions(step))]
    for batch in loader:
        assert len(batch) == TOTAL
    figures = loader.counts.figures()
    assert figures.bytes == sum(len(shards.image_bytes(draw.row)) for draw in draws)
    assert figures.takes == 5  # the end is taken too
    assert min(figures.read, figures.decode, figures.text) > 0
    assert 0 <= figures.ready <= 2 * 5
    assert loader.counts.figures().since(figures).bytes == 0


def slow(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def slowed(*arguments: Any) -> Any:
        time.sleep(seconds)
        return function(*arguments)

    return slowed


@pytest.mark.parametrize("work", ["reading", "decoding", "text"])
def test_the_slowest_stage_is_what_the_last_one_waits_for(
    shards: ShardSet, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    if work == "reading":
        monkeypatch.setattr(shards, "image_bytes", slow(shards.image_bytes, 0.005))
    elif work == "decoding":
        monkeypatch.setattr(decoders, "decode_one", slow(decoders.decode_one, 0.005))
    else:
        monkeypatch.setattr(tokenizer, "encode", slow(tokenizer.encode, 0.04))
    loader = loader_of(shards, tokenizer)
    list(loader)
    late = loader.counts.figures().late
    assert max(late, key=lambda name: late[name]) == work
    assert late[work] > 0.1  # seven steps of 30 ms and more


# --- what they stand on ----------------------------------------------------------------------------------------------


def test_waits_of_a_channel_end_when_it_stops() -> None:
    stop = threading.Event()
    channel: Channel[int] = Channel(1, stop)
    channel.put(1)
    threading.Timer(0.05, stop.set).start()
    with pytest.raises(ClosedError):
        channel.put(2)
    with pytest.raises(ClosedError):
        channel.get()
    assert len(channel) == 1


def test_no_threads_means_that_the_caller_does_it_at_once() -> None:
    workers, done = Workers(0, "nobody"), []
    futures = workers.start(lambda item: (done.append(threading.current_thread()), item / (item - 2))[1], [1, 2, 3])
    assert set(done) == {threading.current_thread()} and len(done) == 3
    assert futures[0].result() == -1 and futures[2].result() == 3
    with pytest.raises(ZeroDivisionError):
        futures[1].result()
    workers.stop()


def test_a_disk_is_told_of_the_next_step_and_of_no_more_bytes_than_allowed(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make_shards(tmp_path, [8, 8])
    told: list[tuple[int, int, int]] = []
    advise = os.posix_fadvise
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *what: (told.append(what), advise(fd, *what)))
    plan = SamplingPlan(shards, seed=0, batch_total=4, slots=2)

    def steps(read_ahead: int) -> int:
        told.clear()
        with Loader(DataConfig(read_ahead=read_ahead), plan, shards, tokenizer, 16, 12, steps=3) as loader:
            assert len(list(loader)) == 3
        return len(told)

    assert steps(0) == 0
    assert 2 <= steps(1) <= 8  # two steps of four, but for what lies in shards that are not open yet
    assert all(how == os.POSIX_FADV_WILLNEED and size < 10_000 for _, size, how in told)
    columns = [index.columns for index in shards.indexes]
    ranges = {(int(o), int(n)) for c in columns for o, n in zip(c["image.offset"], c["image.size"], strict=True)}
    assert {(offset, size) for offset, size, _ in told} <= ranges
