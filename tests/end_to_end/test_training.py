"""Whole runs, as a user starts them: killed, stopped, started again, refused."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mvle.config import Config
from mvle.engine.checkpoint import load_checkpoint
from mvle.engine.checkpoint_files import find_latest, read_meta
from mvle.engine.metrics import read_rows
from mvle.model.model import MaskVLM
from mvle.train import main

from ..unit.small_run import small_config, write_shard

ROOT = Path(__file__).resolve().parents[2]


def write_config(folder: Path, steps: int = 12, **sections: object) -> Path:
    """A config file of a run in folder/run over a small shard."""
    folder.mkdir(parents=True, exist_ok=True)
    shard = folder.parent / "pairs.tar"
    if not shard.exists():
        write_shard(shard, images=16)
    values = {
        "schedule": {"steps": steps},
        "optim": {"lr": 1e-3},
        "checkpoint": {"every": 4, "keep": 2},
        "evaluation": {"every": 0},
        "metrics": {"every": 1},
        **sections,
    }
    path = folder / "config.yaml"
    path.write_text(small_config(shard, folder / "run", **values).to_yaml())
    return path


def start(config: Path, *overrides: str) -> subprocess.Popen[str]:
    """`python -m mvle.train CONFIG` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "mvle.train", str(config), *overrides]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(config: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until metrics.jsonl has a row of `step`."""
    metrics = config.parent / "run" / "metrics.jsonl"
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        if metrics.is_file() and any(row["step"] >= step for row in read_rows(metrics)):
            return
        time.sleep(0.005)
    pytest.fail(f"step {step} was not reached: {process.communicate()[0]}")


def final_weights(config: Path) -> dict[str, torch.Tensor]:
    """The weights of the newest checkpoint of the run."""
    path = find_latest(config.parent / "run" / "checkpoints")
    assert path is not None
    meta = read_meta(path)
    loaded = Config.from_dict(meta["config"])
    tokens = json.loads((config.parent / "run" / "tokenizer" / "tokenizer.json").read_text())
    model = MaskVLM(loaded, len(tokens["model"]["vocab"]), 4)
    load_checkpoint(path, model)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_run_killed_at_a_random_step_ends_in_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    straight, broken = write_config(tmp_path / "straight", 40), write_config(tmp_path / "broken", 40)
    step = random.Random(os.urandom(8)).randint(5, 30)
    assert start(straight).wait() == 0

    killed = start(broken)
    wait_for_step(broken, step, killed)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert start(broken).wait() == 0

    expected, got = final_weights(straight), final_weights(broken)
    assert all(torch.equal(got[name], value) for name, value in expected.items()), f"killed after step {step}"
    rows = [read_rows(c.parent / "run" / "metrics.jsonl", "train") for c in (straight, broken)]
    assert [[r["step"], r["loss"]] for r in rows[0]] == [[r["step"], r["loss"]] for r in rows[1]]


def test_sigterm_saves_and_ends_cleanly_and_the_same_command_goes_on(tmp_path: Path) -> None:
    config = write_config(tmp_path / "stopped", 400, checkpoint={"every": 400, "keep": 1})

    process = start(config)
    wait_for_step(config, 3, process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]

    assert process.returncode == 75
    assert "stopped by signal SIGTERM" in said
    path = find_latest(config.parent / "run" / "checkpoints")
    assert path is not None
    step = read_meta(path)["step"]
    assert 3 <= step < 400
    again = start(config)
    wait_for_step(config, step + 1, again)
    again.kill()
    assert f"goes on from step {step}" in again.communicate()[0]


def test_a_finished_run_says_so_and_prints_its_figures_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "done", 2, evaluation={"every": 2, "pairs": 8, "k": 2})
    assert main([str(config)]) == 0
    first = read_rows(config.parent / "run" / "metrics.jsonl", "val")[-1]
    capsys.readouterr()

    assert main([str(config)]) == 0

    said = capsys.readouterr().out
    assert "is finished (2 steps)" in said
    assert f"val_r1_image_to_text  {first['val_r1_image_to_text']:.4f}" in said
    assert len(read_rows(config.parent / "run" / "metrics.jsonl", "train")) == 2


def test_another_config_or_other_data_in_the_same_folder_is_refused_with_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "first", 4)
    assert main([str(config)]) == 0

    assert main([str(config), "optim.lr=0.5"]) == 2
    assert "optim.lr: 0.001 in the checkpoint, 0.5 now" in capsys.readouterr().err

    other = write_shard(tmp_path / "other.tar", images=14)
    assert main([str(config), f"data.train={other}"]) == 2
    said = capsys.readouterr().err
    assert "fingerprint of the data" in said and "run.folder" in said


def test_micro_batches_train_as_one_forward_over_the_whole_batch_does(tmp_path: Path) -> None:
    whole = write_config(tmp_path / "whole", 3)
    parts = write_config(tmp_path / "parts", 3, batch={"total": 8, "micro": 4})

    assert main([str(whole)]) == 0 and main([str(parts)]) == 0

    rows = [read_rows(c.parent / "run" / "metrics.jsonl", "train") for c in (whole, parts)]
    for one, other in zip(*rows, strict=True):
        for name in ("mim", "mlm", "itc", "itm", "itc_accuracy", "grad_norm", "temperature"):
            assert one[name] == pytest.approx(other[name], rel=2e-4), name


def test_two_ranks_of_torchrun_train_as_one_does(tmp_path: Path) -> None:
    alone, both = write_config(tmp_path / "alone", 3), write_config(tmp_path / "both", 3)
    assert main([str(alone)]) == 0
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    done = subprocess.run(
        [*command, "-m", "mvle.train", str(both)], env=environment, capture_output=True, text=True, timeout=240
    )

    assert done.returncode == 0, done.stderr
    assert "2 ranks x 4 x 1 accumulate = 8 pairs" in done.stdout
    rows = [read_rows(c.parent / "run" / "metrics.jsonl", "train") for c in (alone, both)]
    for one, other in zip(*rows, strict=True):
        for name in ("mim", "mlm", "itc", "itm", "grad_norm", "temperature"):
            assert one[name] == pytest.approx(other[name], rel=5e-4), name


def test_large_without_data_says_within_seconds_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["large"]) == 2

    said = capsys.readouterr().err
    for words in ("data.train", "mvle.data pack", "mvle.data index", "data.train=shapes:train"):
        assert words in said


def test_a_tokenizer_that_cannot_be_had_is_named_before_anything_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = write_config(tmp_path / "words", 3)

    assert main([str(config), "tokenizer.kind=transformers", "tokenizer.name=nobody/has-this"]) == 2

    said = capsys.readouterr().err
    assert "tokenizer.name" in said and "tokenizer.kind=bpe" in said
    assert not (config.parent / "run").exists()


def test_a_cpu_run_needs_neither_triton_nor_dali_nor_a_compiler(tmp_path: Path) -> None:
    config = write_config(tmp_path / "bare", 2)
    hide = (
        "import sys, os\n"
        "class Hidden:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in ('triton', 'nvidia', 'xformers', 'apex', 'timm', 'transformers'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "os.environ['PATH'] = '/nonexistent'\n"
        "import mvle.train\n"
        f"sys.exit(mvle.train.main([{str(config)!r}]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "CXX": "/none"}

    done = subprocess.run([sys.executable, "-c", hide], env=environment, capture_output=True, text=True, timeout=240)

    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stdout
