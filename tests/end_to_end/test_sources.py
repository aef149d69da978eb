"""Runs on a set that is smaller than a batch, and on two sources: started, gone on with, refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mvle.data.loader import Loader
from mvle.data.plan import SamplingPlan
from mvle.engine.metrics import read_rows
from mvle.objectives.itm import Itm
from mvle.train import main

from ..unit.small_run import small_config, small_parts, write_shard

QUICK = {
    "schedule": {"steps": 3},
    "optim": {"lr": 1e-3},
    "checkpoint": {"every": 3},
    "evaluation": {"every": 0},
    "metrics": {"every": 1},
}


def run(folder: Path, **sections: object) -> Path:
    """A config file beside a run over pairs.tar."""
    path = folder / "config.yaml"
    path.write_text(small_config(folder / "pairs.tar", folder / "run", **{**QUICK, **sections}).to_yaml())
    return path


@pytest.mark.parametrize("images", [5, 1])
def test_a_set_smaller_than_a_batch_trains_and_equal_images_are_no_negatives(tmp_path: Path, images: int) -> None:
    shard = write_shard(tmp_path / "pairs.tar", images=images)

    assert main([str(run(tmp_path, batch={"total": 32}))]) == 0

    rows = read_rows(tmp_path / "run" / "metrics.jsonl", "train")
    assert len(rows) == 3 and not any(row["skipped"] for row in rows)
    for row in rows:
        assert all(math.isfinite(row[name]) for name in ("mim", "mlm", "itc", "itm", "grad_norm"))
    if images == 1:
        assert [row["itc"] for row in rows] == [0.0] * 3  # everything is a positive

    config, shards, tokenizer, _ = small_parts(shard, batch={"total": 32})
    batch = Loader(config.data, SamplingPlan.build(config, shards), shards, tokenizer, 64, 40).load(1)
    groups = [batch.keys[i : i + 4] for i in range(0, 32, 4)]
    alone = sum(set(group) == {key} for group in groups for key in group)  # no other image in its group
    assert len(set(batch.keys)) == images
    assert int(Itm(config.objectives.itm).count(batch)) == 32 + 2 * (32 - alone)


def test_a_run_of_two_sources_goes_on_elsewhere_and_not_with_other_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, images in (("a", 3), ("b", 16)):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "pairs.tar", images=images)
    train = {name: {"shards": f"{tmp_path}/{name}/*.tar", "weight": weight} for name, weight in (("a", 1), ("b", 3))}
    config = run(tmp_path, data={"train": train}, schedule={"steps": 3, "kind": "constant"})

    assert main([str(config)]) == 0
    said = capsys.readouterr().out
    assert "    a  3 images, 1 shards, weight 1: 25.0% of the pairs, 2 epochs\n" in said
    assert "    b  16 images, 1 shards, weight 3: 75.0% of the pairs, 1.12 epochs\n" in said

    (tmp_path / "a").rename(tmp_path / "moved")
    moved = [f"data.train.a.shards={tmp_path}/moved/pairs.tar", "data.train.b.weight=6", "data.train.a.weight=2"]
    assert main([str(config), "schedule.steps=4", *moved]) == 0  # twice each weight are the same weights
    assert "goes on from step 3" in capsys.readouterr().out

    assert main([str(config), "schedule.steps=5", *moved[:2]]) == 2
    assert "sources have other weights" in capsys.readouterr().err
