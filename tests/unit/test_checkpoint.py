"""Checkpoints of one process: bitwise resume, whole or not at all, and what is kept."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from mvle.engine import checkpoint, checkpoint_files
from mvle.engine.checkpoint import load_checkpoint
from mvle.engine.checkpoint_files import find_latest, read_meta, steps_in
from mvle.engine.checkpoint_tensors import state_tensors
from mvle.engine.errors import CheckpointError

from ..distributed.toy import Toy
from .checkpoint_run import Run, same

# --- resume ----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    Run(tmp_path).train(3).save()

    resumed = Run(tmp_path, seed=9).resume().train(3)

    assert same(resumed, Run(tmp_path / "other").train(6))


def test_a_checkpoint_before_the_first_step_holds_no_moments_and_makes_none(tmp_path: Path) -> None:
    run = Run(tmp_path)
    path = run.save()

    resumed = Run(tmp_path, seed=9).resume()

    assert not run.optimizer.state and not resumed.optimizer.state
    assert same(resumed.train(2), Run(tmp_path / "other").train(2))
    assert read_meta(path)["step"] == 0


def test_loading_forgets_moments_that_the_checkpoint_does_not_have(tmp_path: Path) -> None:
    Run(tmp_path).save()

    run = Run(tmp_path).train(2).resume()

    assert not run.optimizer.state


def test_a_model_loads_without_an_optimizer(tmp_path: Path) -> None:
    run = Run(tmp_path).train(2)
    path = run.save()
    other = Toy(seed=9)

    load_checkpoint(path, other)

    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), other.parameters(), strict=True))


def test_a_compiled_model_has_the_names_of_a_plain_one(tmp_path: Path) -> None:
    model = Toy()
    model.embed = torch.compile(model.embed)  # type: ignore[assignment]  wraps; nothing is compiled before a call

    assert state_tensors(model, None).keys() == state_tensors(Toy(), None).keys()


def test_meta_holds_what_was_given_and_what_was_measured(tmp_path: Path) -> None:
    meta = read_meta(Run(tmp_path).train(2).save())

    assert (meta["step"], meta["pairs"], meta["ranks"], meta["threads"]) == (2, 16, 1, torch.get_num_threads())
    assert meta["versions"]["torch"] == torch.__version__
    assert set(meta["files"]) == {".metadata", "__0_0.distcp"}


def test_no_file_names_a_path_of_the_machine(tmp_path: Path) -> None:
    path = Run(tmp_path).save()

    for file in path.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "extra", torch.nn.Linear(1, 1)), "the checkpoint lacks model.extra.weight"),
        (lambda m: delattr(m, "unused"), "only the checkpoint has model.unused.weight"),
        (
            lambda m: setattr(m, "embed", torch.nn.Linear(5, 8)),
            r"model.embed.weight is \(7, 5\) in the checkpoint and \(8, 5\) in",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path, change, message: str) -> None:
    path = Run(tmp_path).save()
    model = Toy()
    change(model)

    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, model)


# --- whole or not at all ---------------------------------------------------------------------------------------------


def test_a_new_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert Run(tmp_path).checkpoints.latest() is None
    assert find_latest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("damage", ["no meta", "short shard", "no shard", "meta cut", "no metadata"])
def test_a_broken_checkpoint_is_passed_over_with_its_reason(tmp_path: Path, damage: str, capsys) -> None:
    run = Run(tmp_path)
    good, bad = run.train(1).save(), run.train(1).save()
    shard = bad / "__0_0.distcp"
    {
        "no meta": lambda: (bad / "meta.json").unlink(),
        "short shard": lambda: os.truncate(shard, shard.stat().st_size - 1),
        "no shard": shard.unlink,
        "meta cut": lambda: os.truncate(bad / "meta.json", 20),
        "no metadata": lambda: (bad / ".metadata").unlink(),
    }[damage]()

    assert Run(tmp_path).checkpoints.latest() == good
    assert "passed over" in capsys.readouterr().out


def test_a_broken_checkpoint_is_not_loaded_by_name_either(tmp_path: Path) -> None:
    path = Run(tmp_path).save()
    (path / "meta.json").unlink()

    with pytest.raises(CheckpointError, match="not whole"):
        load_checkpoint(path, Toy())


def test_a_run_whose_checkpoints_are_all_broken_does_not_start_from_nothing(tmp_path: Path) -> None:
    (Run(tmp_path).save() / "meta.json").unlink()

    with pytest.raises(CheckpointError, match=r"no checkpoint can be loaded: .*Remove .* to start the run anew"):
        Run(tmp_path).checkpoints.latest()


def test_what_a_killed_save_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    run = Run(tmp_path)
    good = run.train(1).save()
    shutil.copytree(good, tmp_path / ".step_00000002.writing")

    again = Run(tmp_path)

    assert again.checkpoints.latest() == good
    assert not list(tmp_path.glob(".step*"))


@pytest.mark.parametrize("moment", ["start_writing", "publish", "write", "rename", "latest"])
def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path, moment: str, monkeypatch) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: object, **__: object) -> None:
        raise Killed

    run = Run(tmp_path)
    run.train(1).save()
    run.train(1)
    if moment == "write":
        monkeypatch.setattr(run.checkpoints, "_write", kill)
    elif moment == "rename":
        rename = os.rename
        final = tmp_path / "step_00000002"
        monkeypatch.setattr(checkpoint_files.os, "rename", lambda a, b: kill() if Path(b) == final else rename(a, b))
    elif moment == "latest":
        write = checkpoint_files.write_text
        monkeypatch.setattr(checkpoint_files, "write_text", lambda p, t: kill() if p.name == "latest" else write(p, t))
    else:
        monkeypatch.setattr(checkpoint, moment, kill)
    with pytest.raises(Killed):
        run.save()
    monkeypatch.undo()

    resumed = Run(tmp_path, seed=9).resume()

    assert same(resumed.train(3 - resumed.step), Run(tmp_path / "other").train(3))
    assert resumed.save().name == "step_00000003"  # and saving goes on


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(1).save()
    run.train(1).save()
    (tmp_path / "latest").write_text("step_00000001\n")  # set back by hand

    again = Run(tmp_path).resume()
    assert again.step == 1
    again.train(1).save()

    assert steps_in(tmp_path) == [1, 2]
    assert (tmp_path / "latest").read_text() == "step_00000002\n"


def test_an_old_one_set_aside_comes_back_if_its_successor_never_came(tmp_path: Path) -> None:
    path = Run(tmp_path).save()
    path.rename(tmp_path / f".{path.name}.old")

    assert Run(tmp_path).checkpoints.latest() == path


def fill_disk(monkeypatch, after: int) -> None:
    """Files of shards take `after` bytes; then the disk is full."""
    from torch.distributed.checkpoint.filesystem import FileSystem

    class Full:
        def __init__(self, stream) -> None:
            self.stream, self.left = stream, after

        def write(self, data) -> int:
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.stream.write(data)

        def __getattr__(self, name: str):
            return getattr(self.stream, name)

    create = FileSystem.create_stream

    @contextlib.contextmanager
    def stream(self, path, mode):
        with create(self, path, mode) as inner:
            yield Full(inner) if "w" in mode else inner

    monkeypatch.setattr(FileSystem, "create_stream", stream)


@pytest.mark.parametrize("after", [0, 100, 10_000])  # at once, in the first tensor, late
def test_a_full_disk_leaves_the_old_checkpoint_and_says_so(tmp_path: Path, after: int, monkeypatch) -> None:
    run = Run(tmp_path)
    good = run.train(1).save()
    run.train(1)
    fill_disk(monkeypatch, after)

    with pytest.raises(CheckpointError, match="step 2 was not written: OSError: .*No space left on device"):
        run.save()

    monkeypatch.undo()
    assert find_latest(tmp_path) == good
    assert not list(tmp_path.glob(".step*"))
    assert run.save().name == "step_00000002"  # once there is room


def test_a_full_disk_at_the_last_file_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch) -> None:
    run = Run(tmp_path)
    good = run.train(1).save()
    run.train(1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint_files, "write_text", full)
    with pytest.raises(CheckpointError, match="No space left"):
        run.save()

    assert find_latest(tmp_path) == good
    assert steps_in(tmp_path) == [1]


# --- and else --------------------------------------------------------------------------------------------------------


def test_saving_does_not_change_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path).train(2)
    before = copy.deepcopy(state_tensors(run.model, run.optimizer))

    run.save()

    after = state_tensors(run.model, run.optimizer)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_the_meta_file_is_json_that_anyone_reads(tmp_path: Path) -> None:
    path = Run(tmp_path).save()

    assert json.loads((path / "meta.json").read_text())["step"] == 0
