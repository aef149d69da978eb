"""The learning rate over a run: its three shapes, what does not fit, and which runs may go on with another length."""

from __future__ import annotations

from itertools import pairwise

import pytest
from pydantic import ValidationError

from mvle.engine.optim import OptimConfig, build_optimizer
from mvle.engine.schedule import ScheduleConfig, learning_rate_factor, same_history, set_learning_rates

from ..distributed.toy import Toy


def factors(floor: float = 0.1, **values: object) -> list[float]:
    schedule = ScheduleConfig(**{"steps": 100, "warmup": 10, **values})
    return [learning_rate_factor(step, schedule, floor) for step in range(schedule.steps)]


def test_a_cosine_rises_to_its_peak_and_falls_to_the_floor_at_the_last_step() -> None:
    found = factors(kind="cosine")

    assert found[0] == pytest.approx(0.1)  # never zero: the first step learns
    assert max(found) == found[9] == 1.0
    assert found == sorted(found[:10]) + sorted(found[10:], reverse=True)
    assert found[-1] == pytest.approx(0.1)
    assert found[54] == pytest.approx(0.55)  # half way down


def test_wsd_stays_at_its_peak_and_falls_in_a_line_to_the_floor_at_the_last_step() -> None:
    found = factors(kind="wsd", decay=20)

    assert found[:10] == factors(kind="cosine")[:10]
    assert found[9:80] == [1.0] * 71
    steps_down = [a - b for a, b in pairwise(found[79:])]
    assert steps_down == pytest.approx([0.9 / 20] * 20)
    assert found[-1] == 0.1


def test_a_constant_rate_stays_at_its_peak_whatever_the_floor() -> None:
    found = factors(kind="constant", floor=0.0)

    assert found[:10] == factors(kind="cosine")[:10]
    assert found[9:] == [1.0] * 91


@pytest.mark.parametrize(("part", "steps"), [(0.05, 50), (0, 0), (7, 7), (0.999, 999), (1000, 1000)])
def test_warm_up_and_decay_are_a_share_or_a_number_of_steps(part: float, steps: int) -> None:
    warmup = ScheduleConfig(steps=1000, warmup=part)
    decay = ScheduleConfig(steps=1000, warmup=0, kind="wsd", decay=part)

    assert warmup.warmup_steps == decay.decay_steps == steps
    assert warmup.decay_steps == 0  # a cosine has none
    assert all(0 < learning_rate_factor(s, warmup, 0.0) <= 1 for s in range(999))
    assert all(0 < learning_rate_factor(s, decay, 0.0) <= 1 for s in range(999))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"warmup": 1001}, r"schedule.warmup must be at most schedule.steps \(1000\); got 1001"),
        ({"warmup": 0.5, "kind": "wsd", "decay": 501}, r"schedule.decay .*\(1000\) together; got 500 \+ 501"),
        ({"kind": "wsd", "decay": 2.5}, "expected a share below 1 or a whole number of steps; got 2.5"),
        ({"warmup": float("inf")}, "whole number of steps; got inf"),
    ],
)
def test_parts_that_do_not_fit_into_the_run_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ScheduleConfig(steps=1000, **values)


def test_a_decay_that_fills_what_the_warm_up_leaves_is_taken_and_only_wsd_looks_at_it() -> None:
    assert factors(kind="wsd", decay=90)[9:11] == [1.0, pytest.approx(0.1 + 0.9 * 89 / 90)]
    assert factors(kind="cosine", decay=5000) == factors(kind="cosine")


@pytest.mark.parametrize(
    ("before", "now", "done", "same"),
    [
        ({"kind": "constant"}, {"kind": "constant", "steps": 250}, 100, True),
        ({"kind": "wsd", "decay": 20}, {"kind": "wsd", "decay": 20, "steps": 250}, 80, True),
        ({"kind": "wsd", "decay": 20}, {"kind": "wsd", "decay": 20, "steps": 250}, 81, False),  # the fall has begun
        ({"kind": "constant"}, {"kind": "wsd", "decay": 20}, 80, True),  # a constant run that is now to end
        ({"kind": "constant"}, {"kind": "constant", "steps": 250, "warmup": 11}, 100, False),
        ({"kind": "constant", "warmup": 0.1}, {"kind": "constant", "warmup": 0.1, "steps": 250}, 100, False),
        ({"kind": "cosine"}, {"kind": "cosine", "steps": 101}, 11, False),
        ({"kind": "cosine"}, {"kind": "cosine", "steps": 101}, 10, True),  # all of it warm-up
        ({"kind": "cosine"}, {"kind": "cosine"}, 100, True),
        ({"kind": "cosine"}, {"kind": "constant"}, 0, True),  # nothing done
    ],
)
def test_a_run_may_go_on_with_a_schedule_that_had_the_same_rates_until_now(
    before: dict, now: dict, done: int, same: bool
) -> None:
    old, new = (ScheduleConfig(**{"steps": 100, "warmup": 10, **values}) for values in (before, now))

    assert same_history(new, 0.1, old, 0.1, done) is same


def test_the_floor_is_part_of_a_history_where_it_was_felt() -> None:
    cosine, constant = (ScheduleConfig(steps=100, warmup=10, kind=kind) for kind in ("cosine", "constant"))

    assert not same_history(cosine, 0.1, cosine, 0.0, 50)
    assert same_history(constant, 0.1, constant, 0.0, 50)


def test_each_group_gets_its_peak_times_the_factor() -> None:
    optimizer = build_optimizer(Toy(), OptimConfig(lr=1.0, encoder_lr=0.1))

    set_learning_rates(optimizer, 0.5)

    assert {g["lr"] for g in optimizer.param_groups} == {0.5, 0.05}
