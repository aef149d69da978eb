"""A run with phases of lower resolution: interrupted before and at the change, it ends in the weights of one that was
not; and what it may go on with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mvle.data.batch import Batch
from mvle.engine.metrics import Metrics, read_rows
from mvle.engine.train_step import TrainStep
from mvle.evaluation.validation import Validation
from mvle.train import main

from .test_training import final_weights, write_config

SECTIONS = {
    "schedule": {"steps": 6, "kind": "constant", "warmup": 0, "resolution": [[32, 4]]},
    "masking": {"cell": 16, "image_ratio": [0.6, 1.0], "clean_keep": 0.5, "mode": "drop"},
    "batch": {"total": 8, "micro": 4},
    "checkpoint": {"every": 2, "keep": 5},
    "evaluation": {"every": 3, "pairs": 8, "k": 2},
}


def test_a_run_interrupted_around_a_change_of_size_ends_in_the_same_weights_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, broken = (write_config(tmp_path / name, 6, **SECTIONS) for name in ("straight", "broken"))
    seen: list[tuple[int, int]] = []
    interrupted: list[int] = []
    work: list[int] = []
    call, losses, update = TrainStep.__call__, Validation.losses, Metrics.update

    def watched(self: TrainStep, step: int, batch: Batch) -> object:
        if step in interrupted:
            interrupted.remove(step)
            raise RuntimeError("interrupted")
        seen.append((step, batch.images.shape[1]))
        return call(self, step, batch)

    def validated(self: Validation, model: torch.nn.Module, *rest: object) -> dict[str, float]:
        assert not model.training
        assert self.split.batch([0]).images.shape[1] == 64
        return losses(self, model, *rest)

    def counted(self: Metrics, *values: object, flops: int, **others: object) -> None:
        work.append(flops)
        update(self, *values, flops=flops, **others)

    monkeypatch.setattr(Metrics, "update", counted)
    monkeypatch.setattr(TrainStep, "__call__", watched)
    monkeypatch.setattr(Validation, "losses", validated)
    assert main([str(straight)]) == 0
    said = capsys.readouterr().out
    assert seen == [(0, 32), (1, 32), (2, 32), (3, 32), (4, 64), (5, 64)]
    assert min(work[4:]) > 1.5 * max(work[:4])  # useful operations are those of the images that came
    assert "approximate images of 32 pixels until step 4 of 6, positions resampled" in said
    assert "approximate clean image views show 0.5 of their patches in training" in said
    assert "images have 64 pixels a side from step 5 on" in said

    seen.clear()
    interrupted.extend([3, 4])  # from step 3 back to the checkpoint of 2; then at that of 4, as the size changes
    assert [main([str(broken)]) for _ in range(3)] == [1, 1, 0]
    assert seen == [(0, 32), (1, 32), (2, 32), (2, 32), (3, 32), (4, 64), (5, 64)]

    expected, got = final_weights(straight), final_weights(broken)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    for kind in ("train", "val"):
        one, two = (read_rows(c.parent / "run" / "metrics.jsonl", kind) for c in (straight, broken))
        assert {r["step"]: r.get("loss", r.get("val_loss")) for r in one} == {
            r["step"]: r.get("loss", r.get("val_loss")) for r in two
        }


def test_another_share_of_patches_or_other_sizes_of_steps_done_are_another_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "first", 6, **{**SECTIONS, "evaluation": {"every": 0}})
    assert main([str(config)]) == 0

    assert main([str(config), "masking.clean_keep=0.25"]) == 2
    assert "masking.clean_keep: 0.5 in the checkpoint, 0.25 now" in capsys.readouterr().err
    assert main([str(config), "schedule.resolution=[[32,5]]"]) == 2
    assert "schedule.resolution: [[32, 4]] in the checkpoint, [[32, 5]] now" in capsys.readouterr().err
    assert main([str(config), "schedule.steps=8", "schedule.resolution=[[32,4],[48,7]]"]) == 2  # 5 and 6 were of 64
    assert main([str(config), "schedule.steps=7"]) == 0
    assert "goes on from step 6 to 7" in capsys.readouterr().out
