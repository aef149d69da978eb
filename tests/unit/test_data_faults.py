"""Nothing lost on the side of the data: bad bytes, and shards that go or change in mid-run. Reads that fail or hang:
test_data_reads.py."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mvle.data.batch import Batch
from mvle.data.config import DataConfig
from mvle.data.decode import decode_window
from mvle.data.errors import DataError
from mvle.data.evaluation_batch import evaluation_batch
from mvle.data.index import index_path
from mvle.data.indexing import index_shard
from mvle.data.plan import Draw
from mvle.data.shards import ShardSet
from mvle.data.tokenizer import Tokenizer

from .data_files import make_shards, number_words, pair, spoil, write_shard
from .faulty_shards import STEPS, loader_of, plan_of, rows_of


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return number_words()


# --- bad bytes -------------------------------------------------------------------------------------------------------


def shown(batch: Batch) -> list[tuple[Any, ...]]:
    """Each pair as the model gets it: counter, key, ratio, caption, and the pixels that window and flip make."""
    texts = [tuple(text.tolist()) for text in batch.text.unpack()]
    pixels = [image.numpy().tobytes() for image in batch.images]
    return list(zip(batch.pair_ids.tolist(), batch.keys, batch.image_ratio, texts, pixels, strict=True))


def expected(shards: ShardSet, tokenizer: Tokenizer, step: int, bad: set[int], intact: ShardSet) -> list[tuple]:
    """The same of the plan alone: the first of the draws of a counter whose row is not bad."""
    plan, pairs = plan_of(shards), []
    for counter in plan.positions(step).tolist():
        draws = (plan.replacement(counter, attempt) for attempt in range(64))
        draw: Draw = next(draw for draw in draws if draw.row not in bad)
        ids, _ = tokenizer.encode([shards.caption(draw.row, draw.caption)], 12)
        pixels = decode_window(intact.image_bytes(draw.row), draw.window, draw.flip, 16)
        pairs.append((counter, shards.key(draw.row), draw.ratio, tuple(ids[0]), pixels.tobytes()))
    return pairs


def test_any_ranks_and_any_resume_give_the_same_sequence_with_bad_images_in_it(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    intact = make_shards(tmp_path, [20, 17, 11])
    shutil.copytree(tmp_path, tmp_path / "rotten", copy_function=shutil.copy2)
    shards = ShardSet.open(str(tmp_path / "rotten" / "*.tar"))
    plan = plan_of(shards)
    neighbours = {plan.row(15), plan.row(15, 1), plan.row(15, 2)}  # whose replacement and its replacement fail as well
    bad = neighbours | {0, 21, 47}
    for row in bad:
        spoil(shards, row)

    whole = [expected(shards, tokenizer, step, bad, intact) for step in range(STEPS)]
    replaced = [sum(plan.row(int(c)) in bad for c in plan.positions(step)) for step in range(STEPS)]

    assert sum(replaced) >= 2 * len(bad) - 2 and len({pair[1] for step in whole for pair in step}) == 48 - len(bad)
    for ranks in (1, 2, 3, 4):
        batches = [list(loader_of(shards, tokenizer, rank=rank, ranks=ranks)) for rank in range(ranks)]
        for step in range(STEPS):
            parts = [batches[rank][step] for rank in range(ranks)]
            assert [pair for part in parts for pair in shown(part)] == whole[step], (ranks, step)
            assert sum(part.replaced for part in parts) == replaced[step]
    for start in range(1, STEPS):  # each on another number of ranks than the one before
        ranks = (1, 2, 3, 4)[start % 4]
        resumed = [list(loader_of(shards, tokenizer, rank=r, ranks=ranks, start_step=start)) for r in range(ranks)]
        for step in range(start, STEPS):
            assert [pair for part in resumed for pair in shown(part[step - start])] == whole[step], (start, step)


def test_what_a_loader_met_before_does_not_choose_the_replacement(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards = make_shards(tmp_path, [24])
    row = plan_of(shards).row(3)
    whole = shards.shard_path(row).read_bytes()
    loader = loader_of(shards, tokenizer)
    spoil(shards, row)
    assert loader.load(0).replaced == 1
    shards.shard_path(row).write_bytes(whole)  # the disk gives the right bytes again

    epoch = next(step for step in range(1, 20) if row in rows_of(shards, step))

    assert shards.key(row) in loader.load(epoch).keys
    assert shown(loader.load(epoch)) == shown(loader_of(shards, tokenizer).load(epoch))


def test_a_bad_image_is_named_on_the_terminal_with_the_rank_once(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = make_shards(tmp_path, [24])
    row = plan_of(shards).row(9)
    spoil(shards, row)
    monkeypatch.setattr(logging.root, "handlers", [])  # as in a run: nobody set up logging, pytest neither

    list(loader_of(shards, tokenizer, rank=1, ranks=2))

    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"rank 1: image {shards.key(row)} ({shards.shard_path(row)}) is bad")
    assert "checksum" in lines[0]


def test_a_disk_that_begins_to_fail_late_stops_the_run_as_an_early_one_does(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    shards = make_shards(tmp_path, [48])
    loader = loader_of(shards, tokenizer, config=DataConfig(max_bad_share=0.0005))  # 5 of the last 10,000
    loader._bad.pairs = 10**8  # months of pairs without one bad image
    for row in range(6):
        spoil(shards, row)
    with pytest.raises(DataError, match="6 images failed within 10000 pairs"):
        list(loader)


# --- shards that go or change ----------------------------------------------------------------------------------------


def remove(path: Path) -> None:
    path.unlink()


def replace_by_another(path: Path) -> None:
    path.with_name("other").write_bytes(bytes(10_240))
    os.replace(path.with_name("other"), path)


def replace_by_one_of_the_same_size(path: Path) -> None:
    other = write_shard(path.with_name("other"), [(f"s0p{i}", pair(500 + i)) for i in range(48)])
    os.truncate(other, path.stat().st_size)
    os.replace(other, path)


def replace_by_a_longer_one(path: Path) -> None:
    shutil.copy2(path, path.with_name("other"))
    os.truncate(path.with_name("other"), 999_999)  # its images are where they were: only the size tells
    os.replace(path.with_name("other"), path)


def cut(path: Path) -> None:
    os.truncate(path, 3000)


@pytest.mark.parametrize("opened", [False, True], ids=["before it is opened", "while it is open"])
@pytest.mark.parametrize(
    ("change", "now"),
    [
        (remove, "it is gone"),
        (replace_by_another, "it has 10,240 bytes"),
        (replace_by_a_longer_one, "it has 999,999 bytes"),
        (replace_by_one_of_the_same_size, "written since the run began"),
        (cut, "it has 3,000 bytes"),
    ],
)
def test_a_shard_that_goes_or_changes_in_mid_run_stops_it_at_once(
    tmp_path: Path, tokenizer: Tokenizer, change: Callable[[Path], None], now: str, opened: bool
) -> None:
    shards = make_shards(tmp_path, [48])
    path, size = shards.shard_path(0), shards.shard_path(0).stat().st_size
    loader = loader_of(shards, tokenizer, steps=2)
    if opened:
        loader.load(0)
    change(path)

    if opened and change is not cut:
        assert len(list(loader)) == 2  # the open file is the old one still, and loses nothing
        shards.close()  # as when other shards push it out
        loader = loader_of(shards, tokenizer, steps=2)
    with pytest.raises(DataError) as caught:
        list(loader)

    text = str(caught.value)
    assert f"the shard {path} changed" in text and now in text and f"{size:,} bytes" in text
    assert text.endswith(f"python -m mvle.data index {path}")
    assert loader.bad == {}


def test_a_shard_that_is_put_back_is_no_change(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards = make_shards(tmp_path, [24])
    before = shown(loader_of(shards, tokenizer).load(0))
    shards.close()
    shutil.copyfile(shards.shard_path(0), tmp_path / "copy")
    os.replace(tmp_path / "copy", shards.shard_path(0))
    os.utime(index_path(shards.shard_path(0)))  # as those do who keep a scratch disk from forgetting them
    assert shown(loader_of(shards, tokenizer).load(0)) == before


def test_what_the_message_says_mends_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards = make_shards(tmp_path, [24])
    path, before = shards.shard_path(0), shards.fingerprint
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(DataError, match="is gone"):
        loader_of(shards, tokenizer).load(0)
    path.write_bytes(whole)
    index_shard(path)
    assert ShardSet.open([str(path)]).fingerprint == before


@pytest.mark.parametrize("change", [remove, cut])
def test_an_index_that_goes_or_is_cut_in_mid_run_does_no_harm(
    tmp_path: Path, tokenizer: Tokenizer, change: Callable[[Path], None]
) -> None:
    shards = make_shards(tmp_path, [5, 48])
    before = [shown(batch) for batch in loader_of(shards, tokenizer)]
    index = index_path(shards.shard_path(5))
    assert index.stat().st_size > 4096  # more than a page: a map of the file would end the process (SIGBUS)
    change(index)
    assert [shown(batch) for batch in loader_of(shards, tokenizer)] == before


def test_a_shard_that_a_glob_misses_is_named_by_its_index(tmp_path: Path) -> None:
    make_shards(tmp_path, [3, 3, 3])
    (tmp_path / "part-001.tar").unlink()
    with pytest.raises(DataError, match=r"part-001\.tar is gone, and its index is there"):
        ShardSet.open(str(tmp_path / "*.tar"))


def test_an_index_that_is_made_again_in_mid_run_does_no_harm(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards = make_shards(tmp_path, [24])
    before = shown(loader_of(shards, tokenizer).load(0))
    index_shard(shards.shard_path(0))
    assert shown(loader_of(shards, tokenizer).load(0)) == before


def test_a_shard_of_an_evaluation_that_is_gone_is_no_bad_image(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards = make_shards(tmp_path, [3])
    shards.shard_path(0).unlink()
    with pytest.raises(DataError, match=r"part-000\.tar changed .*it is gone"):
        evaluation_batch(shards, [0], [0], tokenizer, 16, 12)


def test_whatever_ends_the_loaders_thread_reaches_the_one_who_iterates(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        """As Rust's panics come out of tokenizers: no Exception."""

    def encode(texts: object, limit: object) -> None:
        raise Panic("called unwrap on None")

    monkeypatch.setattr(tokenizer, "encode", encode)
    with pytest.raises(Panic, match="unwrap"):
        list(loader_of(make_shards(tmp_path, [24]), tokenizer))
