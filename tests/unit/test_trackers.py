"""TensorBoard and W&B get the rows of metrics.jsonl, and say so where they cannot."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mvle.config import Config
from mvle.engine.metrics import Metrics, read_rows
from mvle.engine.parallel import Parallel
from mvle.engine.run import RunFolder
from mvle.engine.trackers import TrackerError, check_trackers, open_trackers

ALONE = Parallel(0, 1, torch.device("cpu"))


def steps(folder: Path, start: int, end: int, loss: float, **metrics: Any) -> Path:
    """A process of a run: rows of steps start + 1 .. end, and a validation at the end."""
    config = Config.from_dict({"run": {"folder": str(folder)}, "metrics": {"every": 2, **metrics}})
    run = RunFolder(folder)
    with Metrics(
        run.metrics,
        config.metrics,
        ALONE,
        steps=100,
        pairs=8,
        start=start,
        trackers=open_trackers(config, run, ALONE, start),
    ) as log:
        for step in range(start + 1, end + 1):
            sums = {"loss": torch.tensor(loss)}
            log.update(step, sums, {}, skipped=torch.tensor(0.0), wait=0.0, lr=0.5)
        log.record(end, "skipped", {"keys": ["a", "b"], "blamed": True, "losses": {"loss": float("nan")}})
        log.record(end, "val", {"recall": 0.25, "pairs": 12, "none": float("nan")})
    return folder


def test_tensorboard_has_the_numbers_of_the_rows_and_after_a_resume_each_step_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    steps(tmp_path / "run", 0, 8, 1.0, tensorboard=True)
    steps(tmp_path / "run", 4, 6, 2.0, tensorboard=True)

    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(2, 1.0), (4, 1.0), (6, 2.0)]
    assert [(e.step, e.value) for e in events.Scalars("val/recall")] == [(6, 0.25)]
    numbers = {
        f"{row['kind']}/{name}"
        for row in read_rows(tmp_path / "run" / "metrics.jsonl")
        for name, value in row.items()
        if name not in ("step", "kind") and type(value) in (int, float)
    }
    assert set(events.Tags()["scalars"]) == numbers
    assert not any("keys" in tag or "blamed" in tag or "none" in tag for tag in numbers)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the package wandb")
def test_processes_of_a_run_are_one_run_at_wandb(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "first"

    for start, end in ((0, 4), (4, 6)):
        steps(folder, start, end, 1.0, wandb="project")

    identity = (folder / "wandb" / "id").read_text().strip()
    stored = list((folder / "wandb").glob(f"offline-run-*/run-{identity}.wandb"))
    assert len(stored) in (1, 2)  # folders are named by the second: two processes may share one
    bytes_ = b"".join(path.read_bytes() for path in stored)
    for word in (b"project", b"first", b"train/loss", b"val/recall", b"weight_decay"):
        assert word in bytes_


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="needs a place without the package wandb")
def test_wandb_that_is_not_installed_is_asked_for_by_name() -> None:
    with pytest.raises(TrackerError, match=r"(?s)metrics.wandb expected .*pip install wandb\n.*metrics.wandb=null"):
        check_trackers(Config.from_dict({"metrics": {"wandb": "project"}}).metrics)


def test_a_folder_that_has_the_name_of_the_package_is_not_the_package(tmp_path: Path, monkeypatch) -> None:
    metrics = Config.from_dict({"metrics": {"tensorboard": True}}).metrics
    (tmp_path / "tensorboard").mkdir()  # as a run may leave beside itself
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [n for n in sys.modules if n.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)

    with pytest.raises(TrackerError, match="pip install tensorboard"):
        check_trackers(metrics)


def test_trackers_that_nobody_asks_for_leave_nothing(tmp_path: Path) -> None:
    folder = steps(tmp_path / "run", 0, 2, 1.0)

    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"] == 1.0


def test_a_tracker_that_cannot_write_stops_the_run_before_it_starts(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "tensorboard").write_text("a file is in the way")

    with pytest.raises(OSError, match="tensorboard"):
        steps(folder, 0, 2, 1.0, tensorboard=True)
