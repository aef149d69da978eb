"""Memory of a run of one CPU rank stays with the process between steps.

glibc gives a freed large buffer back to the system, and the next one of that size comes as fresh pages, each zeroed at
its first touch. A training step frees and asks for the same buffers again and again: a sixth of a step of base on two
cores (docs/performance.md), and another share in each run. Held, the same pages serve every step; a process is then as
large as its fullest moment (2.8 GB instead of 2.6 for ViT-S at 4 pairs). A process that trains one model after the
other gives it back in between.
"""

from __future__ import annotations

import ctypes
import os
import platform

# of glibc's malloc.h: never give back the top of the heap; take no buffer from the system by itself
M_TRIM_THRESHOLD, NEVER = -1, -1
M_MMAP_MAX, NONE = -4, 0
OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def can_hold_freed_memory() -> bool:
    """False with another C library, or where the user has settings of malloc, or another malloc, in the environment."""
    return platform.libc_ver()[0] == "glibc" and not any(os.environ.get(name) for name in OWN_SETTINGS)


def hold_freed_memory() -> bool:
    """Ask glibc to keep what is freed from now on; whether it does. Before other threads are there: glibc does not
    promise that it can be told safely beside them."""
    if not can_hold_freed_memory():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_TRIM_THRESHOLD, NEVER)) and bool(mallopt(M_MMAP_MAX, NONE))


def give_back_freed_memory() -> None:
    """To the system, once: what is free now, and not used soon. Does nothing with another C library than glibc."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
