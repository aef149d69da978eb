"""One question: how fast is each op, beside what a library or a compiler makes of the same, and beside its floor?

    pytest benchmarks/test_kernels.py --benchmark-only                              a table at the end
    python -m benchmarks.kernel_report run.json                                     the table in docs/kernels.md

Problems and providers: kernels.py and kernel_cases.py. Every call is made in turn with the plain one of its problem;
read the ratio. `*` marks the backend that a call takes of itself. On a GPU calls are captured into a CUDA graph first,
so that what is timed is the device; on a CPU sizes are small, and what counts there are bytes and launches. What
torch.compile makes of plain comes last, since compiling takes longer than all the rest.

Of the roof: what no implementation can pass, over the time taken. That is the longer of the products that the op needs,
as fast as a large one, and of a copy of as many bytes as it has to move, made in turn with the providers: what lies in
the caches for the op lies there for the copy. On a CPU freed memory is held, as in a run: else some calls fetch zeroed
pages for their output and others do not, and a forward can take longer than itself with its backward.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache
from statistics import median
from typing import Any

import pytest
import torch

from mvle.engine.host_memory import hold_freed_memory

from .counts import count
from .kernel_cases import COMPILED, add_compiled, cases, left_out
from .kernels import Problem
from .measure import Ratio, copy_of, matmul_roof, peak_memory, seconds, wait
from .providers import dtype_on
from .report import about

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = cases(DEVICE)
ROUNDS, CALLS = (20, 10) if DEVICE.type == "cuda" else (7, 10)
LONG = 0.02  # seconds of a call that on a CPU is made once a turn
ABOUT = about(DEVICE.type)
COPY = "copy"  # beside the providers


@cache
def products() -> float:
    """Operations a second that this machine reaches at best."""
    return matmul_roof(DEVICE, dtype_on(DEVICE))


def repeated(step: Callable[[], Any], calls: int) -> tuple[Callable[[], Any], bool]:
    """(so many calls of a step, whether the device makes them out of a graph). A step that waits for the device, or is
    not the same every time, cannot be captured: it is timed with its launches then, and the table says so."""

    def again() -> None:
        for _ in range(calls):
            step()

    if DEVICE.type != "cuda":
        return again, False
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    wait(DEVICE)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            again()
    except RuntimeError:
        wait(DEVICE)
        return again, False
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


@pytest.fixture(scope="module", autouse=True)
def memory_as_in_a_run() -> None:
    if DEVICE.type == "cpu":
        hold_freed_memory()


def measured(benchmark: Any, problem: Problem, case: str, backward: bool, names: Sequence[str]) -> None:
    """A row of each of these providers, made in turn with `plain` and with a copy."""
    chosen = problem.chosen()
    flops, moved = problem.floor(backward)
    calls, made, rows = CALLS, dict[str, Callable[[], Any]](), dict[str, dict[str, Any]]()
    for name in dict.fromkeys(["plain", *names]):
        step = problem.step(name, backward)
        peak, _ = peak_memory(lambda step=step: step, DEVICE)
        if DEVICE.type == "cpu" and seconds(step, DEVICE) > LONG:
            calls = 1
        made[name] = step
        if name in names:
            rows[name] = {"case": case, "op": problem.op, "kernel": name, "backward": backward, "peak_bytes": peak}
            rows[name] |= asdict(count(step)) if DEVICE.type == "cpu" else {}
    made[COPY] = copy_of(DEVICE, moved)
    steps = {name: repeated(step, calls) for name, step in made.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}

    def turn() -> None:
        for name, (step, _) in steps.items():
            times[name].append(seconds(step, DEVICE) / calls)

    turn()
    times = {name: [] for name in steps}
    benchmark.group = f"{case}, {'forward and backward' if backward else 'forward'}"
    benchmark.pedantic(turn, rounds=ROUNDS)
    best = max(flops / products(), min(times[COPY]))
    for name, row in rows.items():
        own = median(times[name])
        row |= {"seconds": own, "ratio": asdict(Ratio.of(times["plain"], times[name])), "against": "plain"}
        row |= {"chosen": name == chosen, "captured": steps[name][1], "roof": best / own}
        row |= {"flops_per_second": flops / own, "bytes_per_second": moved / own}
    info = {"kernels": list(rows.values()), "skipped": problem.skipped, "left_out": left_out(DEVICE)}
    benchmark.extra_info.update(info | {"device": str(DEVICE), "about": ABOUT})


DIRECTIONS = pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])


@DIRECTIONS
@pytest.mark.parametrize("case", list(CASES))
def test_kernel(benchmark: Any, problems: Problems, case: str, backward: bool) -> None:
    """All providers of a case but what torch.compile makes of it."""
    problem = problems(case)
    if backward and not problem.leaves:
        pytest.skip(f"{case}: has no backward")
    measured(benchmark, problem, case, backward, [n for n in problem.providers if n not in ("auto", COMPILED)])


@DIRECTIONS
@pytest.mark.parametrize("case", list(CASES) if DEVICE.type == "cuda" else [])
def test_compiled(benchmark: Any, problems: Problems, case: str, backward: bool) -> None:
    """Plain under torch.compile."""
    problem = problems(case)
    if backward and not problem.leaves:
        pytest.skip(f"{case}: has no backward")
    add_compiled(problem)
    measured(benchmark, problem, case, backward, [COMPILED])
