"""Shards behind URLs: what is said when a server or driver does not do its part, and a web server that does."""

from __future__ import annotations

import http.server
import os
import socket
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations

from mvle.data import remote as remote_module
from mvle.data.errors import DataError
from mvle.data.indexing import index_shard
from mvle.data.shards import ShardSet
from mvle.data.tokenizer import Tokenizer

from .data_files import in_memory, index_all, number_words, shown


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return number_words()


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from in_memory(tmp_path, monkeypatch)


# --- servers and drivers ---------------------------------------------------------------------------------------------


class DriverError(Exception):
    """As a driver's own library raises: no OSError, and its words hold the URL as it was asked for."""


def test_a_read_that_a_server_fails_for_a_moment_is_tried_again(
    remote: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    index_all(f"{remote}/*.tar")
    shards, tries = ShardSet.open(f"{remote}/*.tar"), []
    right, original = shards.image_bytes(0), MemoryFileSystem.cat_file

    def flaky(self: Any, path: str, *arguments: Any, **options: Any) -> bytes:
        tries.append(path)
        if len(tries) < 3:
            raise DriverError("503 at https://me@host/x?token=SECRET")
        return original(self, path, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", flaky)
    assert shards.image_bytes(0) == right
    assert caplog.text.count("trying again") == 2 and "SECRET" not in caplog.text and "me@" not in caplog.text


def test_a_server_that_stays_away_is_named_with_its_words_and_without_keys(
    remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_all(f"{remote}/*.tar")
    shards = ShardSet.open(f"{remote}/*.tar")

    def broken(self: Any, path: str, *arguments: Any, **options: Any) -> bytes:
        raise DriverError("cannot connect to https://me:hidden@host/x?token=SECRET")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", broken)
    with pytest.raises(DataError, match=r"part-000\.tar cannot be read, after 3 tries: .*cannot connect") as caught:
        shards.image_bytes(0)
    told = "".join(traceback.format_exception(caught.value))
    assert "SECRET" not in told and "hidden" not in told and "https://host/x?..." in told


@pytest.mark.parametrize("status", [401, 403, 400, 501])
def test_an_answer_that_no_further_try_would_mend_is_told_at_once(
    remote: str, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    index_all(f"{remote}/*.tar")
    shards, tries = ShardSet.open(f"{remote}/*.tar"), []

    def refused(self: Any, path: str, *arguments: Any, **options: Any) -> bytes:
        tries.append(path)
        error = DriverError("no")
        error.status = status  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(MemoryFileSystem, "cat_file", refused)
    words = "access is refused" if status in (401, 403) else "does not do that"
    with pytest.raises(DataError, match=f"part-000.tar cannot be read: .*{words}"):
        shards.image_bytes(0)
    assert len(tries) == 1


def test_a_server_that_is_down_is_no_shard_that_is_gone(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(self: Any, path: str, **options: Any) -> dict[str, Any]:
        raise FileNotFoundError(path) from ConnectionRefusedError("refused")  # as fsspec's HTTP driver says it

    monkeypatch.setattr(MemoryFileSystem, "info", down)
    with pytest.raises(DataError, match="cannot be asked for, after 3 tries: .*ConnectionRefusedError"):
        ShardSet.open(f"{remote}/part-000.tar")


def test_a_server_that_ignores_byte_ranges_is_told_from_a_longer_file(
    remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_all(f"{remote}/*.tar")
    shards, original = ShardSet.open(f"{remote}/*.tar"), MemoryFileSystem.cat_file
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda self, path, **o: original(self, path))
    with pytest.raises(DataError, match="it does not answer byte ranges"):
        shards.image_bytes(0)


def test_a_shard_that_comes_in_part_is_fetched_again(
    remote: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tries, original = [], MemoryFileSystem.get_file

    def cut(self: Any, path: str, local: str, **options: Any) -> None:
        original(self, path, local, **options)
        tries.append(path)
        if len(tries) == 1:
            os.truncate(local, 1000)

    monkeypatch.setattr(MemoryFileSystem, "get_file", cut)
    assert index_shard(f"{remote}/part-000.tar").images == 5
    assert len(tries) == 2


def test_a_driver_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(known_implementations, "nodriver", {"class": "no_such_module.FS", "err": "Install it"})
    monkeypatch.setitem(remote_module._DRIVERS, "nodriver", "nodriverfs")
    with pytest.raises(DataError, match="nodriver:// needs a driver that is not installed.*: pip install nodriverfs"):
        ShardSet.open("nodriver://bucket/x-{000..001}.tar")
    with pytest.raises(DataError, match="there is no driver for nowhere://"):
        ShardSet.open("nowhere://bucket/*.tar")


# --- a web server ----------------------------------------------------------------------------------------------------


class Ranges(http.server.SimpleHTTPRequestHandler):
    """A file server that answers byte ranges, and fails as often as it is told to."""

    failures: ClassVar[list[int]] = []
    ranged: ClassVar[bool] = True

    def do_GET(self) -> None:
        if self.failures:
            self.send_error(self.failures.pop())
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data, span = path.read_bytes(), self.headers.get("Range")
        if span and self.ranged:
            first, last = (int(n) for n in span.removeprefix("bytes=").split("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def web(remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("aiohttp", reason="fsspec's HTTP driver needs aiohttp, which is not installed")
    monkeypatch.setattr(Ranges, "failures", [])
    folder = str(tmp_path / "disk")
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0),
        lambda *arguments: Ranges(*arguments, directory=folder),  # type: ignore[arg-type]
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_web_server_gives_the_batches_of_a_disk(web: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    indexes = tmp_path / "indexes"
    index_all(f"{web}/part-{{000..002}}.tar", index_folder=indexes)
    there = ShardSet.open(f"{web}/part-{{000..002}}.tar?token=SECRET", index_folder=indexes)
    here = ShardSet.open(f"{tmp_path}/disk/*.tar")
    assert there.fingerprint == here.fingerprint
    assert shown(there, tokenizer) == shown(here, tokenizer)


def test_a_web_servers_answers_are_told_apart(web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ShardSet.open(f"{web}/part-000.tar")  # its index lies beside it, as it was uploaded
    right = ShardSet.open(f"{tmp_path}/disk/part-000.tar").image_bytes(0)

    Ranges.failures = [503, 500]
    assert shards.image_bytes(0) == right
    Ranges.failures = [403]
    with pytest.raises(DataError, match="access is refused"):
        shards.image_bytes(0)
    with pytest.raises(DataError, match="there is no shard http.*/nothing.tar"):
        ShardSet.open(f"{web}/nothing.tar")
    monkeypatch.setattr(Ranges, "ranged", False)
    with pytest.raises(DataError, match="does not answer byte ranges"):
        shards.image_bytes(0)


def test_a_web_server_that_is_down_is_named_after_some_tries(web: str) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        with pytest.raises(DataError, match="cannot be asked for, after 3 tries"):
            ShardSet.open(f"http://127.0.0.1:{nobody.getsockname()[1]}/part-000.tar")
