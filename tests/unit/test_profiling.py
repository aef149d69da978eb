"""The profiler sees its window of steps and nothing else."""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path

import pytest
import torch

from mvle.engine.metrics import Metrics, MetricsConfig
from mvle.engine.parallel import Parallel
from mvle.engine.profiling import Profiler

ALONE = Parallel(0, 1, torch.device("cpu"))


def run(folder: Path, window: tuple[int, int] | None, end: int, start: int = 0) -> Path:
    with (
        Metrics(folder / "metrics.jsonl", MetricsConfig(), ALONE, steps=9, pairs=1) as metrics,
        Profiler(window, folder / "profile", ALONE, metrics) as profiler,
    ):
        for step in range(start + 1, end + 1):
            with profiler.step(step):
                torch.ones(step, step) @ torch.ones(step, step)
    return folder / "profile"


def steps_seen(folder: Path) -> list[str]:
    with gzip.open(folder / "trace_rank0.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = [str(event.get("name")) for event in events]
    steps = [name for name in names if name.startswith("step ")]
    assert names.count("aten::mm") == len(steps)
    return steps


def test_a_window_leaves_a_trace_and_a_table_of_its_steps(tmp_path: Path, capsys) -> None:
    folder = run(tmp_path, (2, 3), end=5)

    assert steps_seen(folder) == ["step 2", "step 3"]
    assert "aten::mm" in (folder / "operators.txt").read_text()
    assert "operators.txt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("start", "end", "seen"),
    [(2, 5, ["step 3", "step 4"]), (0, 3, ["step 2", "step 3"])],  # goes on within the window; ends within it
)
def test_a_run_that_is_only_partly_in_the_window_leaves_that_part(
    tmp_path: Path, start: int, end: int, seen: list[str]
) -> None:
    assert steps_seen(run(tmp_path, (2, 4), end, start)) == seen


def test_a_run_that_fails_in_the_window_leaves_what_was_seen(tmp_path: Path) -> None:
    with Metrics(tmp_path / "metrics.jsonl", MetricsConfig(), ALONE, steps=9, pairs=1) as metrics:
        with pytest.raises(ZeroDivisionError), Profiler((1, 4), tmp_path / "profile", ALONE, metrics) as profiler:
            with profiler.step(1):
                torch.ones(3, 3) @ torch.ones(3, 3)
                raise ZeroDivisionError

    assert steps_seen(tmp_path / "profile") == ["step 1"]


def test_without_a_window_and_beyond_it_nothing_is_watched(tmp_path: Path) -> None:
    assert not run(tmp_path / "none", None, end=3).exists()
    assert not run(tmp_path / "late", (1, 2), end=4, start=2).exists()
    with Metrics(tmp_path / "metrics.jsonl", MetricsConfig(), ALONE, steps=9, pairs=1) as metrics:
        assert isinstance(Profiler(None, tmp_path, ALONE, metrics).step(1), contextlib.nullcontext)
