"""A file behind a URL: its name, its driver, and a driver's errors as the errors of any file.

What is shown of a URL, also within the words of a driver, is without its query and without user and password: those
are keys. Credentials, endpoints and the like are for fsspec's own configuration and each driver's environment.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator
from typing import Any

from .errors import DataError

_DRIVERS = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp",
    "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs", "hf": "huggingface_hub", "sftp": "paramiko", "ssh": "paramiko",
    "oci": "ocifs", "oss": "ossfs", "webdav": "webdav4", "hdfs": "pyarrow",
}  # fmt: skip
_LATER = (408, 425, 429)  # HTTP answers below 500 after which another try may help
_NEVER = (501, 505)  # and above, after which none will


class RemoteFile:
    """A file behind a URL. `url` is what was asked for; `str` is what may be shown. Equal URLs are equal files."""

    def __init__(self, url: str) -> None:
        self.url = url
        if "::" in url.partition("//")[0]:
            raise DataError(f"a URL must name one file system; {self} chains several. Name the last one alone.")
        user, at, _ = url.partition("://")[2].partition("/")[0].rpartition("@")
        if at and ":" in user:
            raise DataError(
                f"{self}: a password in a URL would be written into a run's config. Put it where the driver of "
                f"{self.scheme}:// looks for it (its environment variables, or fsspec's configuration)."
            )

    @property
    def scheme(self) -> str:
        """s3, https, ..."""
        return self.url.partition("://")[0]

    @property
    def name(self) -> str:
        """The last part of the path."""
        return query_apart(self.url)[0].rpartition("/")[2]

    @contextlib.contextmanager
    def driver(self) -> Iterator[tuple[Any, str]]:
        """(fsspec's file system, this file's path in it); whatever the driver raises inside is an OSError outside.

        Raises DataError where there is no driver, or it is not installed. Looked up anew each time: fsspec keeps one
        for all threads where it can serve them, else one a thread.
        """
        try:
            yield self._file_system()
        except DataError:
            raise
        # Each driver raises errors of a library of its own. `from None`: a traceback would show their URLs after all.
        except Exception as error:
            raise _plain(self, error) from None

    def _file_system(self) -> tuple[Any, str]:
        import fsspec

        if self.scheme not in fsspec.available_protocols():
            raise DataError(
                f"{self}: there is no driver for {self.scheme}://. fsspec knows s3, gs, https, abfs, hf and others "
                "(python -c 'import fsspec; print(fsspec.available_protocols())')."
            )
        try:
            file_system, path = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            package = _DRIVERS.get(self.scheme)
            how = f"pip install {package}" if package else str(error)
            raise DataError(f"{self}: {self.scheme}:// needs a driver that is not installed here: {how}") from error
        return file_system, path

    def __str__(self) -> str:
        return shown(self.url)

    def __repr__(self) -> str:
        return f"RemoteFile({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteFile) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)


def query_apart(url: str) -> tuple[str, str]:
    """(URL, "?" and its query). Over HTTP alone: elsewhere a ? is part of a name."""
    if url.startswith(("http://", "https://")):
        path, mark, query = url.partition("?")
        return path, mark + query
    return url, ""


# --- what goes wrong -------------------------------------------------------------------------------------------------


def _plain(file: RemoteFile, error: BaseException) -> OSError:
    """A driver's error as the error of any file, without keys. What is not known to be final (absent, refused, asked
    wrongly) counts as transient: it is tried a few times, then told in full."""
    if isinstance(error, FileNotFoundError) and error.__cause__ and not _says_absent(error.__cause__):
        error = error.__cause__  # fsspec's HTTP driver calls a server that is down a file that is not there
    words = shown(f"{type(error).__name__}: {error}")
    answer = _http_status(error)
    if isinstance(error, FileNotFoundError | NotADirectoryError) or answer in (404, 410):
        return FileNotFoundError(errno.ENOENT, "there is no such file", str(file))
    if isinstance(error, PermissionError) or answer in (401, 403):
        return PermissionError(errno.EACCES, f"access is refused ({words})", str(file))
    if isinstance(error, IsADirectoryError):
        return IsADirectoryError(errno.EISDIR, "it is a folder", str(file))
    if isinstance(error, NotImplementedError) or answer in _NEVER or (answer and answer < 500 and answer not in _LATER):
        return OSError(errno.ENOTSUP, f"the server or its driver does not do that ({words})", str(file))
    return OSError(errno.EIO, words, str(file))


def _says_absent(cause: BaseException) -> bool:
    """Whether a driver's own error, behind a FileNotFoundError, is no failure of server or connection."""
    answer = _http_status(cause)
    return answer in (404, 410) if answer else not (isinstance(cause, OSError) or "aiohttp" in type(cause).__module__)


def _http_status(error: BaseException) -> int | None:
    answer = error.status if hasattr(error, "status") else getattr(error, "code", None)
    return answer if isinstance(answer, int) and 400 <= answer < 600 else None


def shown(text: str) -> str:
    """A URL, or words with URLs in them, without user, password and query, which are keys."""
    text = re.sub(r"(\w://)[^\s/?'\"]*@", r"\1", text)
    return re.sub(r"(\w://[^\s?'\"]*)\?[^\s'\")]*", r"\1?...", text)
