"""A CPU run keeps the memory that it freed."""

import platform
import subprocess
import sys

import pytest

from mvle.engine.host_memory import OWN_SETTINGS, hold_freed_memory

PAGES = """
import resource, sys
import torch
from mvle.engine.parallel import Parallel, ParallelConfig

if sys.argv[1] == "held":
    Parallel.start(ParallelConfig(), "cpu")
def fill():
    torch.empty(2**26, dtype=torch.uint8).fill_(1)  # larger than glibc ever keeps by itself
for _ in range(10):  # small buffers settle between large ones
    fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is told")


def fresh_pages(how: str) -> int:
    """Pages that five buffers of 64 MiB, one after the other, got from the system."""
    run = subprocess.run([sys.executable, "-c", PAGES, how], capture_output=True, text=True, check=True)
    return int(run.stdout)


@glibc
def test_a_cpu_run_uses_the_same_pages_in_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OWN_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    huge = 2**21  # a system may hand out pages as large as this
    assert fresh_pages("given back") >= 5 * 2**26 // huge
    assert fresh_pages("held") < 2**26 // huge


@pytest.mark.parametrize("name", OWN_SETTINGS)
def test_settings_of_the_user_win(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    assert not hold_freed_memory()
