"""What a run says of its waits for data: figures in each row, and one warning that names what is slow and what
helps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mvle.data import decoders
from mvle.data.config import DataConfig
from mvle.data.counts import Counts
from mvle.data.indexing import index_shard
from mvle.data.shards import ShardSet
from mvle.engine.data_wait import DataWait
from mvle.engine.metrics import Metrics, MetricsConfig, read_rows
from mvle.engine.parallel import Parallel

from .data_files import make_shards, number_words
from .faulty_shards import loader_of

ALONE = Parallel(0, 1, torch.device("cpu"))


def wait_of(decoder: str = "torch", gpu: bool = False, **data: Any) -> tuple[DataWait, Counts]:
    counts = Counts()
    return DataWait(counts, DataConfig(**data), decoder, gpu), counts


def advice(rows: int = 4, share: float = 0.3, decoder: str = "torch", gpu: bool = False, **late: float) -> str | None:
    wait, counts = wait_of(decoder, gpu)
    said = None
    for _ in range(rows):
        counts.add(takes=2, **late)
        wait.figures(2, 1.0, share)
        said = said or wait.advice()
    return said


# --- figures ---------------------------------------------------------------------------------------------------------


def test_figures_are_of_the_steps_since_the_last_row() -> None:
    wait, counts = wait_of()
    counts.add(read=1.0, decode=6.0, text=0.5, bytes=3000, takes=2, ready=3)
    first = wait.figures(steps=2, seconds=3.0, share=0.0)
    counts.add(read=0.5, bytes=500)
    second = wait.figures(steps=1, seconds=2.0, share=0.0)
    assert first == {
        "read_seconds": 0.5,
        "decode_seconds": 3.0,
        "text_seconds": 0.25,
        "batches_ready": 1.5,
        "bytes/s": 1000.0,
    }
    assert (second["read_seconds"], second["decode_seconds"], second["batches_ready"], second["bytes/s"]) == (
        0.5,
        0.0,
        0.0,
        250.0,
    )


# --- the warning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("late", "where", "expected"),
    [
        (
            "late_reading",
            {},
            ("reading is what", "nearer or faster disk", "data.threads (it is 2; this process may use"),
        ),
        ("late_decoding", {}, ("decoding is what", "Raise data.threads", "smaller images")),
        ("late_decoding", {"gpu": True}, ("decoding is what", "data.decoder=dali", "raise data.threads")),
        ("late_decoding", {"gpu": True, "decoder": "dali"}, ("decoding is what", "Raise data.threads")),
        ("late_text", {}, ("text is what", "free core")),
    ],
)
def test_the_warning_names_the_slowest_stage_and_what_helps(
    late: str, where: dict[str, Any], expected: tuple[str, ...]
) -> None:
    others = {"late_reading": 0.1, "late_decoding": 0.1, "late_text": 0.1} | {late: 0.5}
    said = advice(**where, **others)
    assert said is not None and "30% of the time" in said
    assert all(words in said for words in expected), said
    assert ("data.decoder=dali" in said) == ("data.decoder=dali" in expected)


def test_batches_that_are_ready_mostly_want_more_of_them() -> None:
    said = advice(late_reading=0.5, ready=2)
    assert said is not None and "reading is uneven" in said and "data.prefetch" in said


@pytest.mark.parametrize(("rows", "share"), [(3, 0.3), (10, 0.05)])
def test_the_first_row_and_short_waits_are_no_reason(rows: int, share: float) -> None:
    assert advice(rows, share, late_reading=1.0) is None


def test_a_good_row_begins_the_count_anew_and_the_warning_comes_once() -> None:
    wait, counts = wait_of()
    said = []
    for share in (0.9, 0.9, 0.9, 0.01, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9):
        counts.add(late_reading=1.0, takes=1)
        wait.figures(1, 1.0, share)
        said.append(wait.advice() is not None)
    assert said == [False] * 6 + [True] + [False] * 4


# --- with a loader ---------------------------------------------------------------------------------------------------


def slow(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def slowed(*arguments: Any) -> Any:
        time.sleep(seconds)
        return function(*arguments)

    return slowed


def steps_of(folder: Path, shards: ShardSet, work: float = 0.0, decoder: str = "torch") -> None:
    """Take every batch as a trainer does, which needs so many seconds for each."""
    loader = loader_of(shards, number_words(), steps=12, config=DataConfig(decoder=decoder))
    with Metrics(folder / "metrics.jsonl", MetricsConfig(every=2), ALONE, steps=12, pairs=12) as metrics:
        metrics.watch(DataWait(loader.counts, loader.config, loader.decoder.name, False))
        batches, step = iter(loader), 0
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            waited = time.perf_counter() - start
            if batch is None:
                return
            step += 1
            time.sleep(work)
            losses = {"loss": torch.tensor(1.0)}
            metrics.update(step, losses, {}, skipped=torch.tensor(0.0), wait=waited, lr=1.0)


def test_a_slow_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    shards = make_shards(tmp_path, [48])
    monkeypatch.setattr(shards, "image_bytes", slow(shards.image_bytes, 0.004))
    steps_of(tmp_path, shards)
    out = capsys.readouterr().out
    assert out.count("the model waited for data") == 1 and "reading is what it waited for" in out


def test_a_slow_decoder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    shards = make_shards(tmp_path, [48])
    monkeypatch.setattr(decoders, "decode_one", slow(decoders.decode_one, 0.004))
    steps_of(tmp_path, shards)
    out = capsys.readouterr().out
    assert out.count("the model waited for data") == 1 and "decoding is what it waited for" in out


def test_decoding_again_what_nobody_verified_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    shards = make_shards(tmp_path, [140])
    index_shard(shards.shard_path(0), verify=False)
    monkeypatch.setattr(decoders, "decode_one", slow(decoders.decode_one, 0.004))
    steps_of(tmp_path, ShardSet.open(str(shards.shard_path(0))), decoder="dali")
    out = capsys.readouterr().out
    assert out.count("the model waited for data") == 1 and "decoding is what it waited for" in out
    assert "since shards were indexed with --no-verify: index them without it (python -m mvle.data index" in out


def test_slow_decoding_of_what_was_verified_is_not_laid_to_its_index() -> None:
    for verify, laid in ((0.1, False), (0.9, True)):
        said = advice(decoder="dali", gpu=True, late_decoding=1.0, verify=verify)
        assert (said is not None and ("--no-verify" in said) == laid and "Raise" in said) or laid


def test_the_loader_is_late_by_what_it_verifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    shards = make_shards(tmp_path, [48])
    index_shard(shards.shard_path(0), verify=False)
    monkeypatch.setattr(decoders, "decode_one", slow(decoders.decode_one, 0.004))
    loader = loader_of(ShardSet.open(str(shards.shard_path(0))), number_words(), config=DataConfig(decoder="dali"))
    list(loader)
    figures = loader.counts.figures()
    assert figures.late_decoding >= figures.verify > 48 * 0.004 / loader.config.threads


def test_a_loader_that_keeps_up_is_not_complained_of_and_has_its_figures_in_each_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps_of(tmp_path, make_shards(tmp_path, [48]), work=0.05)
    assert "the model waited" not in capsys.readouterr().out
    rows = read_rows(tmp_path / "metrics.jsonl", "train")
    assert len(rows) == 6 and json.dumps(rows)
    for row in rows:
        assert min(row["read_seconds"], row["decode_seconds"], row["text_seconds"]) >= 0
        assert {"batches_ready", "bytes/s"} <= row.keys()
    assert rows[0]["bytes/s"] > 0 and max(row["batches_ready"] for row in rows) >= 1.5
