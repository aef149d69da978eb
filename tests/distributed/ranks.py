"""Real ranks on one machine: functions run by several processes over gloo.

The processes are forked from one that has imported torch and the engine and has done nothing else, so that a rank
starts in milliseconds and not in seconds.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from mvle.train import leave

PRELOADED = ["pytest", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", "mvle.engine.build"]
PATIENCE = 12.0  # seconds: a rank of a busy machine may itself take 6 s to notice that the others are gone


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(ranks: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(*arguments)` in `ranks` processes that have torchrun's environment; raises what any raises.

    The function must be importable (defined at a module's top level).
    """
    context()
    job = Job(ranks, function, arguments)
    mp.start_processes(enter, (job, Stream(1), Stream(2)), nprocs=ranks, join=True, start_method="forkserver")


@dataclass(frozen=True)
class Ending:
    """How a rank ended: its exit code (less than 0: by that signal), when (seconds), what it wrote."""

    code: int
    after: float
    said: str


def ends_of_jobs(folder: Path, jobs: Mapping[str, tuple[int, Callable[[], None]]]) -> dict[str, list[Ending]]:
    """Run jobs, each a number of ranks and a function, side by side; each rank goes its own way to its end.

    A rank that outlives all others of its job by PATIENCE is killed: it was stopped. folder: for what they write.
    """
    began = time.monotonic()
    processes: dict[tuple[str, int], Any] = {}
    for name, (ranks, function) in jobs.items():
        job = Job(ranks, function)
        for rank in range(ranks):
            with open(folder / f"{name}{rank}", "w") as log:
                stream = Stream(log.fileno())
                process = context().Process(target=enter, args=(rank, job, stream, stream), daemon=True)
                process.start()
            processes[name, rank] = process
    ended: dict[tuple[str, int], float] = {}
    while len(ended) < len(processes):
        time.sleep(0.02)
        now = time.monotonic() - began
        ended |= {key: now for key, process in processes.items() if key not in ended and not process.is_alive()}
        for key in processes.keys() - ended:
            others = [ended.get(other, now) for other in processes if other[0] == key[0] and other != key]
            if now > max(others) + PATIENCE or now > 120:
                processes[key].kill()
    found: dict[str, list[Ending]] = {name: [] for name in jobs}
    for (name, rank), process in processes.items():
        process.join()
        found[name].append(Ending(process.exitcode, ended[name, rank], (folder / f"{name}{rank}").read_text()))
    return found


@dataclass(frozen=True)
class Job:
    """What some ranks do together, and where they meet."""

    ranks: int
    function: Callable[..., None]
    arguments: tuple[Any, ...] = ()
    port: int = field(default_factory=free_port)
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))


class Stream:
    """A file descriptor that a process takes along; it would have those of the one that it is forked from."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __reduce__(self) -> tuple[Any, ...]:
        return taken, (reduction.DupFd(self.descriptor),)


def taken(duplicate: Any) -> Stream:
    """The stream on the other side."""
    return Stream(duplicate.detach())


def context() -> Any:
    """Where processes come from."""
    found = mp.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    return found


def enter(rank: int, job: Job, out: Stream, err: Stream) -> None:
    """One rank of a job, from its start to its end."""
    os.dup2(out.descriptor, 1)
    os.dup2(err.descriptor, 2)
    os.environ.update(
        job.environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(job.ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(job.port),
    )
    torch.set_num_threads(1)
    faulthandler.enable()  # a rank that aborts says where
    job.function(*job.arguments)
    leave(0)  # as `python -m mvle.train` does; an exception above is reported by mp.start_processes
