"""What loaders are measured with and on: photos like photos, turns that leave nothing behind, and an honest table."""

from __future__ import annotations

import io
import json
import multiprocessing
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import fed, loader, loader_report
from benchmarks.loader import Turn, measure, rows_of, take_turn
from benchmarks.loader_data import PhotoShards, jpeg, make_shards, photo
from benchmarks.peers.loaders import LOADERS, PILLOW, TORCHVISION, Missing, Setup
from mvle.config import load_config
from mvle.engine.metrics import read_rows

from .small_run import SMALL

TOY = Setup(batch=4, workers=2, size=16)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> PhotoShards:
    return make_shards(tmp_path_factory.mktemp("photos"), 40, 24, 4)


def test_photos_are_as_large_as_photos_are_and_have_half_as_many_colours() -> None:
    for quality in (85, 90):
        data = jpeg(photo(quality, 320, 240), quality)
        assert 1.0 < 8 * len(data) / (320 * 240) < 3.0  # bits a pixel: as those of Flickr8k and COCO
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.size == (320, 240)
            layer = picture.layer  # type: ignore[attr-defined]
            assert [tuple(part[1:3]) for part in layer] == [(2, 2), (1, 1), (1, 1)]  # 4:2:0


def test_every_loader_gives_batches_or_says_why_it_cannot(shards: PhotoShards) -> None:
    turns, missing = measure(shards, TOY, rounds=1, seconds=0.01, untimed=1)

    assert set(turns) | set(missing) == set(LOADERS) and not set(turns) & set(missing)
    assert "ours, torch" in turns
    assert all(len(why) > 10 for why in missing.values())
    assert all(own[0].images >= 2 * TOY.batch and own[0].cpu_seconds > 0 for own in turns.values())


def test_a_turn_leaves_neither_threads_nor_processes(shards: PhotoShards) -> None:
    before = set(threading.enumerate())
    take_turn(LOADERS["ours, torch"], shards, TOY, 0.01, 1)
    assert set(threading.enumerate()) <= before and not multiprocessing.active_children()


def test_a_loader_of_other_batches_is_not_timed(shards: PhotoShards) -> None:
    def floats(shards: PhotoShards, setup: Setup) -> Iterator[torch.Tensor]:
        while True:
            yield torch.zeros(setup.batch, 3, 16, 16)

    with pytest.raises(RuntimeError, match=r"expected 4 uint8 images; got torch.float32 \(4, 3, 16, 16\)"):
        take_turn(floats, shards, TOY, 0.01, 1)


def test_a_missing_loader_is_skipped_once_with_its_reason(shards: PhotoShards) -> None:
    asked = []

    def gone(shards: PhotoShards, setup: Setup) -> Iterator[torch.Tensor]:
        asked.append(setup)
        raise Missing("the package gone is not installed")
        yield

    turns, missing = measure(shards, TOY, 3, 0.01, 1, {"gone": gone, "ours, torch": LOADERS["ours, torch"]})
    assert missing == {"gone": "the package gone is not installed"} and len(asked) == 1
    assert len(turns["ours, torch"]) == 3


def test_ratios_are_of_neighbours_in_a_round() -> None:
    turns = {
        "ours, torch": [Turn(100, 1.0, 1.5), Turn(100, 4.0, 6.0), Turn(100, 2.0, 3.0)],
        PILLOW: [Turn(50, 1.0, 2.0), Turn(50, 4.0, 8.0), Turn(50, 2.0, 4.0)],  # half as fast in every round
    }
    ours, pillow = rows_of(480, turns)
    assert ours["against_pillow"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert pillow["against_pillow"]["median"] == 1.0
    assert "against_torchvision" not in ours  # it was not measured
    assert ours["images_per_second"] == 50 and ours["images_per_cpu_second"] == pytest.approx(100 / 3)


def test_a_run_gives_a_table_of_all_that_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"ours, torch": LOADERS["ours, torch"], TORCHVISION: LOADERS["ours, torch"]}
    monkeypatch.setattr(loader, "LOADERS", own)
    monkeypatch.setattr(loader, "measure", lambda *a, **k: measure(*a, **k, loaders=own))
    monkeypatch.setattr(loader, "RESULT", tmp_path / "loader_cpu.json")
    threads = torch.get_num_threads()
    try:
        options = "--sides 40 --rounds 2 --seconds 0.01 --batch 4 --size 16 --images 16 --write"
        assert loader.main(options.split()) == 0
    finally:
        torch.set_num_threads(threads)
    result: dict[str, Any] = json.loads((tmp_path / "loader_cpu.json").read_text())
    assert {row["loader"] for row in result["rows"]} == set(own)
    assert result["about"]["commit"] and result["about"]["versions"]["pillow"] and result["plan_seconds_a_pair"] > 0
    assert loader_report.written(result) in capsys.readouterr().out


def test_the_document_has_the_table_of_the_result_that_is_there(tmp_path: Path) -> None:
    copy = tmp_path / "performance.md"
    copy.write_text(loader_report.DOCUMENT.read_text())
    loader_report.write(copy, loader_report.RESULT)
    assert copy.read_text() == loader_report.DOCUMENT.read_text()


def test_the_table_shows_ratios_with_their_spread_and_what_was_not_measured() -> None:
    row = {"side": 480, "loader": "ours, torch", "images_per_second": 1234.4, "cpu_share": 0.97}
    row |= {"images_per_cpu_second": 640.0, "against_pillow": {"median": 1.8, "low": 1.75, "high": 1.9}}
    where = {
        "cpu": "C",
        "device": "D",
        "torch": "2",
        "commit": "c",
        "date": "d",
        "versions": {"pillow": "1", "x": None},
    }
    setup = {"workers": 2, "batch": 64, "size": 224, "rounds": 7, "data": {"480": {"images": 9, "mean_bytes": 61440}}}
    result = {"about": where, "setup": setup, "rows": [row], "plan_seconds_a_pair": 9e-6, "skipped": {"DALI": "gone."}}
    text = loader_report.written(result)
    assert "| ours, torch | 1,234 | 1.80 (1.75-1.90) |  | 97% | 640 |" in text
    assert "60 KiB" in text and "9.0 microseconds a pair" in text and "Not measured: DALI: gone." in text
    assert "pillow 1" in text and "x None" not in text
    assert loader_report.written(None) == loader_report.NOT_MEASURED


def test_a_run_that_is_fed_tells_how_it_waits_beside_what_its_loader_gives(
    shards: PhotoShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mvle.data.decoders._find_dali", lambda: (None, "DALI is not installed: pip install …"))
    small = [one for one in SMALL if not one.startswith(("evaluation", "schedule", "checkpoint"))]
    dali, by_torch = fed.fed("tiny", shards, tmp_path, 8, 4, 2, ["dali", "torch"], small)

    assert "DALI is not installed" in dali["skipped"] and "skipped" in fed.told([dali])[0]
    (_, last) = read_rows(tmp_path / "torch" / "metrics.jsonl", "train")
    assert (by_torch["data_wait"], by_torch["pairs/s"]) == (last["data_wait"], last["pairs/s"])
    assert by_torch["loader_pairs_per_second"] > 0 and by_torch["why"] == "torch: data.decoder=torch"
    assert fed.told([by_torch])[0].startswith("tiny, 8 pairs of 40 px, torch, 2 threads: loader alone ")
    clock = iter((100.0, 104.0))
    monkeypatch.setattr(fed, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    arguments = [*fed.overrides(shards, tmp_path, 8, 4, 2, "torch"), *small]
    rate, _ = fed.loader_rate(load_config("tiny", arguments), torch.device("cpu"), 6)
    assert rate == 6 * 8 / 4.0
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="the run has one row alone"):
        fed.fed("tiny", shards, tmp_path / "short", 8, 2, 2, ["torch"], small)
