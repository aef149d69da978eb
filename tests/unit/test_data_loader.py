"""The loader: the plan's batches, whatever ranks and threads; bad images replaced, named once, and counted."""

from __future__ import annotations

import logging
import re
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvle.data import decode
from mvle.data.bad_images import BadImageError, BadImages
from mvle.data.batch import Batch
from mvle.data.config import DataConfig, open_shards
from mvle.data.decode import decode_image, decode_window
from mvle.data.errors import DataError
from mvle.data.evaluation_batch import evaluation_batch
from mvle.data.index import index_path
from mvle.data.loader import Loader
from mvle.data.plan import SamplingPlan
from mvle.data.shards import ShardSet
from mvle.data.tokenizer import Tokenizer, train_bpe

from .data_files import make_shards, spoil


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return make_shards(tmp_path_factory.mktemp("shards"), [20, 17, 11])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([f"picture number {i} again" for i in range(10)] * 3, 320)


def plan_of(shards: ShardSet, **changes: Any) -> SamplingPlan:
    return SamplingPlan(shards, **{"seed": 0, "batch_total": 12, "slots": 12, **changes})


def loader_of(shards: ShardSet, tokenizer: Tokenizer, plan: SamplingPlan | None = None, **changes: Any) -> Loader:
    options = {"image_size": 16, "max_tokens": 12, "row_multiple": 8, "steps": 5, **changes}
    config = options.pop("config", DataConfig())
    return Loader(config, plan or plan_of(shards), shards, tokenizer, **options)


def assert_same(a: Batch, b: Batch) -> None:
    assert a.keys == b.keys and a.image_ratio == b.image_ratio and a.text.lengths == b.text.lengths
    for name in ("images", "pair_ids", "image_ids", "text_ids"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert torch.equal(a.text.rows, b.text.rows)


def test_batches_are_whole_and_follow_the_plan(shards: ShardSet, tokenizer: Tokenizer) -> None:
    batches = list(loader_of(shards, tokenizer))

    assert len(batches) == 5
    for step, batch in enumerate(batches):
        draws = plan_of(shards).draws(plan_of(shards).positions(step))
        assert batch.images.shape == (12, 16, 16, 3) and batch.images.dtype == torch.uint8
        assert batch.pair_ids.tolist() == list(range(12 * step, 12 * step + 12))
        assert batch.keys == [shards.key(draw.row) for draw in draws]
        assert batch.image_ratio == tuple(draw.ratio for draw in draws)
        for i, draw in enumerate(draws):
            expected = decode_window(shards.image_bytes(draw.row), draw.window, draw.flip, 16)
            assert np.array_equal(batch.images[i].numpy(), expected)


def test_captions_are_packed_with_a_zero_tail(shards: ShardSet, tokenizer: Tokenizer) -> None:
    batch = next(iter(loader_of(shards, tokenizer)))
    draws = plan_of(shards).draws(plan_of(shards).positions(0))
    ids, _ = tokenizer.encode([shards.caption(draw.row, draw.caption) for draw in draws], 12)
    assert [part.tolist() for part in batch.text.unpack()] == ids
    assert batch.text.rows.dtype == torch.int32 and batch.text.total % 8 == 0
    assert not batch.text.rows[sum(batch.text.lengths or ()) :].any()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_share_the_batch_that_one_rank_has(shards: ShardSet, tokenizer: Tokenizer, ranks: int) -> None:
    whole = loader_of(shards, tokenizer).load(2)
    parts = [loader_of(shards, tokenizer, rank=rank, ranks=ranks).load(2) for rank in range(ranks)]
    assert [key for part in parts for key in part.keys] == whole.keys
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.pair_ids for part in parts]), whole.pair_ids)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_the_batches(shards: ShardSet, tokenizer: Tokenizer, threads: int) -> None:
    for a, b in zip(
        loader_of(shards, tokenizer, config=DataConfig(threads=threads)), loader_of(shards, tokenizer), strict=True
    ):
        assert_same(a, b)


def test_a_resumed_loader_goes_on_where_the_other_stopped(shards: ShardSet, tokenizer: Tokenizer) -> None:
    straight = list(loader_of(shards, tokenizer, steps=9))
    resumed = list(loader_of(shards, tokenizer, start_step=6, steps=9))
    assert len(resumed) == 3
    for a, b in zip(straight[6:], resumed, strict=True):
        assert_same(a, b)


def test_a_loader_of_two_sources_resumes_in_the_middle_of_a_period(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = DataConfig.model_validate({"train": two_sources(tmp_path)})
    shards = open_shards(config, "train")
    straight = list(loader_of(shards, tokenizer, plan_of(shards), steps=9))
    resumed = list(loader_of(open_shards(config, "train"), tokenizer, plan_of(shards), start_step=6, steps=9))
    assert {key[:2] for batch in straight for key in batch.keys} == {"a:", "b:"}
    for a, b in zip(straight[6:], resumed, strict=True):
        assert_same(a, b)


def two_sources(folder: Path) -> dict[str, dict[str, object]]:
    """a of 5 images, fewer than slots, and b of 20."""
    named = {}
    for name, images, weight in (("a", 5, 1), ("b", 20, 2)):
        (folder / name).mkdir()
        make_shards(folder / name, [images])
        named[name] = {"shards": f"{folder}/{name}/*.tar", "weight": weight}
    return named


def test_an_endless_loader_ends_its_threads_when_it_is_left(shards: ShardSet, tokenizer: Tokenizer) -> None:
    with loader_of(shards, tokenizer, steps=None) as loader:
        batches = iter(loader)
        next(batches)
        next(batches)
    assert not [t for t in threading.enumerate() if t.name == "loader" or t.name.startswith("decode")]
    assert loader.wait_seconds > 0
    with pytest.raises(RuntimeError, match="iterated once"):
        next(iter(loader))


def test_an_image_of_another_size_than_its_index_says_is_replaced_and_named(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """As one that another decoder turns otherwise than the one that it was indexed with."""
    shards = make_shards(tmp_path, [48])
    row = plan_of(shards).row(3)
    columns = shards.indexes[0].columns
    for name, value in (("width", 24), ("height", 32)):
        columns[name] = columns[name].copy()
        columns[name][row] = value
    loader = loader_of(shards, tokenizer)
    assert loader.load(0).replaced == 1
    assert list(loader.bad.values()) == ["it has 32 x 24 pixels, and its index says 24 x 32"]

    columns["width"][row], columns["height"][row], columns["orientation"] = 32, 24, columns["orientation"].copy()
    columns["orientation"][row] = 3
    loader = loader_of(shards, tokenizer)
    assert loader.load(0).replaced == 1
    assert list(loader.bad.values()) == ["its EXIF orientation is 1, and its index says 3"]


def test_an_image_may_be_as_large_as_its_index_allowed(
    shards: ShardSet, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    examined, examine = [], decode.examine_image
    monkeypatch.setattr(decode, "examine_image", lambda *given: (examined.append(given[1]), examine(*given))[1])
    loader_of(shards, tokenizer).load(0)
    assert examined == [24 * 32] * 12


def test_cut_captions_are_counted(shards: ShardSet, tokenizer: Tokenizer) -> None:
    batch = loader_of(shards, tokenizer, max_tokens=4).load(0)
    assert batch.truncated == 12 and batch.to("cpu").truncated == 12
    assert batch.micro(0, 6).truncated == 0  # the counts stay with the whole
    assert set(batch.text.lengths or ()) == {4}


def test_a_bad_image_is_replaced_named_once_and_counted(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    shards = make_shards(tmp_path, [24])
    plan = plan_of(shards)
    counter = 15
    bad = plan.row(counter)
    spoil(shards, bad)
    loader = loader_of(shards, tokenizer, steps=6)

    with caplog.at_level(logging.WARNING):
        batches = list(loader)

    assert batches[1].keys[3] == shards.key(plan.row(counter + 12))  # what its slot gives next
    assert batches[1].pair_ids[3] == counter
    assert shards.key(bad) not in {key for batch in batches for key in batch.keys}
    assert sum(batch.replaced for batch in batches) == 3  # once an epoch of two steps
    assert batches[1].replaced == 1 and batches[1].to("cpu").replaced == 1
    assert len(caplog.records) == len(loader.bad) == 1
    assert shards.key(bad) in caplog.text and "checksum" in caplog.text


def test_a_replacement_is_the_same_on_every_number_of_ranks(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards = make_shards(tmp_path, [30])
    for row in (3, 17):
        spoil(shards, row)
    whole = [loader_of(shards, tokenizer).load(step) for step in range(3)]
    for rank in range(3):
        for step in range(3):
            part = loader_of(shards, tokenizer, rank=rank, ranks=3).load(step)
            assert torch.equal(part.images, whole[step].images[4 * rank : 4 * rank + 4])


def test_too_many_bad_images_stop_the_run_with_the_list(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards = make_shards(tmp_path, [24])
    for row in range(6):
        spoil(shards, row)
    loader = loader_of(shards, tokenizer, config=DataConfig(max_bad_share=0.004), steps=20)  # 4 of the first 1,000
    with pytest.raises(
        DataError, match=r"(?s)5 images failed .*data\.max_bad_share=0\.004.*s0p\d.*checksum.*index SHARDS"
    ) as caught:
        list(loader)
    seen = re.search(r"failed within (\d+) pairs", str(caught.value))
    assert seen and int(seen[1]) in (12, 24)  # an epoch of two steps has all six


def test_bad_images_of_long_ago_do_not_count(tmp_path: Path) -> None:
    bad = BadImages(make_shards(tmp_path, [24]), 0.0004)  # 4 of the last 10,000
    for row in range(4):
        bad.pairs = 10_000 + row
        bad.note(row, "it is torn")
    bad.pairs = 20_002  # the first three are forgotten
    for row in range(4, 7):
        bad.note(row, "it is torn")
    with pytest.raises(DataError, match=r"(?s)5 images failed within 10000 pairs"):
        bad.note(7, "it is torn")
    assert len(bad.reasons) == 8


def test_an_image_that_is_intact_and_undecodable_is_bad_too(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make_shards(tmp_path, [12])
    zeros = b"\xff\xd8\xff" + bytes(500)
    monkeypatch.setattr(ShardSet, "image_bytes", lambda self, row: zeros)
    monkeypatch.setattr(ShardSet, "image_crc32", lambda self, row: zlib.crc32(zeros))
    with pytest.raises(BadImageError, match="JPEG without a frame header"):
        evaluation_batch(shards, [0], [0], tokenizer, 16, 12)


def test_an_error_in_the_threads_reaches_the_one_who_iterates(
    shards: ShardSet, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = loader_of(shards, tokenizer)

    def lose_the_disk(row: int) -> bytes:
        raise OSError("disk gone")

    monkeypatch.setattr(loader.shards, "image_bytes", lose_the_disk)
    with pytest.raises(OSError, match="disk gone"):
        list(loader)


def test_evaluation_shows_the_centre_without_flip(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards = make_shards(tmp_path, [3], height=16, width=32)
    batch = evaluation_batch(shards, [2, 0], [1, 0], tokenizer, 16, 12, 4, 0.5)
    assert np.array_equal(batch.images[0].numpy(), decode_image(shards.image_bytes(2))[:, 8:24])
    assert batch.pair_ids.tolist() == [2, 0]
    assert batch.text_ids.tolist() == [shards.text_id(2, 1), shards.text_id(0, 0)]
    assert batch.image_ratio == (0.5, 0.5) and batch.extras == {}


def test_a_bad_image_of_an_evaluation_is_an_error_that_names_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards = make_shards(tmp_path, [3])
    spoil(shards, 1)
    with pytest.raises(BadImageError, match=r"s0p1 in .*part-000\.tar: .*checksum"):
        evaluation_batch(shards, [0, 1], [0, 0], tokenizer, 16, 12)


def test_spoiling_leaves_the_shard_looking_untouched(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [2])
    spoil(shards, 0)
    assert ShardSet.open([str(shards.shard_path(0))]).images == 2
    assert index_path(shards.shard_path(0)).is_file()
