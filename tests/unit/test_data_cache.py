"""Shards behind URLs on a disk of this machine: fetched once and whole, within a bound, or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from mvle.data import cache as module
from mvle.data.cache import ShardCache
from mvle.data.config import DataConfig, open_shards
from mvle.data.errors import DataError
from mvle.data.files import status
from mvle.data.reader import ShardReader
from mvle.data.remote import RemoteFile
from mvle.data.shards import ShardSet

from .data_files import in_memory, index_all

SIZE = 3000


@pytest.fixture
def files() -> list[RemoteFile]:
    """Four files of SIZE bytes, each of its own letter."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for letter in "abcd":
        memory.pipe_file(f"/cached/{letter}.tar", letter.encode() * SIZE)
    return [RemoteFile(f"memory://cached/{letter}.tar") for letter in "abcd"]


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of files, once for each request of a part."""
    asked: list[str] = []
    open_ranges = module.open_ranges

    class Counted:
        def __init__(self, file: RemoteFile) -> None:
            self.file, self.inner = file, open_ranges(file)

        def read(self, offset: int, size: int) -> bytes:
            asked.append(self.file.name)
            return self.inner.read(offset, size)

        def size(self) -> int:
            return self.inner.size()

    monkeypatch.setattr(module, "open_ranges", lambda f: Counted(f) if isinstance(f, RemoteFile) else open_ranges(f))
    return asked


def kept(folder: Path) -> list[str]:
    return sorted(path.name.partition("-")[2] for path in folder.iterdir() if path.suffix != ".lock")


def test_a_file_is_fetched_once_whole_and_read_from_the_disk(
    tmp_path: Path, files: list[RemoteFile], fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE", 1024)
    cache = ShardCache(tmp_path / "deep" / "cache", 10 * SIZE)
    for _ in range(3):
        ranges = cache.open(files[0])
        assert ranges.read(5, 7) == b"a" * 7 and ranges.size() == SIZE and ranges.read(SIZE - 2, 9) == b"aa"
    assert fetched == ["a.tar"] * 3  # 1024, 1024, 952: of the first time
    assert ShardCache(tmp_path / "deep" / "cache", 10 * SIZE).open(files[0]).read(0, 1) == b"a"  # another process
    assert len(fetched) == 3 and kept(tmp_path / "deep" / "cache") == ["a.tar"]


def test_a_file_on_a_disk_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"here")
    cache = ShardCache(tmp_path / "cache", 100)
    assert cache.open(tmp_path / "x.tar").read(0, 4) == b"here" and not (tmp_path / "cache").exists()


def test_what_was_opened_longest_ago_leaves_and_its_readers_keep_it(tmp_path: Path, files: list[RemoteFile]) -> None:
    cache = ShardCache(tmp_path, 2 * SIZE)
    opened = []
    for k in (0, 1, 0, 2):  # the first is opened again: the second leaves
        opened.append(cache.open(files[k]))
        time.sleep(0.01)
    assert kept(tmp_path) == ["a.tar", "c.tar"]
    cache.open(files[3])
    assert kept(tmp_path) == ["c.tar", "d.tar"]
    assert [ranges.read(0, 1) for ranges in opened] == [b"a", b"b", b"a", b"c"]
    locks = [path.name.removesuffix(".lock").partition("-")[2] for path in tmp_path.glob("*.lock")]
    assert sorted(locks) == ["", "c.tar", "d.tar"]  # and that of the room


def test_what_else_lies_in_the_folder_is_left_alone(tmp_path: Path, files: list[RemoteFile]) -> None:
    (tmp_path / "mine.txt").write_bytes(bytes(5 * SIZE))
    (tmp_path / "folder").mkdir()
    (tmp_path / "download.part").write_bytes(b"half")
    cache = ShardCache(tmp_path, 2 * SIZE)
    for file in files:
        cache.open(file)
        time.sleep(0.01)
    assert (tmp_path / "mine.txt").stat().st_size == 5 * SIZE and (tmp_path / "folder").is_dir()
    assert (tmp_path / "download.part").read_bytes() == b"half"
    assert [name for name in kept(tmp_path) if name.endswith(".tar")] == ["c.tar", "d.tar"]


def test_only_one_at_a_time_makes_room(tmp_path: Path, files: list[RemoteFile]) -> None:
    """Two who counted at once would both find room for themselves."""
    cache = ShardCache(tmp_path, 10 * SIZE)
    opener = threading.Thread(target=cache.open, args=(files[0],))
    with cache._locked(tmp_path / "room"):
        opener.start()
        opener.join(0.2)
        assert opener.is_alive() and kept(tmp_path) == []
    opener.join(10)
    assert kept(tmp_path) == ["a.tar"]


def test_what_becomes_whole_while_room_is_made_takes_room(
    tmp_path: Path, files: list[RemoteFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ShardCache(tmp_path, 2 * SIZE)
    for file in files[:2]:
        cache.open(file)
        time.sleep(0.01)
    listed = cache._files()
    assert len(listed) == 2
    before = [listed[0], listed[1].with_name(f"{listed[1].name}.part")]  # as another process had it a moment ago
    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "iterdir", lambda self: iter(before))
        cache.open(files[2])
    assert len(kept(tmp_path)) == 2 and "c.tar" in kept(tmp_path)


def test_who_waited_for_a_lock_that_went_with_its_shard_takes_the_one_that_is_there(tmp_path: Path) -> None:
    cache, place = ShardCache(tmp_path, SIZE), tmp_path / "a.tar"
    waiting, found = threading.Event(), []

    def wait() -> None:
        waiting.set()
        with cache._locked(place) as held:
            found.append((held, Path(f"{place}.lock").is_file()))

    with cache._locked(place):
        waiter = threading.Thread(target=wait)
        waiter.start()
        waiting.wait(10)
        time.sleep(0.05)  # it has opened the file
        Path(f"{place}.lock").unlink()
    waiter.join(10)
    assert found == [(True, True)]


def test_a_file_that_was_replaced_is_fetched_again(tmp_path: Path, files: list[RemoteFile]) -> None:
    cache = ShardCache(tmp_path, 10 * SIZE)
    cache.open(files[0])
    time.sleep(0.01)
    fsspec.filesystem("memory").pipe_file("/cached/a.tar", b"z" * SIZE)
    assert cache.open(files[0]).read(0, 2) == b"zz"


def test_what_does_not_fit_is_read_by_parts_with_one_warning(
    tmp_path: Path, files: list[RemoteFile], caplog: pytest.LogCaptureFixture
) -> None:
    cache = ShardCache(tmp_path, SIZE - 1)
    assert [cache.open(file).read(0, 1) for file in files] == [b"a", b"b", b"c", b"d"]
    assert kept(tmp_path) == []
    assert caplog.text.count("is not kept in data.cache_folder") == 1 and "data.cache_gib allows 2,999" in caplog.text


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_disk_that_cannot_be_written_does_not_stop_a_run(
    tmp_path: Path,
    files: list[RemoteFile],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    def full(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    cache = ShardCache(tmp_path, 10 * SIZE)
    assert cache.open(files[0]).read(0, 1) == b"a" and cache.open(files[1]).read(0, 1) == b"b"
    assert kept(tmp_path) == [] and caplog.text.count(os.strerror(code)) == 1


def test_nothing_half_counts_as_whole(tmp_path: Path, files: list[RemoteFile], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 1000)
    cache = ShardCache(tmp_path, 10 * SIZE)
    place = cache.place(files[0], status(files[0]))
    Path(f"{place}.part").write_bytes(b"what a process left that was killed")
    Path(f"{cache.place(files[1], status(files[1]))}.part").write_bytes(b"x" * 10 * SIZE)  # another, of a lost shard
    assert cache.open(files[0]).read(0, SIZE) == b"a" * SIZE
    assert kept(tmp_path) == ["a.tar"]

    place.write_bytes(b"cut by somebody")
    assert cache.open(files[0]).read(0, SIZE) == b"a" * SIZE

    class Ends:
        def read(self, offset: int, size: int) -> bytes:
            return b"" if offset else b"b" * size

    open_ranges = module.open_ranges
    monkeypatch.setattr(
        module, "open_ranges", lambda file: Ends() if isinstance(file, RemoteFile) else open_ranges(file)
    )
    with pytest.raises(DataError, match="b.tar ends after 1,000 of 3,000 bytes"):
        cache.open(files[1])
    assert kept(tmp_path) == ["a.tar"]


def test_many_who_want_one_file_fetch_it_once(tmp_path: Path, files: list[RemoteFile], fetched: list[str]) -> None:
    caches = [ShardCache(tmp_path, 2 * SIZE) for _ in range(2)]
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda k=k: found.append(caches[k % 2].open(files[k // 4]).read(0, 1)))
        for k in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [b"a"] * 4 + [b"b"] * 4 and sorted(fetched) == ["a.tar", "b.tar"]


HOLD = """
import sys, time
from pathlib import Path
from mvle.data.cache import ShardCache
with ShardCache(sys.argv[1], 10**6)._locked(Path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_process_that_is_killed_lets_go_of_its_lock(tmp_path: Path, files: list[RemoteFile]) -> None:
    cache = ShardCache(tmp_path, 10 * SIZE)
    place = cache.place(files[0], status(files[0]))
    command = [sys.executable, "-c", HOLD, str(tmp_path), str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with cache._locked(place, wait=False) as held:
            assert not held
        opened: list[bytes] = []
        waiting = threading.Thread(target=lambda: opened.append(cache.open(files[0]).read(0, 1)))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        other.kill()
        waiting.join(10)
    assert opened == [b"a"]


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from in_memory(tmp_path, monkeypatch)


def test_a_run_reads_through_the_cache_that_its_config_names(remote: str, tmp_path: Path) -> None:
    index_all(f"{remote}/*.tar")
    config = DataConfig(train=(f"{remote}/*.tar",), cache_folder=str(tmp_path / "cache"), cache_gib=0.001)
    shards, plain = open_shards(config, "train"), ShardSet.open(f"{remote}/*.tar")
    rows = range(plain.images)
    assert [shards.image_bytes(row) for row in rows] == [plain.image_bytes(row) for row in rows]
    assert kept(tmp_path / "cache") == ["part-000.tar", "part-001.tar", "part-002.tar"]


def test_many_who_fetch_different_files_into_a_full_cache_all_read_right(
    tmp_path: Path, files: list[RemoteFile]
) -> None:
    caches = [ShardCache(tmp_path, 2 * SIZE) for _ in range(4)]

    def read(k: int) -> None:
        for i in range(60):
            which = (i * (k + 1) + k) % 4
            assert caches[k].open(files[which]).read(0, 2) == b"abcd"[which : which + 1] * 2

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))


def test_what_left_is_closed_when_the_next_is_opened(tmp_path: Path, files: list[RemoteFile]) -> None:
    reader = ShardReader(files, [SIZE] * 4, opener=ShardCache(tmp_path, 2 * SIZE).open)
    for k in (0, 1, 2, 3):
        assert reader.read(k, 0, 1) == b"abcd"[k : k + 1]
        time.sleep(0.01)
    assert len(reader._open) <= 3  # the last two, and one that left while it was opened
    assert [reader.read(k, 5, 1) for k in range(4)] == [b"a", b"b", b"c", b"d"]
