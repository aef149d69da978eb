"""Skipped steps on one rank: what is written, when, and when it is too much."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mvle.engine.metrics import Metrics, MetricsConfig, read_rows
from mvle.engine.parallel import Parallel
from mvle.engine.skips import NotFiniteError, SkipLog

ALONE = Parallel(0, 1, torch.device("cpu"))
KEYS = [f"pair{i}" for i in range(8)]


@contextmanager
def open_log(folder: Path, limit: int = 5) -> Iterator[SkipLog]:
    with Metrics(folder / "metrics.jsonl", MetricsConfig(), ALONE, steps=100, pairs=8) as metrics:
        yield SkipLog(metrics, ALONE, limit)


def note(log: SkipLog, step: int, bad: bool, guilty: tuple[int, ...] = ()) -> None:
    broken = torch.zeros(8, dtype=torch.bool)
    broken[list(guilty)] = True
    losses = {"loss": torch.tensor(math.nan if bad else 1.0), "mlm": torch.tensor(2.0)}
    log.note(step, torch.tensor(float(bad)), KEYS, broken, losses)


def rows(folder: Path) -> list[dict]:
    return read_rows(folder / "metrics.jsonl", "skipped")


def test_a_skipped_step_is_written_down_two_steps_late_with_its_guilty_pairs(tmp_path: Path, capsys) -> None:
    with open_log(tmp_path) as log:
        note(log, 1, bad=True, guilty=(2, 5))
        note(log, 2, bad=False, guilty=(0,))  # a step that was not skipped blames nobody
        assert not rows(tmp_path)
        note(log, 3, bad=False)

        losses = {"loss": None, "mlm": 2.0}
        assert rows(tmp_path) == [
            {"step": 1, "kind": "skipped", "keys": ["pair2", "pair5"], "blamed": True, "losses": losses}
        ]
    said = capsys.readouterr().out
    assert said == "SKIPPED step 1 was not finite; to blame: pair2, pair5\n"


def test_where_no_pair_is_to_blame_the_row_has_all_keys_and_the_screen_a_few(tmp_path: Path, capsys) -> None:
    with open_log(tmp_path) as log:
        note(log, 1, bad=True)
        log.note(2, torch.tensor(1.0), KEYS)  # nothing is known of its pairs
        log.flush()

    assert [(row["keys"], row["blamed"]) for row in rows(tmp_path)] == [(KEYS, False)] * 2
    first, _ = capsys.readouterr().out.splitlines()
    assert "no pair is to blame" in first and first.endswith("pair0, pair1, pair2, pair3, pair4 and 3 more")


def test_a_flush_looks_at_every_step_and_at_each_once(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        note(log, 1, bad=True)
        note(log, 2, bad=True)
        log.flush()
        log.flush()
        note(log, 3, bad=False)

    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_too_many_in_a_row_stop_the_run_with_their_steps_and_pairs(tmp_path: Path) -> None:
    with open_log(tmp_path, limit=3) as log:
        for step in (1, 2, 4, 5):  # two and two: never three in a row
            note(log, step, bad=True, guilty=(1,))
            note(log, step, bad=False) if step == 2 else None
        note(log, 6, bad=True)
        note(log, 7, bad=False)
        with pytest.raises(NotFiniteError) as error:
            note(log, 8, bad=False)  # two steps after the third in a row

    text = str(error.value)
    assert text.startswith("3 steps in a row were not finite, as many as optim.max_skipped allows")
    for step, what in ((4, "to blame: pair1"), (5, "to blame: pair1"), (6, "no pair is to blame")):
        assert f"step {step} was not finite; {what}" in text
    assert "step 2" not in text and "optim.lr" in text
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 4, 5, 6]


def test_a_flush_stops_the_run_as_well(tmp_path: Path) -> None:
    with open_log(tmp_path, limit=1) as log, pytest.raises(NotFiniteError, match="step 1 "):
        note(log, 1, bad=True)
        log.flush()
