"""What happens to checkpoints on real machines: a bit flips, the disk is full, the process is killed in mid-save."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mvle.engine.checkpoint import load_checkpoint
from mvle.engine.checkpoint_files import find_latest, read_meta, steps_in
from mvle.engine.errors import CheckpointError

from ..distributed.toy import Toy
from .checkpoint_run import Run, same

ROOT = Path(__file__).resolve().parents[2]


def in_a_process(function: str, *arguments: object) -> subprocess.Popen[str]:
    """A function of this file in a process of its own, which may be killed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    code = f"import tests.unit.test_checkpoint_damage as here; here.{function}(*{arguments!r})"
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


# --- a flipped bit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "flips"), [("__0_0.distcp", 30), (".metadata", 10)])
def test_no_flipped_bit_is_loaded_in_silence(tmp_path: Path, name: str, flips: int) -> None:
    run = Run(tmp_path).train(1)
    good = run.save()
    expected, file = run.train(1), run.save() / name
    data, draw, noticed = file.read_bytes(), random.Random(name), 0

    for _ in range(flips):
        flipped = bytearray(data)
        flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(flipped)

        found = Run(tmp_path, seed=9).resume()  # `latest` reads all; it may be none of what is read
        noticed += found.step == 1
        assert found.step == 1 or same(found, expected)

        model = Toy(seed=9)
        try:
            load_checkpoint(file.parent, model)
        except CheckpointError as error:
            assert str(file) in str(error) or str(good.parent) in str(error)
        else:
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), run.model.parameters(), strict=True))

    assert noticed > flips / 3, "most bytes here belong to no tensor"


def test_a_damaged_checkpoint_is_passed_over_naming_the_file_and_the_tensor(tmp_path: Path, capsys) -> None:
    run = Run(tmp_path)
    good, bad = run.train(1).save(), run.train(1).save()
    file = bad / "__0_0.distcp"
    data = file.read_bytes()
    weight = run.model.embed.weight.detach().numpy().tobytes()
    assert data.count(weight) == 1
    file.write_bytes(data.replace(weight, bytes([weight[0] ^ 1]) + weight[1:]))

    assert Run(tmp_path).checkpoints.latest() == good

    said = capsys.readouterr().out
    assert f"passed over a checkpoint: {file} is damaged: the bytes of model.embed.weight are not those" in said


# --- a full disk -----------------------------------------------------------------------------------------------------


def save_on_a_full_disk(folder: str) -> None:
    """Files may have so many bytes and no more, as on a disk that is full, for real: the system refuses to write on."""
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)
    for asynchronous in (False, True):
        run = Run(Path(folder) / str(asynchronous), asynchronous=asynchronous).train(1)
        good = run.save()
        run.checkpoints.wait()
        for limit in (0, 100, 20_000):  # at once, in the first tensor, late
            run.train(1)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, whole[1]))
            try:
                with pytest.raises(
                    CheckpointError, match=f"step {run.step} was not written: .*OSError.*File too large"
                ):
                    run.save()
                    run.checkpoints.wait()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, whole)
            assert find_latest(good.parent) == good and not list(good.parent.glob(".step*"))
        run.save()  # once there is room
        run.checkpoints.wait()
        assert same(Run(good.parent, seed=9).resume(), run)


def test_a_disk_that_is_really_full_fails_the_save_and_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    process = in_a_process("save_on_a_full_disk", str(tmp_path))

    said = process.communicate(timeout=120)[0]

    assert process.returncode == 0, said


# --- killed ----------------------------------------------------------------------------------------------------------


def save_for_ever(folder: str) -> None:
    run = Run(Path(folder), asynchronous=True)
    while True:
        run.train(1).save()
        print(run.step, flush=True)


def test_a_process_killed_in_mid_save_leaves_a_whole_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    process = in_a_process("save_for_ever", str(tmp_path))
    assert process.stdout is not None
    while process.stdout.readline().strip() != "3":
        assert process.poll() is None
    time.sleep(random.Random(os.urandom(8)).uniform(0, 0.1))  # anywhere in a save
    process.send_signal(signal.SIGKILL)
    process.communicate()

    resumed = Run(tmp_path, seed=9).resume()

    assert resumed.step >= 2 and read_meta(tmp_path / f"step_{resumed.step:08d}")["pairs"] == 8 * resumed.step
    assert not list(tmp_path.glob(".step*"))
    assert same(resumed, Run(tmp_path / "other").train(resumed.step)), f"killed after step {resumed.step}"
    resumed.train(1).save()
    assert resumed.step in steps_in(tmp_path)
