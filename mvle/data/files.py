"""A file by path or by URL: the one place that knows whether data lies on a disk or behind a network.

A path is a pathlib.Path and is read by `pread`. A URL (s3://, gs://, https://, ...: what fsspec has a driver for) is a
RemoteFile and is read by byte ranges; file:// is a path. Both are asked through the functions below, and what goes
wrong is an OSError of the same kind from both: FileNotFoundError where nothing is there, PermissionError where access
is refused, EIO and its like where another try may help (`patiently`).

Who wants to read ahead or to keep what was read on a disk does so behind `open_ranges`: it gives something with `read`
and `size`, and nobody above asks for more.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from .errors import DataError
from .remote import RemoteFile, query_apart

log = logging.getLogger(__name__)

RETRY_SECONDS = (0.1, 0.5, 2.0)  # a server that fails over takes seconds; one that takes longer is for an operator
TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
_TIMES = ("LastModified", "last_modified", "modified", "mtime", "updated", "created")  # as drivers name it, best first
_VERSIONS = ("ETag", "etag", "generation")

Result = TypeVar("Result")


class Status(NamedTuple):
    """What a file system says of a file. size: bytes · time_ns: last written, or None where it does not say · version:
    a tag that changes with the contents, or "". A file that was replaced differs in one of them."""

    size: int
    time_ns: int | None
    version: str = ""


File = Path | RemoteFile


def is_url(name: str | os.PathLike[str] | RemoteFile) -> bool:
    """Whether it is asked for over a network."""
    return isinstance(name, RemoteFile) or (isinstance(name, str) and "://" in name and not _is_local_url(name))


def locate(name: str | os.PathLike[str] | RemoteFile) -> File:
    """The file that a path or URL names. Raises DataError for a URL with a password, or of several file systems."""
    if isinstance(name, RemoteFile):
        return name
    name = os.fspath(name)
    if is_url(name):
        return RemoteFile(name)
    return Path(name.partition("://")[2] if _is_local_url(name) else name)


def beside(file: File, suffix: str) -> File:
    """FILE + suffix, in the same place."""
    if isinstance(file, RemoteFile):
        path, query = query_apart(file.url)
        return RemoteFile(path + suffix + query)
    return Path(f"{file}{suffix}")


def below(folder: str | os.PathLike[str], file: File, suffix: str) -> File:
    """FOLDER/whole/path/of/FILE + suffix: a place for what cannot lie beside the file. A URL begins with its scheme;
    its query is left out."""
    if isinstance(file, RemoteFile):
        path = f"{file.scheme}/{query_apart(file.url)[0].partition('://')[2].lstrip('/')}"
    else:
        path = os.path.abspath(file).lstrip(os.sep)
    return locate(f"{os.fspath(folder).rstrip('/')}/{path}{suffix}")


def status(file: File, refresh: bool = False) -> Status:
    """What the file system says of the file; refresh: not what a driver remembers of it. Raises FileNotFoundError."""
    if isinstance(file, Path):
        stat = file.stat()
        return Status(stat.st_size, stat.st_mtime_ns)

    def ask() -> dict[str, Any]:
        with file.driver() as (file_system, path):
            if refresh:
                file_system.invalidate_cache()
            return file_system.info(path)

    info = patiently(ask, f"{file} cannot be asked for")
    if info.get("type") == "directory":
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(file))
    if info.get("size") is None:
        raise OSError(errno.ENOTSUP, "the server does not say how large it is, and no part can be read", str(file))
    version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
    return Status(int(info["size"]), _time_ns(info), version)


def read_bytes(file: File) -> bytes:
    """The whole file. Raises OSError."""
    if isinstance(file, Path):
        return file.read_bytes()

    def fetch() -> bytes:
        with file.driver() as (file_system, path):
            return file_system.cat_file(path)

    return patiently(fetch, f"{file} cannot be read")


def temporary_beside(path: Path) -> Path:
    """A name that nobody else has, in the folder of a file that is to be renamed when it is whole. No process number:
    machines and containers that share a disk have the same ones."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def write_bytes(file: File, data: bytes) -> None:
    """Write the whole file: on a disk under a temporary name, then renamed; behind a URL as its file system writes
    (object stores show a file when it is whole). Folders are made. Raises OSError."""
    if isinstance(file, RemoteFile):

        def send() -> None:
            with file.driver() as (file_system, path):
                file_system.pipe_file(path, data)

        return patiently(send, f"{file} cannot be written")
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(file)
    try:
        with open(temporary, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    finally:
        with contextlib.suppress(OSError):  # it may be the folder that fails, and that error is the one to see
            temporary.unlink(missing_ok=True)


def is_read_only(file: File) -> bool:
    """Whether it is known beforehand that nothing can be written there: web servers, folders without the right."""
    if isinstance(file, RemoteFile):
        return file.scheme in ("http", "https")
    folder = next(parent for parent in file.absolute().parents if parent.exists())
    return not os.access(folder, os.W_OK)


def has_magic(pattern: str | RemoteFile) -> bool:
    """Whether a name is a pattern (*, ? or [...]; no ? in a URL, where it begins the query)."""
    if is_url(pattern):
        url = pattern.url if isinstance(pattern, RemoteFile) else pattern
        return bool(set("*[") & set(query_apart(url)[0].partition("://")[2].partition("/")[2]))
    return glob.has_magic(str(pattern))


def matches(pattern: str) -> list[File]:
    """The files that a pattern names, sorted. Raises OSError where a server cannot list."""
    if not is_url(pattern):
        return [Path(path) for path in sorted(glob.glob(str(locate(pattern))))]
    file = RemoteFile(pattern)

    def ask() -> list[File]:
        with file.driver() as (file_system, path):
            names = sorted(file_system.glob(path))
            if pattern.endswith(path):  # what stands before the path in the pattern stands before every file's
                return [RemoteFile(pattern[: len(pattern) - len(path)] + name) for name in names]
            return [RemoteFile(file_system.unstrip_protocol(name)) for name in names]

    return patiently(ask, f"{file} cannot be listed")


@contextlib.contextmanager
def local_copy(file: File) -> Iterator[Path]:
    """The file on a disk: itself, or fetched whole into a temporary folder (TMPDIR) that goes afterwards."""
    if isinstance(file, Path):
        yield file
        return
    with tempfile.TemporaryDirectory(prefix="mvle-") as folder:
        copy = Path(folder) / file.name
        size = status(file).size

        def fetch() -> None:
            with file.driver() as (file_system, path):
                file_system.get_file(path, str(copy))
            if (now := copy.stat().st_size) != size:
                raise OSError(errno.EIO, f"{now:,} of {size:,} bytes came", str(file))

        patiently(fetch, f"{file} cannot be fetched")
        yield copy


# --- parts of a file -------------------------------------------------------------------------------------------------


class Ranges(Protocol):
    """An open file, read by parts from any thread."""

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on; fewer where the file ends. Raises OSError."""

    def size(self) -> int:
        """Bytes of the file as it was opened."""

    def expect(self, offset: int, size: int) -> None:
        """These bytes are read soon: a disk may begin with them. Nothing waits, nothing is raised."""


def open_ranges(file: File) -> Ranges:
    """Open a file for reading by parts. It closes itself when the last thread that reads from it lets go."""
    return _LocalRanges(file) if isinstance(file, Path) else _RemoteRanges(file)


class _LocalRanges:
    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        parts, missing = [], size
        while missing:  # a signal or a network file system may give less than was asked for
            part = os.pread(self._fd, missing, offset)
            if not part:
                break
            parts.append(part)
            offset, missing = offset + len(part), missing - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def unlinked(self) -> bool:
        """Whether the file has lost its name: its bytes stay on the disk for whoever has it open."""
        return os.fstat(self._fd).st_nlink == 0

    def expect(self, offset: int, size: int) -> None:
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._fd, offset, size, os.POSIX_FADV_WILLNEED)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)


class _RemoteRanges:
    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._size = status(file).size

    def read(self, offset: int, size: int) -> bytes:
        end = min(offset + size, self._size)  # what a server says to a range beyond the end differs
        if offset >= end:
            return b""
        with self._file.driver() as (file_system, path):
            data = file_system.cat_file(path, start=offset, end=end)
        if len(data) > end - offset:
            raise OSError(
                errno.ENOTSUP,
                f"the server gave {len(data):,} bytes for a range of {end - offset:,}: it does not answer byte ranges. "
                "Copy the shards to another place",
                str(self._file),
            )
        return data

    def size(self) -> int:
        return self._size

    def expect(self, offset: int, size: int) -> None:
        """A server is not asked before it has to answer: cache.py is for that."""


# --- what goes wrong -------------------------------------------------------------------------------------------------


def patiently(attempt: Callable[[], Result], failed: str, renew: Callable[[], None] = lambda: None) -> Result:
    """attempt(), again after each of RETRY_SECONDS while it fails as a disk or server does that may recover.

    failed: how the error begins ("FILE cannot be read") · renew: called before another try. Raises DataError after the
    last one, and at once any OSError that no further try would mend.
    """
    for wait in (*RETRY_SECONDS, None):
        try:
            return attempt()
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
            if wait is None:
                raise DataError(
                    f"{failed}, after {1 + len(RETRY_SECONDS)} tries: {error}. Look after the disk, the file system or "
                    "the server, then start again: a run goes on from its last checkpoint."
                ) from error
            log.warning("%s (%s); trying again in %s s", failed, error, wait)
            renew()
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


# --- URLs ------------------------------------------------------------------------------------------------------------


def _is_local_url(name: str) -> bool:
    return name.startswith(("file://", "local://"))


def _time_ns(info: dict[str, Any]) -> int | None:
    when = next((info[name] for name in _TIMES if info.get(name)), None)
    if isinstance(when, str):
        try:
            when = datetime.fromisoformat(when)
        except ValueError:
            return None
    if isinstance(when, datetime):
        when = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    return int(when * 1e9) if isinstance(when, int | float) else None
