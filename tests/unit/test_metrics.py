"""metrics.jsonl and the log line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mvle.engine.gpus import GPUS, known_gpu, peak_tflops
from mvle.engine.host_memory import give_back_freed_memory
from mvle.engine.metrics import Metrics, MetricsConfig, drop_rows_after, duration, memory_gib, read_rows
from mvle.engine.parallel import Parallel

ALONE = Parallel(0, 1, torch.device("cpu"))


def open_metrics(folder: Path, every: int = 2, **more: Any) -> Metrics:
    return Metrics(folder / "metrics.jsonl", MetricsConfig(every=every), ALONE, **{"steps": 10, "pairs": 32} | more)


def step(metrics: Metrics, number: int, loss: float = 1.0, bad: bool = False) -> dict[str, Any] | None:
    value = math.nan if bad else loss
    return metrics.update(
        number,
        {"loss": torch.tensor(value), "mim": torch.tensor(value / 2), "mlm_correct": torch.tensor(0.5)},
        {"grad_norm": torch.tensor(value), "temperature": torch.tensor(0.07)},
        skipped=torch.tensor(float(bad)),
        wait=0.0,
        lr=1e-3,
    )


def test_a_row_holds_the_means_of_its_interval(tmp_path: Path) -> None:
    with open_metrics(tmp_path) as metrics:
        for number, loss in enumerate([1.0, 3.0, 5.0, 7.0], 1):
            step(metrics, number, loss)

    rows = read_rows(tmp_path / "metrics.jsonl", "train")
    assert [(r["step"], r["loss"], r["mim"]) for r in rows] == [(2, 2.0, 1.0), (4, 6.0, 3.0)]
    assert rows[0]["mlm_accuracy"] == 0.5
    assert rows[1]["pairs"] == 128
    assert {"lr", "grad_norm", "temperature", "skipped", "pairs/s", "data_wait", "mem_gib"} <= rows[0].keys()


@pytest.mark.parametrize("peak", [None, 50.0])
def test_useful_work_is_told_a_second_and_as_a_share_of_a_known_peak(tmp_path: Path, monkeypatch, peak: Any) -> None:
    clock = iter([0.0, 4.0, 4.0, 14.0, 14.0])  # start; log and next interval, twice
    monkeypatch.setattr("mvle.engine.metrics.time.perf_counter", lambda: next(clock))
    with open_metrics(tmp_path, every=2, peak_tflops=peak) as metrics:
        for number, flops in enumerate([10e12, 30e12, 20e12, 30e12], 1):
            metrics.update(
                number, {"loss": torch.tensor(1.0)}, {}, skipped=torch.tensor(0.0), wait=0.0, lr=1.0, flops=flops
            )

    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["tflops"] for row in rows] == [10.0, 5.0]
    assert [row.get("mfu") for row in rows] == ([None, None] if peak is None else [0.2, 0.1])


def test_a_peak_is_that_of_a_whole_known_card_and_never_a_guess() -> None:
    assert known_gpu("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert known_gpu("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert known_gpu("NVIDIA H100") is None
    assert peak_tflops(torch.device("cpu")) is None


def test_the_last_step_has_a_row_whatever_the_interval(tmp_path: Path) -> None:
    with open_metrics(tmp_path, every=4, steps=5) as metrics:
        rows = [step(metrics, number) for number in range(1, 6)]

    assert [row is not None for row in rows] == [False, False, False, True, True]


def test_a_skipped_step_is_counted_and_enters_no_mean(tmp_path: Path, capsys) -> None:
    with open_metrics(tmp_path, every=3) as metrics:
        step(metrics, 1, 1.0)
        step(metrics, 2, bad=True)
        row = step(metrics, 3, 3.0)

    assert row is not None
    assert (row["loss"], row["grad_norm"], row["skipped"]) == (2.0, 2.0, 1)
    assert "SKIPPED 1" in capsys.readouterr().out


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    with open_metrics(tmp_path, every=1) as metrics:
        step(metrics, 1, bad=True)
        metrics.record(1, "validation", {"loss": math.inf})

    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert [json.loads(line)["loss"] for line in text.splitlines()] == [None, None]


def test_a_resume_removes_rows_beyond_its_step_and_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "kind": "train"}) + "\n" for s in (2, 4, 6)) + '{"step": 8, "ki')

    with open_metrics(tmp_path, start=4) as metrics:
        step(metrics, 5)
        step(metrics, 6)

    assert [row["step"] for row in read_rows(path)] == [2, 4, 6]
    assert "loss" in read_rows(path)[-1]


def test_a_file_that_is_not_there_has_no_rows_to_remove(tmp_path: Path) -> None:
    drop_rows_after(tmp_path / "metrics.jsonl", 3)

    assert not list(tmp_path.iterdir())


def test_lines_are_aligned_and_use_the_names_of_the_rows(tmp_path: Path, capsys) -> None:
    with open_metrics(tmp_path, every=1, steps=100) as metrics:
        step(metrics, 9, 1.0)
        step(metrics, 10, 12.5)

    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 009/100  loss  1.000 (mim 0.500)  lr 1.00e-03  grad_norm   1.00  temperature 0.0700")
    assert first.index("  lr") == second.index("  lr")
    for word in ("pairs/s", "data_wait", "mem", "GiB", "eta"):
        assert word in first


def test_other_names_at_a_later_step_are_refused(tmp_path: Path) -> None:
    with open_metrics(tmp_path) as metrics:
        step(metrics, 1)
        with pytest.raises(ValueError, match="same names"):
            metrics.update(2, {"loss": torch.tensor(1.0)}, {}, skipped=torch.tensor(0.0), wait=0.0, lr=1.0)


def test_a_terminal_gets_lines_above_a_bar(tmp_path: Path, capsys) -> None:
    with open_metrics(tmp_path, every=1, steps=2, terminal=True) as metrics:
        step(metrics, 1)
        step(metrics, 2)

    out = capsys.readouterr().out
    assert "loss" in out and "2/2" in out


def test_time_that_is_paused_is_not_training(tmp_path: Path, monkeypatch) -> None:
    clock = iter([0.0, 10.0, 110.0, 120.0, 120.0])  # start, pause, resume, log, next interval
    monkeypatch.setattr("mvle.engine.metrics.time.perf_counter", lambda: next(clock))
    with open_metrics(tmp_path, every=1) as metrics:
        with metrics.paused():
            pass
        row = step(metrics, 1)

    assert row is not None
    assert row["pairs/s"] == pytest.approx(32 / 20)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1m00s"), (200, "3m20s"), (18720, "5h12m"), (180000, "2d02h"), (math.nan, "unknown")],
)
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_memory_is_what_the_process_holds() -> None:
    give_back_freed_memory()  # a run that another test made keeps its own
    before = memory_gib(torch.device("cpu"))
    held = torch.ones(2**26)  # a quarter of a GiB

    assert 0.2 < memory_gib(torch.device("cpu")) - before < 0.4
    assert held.sum() > 0


def test_values_that_come_at_some_steps_are_in_the_next_row_and_in_no_other(tmp_path: Path) -> None:
    with open_metrics(tmp_path, every=3) as metrics:
        for number in range(1, 7):
            if number < 3:
                metrics.extra({"grad_norm_mim": torch.tensor(float(number)), "grad_norm_mlm": torch.tensor(0.5)})
            step(metrics, number)

    first, second = read_rows(tmp_path / "metrics.jsonl")
    assert (first["grad_norm_mim"], first["grad_norm_mlm"], first["grad_norm"]) == (2.0, 0.5, 1.0)  # the last of each
    assert "grad_norm_mim" not in second


def test_pairs_replaced_and_captions_truncated_are_counted_and_shown_if_there_are_any(tmp_path: Path, capsys) -> None:
    losses = {"loss": torch.tensor(1.0)}
    with open_metrics(tmp_path, every=2) as metrics:
        for number, counts in enumerate([{"replaced": 2}, {"replaced": 1, "truncated": 4}, {}, {}], 1):
            metrics.update(number, losses, {}, skipped=torch.tensor(0.0), wait=0.0, lr=1.0, **counts)

    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["replaced"], row["truncated"], row["loss"]) for row in rows] == [(3, 4, 1.0), (0, 0, 1.0)]
    first, second = capsys.readouterr().out.splitlines()
    assert "replaced 3 pairs" in first and "truncated 4 captions" in first
    assert "replaced" not in second and "truncated" not in second


@pytest.mark.parametrize("window", [[0, 3], [4, 3]])
def test_a_profile_window_that_cannot_be_is_refused(window: list[int]) -> None:
    with pytest.raises(ValueError, match=r"expected \[first, last\] step"):
        MetricsConfig(profile=window)
