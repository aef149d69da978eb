"""Several sources, small ones, few shards: exact shares, epochs of their own, one order for any number of ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvle.data.errors import DataError
from mvle.data.sources import Source, weights_of
from mvle.data.turns import PERIOD, Turns

from .fake_rows import FakeRows, digest, fake_sources, plan_of, source_of

THREE = [(40, 25), (60, 33, 42), (7,)]  # 65, 135 and 7 images; the last has fewer than 12 slots
WEIGHTS = (3.0, 2.0, 1.0)


def three(weights: Sequence[float | None] = WEIGHTS) -> FakeRows:
    return fake_sources(THREE, weights)


def slot_rows(plan: object, slot: int, turns: int, batch_total: int = 12) -> list[int]:
    """What one of 12 slots shows, one position a step."""
    return [plan.row(batch_total * turn + slot) for turn in range(turns)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("weights", [(3, 2, 1), (1, 1), (1, 999), (999, 1), (5, 0.003, 7, 1.1), (1,) * 8])
def test_shares_stay_within_as_many_turns_as_there_are_sources(weights: Sequence[float]) -> None:
    whole = weights_of([Source("s", range(0), weight) for weight in weights])
    turns = Turns(5, whole, 4)
    for slot in range(4):
        had = [0] * len(weights)
        for turn in range(40 * PERIOD):
            source, before = turns.source(slot, turn)
            assert before == had[source]
            had[source] += 1
            if (turn + 1) % PERIOD == 0:
                shares = [(turn + 1) * weight / sum(weights) for weight in weights]
                assert max(abs(a - b) for a, b in zip(had, shares, strict=True)) < len(weights)


def test_turns_far_on_follow_from_the_weights_without_a_walk() -> None:
    turns, turn = Turns(0, (3, 2, 1), 4), 10**12
    source, before = turns.source(2, turn)
    assert abs(before - turn * (3, 2, 1)[source] / 6) < PERIOD
    around = [turns.source(2, t) for t in range(turn - PERIOD, turn + PERIOD)]
    for one in range(3):
        assert np.diff([before for source, before in around if source == one]).tolist() == [1] * (
            sum(source == one for source, _ in around) - 1
        )


def test_turns_are_in_another_order_in_each_slot_and_period() -> None:
    turns = Turns(0, (1, 1), 4)
    orders = {
        tuple(turns.source(slot, turn)[0] for turn in range(start, start + PERIOD))
        for slot in range(4)
        for start in range(0, 4 * PERIOD, PERIOD)
    }
    assert len(orders) == 16


def test_a_rare_source_comes_at_a_time_of_its_own_in_each_slot() -> None:
    turns = Turns(0, (1, 4095), 64)
    firsts = {next(turn for turn in range(2 * 4096) if turns.source(slot, turn)[0] == 0) // 1024 for slot in range(16)}
    assert len(firsts) > 2


def test_pairs_come_in_proportion_to_the_weights_and_not_to_the_images() -> None:
    rows = three()
    plan = plan_of(rows, batch_total=12)
    found = Counter(source_of(rows, plan.row(counter)) for counter in range(12 * 4 * PERIOD))
    shares = [found[source] / (12 * 4 * PERIOD) for source in range(3)]
    assert np.abs(np.array(shares) - np.array([3, 2, 1]) / 6).max() < 0.003


def test_each_source_has_epochs_of_its_own() -> None:
    rows = three()
    plan = plan_of(rows, batch_total=1, slots=1)
    walked = [plan.row(counter) for counter in range(6 * PERIOD)]
    for number, images in enumerate((65, 135, 7)):
        own = [row for row in walked if source_of(rows, row) == number]
        epochs = [own[i : i + images] for i in range(0, len(own) - images + 1, images)]
        assert len(epochs) >= 2
        assert all(len(set(epoch)) == images for epoch in epochs)  # each image once
        assert epochs[0] != epochs[1]


def test_two_sources_of_the_same_shape_are_not_walked_alike() -> None:
    rows = fake_sources([(50, 50, 50), (50, 50, 50)], (1.0, 1.0))
    plan = plan_of(rows, batch_total=1, slots=1)
    walked = [plan.row(counter) for counter in range(300)]
    first = [row for row in walked if row < 150][:100]
    second = [row - 150 for row in walked if row >= 150][:100]
    assert len(first) == len(second) == 100 and first != second
    assert [row // 50 for row in first[:50]] != [row // 50 for row in second[:50]]


@pytest.mark.parametrize("ranks", [2, 3, 4, 12])
def test_the_pairs_of_a_step_are_the_same_on_any_number_of_ranks(ranks: int) -> None:
    plan = plan_of(three())
    for step in (0, 11, 5000):
        alone = plan.draws(plan.positions(step))
        shared = [draw for rank in range(ranks) for draw in plan_of(three()).draws(plan.positions(step, rank, ranks))]
        assert shared == alone


def test_a_draw_depends_on_its_counter_alone_also_in_the_middle_of_a_period() -> None:
    together = [draw for step in range(12) for draw in plan_of(three()).draws(plan_of(three()).positions(step))]
    for counter in (287, 100, 5):  # each the first that a new plan is asked for
        assert plan_of(three()).draw(counter) == together[counter]


def test_a_replacement_is_the_next_row_of_the_same_source_and_slot() -> None:
    rows = three()
    plan = plan_of(rows, batch_total=12)
    for slot in (0, 7):
        walked = slot_rows(plan, slot, 3 * PERIOD)
        for turn in range(PERIOD):
            source = source_of(rows, walked[turn])
            later = [row for row in walked[turn + 1 :] if source_of(rows, row) == source]
            assert [plan.replacement(12 * turn + slot, n).row for n in (1, 2)] == later[:2]


def test_the_order_of_weighted_sources_is_the_one_that_was_written_down() -> None:
    # If this fails, runs that were interrupted cannot go on as they were.
    plan = plan_of(fake_sources([(40, 25, 30), (60, 33, 42), (7,)], WEIGHTS))
    assert digest([plan.row(counter) for counter in range(4000)]) == "d52682cd655e6f33"


def test_sources_without_weights_are_one_set() -> None:
    named, listed = three((None, None, None)), FakeRows(three().shard_sizes)
    counters = np.arange(2000)
    assert plan_of(named).draws(counters) == plan_of(listed).draws(counters)
    assert plan_of(named).fingerprint == plan_of(listed).fingerprint


def test_one_source_with_a_weight_is_one_set() -> None:
    alone, listed = fake_sources([(40, 25)], (7.0,)), FakeRows((40, 25))
    assert plan_of(alone).draws(np.arange(500)) == plan_of(listed).draws(np.arange(500))


def test_weights_are_what_is_written_in_lowest_terms() -> None:
    def weights(*given: float) -> tuple[int, ...]:
        return weights_of([Source("s", range(0), weight) for weight in given])

    assert weights(2.0, 1.0) == weights(4.0, 2.0) == weights(0.2, 0.1) == (2, 1)
    assert weights(0.3, 0.1) == (3, 1)  # 0.3 / 0.1 is 2.9999999999999996
    assert weights(1e-5, 1.0) == (1, 100_000)


def test_a_fraction_is_nested_in_each_source() -> None:
    def kept(fraction: float) -> set[int]:
        plan = plan_of(rows, fraction=fraction, batch_total=1, slots=1)
        return {plan.row(counter) for counter in range(40 * plan.images)}

    rows = fake_sources([(200, 100), (300,)], (1.0, 4.0))
    tenth, quarter, half, whole = (kept(fraction) for fraction in (0.1, 0.25, 0.5, 1.0))
    assert tenth < quarter < half < whole == set(range(600))
    for number, images in enumerate((300, 300)):
        shares = [sum(source_of(rows, row) == number for row in some) / images for some in (tenth, quarter, half)]
        assert np.abs(np.array(shares) - [0.1, 0.25, 0.5]).max() < 0.08


def test_a_source_that_a_fraction_leaves_empty_is_named() -> None:
    rows = fake_sources([(200,), (1,)], (1.0, 1.0))
    with pytest.raises(DataError, match=r"data\.train\.b must hold at least one image; it holds none"):
        plan_of(rows, fraction=0.01)


@pytest.mark.parametrize("images", [1, 5, 11])  # one; fewer than a step shows; one fewer than slots
def test_fewer_images_than_slots_are_dealt_in_whole_epochs(images: int) -> None:
    plan = plan_of(FakeRows((images,)), batch_total=12)
    dealt = [plan.row(counter) for counter in range(12 * images * 4)]
    epochs = [dealt[i : i + images] for i in range(0, len(dealt), images)]
    assert all(sorted(epoch) == list(range(images)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > (1 if images > 1 else 0)
    assert plan.epochs(10) == [120 / images]


def test_a_small_source_shows_its_images_equally_often_beside_large_ones() -> None:
    rows = three()
    plan = plan_of(rows)
    found = Counter(row for row in map(plan.row, range(24 * 500)) if source_of(rows, row) == 2)
    assert len(found) == 7 and max(found.values()) < 1.06 * min(found.values())


@pytest.mark.parametrize("ranks", [2, 4])
def test_one_shard_feeds_more_ranks_than_there_are_shards(ranks: int) -> None:
    plan = plan_of(FakeRows((50,)))
    for step in range(5):
        parts = [plan_of(FakeRows((50,))).draws(plan.positions(step, rank, ranks)) for rank in range(ranks)]
        assert all(len(part) == 24 // ranks for part in parts)
        assert [draw for part in parts for draw in part] == plan.draws(plan.positions(step))


def test_epochs_count_pairs_by_source() -> None:
    plan = plan_of(three())  # 24 pairs a step: 12, 8 and 4; an epoch shows 60, 132 and 7
    assert plan.epochs(100) == pytest.approx([1200 / 60, 800 / 132, 400 / 7])
    assert plan_of().epochs(8) == [1.0]


SIZES = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(sum), min_size=1, max_size=4)
SOME_WEIGHTS = st.lists(st.integers(1, 50), min_size=4, max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    sizes=SIZES,
    weights=SOME_WEIGHTS,
    slots=st.integers(1, 9),
    each=st.integers(1, 3),
    window=st.integers(1, 3),
    first=st.integers(0, 10**9),
)
def test_whatever_the_sources_a_counter_alone_decides_its_row_and_its_source(
    sizes: list[list[int]], weights: list[int], slots: int, each: int, window: int, first: int
) -> None:
    rows = fake_sources(sizes, [float(weight) for weight in weights[: len(sizes)]])
    options = {"batch_total": slots * each, "slots": slots, "window": window}
    plan, counters = plan_of(rows, **options), list(range(first, first + 4 * slots * each))

    found = [plan.row(counter) for counter in counters]
    again = [plan_of(rows, **options).row(counter) for counter in counters[::7]]

    assert again == found[::7]
    assert all(0 <= row < rows.images for row in found)
    ahead = [plan.row(counters[0], turns) for turns in range(3)]
    assert ahead[0] == found[0]
    assert {source_of(rows, row) for row in ahead} == {source_of(rows, found[0])}


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, weights=SOME_WEIGHTS, slots=st.integers(1, 9), each=st.integers(1, 3), window=st.integers(1, 3))
def test_whatever_the_sources_no_image_comes_twice_in_an_epoch_of_its_source(
    sizes: list[list[int]], weights: list[int], slots: int, each: int, window: int
) -> None:
    rows = fake_sources(sizes, [float(weight) for weight in weights[: len(sizes)]])
    total = slots * each
    plan = plan_of(rows, batch_total=total, slots=slots, window=window)
    turns: Counter[tuple[int, int]] = Counter()
    seen = set()

    for counter in range(60 * total):
        slot, row = counter % total // each, plan.row(counter)
        source = source_of(rows, row)
        turn, images = turns[source, slot], sum(sizes[source])
        turns[source, slot] += 1
        piece = images // slots
        epoch = turn // piece if piece else (turn * slots + slot) // images
        assert (epoch, row) not in seen
        seen.add((epoch, row))
