"""The Hugging Face hub: what is in the local cache, then what it gives, if it answers within seconds.

Its own client would retry for minutes where there is no network. So the cache is looked at first, then whether a
connection opens at all.
"""

from __future__ import annotations

import os
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
REACH_SECONDS = 4.0


class HubError(OSError):
    """Something that is neither here nor to be had. tried: where it was looked for; reason: why the last one failed."""

    def __init__(self, tried: str, reason: Exception) -> None:
        self.tried, self.reason = tried, reason
        first = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
        super().__init__(f"Tried {tried}: {first}")


def cache_then_hub(
    get: Callable[[bool], T], errors: tuple[type[Exception], ...] = (OSError, ValueError), folder: bool = False
) -> T:
    """get(True), which reads the local cache alone; where that raises one of `errors`, get(False), which asks the hub.

    folder: `get` reads a local folder: nothing else is asked. Raises HubError, within seconds without a network.
    """
    tried = ["that folder" if folder else "the local cache"]
    try:
        return get(True)
    except errors as error:
        reason: Exception = error
    if not folder and not offline():
        host, port = address()
        tried.append(f"{host}:{port}")
        if not reachable(host, port):
            reason = ConnectionError(f"no connection to {host}:{port} opened within {REACH_SECONDS:.0f} seconds")
        else:
            try:
                return get(False)
            except errors as error:
                reason = error
    raise HubError(" and ".join(tried), reason) from reason


def fetch(repository: str, *wanted: Sequence[str]) -> list[Path]:
    """Files of a repository of the hub, from the cache or fetched into it. wanted: for each, its name and those that
    do as well, best first. Raises HubError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def one(names: Sequence[str], local: bool) -> Path:
        for name in names[:-1]:
            try:
                return Path(hf_hub_download(repository, name, local_files_only=local))
            except EntryNotFoundError:  # also of a file that is not in the cache
                continue
        return Path(hf_hub_download(repository, names[-1], local_files_only=local))

    return cache_then_hub(lambda local: [one(names, local) for names in wanted])


def offline() -> bool:
    """Whether the environment forbids to ask."""
    switches = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in switches)


def address() -> tuple[str, int]:
    """Host and port that a download would talk to first: the proxy, if there is one."""
    endpoint = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    proxy = urllib.request.getproxies().get(endpoint.scheme)
    if proxy and endpoint.hostname and not urllib.request.proxy_bypass(endpoint.hostname):
        endpoint = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return endpoint.hostname or "huggingface.co", endpoint.port or (80 if endpoint.scheme == "http" else 443)


def reachable(host: str, port: int) -> bool:
    """Whether a connection opens within a few seconds, name lookup included (which alone may hang for a minute)."""
    opened = threading.Event()

    def knock() -> None:
        try:
            socket.create_connection((host, port), timeout=REACH_SECONDS).close()
            opened.set()
        except OSError:
            return

    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    return opened.is_set()
