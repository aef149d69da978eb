"""torch's profiler over a window of steps (metrics.profile), on rank 0.

RUN/profile/trace_rank0.json.gz   a timeline for chrome://tracing or https://ui.perfetto.dev
RUN/profile/operators.txt         the operators that cost most; on a GPU also those that take most memory
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from .metrics import Metrics
from .parallel import Parallel

ROWS = 40  # operators in the table


class Profiler:
    """A window of steps, [first, last] counted from 1 (None: nothing is watched, and nothing costs).

    Use it as a context manager around the run: a run that ends inside the window still leaves what was seen.
    """

    def __init__(self, window: tuple[int, int] | None, folder: Path, parallel: Parallel, metrics: Metrics) -> None:
        self.window = window if parallel.is_main else None
        self.folder, self.device, self.metrics = folder, parallel.device, metrics
        self._profile: profile | None = None

    def step(self, step: int) -> AbstractContextManager[None]:
        """Around step number `step` (1 for the first)."""
        if self.window is None or not self.window[0] <= step <= self.window[1]:
            return nullcontext()
        return self._watched(step)

    @contextmanager
    def _watched(self, step: int) -> Iterator[None]:
        if self._profile is None:
            self._start()
        with record_function(f"step {step}"):
            yield
        assert self.window is not None
        if step == self.window[1]:
            self._write()

    def _start(self) -> None:
        cuda = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        if cuda:
            torch.cuda.synchronize(self.device)  # sync: kernels of earlier steps are no part of the window
        self._profile = profile(activities=activities, profile_memory=cuda)
        self._profile.start()

    def _write(self) -> None:
        seen, self._profile = self._profile, None
        assert seen is not None
        with self.metrics.paused():
            cuda = self.device.type == "cuda"
            if cuda:
                torch.cuda.synchronize(self.device)  # sync: kernels of the last step belong to the window
            seen.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            seen.export_chrome_trace(str(self.folder / "trace_rank0.json.gz"))
            operators = seen.key_averages()
            orders = ["self_device_time_total", "self_device_memory_usage"] if cuda else ["self_cpu_time_total"]
            tables = [f"by {order}\n{operators.table(sort_by=order, row_limit=ROWS)}" for order in orders]
            (self.folder / "operators.txt").write_text("\n\n".join(tables), encoding="utf-8")
        self.metrics.say(f"profile     {self.folder}: trace_rank0.json.gz and operators.txt")

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is not None:
            self._write()
