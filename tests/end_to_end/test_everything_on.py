"""A run with all that a trainer is expected to have, and a step that is not finite: each part did its work, and its
part of the run folder says so. What this file guards is the wiring; the parts have tests of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mvle
from mvle.config import Config, ConfigError, load_config
from mvle.data.batch import Batch
from mvle.data.shards import ShardSet
from mvle.data.tokenizer import Tokenizer
from mvle.engine.checkpoint import load_checkpoint
from mvle.engine.checkpoint_files import folder_of, read_meta, steps_in
from mvle.engine.metrics import read_rows
from mvle.engine.resume import refuse_other_run
from mvle.engine.run import RunFolder
from mvle.engine.schedule import learning_rate_factor
from mvle.engine.train_step import TrainStep
from mvle.evaluation.validation import Validation
from mvle.model import image_encoder
from mvle.model.model import MaskVLM
from mvle.train import main

from .test_training import ROOT, write_config

STEPS, BAD_STEP, DECAY = 8, 4, 0.5
NOT_LEARNED = ("mem_gib", "mfu")  # columns of the machine
EVERYTHING = {
    "optim": {"lr": 1e-3, "ema": DECAY},
    "schedule": {"steps": STEPS, "kind": "wsd", "warmup": 2, "decay": 3},
    "checkpoint": {"every": 1, "keep": 20, "best": "val_loss", "asynchronous": True},
    "evaluation": {"every": 2, "pairs": 16, "k": 2},
    "metrics": {"every": 1, "gradient_norms": 3, "profile": [2, 3], "tensorboard": True},
    "parallel": {"activation_checkpointing": "selective"},
    "batch": {"total": 8, "micro": 4},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunFolder]:
    """Eight steps, the fourth of which is not finite."""
    config = write_config(tmp_path_factory.mktemp("on") / "all", STEPS, **EVERYTHING)
    call, patchify, at = TrainStep.__call__, image_encoder.patchify, [0]

    def counted(self: TrainStep, step: int, batch: Batch) -> object:
        at[0] = step + 1
        try:
            return call(self, step, batch)
        finally:
            at[0] = 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", counted)
        patch.setattr(image_encoder, "patchify", lambda *a: patchify(*a) * (float("nan") if at[0] == BAD_STEP else 1))
        assert main([str(config)]) == 0
    yield RunFolder(config.parent / "run")


def model_at(run: RunFolder, step: int | None, weights: str = "model") -> MaskVLM:
    """The model of a checkpoint; None: as it was before the first step."""
    config, tokenizer = load_config(run.config), Tokenizer.load(run.tokenizer)
    model = MaskVLM(config, tokenizer.vocabulary, tokenizer.mask_id)
    if step is None:
        model.init_weights(config.run.seed)
    else:
        load_checkpoint(folder_of(run.checkpoints, step), model, weights)
    return model


def test_rates_norms_and_skipped_steps_are_written_down(run: RunFolder) -> None:
    config, rows = load_config(run.config), read_rows(run.metrics)
    train = {row["step"]: row for row in rows if row["kind"] == "train"}

    assert sorted(train) == list(range(1, STEPS + 1))
    for step, row in train.items():
        factor = learning_rate_factor(step - 1, config.schedule, config.optim.min_lr_ratio)
        assert row["lr"] == pytest.approx(1e-3 * factor, rel=1e-5)
        assert 0 < row["padding"] < 0.2
        norms = [row.get(f"grad_norm_{name}") for name in ("mim", "mlm", "itc", "itm")]
        assert (None in norms) == (step % 3 != 0)
        if step % 3 == 0:
            assert len(set(norms)) == 4 and max(norms) < sum(norms) and row["grad_norm"] <= sum(norms)
    assert [step for step, row in train.items() if row["skipped"]] == [BAD_STEP]
    order = [(row["kind"], row["step"]) for row in rows]
    assert order.index(("skipped", BAD_STEP)) < order.index(("train", BAD_STEP + 1)), "before the next checkpoint"


def test_the_average_follows_its_formula_and_leaves_the_skipped_step_out(run: RunFolder) -> None:
    average = {name: p.detach().clone() for name, p in model_at(run, None).named_parameters()}
    for step in range(STEPS):
        if step + 1 != BAD_STEP:
            decay = min(DECAY, (1 + step) / (10 + step))
            for name, weight in model_at(run, step + 1).named_parameters():
                average[name].lerp_(weight.detach(), 1 - decay)

    for name, got in model_at(run, STEPS, "ema").named_parameters():
        torch.testing.assert_close(got, average[name], rtol=1e-5, atol=1e-7)


def test_validation_is_of_the_average_and_the_best_checkpoint_is_that_of_the_best_figure(run: RunFolder) -> None:
    config, rows = load_config(run.config), read_rows(run.metrics, "val")
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    validation = Validation(config, ShardSet.open(config.data.val or ()), Tokenizer.load(run.tokenizer))
    found = validation.run(model_at(run, 6, "ema").eval(), "cpu")
    raw = validation.run(model_at(run, 6).eval(), "cpu")
    for name in ("val_mim", "val_mlm", "val_itc"):
        assert rows[2][name] == pytest.approx(found[name], rel=2e-5)
        assert abs(raw[name] - found[name]) > 1e-4 * abs(found[name]), "else this test shows nothing"

    best = json.loads((run.checkpoints / "best.json").read_text())
    lowest = min(rows, key=lambda row: row["val_loss"])
    assert best["checkpoint"] == folder_of(run.checkpoints, lowest["step"]).name
    opened = mvle.load(str(run.path), step="best", weights="ema")
    assert opened.run.step == lowest["step"]
    assert steps_in(run.checkpoints) and (run.path / "tensorboard").is_dir()
    assert (run.profile / "operators.txt").is_file() and (run.profile / "trace_rank0.json.gz").is_file()


@pytest.mark.parametrize("micro", [None, 2])
def test_validation_does_not_depend_on_the_micro_batch(run: RunFolder, micro: int | None) -> None:
    config = Config.from_dict(
        load_config(run.config).to_dict() | {"batch": {"total": 8, "micro": micro}, "objectives": {"itm": {"group": 2}}}
    )
    validation = Validation(config, ShardSet.open(config.data.val or ()), Tokenizer.load(run.tokenizer))

    assert validation.forward_pairs == 8


def test_a_validation_that_a_stop_or_a_kill_left_out_is_made_at_the_next_start(run: RunFolder, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run.path, folder)
    config = [str(folder / "config.yaml"), f"run.folder={folder}"]
    rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    left_out = [row for row in rows if not ('"kind": "val"' in row and '"step": 8' in row)]
    (folder / "metrics.jsonl").write_text("".join(left_out))

    assert main(config) == 0

    again = [row["step"] for row in read_rows(folder / "metrics.jsonl", "val")]
    assert len(left_out) == len(rows) - 1 and again == [2, 4, 6, 8]


@pytest.mark.parametrize("name", ["data", "tokenizer", "architecture"])
def test_a_checkpoint_of_another_fingerprint_is_refused(run: RunFolder, name: str) -> None:
    path = folder_of(run.checkpoints, STEPS)
    meta = read_meta(path)
    other = meta | {"fingerprints": meta["fingerprints"] | {name: "another"}}

    refuse_other_run(path, meta, meta, run, model_at(run, STEPS))
    with pytest.raises(ConfigError, match=f"fingerprint of the {name}"):
        refuse_other_run(path, other, meta, run, model_at(run, STEPS))


def test_two_ranks_with_everything_on_find_what_one_finds(tmp_path: Path) -> None:
    alone = write_config(tmp_path / "alone", 4, **{**EVERYTHING, "schedule": {"steps": 4, "warmup": 1}})
    both = write_config(tmp_path / "both", 4, **{**EVERYTHING, "schedule": {"steps": 4, "warmup": 1}})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    running = subprocess.Popen([*command, "-m", "mvle.train", str(both)], env=environment)
    assert main([str(alone)]) == 0
    assert running.wait(240) == 0

    for kind in ("train", "val"):
        one, two = (read_rows(c.parent / "run" / "metrics.jsonl", kind) for c in (alone, both))
        assert len(one) == len(two) > 0
        for a, b in zip(one, two, strict=True):
            names = [
                n for n in a if n.startswith(("grad_norm", "val_m", "val_itc", "m", "itc")) and n not in NOT_LEARNED
            ]
            for name in names:
                assert b[name] == pytest.approx(a[name], rel=2e-3, abs=2e-4), (kind, a["step"], name)
            if kind == "train":  # useful work of a pair, whatever the time
                assert 2 * b["tflops"] / b["pairs/s"] == pytest.approx(a["tflops"] / a["pairs/s"], rel=1e-3)
