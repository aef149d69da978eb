"""A rank that hangs, stops, dies or fails ends the job of all ranks within seconds, and is named on the others.

The jobs of this file run once, side by side; each test looks at some. Ranks wait 3 s for one another after step 1.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from mvle.data.errors import DataError
from mvle.engine import watch
from mvle.engine.parallel import Parallel, ParallelConfig
from mvle.engine.signals import stop_on_signals
from mvle.engine.watch import Watch, lost_a_rank, spell
from mvle.train import FAILED, FINISHED, UNUSABLE, explain, leave

from .ranks import Ending, ends_of_jobs

SECONDS = 3
STEP = 3  # of what happens to a job
ALL = -1  # it happens to every rank

Fault = Callable[[list[int]], object]  # called with the process ids of all ranks


def job(fault: Fault, culprit: int, phase: str = "loading") -> None:
    """Steps as a trainer makes them; in a phase of step STEP something happens to a rank, while the others go on."""
    with stop_on_signals() as stop:
        watcher = None
        try:
            config = ParallelConfig(first_timeout=2 * SECONDS / 60, timeout=SECONDS / 60)
            with Parallel.start(config, "cpu") as parallel, Watch(parallel) as watcher:
                pids = [0] * parallel.ranks
                dist.all_gather_object(pids, os.getpid())
                for step in range(1, 5):
                    for name in ("loading", "voting"):
                        watcher.enter(name, step)
                        if (step, name) == (STEP, phase) and culprit in (parallel.rank, ALL):
                            fault(pids)
                    parallel.vote(stop.asked)
                    parallel.shorten_timeouts()
                    watcher.enter("saving", long=True)
                    if step == 1 and parallel.rank == culprit:
                        time.sleep(1.4 * SECONDS)  # too long for anything but a long phase
                    parallel.barrier()
        except DataError as error:
            leave(explain(error, watcher, UNUSABLE))
        except Exception as error:
            leave(explain(error, watcher, FAILED, expected=False))


def hang(pids: list[int]) -> None:
    time.sleep(1000)


def hang_without_patience(pids: list[int]) -> None:
    watch.MARGIN = 0.5  # when no rank is behind, the process group's own timeout comes first, by default in a minute
    hang(pids)


def freeze(pids: list[int]) -> None:
    ctypes.PyDLL(None).sleep(1000)  # keeps the interpreter's lock: no thread of this process goes on


def stop(pids: list[int]) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die(pids: list[int]) -> None:
    for pid in pids:
        if pid != os.getpid():
            os.kill(pid, signal.SIGTERM)  # as torchrun does to the ranks that are left
    os.kill(os.getpid(), signal.SIGKILL)


def find_bad_data(pids: list[int]) -> None:
    raise DataError("pairs-03.tar must have 10 bytes; got 7")


def divide_by_zero(pids: list[int]) -> None:
    print(1 / 0)


# rank 0 holds the store through which ranks watch one another, so what happens to it is another story
JOBS = {
    "slow": (2, partial(job, len, 1)),
    "hangs": (4, partial(job, hang, 1)),
    "hangs among equals": (2, partial(job, hang, 1, "voting")),
    "all hang": (2, partial(job, hang_without_patience, ALL)),
    "freezes": (2, partial(job, freeze, 1)),
    "stops": (2, partial(job, stop, 1)),
    "stops with the store": (2, partial(job, stop, 0)),
    "dies": (3, partial(job, die, 1)),
    "dies with the store": (2, partial(job, die, 0)),
    "fails": (2, partial(job, find_bad_data, 1)),
    "fails with the store": (2, partial(job, find_bad_data, 0)),
    "has a bug": (2, partial(job, divide_by_zero, 1)),
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Ending]]:
    return ends_of_jobs(tmp_path_factory.mktemp("jobs"), JOBS)


def codes(ends: list[Ending]) -> list[int]:
    return [end.code for end in ends]


def test_a_slow_rank_in_a_long_phase_is_not_blamed(ends: dict[str, list[Ending]]) -> None:
    assert codes(ends["slow"]) == [FINISHED] * 2
    assert [end.said for end in ends["slow"]] == ["", ""]


def test_a_rank_that_hangs_is_named_with_its_phase_and_step_and_prints_its_stacks(
    ends: dict[str, list[Ending]],
) -> None:
    first, hung, *others = ends["hangs"]
    assert codes(ends["hangs"]) == [FAILED] * 4
    said = first.said + others[-1].said  # rank 0 or the last, whoever saw it first
    assert re.search(
        r"rank 1 hangs: \d s in 'loading' of step 3, which may take 3 s \(parallel.timeout\), at hang \(test_watch.py",
        said,
    )
    assert "ranks 0, 2-3 in 'voting' of step 3" in said
    assert "rank 1 hangs here" in hung.said and "in hang" in hung.said

    first, hung = ends["hangs among equals"]
    assert codes([first, hung]) == [FAILED] * 2
    assert "rank 1 hangs" in first.said + hung.said and "rank 0 in 'voting' of step 3" in first.said + hung.said
    assert "in hang" in hung.said and "in vote" not in first.said


def test_when_all_hang_none_is_blamed_and_all_print_their_stacks(ends: dict[str, list[Ending]]) -> None:
    assert codes(ends["all hang"]) == [FAILED] * 2
    assert all("in hang_without_patience" in end.said for end in ends["all hang"])
    assert "no rank makes progress, and none is behind the others" in ends["all hang"][0].said


def test_a_rank_whose_interpreter_stands_still_is_named_and_ends_itself(ends: dict[str, list[Ending]]) -> None:
    first, frozen = ends["freezes"]
    assert codes([first, frozen]) == [FAILED] * 2
    assert re.search("rank 1 (is dead or stopped|died): no sign of life since", first.said)
    assert "in freeze" in frozen.said


@pytest.mark.parametrize(
    ("silent", "verdict"),
    [(0.3, "hangs"), (0.7, None), (1.9, None), (2.1, "is dead or stopped: no sign of life since 2 s")],
)
def test_a_rank_that_was_heard_a_while_ago_is_not_yet_judged(silent: float, verdict: str | None) -> None:
    """It may have been stopped a moment after its last word, which came from a phase that it had been in for long."""
    watcher = object.__new__(Watch)
    watcher.parallel = SimpleNamespace(rank=0, timeout=3.0)  # type: ignore[assignment]
    watcher.beat, watcher.window, watcher._least = 0.3, 2.0, (7, 100.0)
    common = {"waits": False, "seconds": 4.0, "limit": 6.0, "code": "f (a.py:1)", "process": "process 5 on a"}
    reports = {0: {**common, "tick": 9, "where": "'voting'"}, 1: {**common, "tick": 7, "where": "'saving'"}}
    found = watcher._judge_late(reports, {0: 0.1, 1: silent}, 106.5)
    assert (found is None) if verdict is None else (found is not None and f"rank 1 {verdict}" in found["text"])

    reports[2] = reports[1]  # of several that are late those that were heard are judged
    found = watcher._judge_late(reports, {0: 0.1, 1: silent, 2: 0.2}, 106.5)
    assert found is not None and "rank 2 hangs" in found["text"]
    named = re.search("rank 1 (hangs|is dead)", found["text"])
    assert bool(named) == (verdict is not None)

    together = {rank: {**reports[1], "waits": True} for rank in range(3)}  # where nobody is behind nobody is blamed
    found = watcher._judge_late(together, {0: 0.1, 1: silent, 2: 0.2}, 106.5)
    assert (found is None) if verdict is None else found is not None and found["text"].startswith("no rank makes")


def test_a_rank_that_is_stopped_is_named(ends: dict[str, list[Ending]]) -> None:
    first, stopped = ends["stops"]
    assert codes([first, stopped]) == [FAILED, -signal.SIGKILL]
    assert "rank 1 is dead or stopped: no sign of life since" in first.said
    assert "rank 0 in 'voting' of step 3" in first.said

    stopped, last = ends["stops with the store"]
    assert codes([stopped, last]) == [-signal.SIGKILL, FAILED]
    assert "rank 0 is dead or stopped: no sign of life since" in last.said
    assert re.search(r"it held the ranks' store at .+: has not answered for [3-9] s", last.said)


def test_a_rank_that_is_killed_is_named_within_seconds_though_the_others_are_told_to_end(
    ends: dict[str, list[Ending]],
) -> None:
    first, dead, last = ends["dies"]
    assert codes([first, dead, last]) == [FAILED, -signal.SIGKILL, FAILED]
    assert re.search(r"rank 1 died: no sign of life since \d+ s, last seen in '", first.said + last.said)
    assert "ranks 0, 2 in 'voting' of step 3" in first.said + last.said
    assert max(first.after, last.after) - dead.after < 15  # torchrun kills after 30

    dead, last = ends["dies with the store"]
    assert codes([dead, last]) == [-signal.SIGKILL, FAILED]
    assert "rank 0 is dead or stopped" in last.said and "last seen in '" in last.said


def test_the_last_words_of_a_rank_are_quoted(ends: dict[str, list[Ending]]) -> None:
    first, failed = ends["fails"]
    assert codes([first, failed]) == [FAILED, UNUSABLE]
    assert failed.said == "mvle.train: rank 1: pairs-03.tar must have 10 bytes; got 7\n"
    assert first.said == "mvle.train: rank 1 ended with: pairs-03.tar must have 10 bytes; got 7\n"

    failed, last = ends["fails with the store"]
    assert codes([failed, last]) == [UNUSABLE, FAILED]
    assert failed.said == "mvle.train: rank 0: pairs-03.tar must have 10 bytes; got 7\n" and last.said == ""

    first, failed = ends["has a bug"]
    assert codes([first, failed]) == [FAILED] * 2
    assert "print(1 / 0)" in failed.said and "rank 1 ended with: ZeroDivisionError" in first.said


def test_one_rank_alone_watches_nobody() -> None:
    parallel = Parallel(0, 1, torch.device("cpu"))
    with Watch(parallel) as alone:
        alone.enter("saving", 7, long=True)
        alone.enter("voting")

        assert (alone.at.phase, alone.at.step, alone.at.tick) == ("voting", 7, 2)
        assert alone.at.limit == parallel.first_timeout
        parallel.shorten_timeouts()
        alone.enter("voting")
        assert alone.at.limit == parallel.timeout
        assert alone.blame(ValueError("a\nb")) == "ValueError: a"
        alone.last_words("none")


def test_the_error_of_a_collective_is_told_from_others() -> None:
    broken = RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    try:
        try:
            raise broken
        except RuntimeError as error:
            raise KeyError("wrapped") from error
    except KeyError as error:
        assert lost_a_rank(error)
    assert lost_a_rank(dist.DistNetworkError("refused")) and not lost_a_rank(RuntimeError("shapes differ"))


@pytest.mark.parametrize(
    ("ranks", "text"), [([3], "rank 3"), ([0, 1], "ranks 0-1"), ([0, 2, 3, 4, 9], "ranks 0, 2-4, 9")]
)
def test_numbers_of_ranks_are_spelled_in_runs(ranks: list[int], text: str) -> None:
    assert spell(ranks) == text
