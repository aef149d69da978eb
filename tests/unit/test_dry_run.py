"""--dry-run: all is built and two steps are made, with no data and nothing left behind."""

from __future__ import annotations

import contextlib
import math
import os
import re
from pathlib import Path

import pytest

from mvle.config import Config, ConfigError
from mvle.engine.dry_run import dry_run
from mvle.engine.parallel import Parallel, ParallelConfig

from ..distributed.ranks import run_ranks
from .small_run import small_config, write_shard


def try_out(config: Config) -> None:
    with Parallel.start(config.parallel, "cpu") as parallel:
        dry_run(config, parallel)


def lines_of(text: str) -> dict[str, str]:
    """What was printed, by the first words of a line."""
    return dict(re.findall(r"^([a-z]\S*(?: (?:\d|of))?) +(.*)$", text, re.M))


def test_it_builds_steps_twice_and_writes_nothing(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    nothing = {"data": {"train": None, "val": None}, "optim": {"ema": 0.9}, "batch": {"total": 8, "micro": 4}}
    try_out(small_config(Path("none"), tmp_path / "run", **nothing))

    said = lines_of(capsys.readouterr().out)
    assert not list(tmp_path.iterdir())
    assert "1 ranks x 4 x 2 accumulate = 8 pairs" in said["batch"]
    assert "unsharded" in said["device"] and "EMA 0.9" in said["parameters"]
    assert "data.train names none yet; data.val names none yet" in said["data"]
    assert said["tokenizer"].startswith("400 words")
    for step in ("step 1", "step 2"):
        numbers = dict(re.findall(r"(\w+) (\d+\.\d+)", said[step]))
        assert numbers.keys() == {"mim", "mlm", "itc", "itm", "loss", "grad_norm"}
        assert all(math.isfinite(float(n)) for n in numbers.values())
    assert "pairs/s" in said["speed"] and "GiB" in said["memory"]


def test_data_that_is_there_is_counted_and_what_is_wrong_with_it_is_said(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shard = write_shard(tmp_path / "pairs.tar")
    files = sorted(tmp_path.rglob("*"))
    for val in (["missing-*.tar"], ["shapes:val"]):
        try_out(small_config(shard, tmp_path / "run", data={"train": [str(shard)], "val": val}))

    missing, shapes = re.findall(r"^data .*$", capsys.readouterr().out, re.M)
    assert "data.train: 12 images, 24 pairs; data.val cannot be used: no shard matches missing-*.tar" in missing
    assert "data.val: pictures of shapes, which a run draws at its first start" in shapes
    assert sorted(tmp_path.rglob("*")) == files


def test_several_sources_are_counted_together(tmp_path: Path, capsys) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / f"{name}.tar")
    train = {"a": str(tmp_path / "a.tar"), "b": str(tmp_path / "b.tar")}
    try_out(small_config(tmp_path / "a.tar", tmp_path / "run", data={"train": train}))

    assert "data.train: 24 images, 48 pairs of 2 sources; data.val names none yet" in capsys.readouterr().out


def on_ranks(folder: str) -> None:
    nothing = {"data": {"train": None, "val": None}}
    with open(f"{folder}/{os.environ['RANK']}.txt", "w") as file, contextlib.redirect_stdout(file):
        with Parallel.start(ParallelConfig(), "cpu") as parallel:
            with pytest.raises(ConfigError, match="batch.micro must divide batch.total / ranks"):
                dry_run(small_config(Path("none"), **nothing, batch={"total": 8, "micro": 8}), parallel)
            dry_run(small_config(Path("none"), **nothing), parallel)


def test_ranks_make_it_together_or_are_refused_as_in_a_run_and_rank_0_speaks(tmp_path: Path) -> None:
    run_ranks(2, on_ranks, str(tmp_path))

    said = lines_of((tmp_path / "0.txt").read_text())
    assert "2 ranks x 4 x 1 accumulate = 8 pairs" in said["batch"] and "FSDP2" in said["device"]
    assert "loss" in said["step 2"]
    assert (tmp_path / "1.txt").read_text() == ""
