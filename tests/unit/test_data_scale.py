"""Many shards and many batches: what a start and a step cost does not grow with them."""

from __future__ import annotations

import gc
import resource
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mvle.data import index
from mvle.data.config import DataConfig
from mvle.data.files import open_ranges
from mvle.data.indexing import index_shard
from mvle.data.shards import ShardSet

from .data_files import number_words, pair, write_shard
from .faulty_shards import TOTAL, loader_of, plan_of

SHARDS = 200
BATCHES, FIRST = 10_000, 1_000
KIB = 1  # a batch: 50,000 of them then stay below 50 MB


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many small shards of two pairs each, indexed."""
    folder = tmp_path_factory.mktemp("many")
    for shard in range(SHARDS):
        path = write_shard(folder / f"{shard:04d}.tar", [(f"s{shard}p{i}", pair(2 * shard + i)) for i in range(2)])
        index_shard(path)
    return folder


def test_the_first_batch_of_many_shards_reads_each_index_once_and_of_the_shards_only_what_is_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexes: Counter[str] = Counter()
    opened: list[str] = []
    asked: list[int] = []

    def counted(*arguments: Any) -> Any:
        indexes[str(arguments[0])] += 1
        return read_columns(*arguments)

    def watched(file: Any) -> Any:
        opened.append(str(file))
        ranges = open_ranges(file)
        read = ranges.read
        ranges.read = lambda offset, size: (asked.append(size), read(offset, size))[1]  # type: ignore[method-assign]
        return ranges

    read_columns = index.read_columns
    monkeypatch.setattr(index, "read_columns", counted)
    monkeypatch.setattr(
        index, "open_ranges", lambda *_: pytest.fail("the ends of a shard that nobody touched are read")
    )
    monkeypatch.setattr("mvle.data.shards.open_ranges", watched)
    shards = ShardSet.open(str(folder / "*.tar"))
    assert len(indexes) == SHARDS and set(indexes.values()) == {1}
    assert not opened

    config = DataConfig(prefetch=1)
    with loader_of(shards, number_words(), config=config) as loader:
        batch = next(iter(loader))
    assert len(set(batch.keys)) == TOTAL
    ahead = config.prefetch + 4  # and the one that is shown: as far ahead as the loader reads
    assert TOTAL <= len(asked) <= (ahead + 1) * TOTAL
    assert len(opened) <= len(asked) < SHARDS  # none is opened that is not read
    assert set(asked) <= {len(shards.image_bytes(row)) for row in range(shards.images)}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the memory of a process is read from /proc")
def test_batches_leave_nothing_in_memory(folder: Path) -> None:
    """The decoder's part is a checksum. A few opened shards, a window of rows, and no more, however long it goes on."""
    shards = ShardSet.open(str(folder / "*.tar"))
    plan = plan_of(shards)

    def resident() -> float:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1024

    before, seen = 0.0, 0
    for step in range(FIRST + BATCHES):
        if step == FIRST:
            before = resident()
        draws = plan.draws(plan.positions(step)[:2])
        shards.expect((draw.row for draw in draws), 2**20)
        for draw in draws:
            seen += zlib.crc32(shards.image_bytes(draw.row)) == shards.image_crc32(draw.row)
    assert seen == 2 * (FIRST + BATCHES)
    assert resident() - before < KIB * BATCHES
