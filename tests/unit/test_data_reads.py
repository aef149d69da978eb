"""Reads of shards that fail for a moment, for good, or hang: tried again, named, and never in the way of an end."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mvle.data import files as files_module
from mvle.data import loader as loader_module
from mvle.data.errors import DataError
from mvle.data.loader import Loader
from mvle.data.reader import ShardReader
from mvle.data.shards import ShardSet
from mvle.data.tokenizer import Tokenizer

from .data_files import make_shards, number_words
from .faulty_shards import loader_of


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return number_words()


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_read_that_fails_for_a_moment_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    shards = make_shards(tmp_path, [3])
    right = shards.image_bytes(1)
    read, open_file, reads, opens = os.pread, os.open, [], []

    def flaky(fd: int, size: int, offset: int) -> bytes:  # no disk fails when asked to
        reads.append(fd)
        if len(reads) <= 2:
            raise OSError(code, os.strerror(code))
        return read(fd, size, offset)

    def counted(path: Path, flags: int) -> int:
        opens.append(path)
        return open_file(path, flags)

    monkeypatch.setattr(files_module, "RETRY_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(os, "pread", flaky)
    monkeypatch.setattr(os, "open", counted)
    assert shards.image_bytes(1) == right
    assert (len(reads), len(opens)) == (3, 2)  # each time from a new handle: a stale one stays stale
    assert caplog.text.count(os.strerror(code)) == 2 and "part-000.tar" in caplog.text


def test_a_read_that_fails_for_good_names_the_shard_and_the_reason(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make_shards(tmp_path, [12])

    def broken(fd: int, size: int, offset: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files_module, "RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(os, "pread", broken)
    loader = loader_of(shards, tokenizer)
    with pytest.raises(DataError, match=r"part-000\.tar cannot be read, after 3 tries: .*Input/output error"):
        list(loader)
    assert loader.bad == {}


@contextlib.contextmanager
def hanging(shard: Path) -> Iterator[None]:
    """A shard whose open hangs, as on a server that does not answer: a pipe that nobody writes to."""
    shard.unlink()
    os.mkfifo(shard)
    try:
        yield
    finally:
        release(shard)


def release(shard: Path) -> None:
    """Let whoever hangs go on, and fail."""
    if shard.exists():
        writer = os.open(shard, os.O_RDWR)
        shard.unlink()
        os.close(writer)


def until(condition: Callable[[], bool]) -> None:
    """Wait for another thread, but not for ever."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it never came")


def consume(loader: Loader) -> threading.Thread:
    """A thread that takes batches until the loader fails."""

    def take() -> None:
        with contextlib.suppress(DataError):
            list(loader)

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    return thread


def test_no_more_files_stay_open_than_are_allowed(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.tar" for i in range(9)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 9)
    reader = ShardReader(paths, max_open=3)
    for i in (0, 1, 2, 0, 3, 4, 0, 5, 6, 7, 8):
        assert reader.read(i, 3, 2) == bytes([i]) * 2
        assert len(reader._open) <= 3
    assert list(reader._open) == [6, 7, 8]
    reader.read(6, 0, 1)
    reader.read(0, 0, 1)
    assert list(reader._open) == [8, 6, 0]  # the least used went


def test_a_loader_says_what_it_is_at(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards = make_shards(tmp_path, [5, 48])
    loader = loader_of(shards, tokenizer)
    assert loader.doing() == "not started"
    with loader:
        batches = iter(loader)
        next(batches)
        until(lambda: loader.doing() in {f"step {step}, waiting for the trainer" for step in (1, 2, 3)})

    stuck = ShardSet.open(str(tmp_path / "*.tar"))
    with hanging(stuck.shard_path(5)), loader_of(stuck, tokenizer) as loader:
        consumer = consume(loader)
        until(lambda: "reading" in loader.doing())
        until(lambda: f"step 0, preparing images: reading {stuck.shard_path(5)} (for " in loader.doing())
        assert stuck.image_bytes(0)  # one that hangs holds up no other shard
        release(stuck.shard_path(5))
        consumer.join()


def test_closing_while_a_read_hangs_comes_back_and_says_so(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loader_module, "_CLOSE_SECONDS", 0.05)
    shards = make_shards(tmp_path, [48])
    loader = loader_of(shards, tokenizer)
    with hanging(shards.shard_path(0)):
        consumer = consume(loader)
        until(lambda: "reading" in loader.doing())
        loader.close()
        loader.close()
        assert caplog.text.count("leaves a thread behind") == 1 and "part-000.tar" in caplog.text
        consumer.join()  # nor does it leave someone waiting
    until(lambda: not [t for t in threading.enumerate() if t.name == "loader" or t.name.startswith("decode")])


def test_a_process_ends_although_a_read_hangs(tmp_path: Path) -> None:
    make_shards(tmp_path, [12])
    program = textwrap.dedent("""
        import sys, threading, time
        from mvle.data import loader
        from mvle.data.config import DataConfig
        from mvle.data.plan import SamplingPlan
        from mvle.data.shards import ShardSet
        from mvle.data.tokenizer import train_bpe

        loader._CLOSE_SECONDS = 0.1
        shards = ShardSet.open(sys.argv[1])
        import os; os.unlink(sys.argv[1]); os.mkfifo(sys.argv[1])
        plan = SamplingPlan(shards, seed=0, batch_total=12, slots=12)
        batches = loader.Loader(DataConfig(), plan, shards, train_bpe(["a picture"] * 9, 300), 16, 12)
        threading.Thread(target=lambda: next(iter(batches)), daemon=True).start()
        while "reading" not in batches.doing():
            time.sleep(0.01)
        batches.close()
        print("closed")
    """)
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "part-000.tar")], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "closed\n" and "leaves a thread behind that hangs" in result.stderr
