"""Checkpoints of several ranks, written in the background: the same bytes, one failure for all, one best for all."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from mvle.engine.checkpoint import CheckpointConfig, Checkpointer
from mvle.engine.checkpoint_best import read_best
from mvle.engine.checkpoint_files import find_latest
from mvle.engine.errors import CheckpointError
from mvle.engine.optim import OptimConfig, build_optimizer, clip_and_step
from mvle.engine.parallel import Parallel, ParallelConfig

from .ranks import run_ranks
from .toy import Toy, pairs_of


def saves(folder: str) -> None:
    """Two copies of two shards."""
    with Parallel.start(ParallelConfig(replicate=2, first_timeout=1, timeout=1), "cpu") as parallel:
        model = parallel.shard(Toy())
        optimizer = build_optimizer(model, OptimConfig(lr=1e-2))
        config = CheckpointConfig(asynchronous=True, best="val_loss")
        plain = Checkpointer(f"{folder}/plain", CheckpointConfig(), parallel)
        checkpoints = Checkpointer(f"{folder}/asynchronous", config, parallel)

        def train(step: int) -> None:
            (model(pairs_of(step).chunk(parallel.ranks)[parallel.rank]) * parallel.ranks / 8).backward()
            clip_and_step(optimizer, 1.0)
            optimizer.zero_grad(set_to_none=True)

        # training and its votes go on while the thread writes and votes
        train(0)
        plain.save(1, model, optimizer)
        allowed, write = threading.Event(), checkpoints._write
        checkpoints._write = lambda path, tensors: (allowed.wait(60), write(path, tensors))[1]  # type: ignore
        checkpoints.save(1, model, optimizer)
        for step in (1, 2):
            train(step)
            assert not parallel.vote(checkpoints.failed)
        # rank 0's figures decide, whatever the others found
        figures = {"val_loss": 1.0 if parallel.is_main else float("nan")}
        assert checkpoints.is_best(1, figures) and checkpoints.saved(1)
        checkpoints.mark_best(1, figures)
        allowed.set()
        checkpoints.wait()
        assert not checkpoints.is_best(3, {"val_loss": 2.0 if parallel.is_main else 0.0})

        # one rank cannot write: all stop in the same step, though they learn it at different moments
        def broken(path: Path, tensors: dict) -> None:
            write(path, tensors)
            if parallel.rank == 2:
                raise OSError(28, os.strerror(28))

        checkpoints._write = broken  # type: ignore[method-assign]
        checkpoints.save(3, model, optimizer)
        for step in range(3, 1000):
            train(step)
            if parallel.vote(checkpoints.failed):
                break
        else:
            raise AssertionError("the failure never came")
        with pytest.raises(CheckpointError, match=r"step 3 was not written: rank 2: OSError: \[Errno 28\] No space"):
            checkpoints.wait()
        assert parallel.agree(step) == step == -parallel.agree(-step)
        parallel.barrier()


def test_four_ranks_save_in_the_background_as_in_the_foreground_and_fail_together(tmp_path: Path, capfd) -> None:
    run_ranks(4, saves, str(tmp_path))

    one, other = tmp_path / "plain" / "step_00000001", tmp_path / "asynchronous" / "step_00000001"
    shards = sorted(p.name for p in one.glob("*.distcp"))
    assert len(shards) >= 2 and shards == sorted(p.name for p in other.glob("*.distcp"))
    for name in shards:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert find_latest(tmp_path / "asynchronous", read_tensors=True) == other
    assert sorted(p.name for p in other.parent.iterdir()) == ["best.json", "latest", "step_00000001"]
    assert read_best(other.parent).step == 1
    assert "step 3 was not written: rank 2" in capfd.readouterr().out
