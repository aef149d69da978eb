"""Shards behind URLs: the same pairs as from a disk, names, what is missing or changes, and where indexes lie. What
servers and drivers do: test_data_servers.py."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mvle.data import files
from mvle.data.__main__ import main
from mvle.data.config import DataConfig, open_shards
from mvle.data.errors import DataError
from mvle.data.index import index_path
from mvle.data.indexing import IndexPlaceError, index_shard
from mvle.data.shards import ShardSet
from mvle.data.tar import TarWriter
from mvle.data.tokenizer import Tokenizer
from mvle.data.workers import Workers

from .data_files import ROOT, in_memory, index_all, number_words, pair, shown, write_shard


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return number_words()


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from in_memory(tmp_path, monkeypatch)


# --- the same pairs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_batches_and_fingerprint_from_a_url_are_those_from_a_disk(
    remote: str, tmp_path: Path, tokenizer: Tokenizer, kind: str
) -> None:
    url = remote if kind == "memory" else f"file://{tmp_path}/disk"
    index_all(f"{url}/part-{{000..002}}.tar")

    here = ShardSet.open(f"{tmp_path}/disk/*.tar")
    there = ShardSet.open(f"{url}/part-{{000..002}}.tar")

    assert there.fingerprint == here.fingerprint and there.images == 15
    assert shown(there, tokenizer) == shown(here, tokenizer)
    assert there.extra(7, "json") == here.extra(7, "json")
    assert isinstance(there.shard_path(0), Path) == (kind == "file")  # a local URL is read as any file of the disk


def test_indexing_inspecting_and_globs_work_on_urls_from_the_command_line(
    remote: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", f"{remote}/*.tar"]) == 0
    assert f"{remote}/part-002.tar: 6 images" in capsys.readouterr().out
    assert main(["inspect", f"{remote}/part-00[01].tar", "--sheet", str(tmp_path / "sheet.png")]) == 0
    assert "9 images, 18 captions in 2 shards" in capsys.readouterr().out
    assert (tmp_path / "sheet.png").is_file()


def test_a_part_of_a_shard_is_fetched_and_not_the_whole(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index_all(f"{remote}/*.tar")
    shards, fetched = ShardSet.open(f"{remote}/*.tar"), []
    original = MemoryFileSystem.cat_file

    def counted(self: Any, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        fetched.append((start, end))
        return original(self, path, start, end, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    data = shards.image_bytes(4)
    offset = int(shards.indexes[0].columns["image.offset"][4])
    assert fetched == [(offset, offset + len(data))]


def test_many_threads_read_at_once(remote: str, tmp_path: Path) -> None:
    index_all(f"{remote}/*.tar")
    shards, here = ShardSet.open(f"{remote}/*.tar"), ShardSet.open(f"{tmp_path}/disk/*.tar")
    workers = Workers(8, "reader")
    rows = [i % 15 for i in range(240)]
    assert workers.map(shards.image_bytes, rows) == [here.image_bytes(row) for row in rows]
    workers.stop()


# --- what is missing or changes --------------------------------------------------------------------------------------


def test_a_url_without_an_index_is_answered_with_the_command(remote: str) -> None:
    index_shard(f"{remote}/part-001.tar")
    with pytest.raises(DataError, match=rf"(?s)2 of 3 shards have no index.*mvle.data index {remote}/part-000.tar"):
        ShardSet.open(f"{remote}/*.tar")


def test_a_url_that_names_nothing_is_told(remote: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=rf"there is no shard {remote}/part-003.tar"):
        ShardSet.open(f"{remote}/part-{{003..004}}.tar")
    with pytest.raises(DataError, match=rf"no shard matches {remote}/x-\*.tar\. Make shards"):
        ShardSet.open(f"{remote}/x-*.tar")
    assert main(["index", f"{remote}/part-003.tar"]) == 2
    assert "1 of 1 shards were not indexed" in capsys.readouterr().err


def test_a_shard_behind_a_url_that_a_glob_misses_is_named_by_its_index(remote: str) -> None:
    index_all(f"{remote}/*.tar")
    fsspec.filesystem("memory").rm(f"{remote}/part-001.tar")
    with pytest.raises(DataError, match=r"part-001\.tar is gone, and its index is there"):
        ShardSet.open(f"{remote}/*.tar")


def remove(url: str) -> None:
    fsspec.filesystem("memory").rm(url)


def replace_by_a_longer_one(url: str) -> None:
    fsspec.filesystem("memory").pipe_file(url, files.read_bytes(files.locate(url)) + bytes(512))


def replace_by_one_of_the_same_size(url: str) -> None:
    fsspec.filesystem("memory").pipe_file(url, bytes(files.status(files.locate(url)).size))


@pytest.mark.parametrize(
    ("change", "now"),
    [
        (remove, "it is gone"),
        (replace_by_a_longer_one, r"it has [\d,]+ bytes"),
        (replace_by_one_of_the_same_size, "it was written since the run began"),
    ],
)
def test_a_shard_behind_a_url_that_changes_in_mid_run_stops_it(
    remote: str, tokenizer: Tokenizer, change: Callable[[str], None], now: str
) -> None:
    index_all(f"{remote}/*.tar")
    shards = ShardSet.open(f"{remote}/*.tar")
    change(f"{remote}/part-000.tar")
    with pytest.raises(DataError, match=rf"the shard {remote}/part-000.tar changed while it is in use: .*{now}"):
        shown(shards, tokenizer)


def test_a_shard_behind_a_url_that_changed_after_its_index_is_refused(remote: str) -> None:
    index_all(f"{remote}/*.tar")
    replace_by_one_of_the_same_size(f"{remote}/part-001.tar")
    with pytest.raises(
        DataError, match="part-001.tar first: its first or last bytes are others than when it was indexed"
    ):
        ShardSet.open(f"{remote}/*.tar")


def test_a_server_that_tells_no_times_is_believed_the_size(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = MemoryFileSystem.info
    monkeypatch.setattr(
        MemoryFileSystem, "info", lambda self, path, **o: {**original(self, path, **o), "created": None}
    )
    index_all(f"{remote}/*.tar")
    assert ShardSet.open(f"{remote}/*.tar").indexes[0].header["time_ns"] is None
    replace_by_a_longer_one(f"{remote}/part-001.tar")
    with pytest.raises(DataError, match=r"the shard has \d+ bytes and had \d+"):
        ShardSet.open(f"{remote}/*.tar")


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"LastModified": "2026-01-02T03:04:05Z"}, 1767323045),
        ({"mtime": 1767323045.5}, 1767323045.5),
        ({"updated": "2026-01-02T04:04:05+01:00"}, 1767323045),
        ({"mtime": "yesterday"}, None),
        ({}, None),
    ],
)
def test_times_are_read_as_drivers_write_them(info: dict[str, Any], expected: float | None) -> None:
    assert files._time_ns(info) == (None if expected is None else int(expected * 1e9))


# --- names -----------------------------------------------------------------------------------------------------------


def test_two_who_write_one_file_at_once_leave_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers on two machines share a disk and have the same process number."""
    file, sync, others = tmp_path / "index", os.fsync, [b"short"]

    def slow(number: int) -> None:
        sync(number)
        if others:
            files.write_bytes(file, others.pop())

    monkeypatch.setattr(files.os, "fsync", slow)
    files.write_bytes(file, b"a longer one")
    assert file.read_bytes() == b"a longer one"
    assert [path.name for path in tmp_path.iterdir()] == ["index"]

    with TarWriter(tmp_path / "a.tar") as one, TarWriter(tmp_path / "a.tar") as other:
        one.add("a.txt", b"1" * 700)
        other.add("a.txt", b"2")
    with TarWriter(tmp_path / "b.tar") as alone:
        alone.add("a.txt", b"1" * 700)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_keys_in_a_url_are_never_shown() -> None:
    file = files.locate("https://me@host/a/x.tar?sig=SECRET&v=1")
    assert (str(file), repr(file), file.name) == (
        "https://host/a/x.tar?...",
        "RemoteFile('https://host/a/x.tar?...')",
        "x.tar",
    )
    assert index_path(file).url == "https://me@host/a/x.tar.index.safetensors?sig=SECRET&v=1"
    with pytest.raises(DataError, match="a password in a URL") as caught:
        files.locate("sftp://me:hidden@host/x.tar")
    assert "hidden" not in str(caught.value)


def test_a_chain_of_file_systems_is_refused() -> None:
    with pytest.raises(DataError, match="must name one file system"):
        files.locate("simplecache::s3://bucket/x.tar")


def test_a_query_is_no_glob_and_a_bracketed_host_neither() -> None:
    assert not files.has_magic("https://host/x.tar?a=[1]*")
    assert not files.has_magic("http://[::1]:80/x.tar")
    assert files.has_magic("s3://bucket/x-[0-9].tar") and files.has_magic("gs://bucket/*/x.tar")


# --- places where no index can be written ----------------------------------------------------------------------------


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """train/00000.tar and val/00000.tar in a folder that refuses whatever is written."""
    for seed, split in enumerate(("train", "val")):
        (tmp_path / "ro" / split).mkdir(parents=True)
        write_shard(tmp_path / "ro" / split / "00000.tar", [(f"{split}{i}", pair(10 * seed + i)) for i in range(3)])
    replace = os.replace

    def refuse(source: str, target: str) -> None:
        if Path(target).is_relative_to(tmp_path / "ro"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    return tmp_path / "ro"


def test_a_read_only_place_is_told_with_what_to_do(read_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(IndexPlaceError, match="Read-only file system.*--index-folder DIR.*data.index_folder=DIR"):
        index_shard(read_only / "train" / "00000.tar")
    assert sorted(p.name for p in (read_only / "train").iterdir()) == ["00000.tar"]
    assert main(["index", f"{read_only}/*/*.tar"]) == 2  # and does not decode the next shard for nothing
    assert "were not indexed" not in capsys.readouterr().err
    with pytest.raises(IndexPlaceError, match="it is read-only"):
        index_shard("https://host.invalid/00000.tar")


def test_shards_of_one_name_have_their_own_places_in_an_index_folder(
    read_only: Path, tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    indexes = tmp_path / "indexes"
    assert main(["index", f"{read_only}/*/*.tar", "--index-folder", str(indexes)]) == 0
    options = ["--index-folder", str(indexes), "--sheet", f"{tmp_path}/sheet.png"]
    assert main(["inspect", f"{read_only}/*/*.tar", *options]) == 0
    config = DataConfig(train=f"{read_only}/train/*.tar", val=f"{read_only}/val/*.tar", index_folder=str(indexes))
    train, val = open_shards(config, "train"), open_shards(config, "val")
    assert [train.key(0), val.key(0)] == ["train0", "val0"]

    shutil.copytree(read_only, tmp_path / "rw")
    index_all(f"{tmp_path}/rw/train/*.tar")
    assert ShardSet.open(f"{tmp_path}/rw/train/*.tar", index_folder=indexes).fingerprint == train.fingerprint
    with pytest.raises(DataError, match=f"have no index.*(?s:.)*--index-folder {indexes}"):
        ShardSet.open(f"{tmp_path}/rw/val/*.tar", index_folder=indexes)
    (read_only / "val" / "00000.tar").rename(read_only / "val" / "1.tar")
    with pytest.raises(DataError, match="00000.tar is gone, and its index is there"):
        ShardSet.open(f"{read_only}/*/0*.tar", index_folder=indexes)


def test_an_index_folder_may_lie_behind_a_url_and_hold_indexes_of_urls(remote: str, tmp_path: Path) -> None:
    index_all(f"{remote}/*.tar", index_folder=f"{ROOT}/indexes")
    assert ShardSet.open(f"{remote}/*.tar", index_folder=f"{ROOT}/indexes").images == 15
    index_all(f"{remote}/*.tar", index_folder=tmp_path / "indexes")
    assert (tmp_path / "indexes" / "memory" / "shards-of-tests" / "part-000.tar.index.safetensors").is_file()


def test_a_run_config_takes_urls(remote: str) -> None:
    index_all(f"{remote}/*.tar")
    config = DataConfig.model_validate({"train": f"{remote}/part-{{000..002}}.tar"})
    assert open_shards(config, "train").images == 15
    assert json.loads(config.model_dump_json())["train"] == [f"{remote}/part-{{000..002}}.tar"]
