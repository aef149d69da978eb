"""Real ranks on one machine: a function run by several processes over gloo."""

from __future__ import annotations

import faulthandler
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from mvle.train import leave


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _enter(rank: int, function: Callable[..., None], ranks: int, port: int, arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    faulthandler.enable()  # a rank that aborts says where
    function(*arguments)
    leave(0)  # as `python -m mvle.train` does; an exception above is reported by mp.spawn


def run_ranks(ranks: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(*arguments)` in `ranks` processes that have torchrun's environment; raises what any raises.

    The function must be importable (defined at a module's top level).
    """
    mp.spawn(_enter, (function, ranks, free_port(), arguments), nprocs=ranks, join=True)
