"""Who is late: ranks watch one another, so that one which hangs, stops or dies ends the job, and is named.

Ranks wait for one another in each step. One that stands still stops them all, and all that torch can say is that some
collective took too long. So every rank says where it is: its main thread enters phases (`Watch.enter`), and a thread
of its own publishes that, every BEAT, in the store through which the ranks have found one another. All ranks enter the
same phases in the same order, so whoever has entered the fewest is the one that the others wait for; of several, those
that are not in a collective themselves. What ends a job:

    a rank hangs        the fewest phases entered did not grow for as long as that phase may take
    a rank is silent    no beat for parallel.timeout: its process is dead or stopped
    a rank has died     a collective failed on the others, and they find out who gives no sign of life (`blame`)
    a rank has failed   by an error of its own, which it leaves behind (`last_words`)
    the store is gone   and with it whoever held it: rank 0, or torchrun's agent of the first node

Each is one verdict, written once into the store and carried out by every rank: its author prints it, a rank that hangs
prints its stacks, and all end with FAILED. Rank 0 and the last rank, which may be on another machine, judge the others.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch.distributed as dist

from .parallel import MARGIN, Parallel

FAILED = 1  # exit code of every rank that ends by a verdict
BEAT = 0.5  # seconds between two beats; a tenth of parallel.timeout where that is less
STDERR = 2  # written without Python's buffers, whose lock a hung main thread may hold
SHOWN = 8  # ranks that a verdict has a line for

Report = Mapping[str, Any]  # what a rank publishes, see Watch._publish
Verdict = Mapping[str, Any]  # author: rank · text: what it prints · stacks: ranks that print theirs · wait: seconds


class At(NamedTuple):
    """Where a main thread is: the `tick`-th phase that it entered, which may take `limit` seconds from `since` on."""

    tick: int
    phase: str
    step: int
    since: float
    limit: float


class Watch:
    """Watches over ranks, from the start of a run to its end. All ranks make it together.

    As a context manager it goes on after an error: then `blame` or `last_words` is called, and the process ended.
    One rank alone has nobody to watch: every method is there, and no thread.
    """

    def __init__(self, parallel: Parallel) -> None:
        self.parallel = parallel
        self.at = At(0, "starting", 0, time.monotonic(), parallel.first_timeout)
        self.beat = min(BEAT, parallel.timeout / 10)
        self.window = max(5 * self.beat, 2.0)  # seconds: whoever is silent for so long is not late, but dead or stopped
        if parallel.ranks == 1:
            return
        self._main = threading.get_ident()
        self._beats = 0
        self._heard: dict[int, tuple[Report, float]] = {}  # rank -> its last report, and when that came
        self._least = (-1, 0.0)  # the fewest phases entered, and since when
        self._answered = time.monotonic()  # when the store last did
        self._broken = ""  # why the store cannot be used any more
        self._error, self._asked = "", 0.0  # of `blame`
        self._words = ""  # of `last_words`
        self._ending = False  # the main thread ends the process itself
        self._verdict: Verdict | None = None
        self._judged, self._closing, self._wake = threading.Event(), threading.Event(), threading.Event()
        self._saying, self._said = threading.Lock(), False
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        client = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(minutes=5))
        self._store = dist.PrefixStore(f"mvle/watch/{parallel.start_name}", client)
        self._address = f"{address}:{port}"
        self._publish()
        parallel.barrier()  # all have published: reading waits for nobody
        self._read((0,))
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._guard)]
        for thread in self._threads:
            thread.start()

    # --- what a main thread calls ---

    def enter(self, phase: str, step: int | None = None, long: bool = False) -> None:
        """The main thread begins something else. Every rank enters the same phases in the same order.

        step   whose phase it is; None: as before
        long   it may take parallel.first_timeout, as all does until the first step is done. It should end in a word
               between ranks (a vote, a barrier): afterwards they wait for one another for the shorter time again
        """
        parallel, at = self.parallel, self.at
        limit = parallel.first_timeout if long or not parallel.settled else parallel.timeout
        if limit != at.limit:
            parallel.set_timeouts(limit)
        self.at = At(at.tick + 1, phase, at.step if step is None else step, time.monotonic(), limit)

    def blame(self, error: BaseException) -> str:
        """Who is to blame for the error of a collective; says so on stderr too. Takes a few beats.

        The error that this rank ends with: call it once, and end the process.
        """
        if self.parallel.ranks == 1:
            return first_line(error)
        self._ending = True
        self._error, self._asked = first_line(error), time.monotonic()
        self._wake.set()
        self._judged.wait(self.window + 10)
        verdict = self._verdict or self._store_verdict(f"has not answered for {self.window + 10:.0f} s")
        self._say(verdict)
        self._linger()
        return str(verdict["text"])

    def last_words(self, message: str) -> None:
        """Tell the other ranks of an error of this rank's own. It prints that itself, and ends the process."""
        if self.parallel.ranks == 1:
            return
        self._ending = True
        self._words = message
        self._wake.set()
        self._judged.wait(self.window + 10)
        self._linger()

    def close(self) -> None:
        """This rank has come to the end of its work; others may still be at theirs."""
        if self.parallel.ranks == 1:
            return
        self._closing.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(5)

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    # --- threads ---

    def _talk(self) -> None:
        """Publish, read and judge, every beat. The only thread that uses the store."""
        try:
            while not self._closing.is_set():
                self._round()
                self._wake.wait(self.beat)
                self._wake.clear()
            self._publish()  # that this rank is done
        except RuntimeError as error:  # torch's DistError: the connection broke
            self._broken = first_line(error)

    def _guard(self) -> None:
        """Notice what `_talk` cannot: a store that does not answer (its calls then wait for ever), or broke."""
        while not self._closing.wait(self.beat):
            # and what this thread cannot: an interpreter that stands still. Then C prints all stacks, and ends
            faulthandler.dump_traceback_later(self.parallel.timeout + 10 * self.beat, exit=True, file=STDERR)
            quiet = time.monotonic() - self._answered
            if self._verdict is None and (self._broken or quiet > self.parallel.timeout):
                self._carry_out(self._store_verdict(self._broken or f"has not answered for {quiet:.0f} s"))
        faulthandler.cancel_dump_traceback_later()

    def _round(self) -> None:
        parallel = self.parallel
        self._publish()
        judges = parallel.rank in (0, parallel.ranks - 1) or self._asked
        # rank 0 is always read: should it take the store along, this is what is known of it
        self._read(range(parallel.ranks) if judges else (0,))
        verdict = self._judge() if judges or self._words else None
        if verdict is not None:  # the first is everybody's
            verdict = json.loads(self._store.compare_set("verdict", "", json.dumps(verdict)))
        elif self._store.check(["verdict"]):
            verdict = json.loads(self._store.get("verdict"))
        self._answered = time.monotonic()
        if verdict is not None and self._verdict is None:
            self._carry_out(verdict)

    def _publish(self) -> None:
        at = self.at
        self._beats += 1  # so that no report is like the one before
        report = {
            "beat": self._beats,
            "tick": at.tick,
            "where": f"'{at.phase}'" + (f" of step {at.step}" if at.step else ""),
            **code_of(self._main),
            "seconds": time.monotonic() - at.since,
            "limit": at.limit,
            "process": f"process {os.getpid()} on {socket.gethostname()}",
            "done": self._closing.is_set(),
        }
        self._store.set(str(self.parallel.rank), json.dumps(report))

    def _read(self, ranks: Iterable[int]) -> None:
        now = time.monotonic()
        ranks = list(ranks)
        for rank, raw in zip(ranks, self._store.multi_get([str(rank) for rank in ranks]), strict=True):
            report = json.loads(raw)
            if rank not in self._heard or self._heard[rank][0]["beat"] != report["beat"]:
                self._heard[rank] = (report, now)

    # --- verdicts ---

    def _judge(self) -> Verdict | None:
        if self._words:
            return self._rule([f"rank {self.parallel.rank} ended with: {self._words}"])
        now = time.monotonic()
        reports = {rank: report for rank, (report, _) in self._heard.items() if not report["done"]}
        silent = {rank: now - self._heard[rank][1] for rank in reports}
        if self._asked:
            return self._judge_lost(reports, silent) if now > self._asked + self.window else None
        if gone := [rank for rank in reports if silent[rank] > self.parallel.timeout]:
            lines = each(gone, lambda r: f"rank {r} is dead or stopped: {last_seen(reports[r], silent[r])}")
            return self._rule(lines + others(reports, gone))
        return self._judge_late(reports, silent, now)

    def _judge_lost(self, reports: Mapping[int, Report], silent: Mapping[int, float]) -> Verdict:
        """A collective failed: who is gone?"""
        gone = [rank for rank in reports if silent[rank] > self.window - self.beat]
        lines = each(gone, lambda r: f"rank {r} died: {last_seen(reports[r], silent[r])}")
        if not gone:
            lines = [f"a collective failed, and every rank is alive; rank {self.parallel.rank} got {self._error}"]
        return self._rule(lines + others(reports, gone))

    def _judge_late(self, reports: Mapping[int, Report], silent: Mapping[int, float], now: float) -> Verdict | None:
        """Has the rank that the others wait for taken too long?"""
        least = min((report["tick"] for report in reports.values()), default=-1)
        if least != self._least[0]:
            self._least = (least, now)
        last = [rank for rank, report in reports.items() if report["tick"] == least]
        limit = max((reports[rank]["limit"] for rank in last), default=0.0)
        if not last or now - self._least[1] <= limit:
            return None
        # Of one whose last word is old another, or none within the window, tells if it hangs or is gone.
        old = [rank for rank in last if 2 * self.beat < silent[rank] <= self.window]
        busy = [rank for rank in last if not reports[rank]["waits"]]
        late = [rank for rank in busy if rank not in old] if busy else [] if old else last
        if not late:
            return None
        key = "parallel.timeout" if limit == self.parallel.timeout else "parallel.first_timeout"

        def line(rank: int) -> str:
            report = reports[rank]
            if silent[rank] > self.window:
                return f"rank {rank} is dead or stopped: {last_seen(report, silent[rank])}"
            return (
                f"rank {rank} hangs: {report['seconds']:.0f} s in {report['where']}, which may take {limit:.0f} s "
                f"({key}), at {report['code']}; {report['process']} is alive and prints its stacks"
            )

        if len(late) < len(reports):
            return self._rule(each(late, line) + others(reports, late), late)
        # the process group's own timeout is next: let NCCL write what its flight recorder holds
        first = "no rank makes progress, and none is behind the others: a network, or a collective"
        return self._rule([first, *each(late, line)], late, wait=2 * MARGIN)

    def _store_verdict(self, problem: str) -> Verdict:
        """What only this rank can know: nobody else is to be reached."""
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            who = "torchrun's agent of the first node is gone or stopped"
        else:
            report, when = self._heard[0]
            who = f"rank 0 is dead or stopped: {last_seen(report, time.monotonic() - when)}"
        return self._rule([who, f"it held the ranks' store at {self._address}: {problem}"])

    def _rule(self, lines: Sequence[str], stacks: Sequence[int] = (), wait: float = 0.0) -> Verdict:
        return {"author": self.parallel.rank, "text": "\n    ".join(lines), "stacks": stacks[:SHOWN], "wait": wait}

    def _carry_out(self, verdict: Verdict) -> None:
        self._verdict = verdict
        self._judged.set()
        if self._ending:
            return
        self._say(verdict)
        try:
            raise RuntimeError(verdict["text"])
        except RuntimeError as error:
            tell_torchrun(error, trace=False)
        if self.parallel.rank in verdict["stacks"]:
            os.write(STDERR, f"mvle.train: rank {self.parallel.rank} hangs here (its main thread is last):\n".encode())
            faulthandler.dump_traceback(file=STDERR)
        self._linger()
        time.sleep(verdict["wait"])
        if not self._ending:
            os._exit(FAILED)

    def _say(self, verdict: Verdict) -> None:
        """The author says all, and the first rank of each other machine the first line."""
        with self._saying:  # the main thread and `_talk` may both be about to end the process
            if self._said:
                return
            self._said = True
            if verdict["author"] == self.parallel.rank:
                os.write(STDERR, f"mvle.train: {verdict['text']}\n".encode())
            elif os.environ.get("LOCAL_RANK", "0") == "0":
                os.write(STDERR, f"mvle.train: {verdict['text'].splitlines()[0]}\n".encode())

    def _linger(self) -> None:
        """Let the others read the verdict: torchrun ends all of a machine when one ends, and the store with them.
        Without torchrun rank 0 holds it, and leaves last."""
        holds = self.parallel.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        time.sleep((5 if holds else 3) * self.beat)


def lost_a_rank(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a collective's, whose other end is gone or late."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def tell_torchrun(error: Exception, trace: bool = True) -> None:
    """Leave an error that is being handled where torchrun looks: it prints that of the rank which failed first."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        if not trace:
            error.__suppress_context__ = True
            error.with_traceback(None)
        get_error_handler().record_exception(error)


def first_line(error: BaseException) -> str:
    """Of an error: its type, and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def code_of(thread: int) -> dict[str, Any]:
    """The line of Python that a thread is at, and whether it waits there for other ranks."""
    frame = sys._current_frames()[thread]
    code = f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
    inner = itertools.islice(traceback.walk_stack(frame), 4)  # further out is FSDP's wrapping of the model itself
    return {"code": code, "waits": any("torch/distributed/" in f.f_code.co_filename for f, _ in inner)}


def last_seen(report: Report, silent: float) -> str:
    """What is left of a rank that is silent."""
    return f"no sign of life since {silent:.0f} s, last seen in {report['where']} ({report['process']})"


def each(ranks: Sequence[int], line: Callable[[int], str]) -> list[str]:
    """A line for each rank, and one for all above SHOWN."""
    more = ranks[SHOWN:]
    return [*map(line, ranks[:SHOWN]), *([f"and so {spell(more)}"] if more else [])]


def others(reports: Mapping[int, Report], culprits: Sequence[int]) -> list[str]:
    """Where the other ranks are, a line for each place."""
    places: dict[str, list[int]] = {}
    for rank, report in sorted(reports.items()):
        if rank not in culprits:
            places.setdefault(report["where"], []).append(rank)
    return [f"{spell(ranks)} in {where}" for where, ranks in places.items()]


def spell(ranks: Sequence[int]) -> str:
    """Sorted numbers of ranks: "rank 3", "ranks 0, 2-7"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {text}"
