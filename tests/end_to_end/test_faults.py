"""Whole runs in which something breaks: what they print, and that nothing is lost.

The faults are planted by planted.py. Runs of one test go on side by side where they can.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mvle.data.shards import ShardSet
from mvle.engine.checkpoint_files import find_latest, read_meta
from mvle.engine.metrics import read_rows

from .test_training import ROOT, final_weights, write_config

PLANTED = Path(__file__).with_name("planted.py")


def launch(
    config: Path, *faults: str, ranks: int = 1, restarts: int = 0, overrides: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    """A run with faults, under torchrun from two ranks on."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable]
    if ranks > 1:
        launcher = ["--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
        command += ["-m", "torch.distributed.run", *launcher]
    command += [str(PLANTED), *faults, "train", str(config), *overrides]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outcome(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def pairs_seen(folder: Path) -> dict[int, list[tuple[str, list[int]]]]:
    """Step -> keys of the global batch, each with row, window, flip and caption, as the steps that count saw them: the
    last time that each was made."""
    seen: dict[int, dict[int, tuple[str, list[int]]]] = {}
    rows = []
    for file in folder.glob("*.jsonl"):
        made = file.stat().st_mtime_ns
        rows += [(made, json.loads(line)) for line in file.read_text().splitlines() if line.endswith("}")]
    for _, row in sorted(rows, key=lambda r: r[0]):
        at = seen.setdefault(row["step"], {})
        at.update(zip(row["ids"], zip(row["keys"], row["shown"], strict=True), strict=True))
    return {step: [pairs[pair] for pair in sorted(pairs)] for step, pairs in sorted(seen.items())}


def rot(shard: Path, image: int) -> None:
    """Flip a byte of an image and leave the shard looking untouched."""
    index = ShardSet.open([str(shard)]).indexes[0]
    before = os.stat(shard)
    with open(shard, "r+b") as file:
        at = int(index.columns["image.offset"][image]) + int(index.columns["image.size"][image]) // 2
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0x55]))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))


def losses(config: Path) -> list[list[float]]:
    rows = read_rows(config.parent / "run" / "metrics.jsonl", "train")
    return [[row["step"], row["loss"]] for row in rows]


def test_a_pair_that_is_not_finite_is_skipped_on_all_ranks_and_named(tmp_path: Path) -> None:
    config = write_config(tmp_path / "nan", 8)
    bad = ShardSet.open([str(tmp_path / "pairs.tar")]).key(3)

    code, out, err = outcome(launch(config, f"nan:{bad}", ranks=2))

    assert code == 0, err
    rows = read_rows(config.parent / "run" / "metrics.jsonl")
    skipped = [row for row in rows if row["kind"] == "skipped"]
    assert skipped and all(row["keys"] == [bad] and row["blamed"] for row in skipped)
    assert f"step {skipped[0]['step']} was not finite; to blame: {bad}" in out
    assert sum(row["skipped"] for row in rows if row["kind"] == "train") == len(skipped) < 8
    assert all(torch.isfinite(weight).all() for weight in final_weights(config).values())


def test_many_steps_that_are_not_finite_stop_the_run_with_the_list_and_the_last_checkpoint_stays(
    tmp_path: Path,
) -> None:
    config = write_config(tmp_path / "diverged", 30)

    code, _out, err = outcome(launch(config, "nan-after:6", overrides=("optim.max_skipped=3",)))

    assert code == 1
    assert "3 steps in a row were not finite" in err
    assert all(f"step {step} was not finite; to blame: pair" in err for step in (6, 7, 8))
    path = find_latest(config.parent / "run" / "checkpoints")
    assert path is not None and read_meta(path)["step"] in (4, 8)
    assert all(torch.isfinite(weight).all() for weight in final_weights(config).values())


def test_bit_rot_behind_a_good_index_is_replaced_named_and_counted(tmp_path: Path) -> None:
    config = write_config(tmp_path / "rot", 8)
    shard = tmp_path / "pairs.tar"
    rot(shard, 5)

    code, _out, err = outcome(launch(config))

    assert code == 0, err
    assert "pair0005" in err and "checksum" in err and str(shard) in err
    rows = read_rows(config.parent / "run" / "metrics.jsonl", "train")
    assert sum(row.get("replaced", 0) for row in rows) > 0
    assert len(rows) == 8


def test_a_shard_cut_short_says_which_and_what_to_do(tmp_path: Path) -> None:
    config = write_config(tmp_path / "cut", 8)
    shard = tmp_path / "pairs.tar"
    os.truncate(shard, os.path.getsize(shard) // 2)

    code, _out, err = outcome(launch(config))

    assert code == 2
    assert str(shard) in err and "mvle.data index" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_full_disk_says_so_and_the_last_good_checkpoint_is_gone_on_from(tmp_path: Path, asynchronous: str) -> None:
    config = write_config(tmp_path / "full", 12)
    overrides = (f"checkpoint.asynchronous={asynchronous}",)

    code, out, err = outcome(launch(config, "full-disk:6", overrides=overrides))

    assert code == 1, out + err
    assert "the checkpoint of step 8 was not written" in err and "MiB free" in err
    path = find_latest(config.parent / "run" / "checkpoints")
    assert path is not None and read_meta(path)["step"] == 4
    straight = write_config(tmp_path / "straight", 12)
    again, other = launch(config, overrides=overrides), launch(straight)
    assert "goes on from step 4" in outcome(again)[1] and outcome(other)[0] == 0
    assert losses(config) == losses(straight)


def test_a_hung_and_a_killed_rank_are_named_and_a_restart_goes_on(tmp_path: Path) -> None:
    hung, killed = write_config(tmp_path / "hung", 12), write_config(tmp_path / "killed", 12)
    straight = write_config(tmp_path / "straight", 12)
    record = [f"record:{c.parent / 'seen'}" for c in (killed, straight)]

    runs = [
        launch(hung, "hang:1:6", ranks=2, overrides=("parallel.timeout=0.05",)),
        launch(killed, "kill:1:7", record[0], ranks=2, restarts=1),
        launch(straight, record[1], ranks=2),
    ]
    (hung_code, _, hung_said), (killed_code, killed_out, killed_said), (code, _, _) = map(outcome, runs)

    assert hung_code == 1
    assert "rank 1 hangs" in hung_said and "'forward and backward' of step 6" in hung_said
    assert "planted.py" in hung_said, "the stack of the rank that hangs"
    assert killed_code == code == 0, killed_said
    assert re.search(r"rank 1 died: no sign of life since \d+ s, last seen in '.+' of step \d", killed_said)
    assert "goes on from step 4" in killed_out
    assert pairs_seen(killed.parent / "seen") == pairs_seen(straight.parent / "seen")
    assert losses(killed) == losses(straight)


def test_sigterm_on_one_rank_in_mid_step_saves_all_and_another_number_of_ranks_goes_on(tmp_path: Path) -> None:
    config, straight = write_config(tmp_path / "stopped", 10), write_config(tmp_path / "straight", 10)
    seen, record = config.parent / "seen", f"record:{config.parent / 'seen'}"

    stopped, other = launch(config, "term:1:3", record, ranks=2), launch(straight, f"record:{straight.parent / 'seen'}")
    code, out, err = outcome(stopped)

    assert code == 1, "torchrun's own code: a rank ended with another than 0"
    assert "exitcode  : 75" in err
    assert "after step 3; the same command goes on from there" in out
    mark = config.parent / "run" / "stopped"
    assert json.loads(mark.read_text())["step"] == 3
    path = find_latest(config.parent / "run" / "checkpoints")
    assert path is not None and read_meta(path)["step"] == 3
    code, out, err = outcome(launch(config, record))
    assert code == 0 and "goes on from step 3" in out, err
    assert not mark.exists()
    assert outcome(other)[0] == 0
    assert pairs_seen(seen) == pairs_seen(straight.parent / "seen")


def test_kills_at_random_steps_over_changing_numbers_of_ranks_lose_no_pair_and_no_step(tmp_path: Path) -> None:
    small = {"itm": {"group": 2}}  # 8 pairs on 4 ranks
    config = write_config(tmp_path / "killed", 30, objectives=small)
    straight = write_config(tmp_path / "straight", 30, objectives=small)
    chance = random.Random(os.urandom(8))
    record = f"record:{config.parent / 'seen'}"
    other = launch(straight, f"record:{straight.parent / 'seen'}")
    said = []

    for ranks in (1, 4):
        at = chance.randint(3, 8)
        rank = chance.randrange(ranks)
        code, _, err = outcome(launch(config, record, f"kill:{rank}:{at}", ranks=ranks))
        said.append(f"rank {rank} of {ranks} killed in its step {at}")
        assert code != 0, f"{said}: {err}"
    code, _out, err = outcome(launch(config, record, ranks=2))

    assert code == 0, f"{said}: {err}"
    assert outcome(other)[0] == 0
    assert pairs_seen(config.parent / "seen") == pairs_seen(straight.parent / "seen"), said
    assert [step for step, _ in losses(config)] == list(range(1, 31)), said
    shutil.rmtree(config.parent)


def test_a_run_killed_while_it_loads_goes_on_with_the_other_decoder_and_other_ranks(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    config, straight = write_config(tmp_path / "killed", 20), write_config(tmp_path / "straight", 20)
    rot(tmp_path / "pairs.tar", 5)
    record = [f"record:{c.parent / 'seen'}" for c in (config, straight)]
    dali, by_torch = ("data.decoder=dali",), ("data.decoder=torch",)

    other = launch(straight, record[1], overrides=by_torch)
    code, out, _ = outcome(launch(config, record[0], "kill-loading:1:55", ranks=2, overrides=dali))
    assert code != 0 and "decoder     dali" in out
    code, out, err = outcome(launch(config, record[0], overrides=by_torch))

    assert code == 0, err
    assert "decoder     torch" in out and re.search(r"goes on from step (4|8|12)\b", out), out
    assert outcome(other)[0] == 0
    assert pairs_seen(config.parent / "seen") == pairs_seen(straight.parent / "seen")
    assert sum(row["replaced"] for row in read_rows(config.parent / "run" / "metrics.jsonl", "train")) > 0
