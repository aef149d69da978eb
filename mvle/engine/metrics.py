"""What a run says of itself: a row in metrics.jsonl and a line on the screen every metrics.every steps.

Numbers are added up on the device; the host asks for them at a log line alone. A terminal gets a progress bar below
the lines, everything else (a file, torchrun's output) the lines. Trackers (TensorBoard, W&B) get the rows too.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from ..section import Section
from .data_wait import DataWait
from .parallel import Parallel
from .run import write_text
from .trackers import Tracker

PARTS = ("mim", "mlm", "itc", "itm")  # shown in brackets behind the loss


class MetricsConfig(Section):
    """The log."""

    every: int = Field(10, gt=0, description="steps between log lines, and between rows of metrics.jsonl")
    gradient_norms: int = Field(
        0,
        ge=0,
        description="steps between norms of each objective's own gradient, in rows as grad_norm_NAME (each costs a "
        "backward for each objective); 0: never",
    )
    tensorboard: bool = Field(False, description="rows also as TensorBoard events, in tensorboard/ of the run's folder")
    wandb: str | None = Field(
        None, min_length=1, description="project of Weights & Biases that gets the rows too, named run.name; null: none"
    )
    profile: tuple[int, int] | None = Field(
        None,
        description="first and last step that torch's profiler watches on rank 0: a trace for chrome://tracing or "
        "Perfetto and a table of the costliest operators, in profile/ of the run's folder; a few steps are enough",
    )

    @field_validator("profile")
    @classmethod
    def check_profile(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        """First and last, counted from 1."""
        if value is not None and not 1 <= value[0] <= value[1]:
            raise ValueError(f"expected [first, last] step, at least 1 and in this order; got {list(value)}")
        return value


class Metrics:
    """Rows and lines of a run. Every rank makes one and calls `update`; rank 0 writes.

    path         metrics.jsonl; rows beyond `start` (the run was killed after it wrote them) are removed
    steps        of the whole run, for the ETA
    pairs        of one step, over all ranks
    start        steps done before this process
    trackers     get the numbers of every row, and are closed with the rest
    terminal     whether to draw a progress bar; None: if standard output is a terminal
    peak_tflops  10^12 operations a second that a rank's device can do, if that is known: rows then have mfu
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: MetricsConfig,
        parallel: Parallel,
        *,
        steps: int,
        pairs: int,
        start: int = 0,
        trackers: Sequence[Tracker] = (),
        terminal: bool | None = None,
        peak_tflops: float | None = None,
    ) -> None:
        self.path, self.config, self.parallel = Path(path), config, parallel
        self.steps, self.pairs, self.trackers, self.peak_tflops = steps, pairs, trackers, peak_tflops
        self._seconds_a_step = math.nan
        self._names: tuple[tuple[str, ...], tuple[str, ...]] | None = None
        self._totals: dict[str, Tensor] = {}
        self._extra: dict[str, Tensor] = {}
        self._applied: Tensor | None = None
        self._wait, self._steps, self._replaced, self._truncated = 0.0, 0, 0, 0
        self._flops = 0.0
        self._rows = (0, 0)
        self._lr = math.nan  # of the newest step
        self._data: DataWait | None = None
        self._file: Any = None
        self._bar: Any = None
        if parallel.is_main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            drop_rows_after(self.path, start)
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  closed by `close`
            if sys.stdout.isatty() if terminal is None else terminal:
                self._start_bar(start)
        self._begin_interval()

    def watch(self, data: DataWait) -> None:
        """Rows have the figures of a loader from now on, and a run that waits for it gets one word about why."""
        self._data = data

    # --- a step ---

    def update(
        self,
        step: int,
        sums: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        *,
        skipped: Tensor,
        wait: float,
        lr: float,
        replaced: int = 0,
        truncated: int = 0,
        flops: float = 0.0,
        rows: tuple[int, int] = (0, 0),
    ) -> dict[str, Any] | None:
        """Count one step; at a log step write its row and line, and return the row.

        step       steps done, this one included
        sums       0-d tensors, this rank's part: added over ranks (losses and accuracies, already divided by counts)
        state      0-d tensors that every rank has alike (grad_norm, temperature)
        skipped    0-d, 1 where the step was not finite: it is counted, and enters no mean
        wait       seconds that this rank waited for data; rank 0's are reported
        lr         learning rate of this step (of the group with the highest peak)
        replaced   pairs of this rank's step that stand in for images that cannot be read   } a row has their sums over
        truncated  captions of this rank's step that were cut to model.text.max_tokens     } its steps and all ranks
        flops      useful operations of this rank's step (model/flops.py); a row has tflops, 10^12 of them a second and
                   rank, and with a peak_tflops mfu, their share of it
        rows       (real, all) rows of packed buffers that this rank's blocks processed (model/rows.py); a row has
                   padding, the share of rank 0's that were not real
        All ranks must call it at every step: at a log step they add up their sums.
        """
        names = (tuple(sums), tuple(state))
        if self._names is None:
            self._names = names
        elif self._names != names:
            raise ValueError(f"update must get the same names at every step; got {names} after {self._names}.")
        applied = 1 - skipped.detach().to(self.parallel.device, torch.float32)
        for part, values in (("sums", sums), ("state", state)):
            if values:
                row = _stack(values.values())
                row = torch.where(applied > 0, row, 0.0)  # not a product: NaN * 0 is NaN
                self._totals[part] = row if part not in self._totals else self._totals[part] + row
        self._applied = applied if self._applied is None else self._applied + applied
        self._wait += wait
        self._replaced += replaced
        self._truncated += truncated
        self._flops += flops
        self._rows = (self._rows[0] + rows[0], self._rows[1] + rows[1])
        self._steps += 1
        self._lr = lr
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        if step % self.config.every and step != self.steps:
            return None
        return self._log(step, lr)

    def extra(self, values: Mapping[str, Tensor]) -> None:
        """Values that come at some steps only: 0-d tensors that every rank has alike and nobody changes any more. The
        next row holds the last of each name; the host does not wait for them before."""
        self._extra.update(values)

    def catch_up(self, step: int) -> None:
        """Write a row now, of the steps since the last one, if there are any. All ranks must call it."""
        if self._steps:
            self._log(step, self._lr)

    def _log(self, step: int, lr: float) -> dict[str, Any]:
        device = self.parallel.device
        nothing = torch.empty(0, device=device)
        work = self._flops / self.parallel.ranks / 1e12
        counts = torch.tensor([self._replaced, self._truncated, work], dtype=torch.float32, device=device)
        sums = self.parallel.all_reduce_sum(torch.cat([self._totals.get("sums", nothing).to(device), counts]))
        state, extra = self._totals.get("state", nothing), _stack(self._extra.values()) if self._extra else nothing
        numbers = torch.cat([part.cpu() for part in (sums, state, extra)]).tolist()  # sync: the log line
        applied = float(self._applied) if self._applied is not None else 0.0
        # the clock is read after the device was waited for, so that the interval holds the work of its steps
        seconds = max(time.perf_counter() - self._started - self._paused, 1e-9)
        assert self._names is not None
        names = [*self._names[0], "replaced", "truncated", "work", *self._names[1], *self._extra]
        values = dict(zip(names, numbers, strict=True))
        means = {
            name.replace("_correct", "_accuracy"): values[name] / applied if applied else math.nan
            for name in (*self._names[0], *self._names[1])
        }
        rate = seconds / self._steps
        old = self._seconds_a_step
        self._seconds_a_step = rate if math.isnan(old) else 0.7 * old + 0.3 * rate
        waited = min(self._wait / seconds, 1.0)
        row = {
            **means,
            **{name: values[name] for name in self._extra},
            "lr": lr,
            "skipped": round(self._steps - applied),
            "replaced": round(values["replaced"]),
            "truncated": round(values["truncated"]),
            "pairs": step * self.pairs,
            "pairs/s": self._steps * self.pairs / seconds,
            "tflops": values["work"] / seconds,
            **({} if self.peak_tflops is None else {"mfu": values["work"] / seconds / self.peak_tflops}),
            "padding": 1 - self._rows[0] / self._rows[1] if self._rows[1] else math.nan,
            "data_wait": waited,
            **({} if self._data is None else self._data.figures(self._steps, seconds, waited)),
            "mem_gib": memory_gib(self.parallel.device),
        }
        self.record(step, "train", row, line=self._line(step, row))
        if self._data is not None and (advice := self._data.advice()) is not None:
            self.say(advice)
        self._begin_interval()
        return row

    def _line(self, step: int, row: Mapping[str, Any]) -> str:
        width = len(str(self.steps))
        losses = " ".join(f"{name} {row[name]:.3f}" for name in PARTS if name in row)
        fields = [f"step {step:0{width}d}/{self.steps}"]
        if "loss" in row:
            fields.append(f"loss {row['loss']:6.3f} ({losses})")
        elif losses:
            fields.append(losses)
        fields.append(f"lr {row['lr']:.2e}")
        if "grad_norm" in row:
            fields.append(f"grad_norm {row['grad_norm']:6.2f}")
        if "temperature" in row:
            fields.append(f"temperature {row['temperature']:.4f}")
        fields += [
            f"pairs/s {row['pairs/s']:7,.1f}",
            f"mfu {row['mfu']:5.1%}" if "mfu" in row else f"tflops {row['tflops']:.3f}",
            f"data_wait {row['data_wait']:5.1%}",
            f"mem {row['mem_gib']:.2f} GiB",
            f"eta {duration((self.steps - step) * self._seconds_a_step)}",
        ]
        if row["replaced"]:
            fields.append(f"replaced {row['replaced']} pairs with bad images")
        if row["truncated"]:
            fields.append(f"truncated {row['truncated']} captions")
        if row["skipped"]:
            fields.append(f"SKIPPED {row['skipped']} steps that were not finite")
        return "  ".join(fields)

    def _begin_interval(self) -> None:
        self._totals, self._extra, self._applied = {}, {}, None
        self._wait, self._steps, self._replaced, self._truncated = 0.0, 0, 0, 0
        self._flops = 0.0
        self._rows = (0, 0)
        self._started, self._paused = time.perf_counter(), 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training (validation, a checkpoint): its time enters neither pairs/s nor the ETA."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    # --- rows and lines ---

    def record(self, step: int, kind: str, values: Mapping[str, Any], line: str | None = None) -> None:
        """A row {"step", "kind", **values} in metrics.jsonl, and its line (None: made from the values). What is not
        finite is null."""
        if self._file is None:
            return
        row = {"step": step, "kind": kind, **values}
        self._file.write(json.dumps(_plain(row), allow_nan=False) + "\n")
        self._file.flush()
        numbers = {k: v for k, v in values.items() if type(v) in (int, float) and math.isfinite(v)}
        if numbers:
            for tracker in self.trackers:
                tracker.record(step, kind, numbers)
        if line is None:
            shown = "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
            line = f"step {step:0{len(str(self.steps))}d}/{self.steps}  {kind}  {shown}"
        self.say(line)

    def say(self, text: str) -> None:
        """A line on rank 0's screen, above the progress bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            self.parallel.say(text)

    def _start_bar(self, start: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

        columns = (BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn(), "eta", TimeRemainingColumn())
        self._bar = Progress(*columns, expand=True, refresh_per_second=4, speed_estimate_period=120)
        self._task = self._bar.add_task("train", total=self.steps, completed=start)
        self._bar.start()

    def close(self, failed: bool = False) -> None:
        """Close the file and the trackers, and leave the terminal as it was. failed: the run ended by an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._file is not None:
            self._file.close()
            self._file = None
        trackers, self.trackers = self.trackers, ()
        for tracker in trackers:
            tracker.close(failed)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)


# --- files and words -------------------------------------------------------------------------------------------------


def read_rows(path: str | os.PathLike[str], kind: str | None = None) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, all or of one kind; a last line that a kill cut short is left out."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return [row for row in rows if kind is None or row["kind"] == kind]


def drop_rows_after(path: Path, step: int) -> None:
    """Remove rows beyond `step`, and a last line that a kill cut short."""
    if path.is_file():
        rows = [row for row in read_rows(path) if row["step"] <= step]
        write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def memory_gib(device: torch.device) -> float:
    """Memory of this process in GiB: the device allocator's peak on a GPU, what is resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # macOS counts in bytes, and the peak


def duration(seconds: float) -> str:
    """Seconds as 5h12m, 3m20s or 12s."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = max(round(seconds), 0)
    hours, minutes = divmod(whole // 60, 60)
    if hours >= 48:
        return f"{hours // 24}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def _stack(values: Iterable[Tensor]) -> Tensor:
    return torch.stack([v.detach().to(torch.float32).reshape(()) for v in values])


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value
