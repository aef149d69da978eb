"""One question: how fast is each op, beside what a library or a compiler makes of the same, and beside its floor?

    pytest benchmarks/test_kernels.py --benchmark-only                              a table at the end
    python -m benchmarks.kernel_report run.json                                     the table in docs/kernels.md

Problems and providers: kernels.py. Every call is made in turn with the plain one of its problem; read the ratio. `*`
marks the backend that a call takes of itself. On a GPU calls are captured into a CUDA graph first, so that what is
timed is the device; on a CPU sizes are small, and what counts there are bytes and launches.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from statistics import median
from typing import Any

import pytest
import torch

from .counts import count
from .kernels import Problem, cases
from .measure import Ratio, copy_roof, matmul_roof, peak_memory, seconds, wait
from .providers import dtype_on
from .report import about

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = cases(DEVICE)
ROUNDS, CALLS = (20, 10) if DEVICE.type == "cuda" else (5, 1)
ABOUT = about(DEVICE.type)


@cache
def roofs() -> tuple[float, float]:
    """(operations, bytes) a second that this machine reaches at best."""
    return matmul_roof(DEVICE, dtype_on(DEVICE)), copy_roof(DEVICE)


def repeated(step: Callable[[], Any]) -> tuple[Callable[[], Any], bool]:
    """(CALLS calls of a step, whether the device makes them out of a graph). A step that waits for the device, or is
    not the same every time, cannot be captured: it is timed with its launches then, and the table says so."""
    if DEVICE.type != "cuda":
        return step, False
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    wait(DEVICE)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                step()
    except RuntimeError:
        wait(DEVICE)
        return lambda: [step() for _ in range(CALLS)], False
    return graph.replay, True


class Problems:
    """The problem of one case at a time: inputs of several would not fit."""

    def __init__(self) -> None:
        self.name, self.problem = "", None

    def __call__(self, name: str) -> Problem:
        if name != self.name:
            self.name, self.problem = name, None
            gc.collect()
            self.problem = CASES[name].problem(DEVICE, dtype_on(DEVICE))
        assert self.problem is not None
        return self.problem


@pytest.fixture(scope="module")
def problems() -> Iterator[Problems]:
    yield Problems()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("case", list(CASES))
def test_kernel(benchmark: Any, problems: Problems, case: str, backward: bool) -> None:
    """All providers of a case, in turn."""
    problem = problems(case)
    if backward and not problem.leaves:
        pytest.skip(f"{case}: has no backward")
    names = [name for name in problem.providers if name != "auto"]
    chosen = problem.chosen()
    steps, captured, rows = {}, {}, {}
    for name in names:
        step = problem.step(name, backward)
        peak, _ = peak_memory(lambda step=step: step, DEVICE)
        steps[name], captured[name] = repeated(step)
        rows[name] = {"case": case, "op": problem.op, "kernel": name, "backward": backward, "peak_bytes": peak}
        if DEVICE.type == "cpu":
            rows[name] |= asdict(count(step))
    times: dict[str, list[float]] = {name: [] for name in names}
    first = "plain" if "plain" in names else names[-1]

    def turn() -> None:
        for name in names:
            times[name].append(seconds(steps[name], DEVICE) / CALLS)

    turn()
    times = {name: [] for name in names}
    benchmark.group = f"{case}, {'forward and backward' if backward else 'forward'}"
    benchmark.pedantic(turn, rounds=ROUNDS)
    flops, moved = problem.floor(backward)
    best = max(flops / roofs()[0], moved / roofs()[1])
    for name, row in rows.items():
        own = median(times[name])
        row |= {"seconds": own, "ratio": asdict(Ratio.of(times[first], times[name])), "against": first}
        row |= {"chosen": name == chosen, "captured": captured[name], "roof": best / own}
        row |= {"flops_per_second": flops / own, "bytes_per_second": moved / own}
    info = {"kernels": list(rows.values()), "skipped": problem.skipped, "device": str(DEVICE), "about": ABOUT}
    benchmark.extra_info.update(info)
