"""What every benchmark shares: one thread unless the caller says otherwise, and the table of the step at the end."""

from __future__ import annotations

import os
from typing import Any

# Before torch is imported. With one thread a CPU is timed by what the process computed, whatever else the machine does.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    from .report import left_out, step_table

    session = getattr(config, "_benchmarksession", None)
    rows = [bench.extra_info for bench in getattr(session, "benchmarks", ()) if "provider" in bench.extra_info]
    if not rows:
        return
    terminalreporter.section("the step")
    terminalreporter.write_line(step_table(rows))
    terminalreporter.write_line("\nNot measured:")
    skipped = [report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])]
    for line in (*skipped, *left_out(rows)):
        terminalreporter.write_line(f"  {line}")
