"""The table of what a faster way to train costs in quality: medians and ranges of runs that were made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import quality


def run(folder: Path, r1: float) -> None:
    """What a run leaves behind, as far as the table reads it."""
    folder.mkdir(parents=True)
    sides = {side: {"r1": r1} for side in ("image_to_text", "text_to_image")}
    pixels = {"true": 0.02, "wrong": 0.1, "caption_alone": {"true": 0.03}}
    found = {
        "retrieval": {"itc": sides},
        "itm": {"balanced_accuracy_hard": 0.9},
        "conditional": {"mlm": {"true": {"loss": 0.1}}, "mim": pixels},
    }
    (folder / "evaluation.json").write_text(json.dumps(found))
    rows = [{"kind": "val", "step": 1, "val_loss": 5.0}, {"kind": "val", "step": 2, "val_loss": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_table_has_the_median_and_the_range_of_what_was_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quality, "ROOT", tmp_path)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for seed, r1 in enumerate((0.5, 0.9, 0.8)):
        run(quality.folder_of("tiny", "drop", seed, tmp_path), r1)
    quality.main(["tiny", "--runs", str(tmp_path), "--only-read"])
    said = capsys.readouterr().out

    assert "| | drop |" in said and said.count("not there") == 3 * (len(quality.WAYS) - 1)
    assert "| R@1 image to caption | 0.800 (0.500-0.900) |" in said
    assert "| val_loss | 1.000 (1.000-1.000) |" in said, "of the last validation"
    written = json.loads((tmp_path / "benchmarks" / "results" / "quality_tiny.json").read_text())
    assert [one["seed"] for one in written["drop"]] == [0, 1, 2] and written["replace"] == []
