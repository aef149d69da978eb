"""Checkpoints written in the background: the same bytes as otherwise, and no failure is lost."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mvle.engine.checkpoint_files import find_latest, steps_in
from mvle.engine.errors import CheckpointError

from .checkpoint_run import Run, same


def hold_writes(run: Run) -> threading.Event:
    """Tensors are written only once the event is set."""
    allowed, write = threading.Event(), run.checkpoints._write

    def late(folder: Path, tensors: dict) -> None:
        assert allowed.wait(60)
        write(folder, tensors)

    run.checkpoints._write = late  # type: ignore[method-assign]
    return allowed


def fail_writes(run: Run, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    run.checkpoints._write = fail  # type: ignore[method-assign]


def test_an_asynchronous_checkpoint_has_the_bytes_of_another_though_training_goes_on(tmp_path: Path) -> None:
    plain = Run(tmp_path / "plain", ema=True).train(2)
    path = plain.save()
    run = Run(tmp_path / "asynchronous", ema=True, asynchronous=True).train(2)
    allowed = hold_writes(run)

    saved = run.save()
    run.train(1)
    for tensor in run.tensors().values():
        tensor.detach().zero_()
    assert not saved.exists()
    allowed.set()
    run.checkpoints.wait()

    assert (saved / "__0_0.distcp").read_bytes() == (path / "__0_0.distcp").read_bytes()
    assert same(Run(tmp_path / "asynchronous", ema=True, seed=9).resume(), plain)


def test_memory_of_copies_is_used_again(tmp_path: Path) -> None:
    run = Run(tmp_path, asynchronous=True)

    def places() -> dict[str, int]:
        run.checkpoints.wait()
        return {name: copy.data_ptr() for name, copy in run.checkpoints._staging.copies.items()}

    run.save()
    untrained = places()
    run.train(1).save()
    first = places()
    run.train(1).save()

    assert places() == first and untrained.items() < first.items(), "moments came with the first step"


def test_one_save_is_in_flight_and_the_next_waits_for_it(tmp_path: Path) -> None:
    run = Run(tmp_path, asynchronous=True).train(1)
    allowed = hold_writes(run)
    run.save()

    second = threading.Thread(target=run.train(1).save)
    second.start()
    second.join(0.2)
    assert second.is_alive() and steps_in(tmp_path) == []
    allowed.set()
    second.join()
    run.checkpoints.wait()

    assert steps_in(tmp_path) == [1, 2] and (tmp_path / "latest").read_text() == "step_00000002\n"


@pytest.mark.parametrize("then", [lambda run: run.checkpoints.wait(), lambda run: run.save()], ids=["wait", "save"])
def test_a_failure_is_said_at_once_raised_once_and_leaves_what_was_there(
    tmp_path: Path, capsys, then: Callable[[Run], object]
) -> None:
    run = Run(tmp_path, asynchronous=True).train(1)
    good = run.save()
    run.checkpoints.wait()
    write = run.checkpoints._write
    fail_writes(run, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    run.train(1).save()
    run.checkpoints._unfinished[0].exception()  # until it has failed
    assert run.checkpoints.failed
    assert "step 2 was not written: OSError: [Errno 28] No space left on device" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="step 2 was not written"):
        then(run)

    assert not run.checkpoints.failed and find_latest(tmp_path) == good and not list(tmp_path.glob(".step*"))
    run.checkpoints._write = write  # type: ignore[method-assign]
    run.save()
    run.checkpoints.wait()
    assert steps_in(tmp_path) == [1, 2], "once there is room"


def test_a_mistake_in_the_thread_is_a_failed_checkpoint_too(tmp_path: Path) -> None:
    run = Run(tmp_path, asynchronous=True).train(1)
    fail_writes(run, RuntimeError("what nobody thought of"))

    run.save()

    with pytest.raises(CheckpointError, match="step 1 was not written: RuntimeError: what nobody thought of"):
        run.checkpoints.wait()


def test_the_best_is_named_once_it_is_published_and_the_one_before_it_stays_until_then(tmp_path: Path) -> None:
    run = Run(tmp_path, asynchronous=True, keep=1, best="val_loss")
    for loss in (2.0, 1.0):
        allowed = hold_writes(run.train(1))
        run.save()
        assert run.checkpoints.is_best(run.step, {"val_loss": loss})
        run.checkpoints.mark_best(run.step, {"val_loss": loss})
        assert run.step == 1 or json.loads((tmp_path / "best.json").read_text())["checkpoint"] == "step_00000001"
        allowed.set()
        run.checkpoints.wait()

    assert json.loads((tmp_path / "best.json").read_text())["checkpoint"] == "step_00000002"
    assert steps_in(tmp_path) == [2]


def test_a_checkpoint_that_failed_is_not_the_best(tmp_path: Path) -> None:
    run = Run(tmp_path, asynchronous=True, best="val_loss").train(1)
    fail_writes(run, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    run.save()
    run.checkpoints.mark_best(1, {"val_loss": 1.0})

    with pytest.raises(CheckpointError):
        run.checkpoints.wait()
    assert not (tmp_path / "best.json").exists()


def test_weights_of_every_kind_are_copied(tmp_path: Path) -> None:
    run = Run(tmp_path, asynchronous=True)
    whole = torch.arange(12.0).reshape(3, 4)
    run.model.embed.weight = torch.nn.Parameter(whole.t())  # not contiguous
    run.model.unused.weight = torch.nn.Parameter(torch.zeros(0, 2))  # what a rank may have of a small tensor
    run.save()
    run.checkpoints.wait()

    other = Run(tmp_path, seed=9)
    other.model.embed.weight = torch.nn.Parameter(torch.zeros(4, 3))
    other.model.unused.weight = torch.nn.Parameter(torch.zeros(0, 2))
    other.resume()

    assert torch.equal(other.model.embed.weight, whole.t())
