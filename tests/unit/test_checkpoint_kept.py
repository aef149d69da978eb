"""Which checkpoints are kept: the newest, one in so many, and the best."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import get_args

import pytest

from mvle.config import ConfigError, load_config
from mvle.engine.checkpoint_best import Best, Figure, is_better, read_best
from mvle.engine.checkpoint_files import steps_in
from mvle.engine.errors import CheckpointError
from mvle.evaluation.validation import Validation

from .checkpoint_run import Run
from .small_run import small_parts, write_shard


def test_the_newest_are_kept(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=2)
    for _ in range(4):
        run.train(1).save()

    assert steps_in(tmp_path) == [3, 4]


def test_the_one_just_written_is_kept_when_a_run_was_set_back(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=3)
    for _ in range(3):
        run.train(1).save()
    (tmp_path / "latest").write_text("step_00000001\n")

    again = Run(tmp_path, keep=1).resume().train(1)
    again.save()

    assert steps_in(tmp_path) == [2]


def test_one_in_so_many_is_kept_for_ever(tmp_path: Path) -> None:
    run = Run(tmp_path, every=1, keep=1, keep_every=3)
    for _ in range(8):
        run.train(1).save()

    assert steps_in(tmp_path) == [3, 6, 8]


def test_checkpoints_are_due_every_so_many_steps(tmp_path: Path) -> None:
    checkpoints = Run(tmp_path, every=3).checkpoints

    assert [step for step in range(1, 10) if checkpoints.due(step)] == [3, 6, 9]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["checkpoint.every=1000", "checkpoint.keep_every=2500"],
            r"multiple of checkpoint.every \(1000\).*Set it to 3000",
        ),
        (["checkpoint.best=val_los"], "checkpoint.best.*val_loss"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_the_config(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


# --- the best --------------------------------------------------------------------------------------------------------


def validate(run: Run, **figures: float) -> bool:
    """What the trainer does after a validation."""
    found = run.checkpoints.is_best(run.step, figures)
    if found:
        if not run.checkpoints.saved(run.step):
            run.save()
        run.checkpoints.mark_best(run.step, figures)
    return found


def named(folder: Path) -> tuple[int, float] | None:
    best = read_best(folder)
    return best and (best.step, best.value)


def test_the_best_is_kept_until_a_better_one_comes(tmp_path: Path) -> None:
    run = Run(tmp_path, every=1, keep=1, best="val_loss")
    for loss, best, kept in [(3.0, 1, [1]), (2.0, 2, [2]), (2.0, 2, [2, 3]), (2.5, 2, [2, 4]), (1.5, 5, [5])]:
        run.train(1).save()
        validate(run, val_loss=loss)
        assert (named(tmp_path)[0], steps_in(tmp_path)) == (best, kept)  # an equal one is not better


def test_the_best_is_saved_even_where_no_checkpoint_was_due(tmp_path: Path) -> None:
    run = Run(tmp_path, every=100, best="val_r1_image_to_text").train(3)

    assert validate(run, val_r1_image_to_text=0.5)

    assert json.loads((tmp_path / "best.json").read_text()) == {
        "checkpoint": "step_00000003",
        "metric": "val_r1_image_to_text",
        "value": 0.5,
    }
    assert steps_in(tmp_path) == [3]


def test_losses_are_better_when_lower_and_all_else_when_higher() -> None:
    for figure in get_args(Figure):
        higher = figure.endswith("_accuracy") or "_r1_" in figure
        assert is_better(0.6, Best(1, figure, 0.5)) == higher
        assert is_better(0.4, Best(1, figure, 0.5)) != higher
        assert is_better(0.5, None) and not is_better(0.5, Best(1, figure, 0.5))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_the_best(value: float) -> None:
    assert not any(
        is_better(value, best) for best in (None, Best(1, "val_loss", 0.5), Best(1, "val_itm_accuracy", 0.5))
    )


def test_every_figure_that_may_be_chosen_is_one_that_validation_gives(tmp_path: Path) -> None:
    config, shards, tokenizer, model = small_parts(write_shard(tmp_path / "pairs.tar"))

    figures = Validation(config, shards, tokenizer).run(model, "cpu")

    assert set(get_args(Figure)) == set(figures) - {"val_mim_true", "val_mim_wrong"}


def test_a_figure_that_validation_does_not_give_is_refused_with_those_it_gives(tmp_path: Path) -> None:
    run = Run(tmp_path, best="val_itm").train(1)

    with pytest.raises(CheckpointError, match=r"validation gives \(after step 1: val_loss, val_mim\); got val_itm"):
        validate(run, val_mim=1.0, val_loss=2.0)


def test_a_run_that_goes_on_knows_the_best_so_far(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=1, best="val_loss")
    for loss in (2.0, 3.0):
        run.train(1).save()
        validate(run, val_loss=loss)

    again = Run(tmp_path, keep=1, best="val_loss").resume().train(1)

    assert not validate(again, val_loss=2.5)
    again.save()
    assert steps_in(tmp_path) == [1, 3] and named(tmp_path) == (1, 2.0)


def test_a_best_of_a_step_beyond_where_a_run_was_set_back_to_does_not_count(tmp_path: Path, capsys) -> None:
    run = Run(tmp_path, keep=5, best="val_loss")
    for loss in (3.0, 2.0, 1.0):
        run.train(1).save()
        validate(run, val_loss=loss)
    (tmp_path / "latest").write_text("step_00000001\n")

    again = Run(tmp_path, keep=5, best="val_loss").resume().train(1)

    assert "of step 3, counts no more: it is beyond step 1" in capsys.readouterr().out
    assert named(tmp_path) is None
    assert validate(again, val_loss=2.9) and named(tmp_path) == (2, 2.9)


def test_a_best_whose_checkpoint_is_broken_does_not_count(tmp_path: Path, capsys) -> None:
    run = Run(tmp_path, best="val_loss")
    for loss in (1.0, 2.0):
        run.train(1).save()
        validate(run, val_loss=loss)
    (tmp_path / "step_00000001" / "__0_0.distcp").unlink()

    again = Run(tmp_path, best="val_loss").resume().train(1)

    assert "no such file" in capsys.readouterr().out and validate(again, val_loss=3.0)


def test_a_run_that_starts_anew_does_not_inherit_the_best_of_one_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "best.json").write_text('{"checkpoint": "step_00000008", "metric": "val_loss", "value": 0.1}')

    Run(tmp_path, best="val_loss")

    assert not (tmp_path / "best.json").exists()


def test_another_figure_starts_its_own_search_and_what_was_best_stays_until_then(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=1, best="val_loss").train(1)
    validate(run, val_loss=1.0)

    again = Run(tmp_path, keep=1, best="val_mim").resume().train(1)
    again.save()
    assert steps_in(tmp_path) == [1, 2]
    assert validate(again, val_mim=9.0)

    assert named(tmp_path) == (2, 9.0) and steps_in(tmp_path) == [2]


def test_what_is_not_saved_cannot_be_marked(tmp_path: Path) -> None:
    run = Run(tmp_path, best="val_loss").train(1)

    with pytest.raises(ValueError, match="must be saved before it is marked; got step 1"):
        run.checkpoints.mark_best(1, {"val_loss": 1.0})
