"""Augmentation of a batch: off by default, drawn by the plan alone, true to captions, and waiting for nobody."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.nosync import RefuseSyncs, fake_device
from mvle.config import ConfigError, check_ranks, load_config
from mvle.data.augment import LAYERS, augment, augmented, by_choice, draw, geometry, plan_words, randaugment
from mvle.data.augment_config import COLOURS, GEOMETRIC, RANDAUGMENT, AugmentConfig
from mvle.data.config import DataConfig
from mvle.data.evaluation_batch import evaluation_batch
from mvle.data.indexing import index_shard
from mvle.data.loader import Loader
from mvle.data.plan import SamplingPlan
from mvle.data.shards import ShardSet
from mvle.engine.dry_run import made_up_batch
from mvle.engine.parallel import Parallel
from mvle.engine.train_step import TrainStep

from ..helpers import make_batch
from .data_files import make_shards, number_words, pair, write_shard
from .fake_rows import plan_of
from .small_run import small_config
from .test_augment_ops import pictures as planes

EVERYTHING: dict[str, Any] = {
    "brightness": {"probability": 0.8, "strength": 0.4},
    "contrast": {"probability": 0.8, "strength": 0.4},
    "saturation": {"probability": 0.8, "strength": 0.4},
    "grey": {"probability": 0.2},
    "blur": {"probability": 0.5, "strength": 2.0},
    "randaugment": {"ops": 2, "magnitude": 7},
}
COLOUR_ALONE = {name: {"probability": 1.0} for name in ("brightness", "contrast", "saturation", "grey")}


def pictures(*how: int) -> Tensor:
    """uint8 [B, height, width, 3]."""
    return planes(*how).permute(0, 2, 3, 1).contiguous()


def config_of(**sections: Any) -> AugmentConfig:
    return AugmentConfig.model_validate(sections)


def words_of(count: int, colours: bool = False, first: int = 0) -> Tensor:
    """What a batch of the plan carries."""
    words = plan_words(plan_of().draws(np.arange(first, first + count)))
    words[:, 4] = int(colours)
    return words


def changed(before: Tensor, after: Tensor) -> list[bool]:
    return (before != after).flatten(1).any(1).tolist()


# ---- whose numbers --------------------------------------------------------------------------------------------------


def test_images_stay_as_they_are_unless_asked_for() -> None:
    batch = make_batch()
    assert not DataConfig().augment.on and not load_config("base").data.augment.on
    assert augmented(batch, AugmentConfig()) is batch


def test_a_batch_without_the_plans_words_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected Batch.augmentation.*got None.*plan_words"):
        augmented(make_batch(), config_of(**EVERYTHING))


@pytest.mark.parametrize("parts", [(1,) * 12, (5, 7), (3, 3, 6)])
def test_an_image_is_the_same_in_every_batch_bit_for_bit(parts: tuple[int, ...]) -> None:
    images, words, config = pictures(12), words_of(12), config_of(**EVERYTHING)
    together = augment(images, words, config)
    assert sum(changed(images, together)) >= 10
    apart = zip(images.split(parts), words.split(parts), strict=True)
    assert torch.equal(torch.cat([augment(some, own, config) for some, own in apart]), together)


def test_every_word_of_the_plan_counts_and_pairs_differ() -> None:
    words = words_of(1)
    base = draw(words, 3).words
    for i in range(4):
        other = words.clone()
        other[0, i] ^= 1
        assert (draw(other, 3).words != base).all()
    many = draw(words_of(200), 8).uniform
    assert many.flatten().unique().numel() > 6390  # 6400 words of 32 bits
    assert abs(float(many.mean()) - 0.5) < 0.02


def test_an_op_that_is_switched_on_changes_no_number_of_another() -> None:
    images, words = pictures(6), words_of(6)
    blur = {"blur": {"probability": 0.5}}
    first = augment(images, words, config_of(brightness={"probability": 0.5}))
    assert torch.equal(
        augment(images, words, config_of(brightness={"probability": 0.5}, **blur)),
        augment(first, words, config_of(**blur)),
    )


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "grey", "blur"])
def test_as_many_images_get_an_op_as_its_probability_says(name: str) -> None:
    images = pictures(1, 16, 16).expand(400, -1, -1, -1)
    share = np.mean(changed(images, augment(images, words_of(400), config_of(**{name: {"probability": 0.3}}))))
    assert 0.2 < share < 0.38  # of 400: more than three deviations either way
    assert not any(changed(images, augment(images, words_of(400), config_of(**{name: {"probability": 0.0}}))))


def test_the_stronger_a_factor_may_be_the_further_images_change() -> None:
    images = pictures(64, 16, 16)
    means = []
    for strength in (0.1, 0.4, 1.0):
        config = config_of(brightness={"probability": 1.0, "strength": strength})
        brighter = augment(images, words_of(64), config).float().mean((1, 2, 3)) / images.float().mean((1, 2, 3))
        assert float(brighter.min()) > 1 - strength - 0.02 and float(brighter.max()) < 1 + strength + 0.02
        means.append(float((brighter - 1).abs().mean()))
    assert means[0] < means[1] < means[2]


def test_how_far_an_image_is_blurred_is_drawn() -> None:
    images = pictures(1, 16, 16).expand(40, -1, -1, -1)
    blurred = augment(images, words_of(40), config_of(blur={"probability": 1.0, "strength": 3.0}))
    left = blurred.float().var((1, 2)).mean(1) / images.float().var((1, 2)).mean(1)
    assert len(left.unique()) > 30 and left.max() > 0.6 and left.min() < 0.3


# ---- captions stay true ---------------------------------------------------------------------------------------------


def test_colours_stay_where_a_caption_names_one_unless_asked_for() -> None:
    images, named = pictures(8), words_of(8, colours=True)
    assert torch.equal(augment(images, named, config_of(**COLOUR_ALONE)), images)
    assert all(changed(images, augment(images, words_of(8), config_of(**COLOUR_ALONE))))
    asked = config_of(**COLOUR_ALONE, colour_words=True)
    assert torch.equal(augment(images, named, asked), augment(images, words_of(8), asked))


def test_randaugment_keeps_colours_where_a_caption_names_one() -> None:
    grey = pictures(1, 16, 16).float().mean(3, keepdim=True).to(torch.uint8).expand(200, -1, -1, 3).clone()
    grey[:, 8:, :, 0] = 250  # red below: any change of colour moves the mean of a channel
    config = config_of(randaugment={"ops": 1, "magnitude": 10})
    middle = (slice(None), slice(6, 10), slice(6, 10))
    free = augment(grey, words_of(200), config)[middle].float().mean((1, 2))
    kept = augment(grey, words_of(200, colours=True), config)[middle].float().mean((1, 2))
    drift = [(one - grey[middle].float().mean((1, 2))).abs().amax(1) for one in (free, kept)]
    assert (drift[0] > 20).float().mean() > 0.25  # five of twelve ops
    assert drift[1].max() < 60 and (drift[1] > 45).float().mean() < 0.1  # an edge that moved a pixel or two
    first = RANDAUGMENT.index(COLOURS[0])
    choice = (draw(words_of(200), LAYERS + 1).words[:, LAYERS, 0] * len(RANDAUGMENT)) >> 32
    free, kept = (augment(grey, words_of(200, colours=named), config) for named in (False, True))
    for op in range(len(RANDAUGMENT)):
        same = [torch.equal(images[choice == op], grey[choice == op]) for images in (free, kept)]
        assert (choice == op).any() and same[1] == (op >= first or RANDAUGMENT[op] == "identity"), RANDAUGMENT[op]
        assert op < first or not same[0], RANDAUGMENT[op]
    assert RANDAUGMENT[first:] == COLOURS and not set(COLOURS) & set(GEOMETRIC)


def test_the_plan_says_which_caption_names_a_colour(tmp_path: Path) -> None:
    captions = ["a red ball", "a ball", "a dog", "black and white"]
    path = write_shard(tmp_path / "a.tar", [(f"p{i}", pair(i, text)) for i, text in enumerate(captions)])
    index_shard(path)
    plan = SamplingPlan(ShardSet.open([str(path)]), seed=0, batch_total=8, slots=4)
    draws = plan.draws(np.arange(8))
    assert {captions[d.row] for d in draws if d.names_colour} == {"a red ball", "black and white"}
    assert plan_words(draws).tolist() == [[*d.augmentation, int(d.row in (0, 3))] for d in draws]


def test_nothing_is_mirrored_or_turned_far() -> None:
    for name in GEOMETRIC:
        choice = torch.tensor([RANDAUGMENT.index(name)] * 2)
        matrix, shift = geometry(choice, torch.tensor([-1.0, 1.0]), (100, 100))
        assert (torch.linalg.det(matrix) > 0.9).all(), name
        assert ((matrix - torch.eye(2)).abs() <= 0.3001).all() and (shift.abs() <= 10).all(), name
        assert not torch.equal(matrix, torch.eye(2).expand(2, 2, 2)) or shift.abs().max() == 10, name


# ---- RandAugment ----------------------------------------------------------------------------------------------------


def test_every_op_of_randaugment_changes_its_own_image_alone() -> None:
    images = planes(len(RANDAUGMENT)) // 2 + 30  # with room to stretch their contrast
    choice, strength = torch.arange(len(RANDAUGMENT)), torch.full((len(RANDAUGMENT),), 0.7)
    found = by_choice(images, choice, strength)
    assert changed(images, found) == [name != "identity" for name in RANDAUGMENT]
    for i in range(len(RANDAUGMENT)):  # what an image gets does not depend on what the others get
        alone = by_choice(images[i : i + 1], choice[i : i + 1], strength[i : i + 1])
        assert torch.equal(alone, found[i : i + 1])
    assert len({one.numpy().tobytes() for one in by_choice(images[:1].expand_as(images), choice, strength)}) == len(
        RANDAUGMENT
    )


def test_randaugment_draws_every_op_about_as_often_and_both_signs() -> None:
    numbers = draw(words_of(2400), LAYERS + 1)
    choice = (numbers.words[:, LAYERS, 0] * len(RANDAUGMENT)) >> 32
    counts = torch.bincount(choice, minlength=len(RANDAUGMENT))
    assert int(counts.min()) > 150 and int(counts.max()) < 250  # 200 each

    flat = torch.full((2400, 3, 4, 4), 100, dtype=torch.uint8)
    found = randaugment(flat, numbers, LAYERS, 5.0, torch.zeros(2400, dtype=torch.bool))[:, 0, 1, 1]
    bright = found[choice == RANDAUGMENT.index("brightness")].tolist()
    assert set(bright) == {55, 145} and 0.4 < bright.count(55) / len(bright) < 0.6  # half of a factor of 1 +- 0.9


# ---- the step -------------------------------------------------------------------------------------------------------


def step_of(micro: int | None, **augment: Any) -> TrainStep:
    config = small_config(
        Path("a.tar"), data={"train": ["a.tar"], "augment": augment}, batch={"total": 8, "micro": micro}
    )
    built: Any = SimpleNamespace(model=None, optimizer=None, ema=None)
    return TrainStep(config, Parallel(0, 1, torch.device("cpu")), check_ranks(config, 1), built)


def test_a_step_augments_each_micro_batch_to_the_same_pixels() -> None:
    batch = replace(make_batch(), augmentation=words_of(8))
    whole = step_of(None, **EVERYTHING).pieces(batch)
    parts = step_of(4, **EVERYTHING).pieces(batch)
    assert [len(p) for p in whole] == [8] and [len(p) for p in parts] == [4] * 2
    assert torch.equal(whole[0].images, torch.cat([p.images for p in parts]))
    assert not torch.equal(whole[0].images, batch.images)
    assert torch.equal(step_of(4).pieces(batch)[1].images, batch.images[4:])


def test_a_micro_batch_carries_the_words_of_its_pairs() -> None:
    batch = replace(make_batch(), augmentation=words_of(8))
    piece = batch.micro(2, 5).to("cpu")
    assert piece.augmentation is not None and batch.augmentation is not None
    assert torch.equal(piece.augmentation, batch.augmentation[2:5])


@pytest.mark.parametrize("fake", [False, True], ids=["cpu", "fake"])
def test_augmentation_does_not_wait_for_the_device(fake: bool) -> None:
    images, words, config = pictures(4), words_of(4), config_of(**EVERYTHING)
    if not fake:
        with RefuseSyncs():
            augment(images, words, config)
        return
    with fake_device() as device:
        there = torch.empty(images.shape, dtype=torch.uint8, device=device), torch.empty_like(words, device=device)
        with RefuseSyncs() as watch:
            result = augment(*there, config)
    assert not watch.copies and result.device.type == "cuda" and result.shape == images.shape


def test_a_dry_run_has_words_to_augment_by() -> None:
    config = small_config(Path("a.tar"), data={"train": ["a.tar"], "augment": EVERYTHING})
    batch = made_up_batch(config, 60, 8, 0)
    assert any(changed(batch.images, augmented(batch, config.data.augment).images))


# ---- the loader and the plan ----------------------------------------------------------------------------------------


def test_the_loader_hands_on_the_plans_words_and_leaves_pixels_alone(tmp_path: Path) -> None:
    shards, words = make_shards(tmp_path, [6, 6]), number_words()
    data = DataConfig.model_validate({"augment": EVERYTHING})
    plans = [
        SamplingPlan(shards, seed=3, batch_total=4, slots=4, augment=a)
        for a in (None, data.augment.model_dump(mode="json"))
    ]
    plain, same = (
        Loader(config, plan, shards, words, image_size=16, max_tokens=12).load(2)
        for config, plan in zip((DataConfig(), data), plans, strict=True)
    )
    assert torch.equal(plain.images, same.images)
    draws = plans[0].draws(plans[0].positions(2))
    assert same.augmentation is not None and torch.equal(same.augmentation, plan_words(draws))
    assert torch.equal(same.augmentation[:, 4], torch.zeros(4, dtype=torch.int64))


def test_an_evaluation_batch_carries_no_draw(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [4])
    batch = evaluation_batch(shards, [0, 1], [0, 0], number_words(), 16, 12)
    assert batch.augmentation is None or not batch.augmentation.any()


def test_the_fingerprint_holds_augmentation_and_stays_what_it_was_without() -> None:
    ways = [None, config_of(**EVERYTHING), config_of(**EVERYTHING, colour_words=True), config_of(**COLOUR_ALONE)]
    plans = [plan_of(augment=way and way.model_dump(mode="json")) for way in ways]
    assert len({plan.fingerprint for plan in plans}) == len(ways)
    assert plans[0].fingerprint == plan_of().fingerprint


def test_the_plan_of_a_config_holds_its_augmentation(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [8])
    plans = {}
    for name, section in {"off": {}, "idle": {"brightness": {"strength": 0.2}}, "on": EVERYTHING}.items():
        config = small_config(tmp_path / "a.tar", data={"train": ["a.tar"], "augment": section})
        plans[name] = SamplingPlan.build(config, shards).fingerprint
    assert plans["off"] == plans["idle"] != plans["on"]  # a strength of what never happens decides nothing


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.augment.brightness.strength=2", r"data\.augment\.brightness\.strength: expected number above 0"),
        ("data.augment.blur.probability=1.5", r"data\.augment\.blur\.probability: expected number at least 0"),
        ("data.augment.randaugment.magnitude=11", r"data\.augment\.randaugment\.magnitude: expected number at least 0"),
        ("data.augment.hue.probability=1", r"unknown config key data\.augment\.hue"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("base", [override])
