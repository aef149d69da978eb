"""The sampling plan: one order for any number of ranks, every image once an epoch, windows inside, nothing else."""

from __future__ import annotations

import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from mvle_kernels.random import Stream, words

from mvle.data.errors import DataError
from mvle.data.plan import SamplingPlan, crop_windows, evaluation_pairs

from .data_files import make_shards
from .fake_rows import FakeRows, digest, plan_of


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])  # divisors of 12 slots, 3 among them
def test_the_pairs_of_a_step_are_the_same_on_any_number_of_ranks(ranks: int) -> None:
    plan = plan_of()
    for step in (0, 7, 1000):
        alone = plan_of().draws(plan.positions(step))
        shared = [draw for rank in range(ranks) for draw in plan_of().draws(plan.positions(step, rank, ranks))]
        assert shared == alone


def test_a_draw_depends_on_its_counter_alone() -> None:
    plan, fresh = plan_of(), plan_of()
    together = plan.draws(np.arange(480, 504))
    assert [fresh.draw(counter) for counter in reversed(range(480, 504))] == together[::-1]


def test_every_image_comes_once_an_epoch_but_for_the_few_left_over() -> None:
    plan = plan_of(batch_total=12)
    for epoch in range(3):
        rows = [plan.row(12 * (epoch * 16 + i) + slot) for i in range(16) for slot in range(12)]
        assert len(set(rows)) == len(rows) == 16 * 12 == 192  # of 200


def test_epochs_differ_in_order_and_seeds_do() -> None:
    orders = [[plan_of(seed=seed).row(c + start) for c in range(100)] for seed in (3, 4) for start in (0, 24 * 8)]
    assert len({tuple(order) for order in orders}) == 4


def test_a_slot_reads_from_few_shards_at_a_time() -> None:
    rows = FakeRows(shard_sizes=(100,) * 16)
    plan = plan_of(rows, batch_total=4, slots=4, window=2)
    for slot in range(4):
        walk = np.array([plan.row(4 * i + slot) // 100 for i in range(400)])
        assert all(len(set(walk[i : i + 100])) <= 4 for i in range(0, 400, 100))  # two windows of two shards


def test_a_set_smaller_than_a_window_is_shuffled_as_a_whole() -> None:
    plan = plan_of(FakeRows(shard_sizes=(1000,)), batch_total=10, slots=10, window=8)
    first_slot = [plan.row(10 * i) for i in range(100)]
    assert min(first_slot) < 100 and max(first_slot) > 900


def test_the_order_is_the_one_that_was_written_down() -> None:
    # If this fails, runs that were interrupted cannot go on as they were: raise the plan's version.
    plan = plan_of(image_ratio=(0.5, 1.0))
    found = [(d.row, d.caption, d.window, d.flip, round(d.ratio, 6)) for d in plan.draws(np.array([0, 23, 4800]))]
    assert found == EXPECTED


@pytest.mark.parametrize("changes", range(4))
def test_one_source_keeps_its_order_and_fingerprint(changes: int) -> None:
    # Of the first pairs, of some far on, and of what would replace them; written down like EXPECTED.
    options, fingerprint, drawn, rows = PINNED[changes]
    plan = plan_of(**options)
    counters = [*range(600), *range(10**7, 10**7 + 200)]
    assert plan.fingerprint == fingerprint
    assert digest(plan.draws(np.array(counters))) == drawn
    assert digest([(plan.row(counter), plan.row(counter, 3)) for counter in counters]) == rows


def test_a_smaller_fraction_is_a_subset() -> None:
    def kept(fraction: float) -> set[int]:
        plan = plan_of(fraction=fraction, batch_total=1, slots=1)
        return {plan.row(counter) for counter in range(plan.images)}

    quarter, half = kept(0.25), kept(0.5)
    assert quarter < half < set(range(200))
    assert 70 < len(half) < 130


def test_a_fraction_that_leaves_no_image_is_an_error_that_names_the_key() -> None:
    with pytest.raises(DataError, match=r"data\.train must hold at least one image; it holds none .*fraction=1e-09"):
        plan_of(fraction=1e-9)


def test_slots_and_ranks_must_divide() -> None:
    with pytest.raises(ValueError, match=r"data\.slots must divide batch\.total \(24\); got 7"):
        plan_of(slots=7)
    with pytest.raises(ValueError, match=r"ranks must divide data\.slots \(12\); got 5 ranks"):
        plan_of().positions(0, 0, 5)


def test_captions_are_chosen_evenly() -> None:
    draws = plan_of().draws(np.arange(6000))
    chosen = [draw.caption for draw in draws if draw.row % 3 == 2]
    shares = np.bincount(chosen, minlength=3) / len(chosen)
    assert np.abs(shares - 1 / 3).max() < 0.05


def test_no_flip_where_the_caption_says_left_and_half_elsewhere() -> None:
    draws = plan_of().draws(np.arange(3000))
    said = [draw.flip for draw in draws if draw.caption == draw.row % 3]
    free = [draw.flip for draw in draws if draw.caption != draw.row % 3]
    assert not any(said)
    assert 0.45 < np.mean(free) < 0.55
    assert not any(draw.flip for draw in plan_of(flip=False).draws(np.arange(300)))


def test_a_ratio_range_is_drawn_from_and_a_number_is_kept() -> None:
    drawn = [draw.ratio for draw in plan_of(image_ratio=(0.6, 1.0)).draws(np.arange(2000))]
    assert 0.6 < min(drawn) < 0.61 and 0.99 < max(drawn) < 1.0
    assert {draw.ratio for draw in plan_of(image_ratio=0.75).draws(np.arange(50))} == {0.75}


@pytest.mark.parametrize("side", [(640, 427), (3, 900), (1, 1), (64, 64)])  # photo; sliver; one pixel; square
def test_windows_lie_inside_the_image_with_an_allowed_area_and_aspect(side: tuple[int, int]) -> None:
    draws = plan_of(FakeRows(side=side)).draws(np.arange(2000))
    windows = np.array([draw.window for draw in draws])
    y, x, height, width = windows.T
    assert (windows[:, 2:] > 0).all() and (windows[:, :2] >= 0).all()
    assert (y + height <= side[1]).all() and (x + width <= side[0]).all()
    if min(side) > 100:
        share = height * width / (side[0] * side[1])
        assert share.min() > 0.195 and share.max() < 1.0
        assert (width / height).min() > 0.74 and (width / height).max() < 1.34


def test_small_windows_are_wide_and_tall_alike() -> None:
    draws = plan_of(crop_scale=(0.1, 0.3)).draws(np.arange(4000))
    wide = np.mean([draw.window[3] > draw.window[2] for draw in draws])
    assert 0.47 < wide < 0.53


def test_whole_images_are_shown_where_the_area_must_be_one() -> None:
    draws = plan_of(FakeRows(side=(64, 64)), crop_scale=(1.0, 1.0)).draws(np.arange(200))
    assert {draw.window for draw in draws} == {(0, 0, 64, 64)}


def test_crops_do_not_depend_on_the_other_pairs_of_the_batch() -> None:
    ids = np.arange(50)
    drawn = words(0, Stream.CROP, ids, 24)
    sizes = np.full(50, 300), np.full(50, 200)
    together = crop_windows(*sizes, drawn, (0.2, 1.0), (0.75, 4 / 3))
    alone = [crop_windows(sizes[0][:1], sizes[1][:1], drawn[i : i + 1], (0.2, 1.0), (0.75, 4 / 3))[0] for i in ids]
    assert np.array_equal(together, alone)


@pytest.mark.parametrize("aspect", [(2.5, 3.0), (0.2, 0.4)])
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 3)])
def test_a_window_has_a_pixel_at_least_in_whatever_image(size: tuple[int, int], aspect: tuple[float, float]) -> None:
    (width, height), drawn = size, words(0, Stream.CROP, np.arange(40), 24)
    windows = crop_windows(np.full(40, width), np.full(40, height), drawn, (0.2, 1.0), aspect)
    y, x, h, w = windows.T
    assert min(h.min(), w.min()) >= 1 and min(y.min(), x.min()) >= 0
    assert (y + h <= height).all() and (x + w <= width).all()


def test_a_replacement_is_what_the_slot_gives_next() -> None:
    plan = plan_of()
    stand_in = plan.replacement(30, 1)
    assert stand_in.counter == 30
    assert stand_in.row == plan.row(31)  # two places a slot: 30 is the first of its two
    assert stand_in.augmentation == plan.draw(30).augmentation


def test_the_fingerprint_holds_whatever_decides_the_order() -> None:
    changes = [{}, {"seed": 4}, {"slots": 6}, {"batch_total": 48}, {"window": 3}, {"fraction": 0.5}, {"flip": False},
               {"image_ratio": (0.5, 1.0)}, {"crop_scale": (0.5, 1.0)}]  # fmt: skip
    assert len({plan_of(**change).fingerprint for change in changes}) == len(changes)
    assert plan_of(FakeRows(fingerprint="g")).fingerprint != plan_of().fingerprint


def test_evaluation_rows_are_distinct_ascending_and_fixed_by_the_seed() -> None:
    first, again, other = (evaluation_pairs(FakeRows(), 50, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert len(set(first.tolist())) == 50 and (np.diff(first) > 0).all()
    assert len(evaluation_pairs(FakeRows(), 10**6, 1)) == 200


EXPECTED: list[tuple[int, int, tuple[int, int, int, int], bool, float]] = [
    (149, 0, (22, 118, 360, 309), False, 0.697814),
    (1, 1, (7, 14, 385, 420), False, 0.549268),
    (42, 0, (1, 113, 347, 407), False, 0.855103),
]
PINNED: list[tuple[dict[str, object], str, str, str]] = [
    ({}, "e0d0e9eab54cac1f594e77ca484a5ee4", "8af7947927b86826", "aa0b441f15d91b54"),
    ({"slots": 1, "window": 8}, "28db3da82ca6ac61d04acbb9957994d0", "8d2d50fe4b15bf40", "eb606e1403289dbf"),
    (
        {"batch_total": 6, "slots": 6, "fraction": 0.5},
        "97fd06079a4f630dc0964f07edf986b4", "471a49ef8ca48056", "9f7f2c2859e18694",
    ),
    (
        {"batch_total": 64, "slots": 64, "window": 3, "image_ratio": (0.5, 1.0)},
        "690ce12c240ddfeabb3244867ebc310a", "34d1724cf02fae37", "4dd8d911bd02ab09",
    ),
]  # fmt: skip


def test_reading_by_the_plan_holds_no_more_memory_step_by_step(tmp_path: Path) -> None:
    """The bytes of images and draws of a step go with it. What a step may keep is counted over hundreds of them."""
    shards = make_shards(tmp_path, [6, 7, 5])
    plan = SamplingPlan(shards, seed=0, batch_total=8, slots=4)

    def read(steps: range) -> int:
        for step in steps:
            draws = plan.draws(plan.positions(step, 0, 1))
            shards.expect((draw.row for draw in draws), 2**20)
            for draw in draws:
                assert zlib.crc32(shards.image_bytes(draw.row)) == shards.image_crc32(draw.row)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = read(range(100))  # 44 epochs: every shard was opened, every cache is as full as it becomes
        after = read(range(100, 500))
    finally:
        tracemalloc.stop()
    assert after - before < 400 * 50, f"{(after - before) / 400:.0f} bytes a step stay"
