"""configs/ablation/: each file differs from what it extends in what its name says, and trains at tiny size."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvle.config import differences, load_config
from mvle.config_files import config_names
from mvle.engine.metrics import read_rows
from mvle.train import FINISHED, main

from .recipes import recipes, stated
from .small_run import write_shard

LOSSES = ("mim", "mlm", "itc", "itm")
# losses that an ablation trains, in its name's words
TRAINED = {
    "ablation/itc": ("itc",),
    "ablation/itc_itm": ("itc", "itm"),
    "ablation/itc_itm_mlm": ("mlm", "itc", "itm"),
    "ablation/itc_itm_mim": ("mim", "itc", "itm"),
    "ablation/mlm_mim": ("mim", "mlm"),
    "ablation/mlm_whole_image": ("mlm",),
    "ablation/mim_alone": ("mim",),
    "ablation/mlm_alone": ("mlm",),
    "ablation/mlm_mim_alone": ("mim", "mlm"),
}
# and what else it changes
OTHERWISE = {
    "ablation/both_masked": {"masking.context": "masked"},
    "ablation/mim_alone": {"masking.context": "none"},
    "ablation/mlm_alone": {"masking.context": "none"},
    "ablation/mlm_mim_alone": {"masking.context": "none"},
    "ablation/drop": {"masking.mode": "drop"},
    "ablation/drop_late": {"masking.mode": "drop", "masking.insert": "decoder"},
    "ablation/data_10": {"data.fraction": 0.1},
    "ablation/data_25": {"data.fraction": 0.25},
    "ablation/data_50": {"data.fraction": 0.5},
}
SMALL = [
    "extends=tiny",
    "batch.total=8",
    "data.slots=2",
    "objectives.itm.group=4",
    "schedule.steps=20",
    "evaluation.every=0",
    "metrics.every=10",
    "run.device=cpu",
    "run.threads=1",
]


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 pictures of shapes: a tenth of them still fills a batch."""
    return write_shard(tmp_path_factory.mktemp("ablations") / "pairs.tar", images=200, extras=False)


@pytest.mark.parametrize("name", recipes("ablation/"))
def test_an_ablation_makes_20_steps_at_tiny_size_of_the_losses_it_is_named_for(
    name: str, shard: Path, tmp_path: Path
) -> None:
    assert main([name, *SMALL, f"data.train={shard}", f"run.folder={tmp_path / 'run'}"]) == FINISHED

    rows = read_rows(tmp_path / "run" / "metrics.jsonl", "train")
    assert [row["step"] for row in rows] == [10, 20]
    trained = TRAINED.get(name, LOSSES)
    for row in rows:  # JSON has no NaN: a loss that is not finite would be no number
        assert tuple(loss for loss in LOSSES if isinstance(row.get(loss), float)) == trained
        assert row["skipped"] == 0
    # once over, tiny's own weights of what is trained are kept
    weights = load_config(tmp_path / "run" / "config.yaml").objectives
    tiny = load_config("tiny").objectives
    assert all(getattr(weights, loss).weight == getattr(tiny, loss).weight for loss in trained)


@pytest.mark.parametrize("name", recipes("ablation/"))
@pytest.mark.parametrize("base", ["base", "tiny"])
def test_an_ablation_changes_what_it_is_named_for_and_nothing_else(name: str, base: str) -> None:
    changes = differences(load_config(name, [f"extends={base}"]), load_config(base))

    off = {f"objectives.{loss}.weight": 0.0 for loss in LOSSES if loss not in TRAINED.get(name, LOSSES)}
    assert {key: new for key, new, _ in changes} == off | OTHERWISE.get(name, {})
    assert stated(name)["extends"] == "base" and stated(name)["run"] == {"name": name}


def test_what_a_recipe_has_anyway_is_stated_where_it_is_compared() -> None:
    """So that it holds over any recipe."""
    assert stated("ablation/replace")["masking"] == {"mode": "replace"}
    assert stated("ablation/mlm_whole_image")["masking"] == {"context": "clean"}
    assert stated("ablation/data_100")["data"] == {"fraction": 1}


def test_every_way_that_is_compared_has_a_config() -> None:
    expected = {*TRAINED, *OTHERWISE, "ablation/all", "ablation/replace", "ablation/data_100"}

    assert {name for name in config_names() if name.startswith("ablation/")} == expected
