"""Two ranks against the plain graph of all their pairs, at steps drawn at random."""

from __future__ import annotations

import os
import random
from pathlib import Path

import torch
import torch.distributed as dist
from mvle_kernels.contrastive_loss import gather
from torch import Tensor

from ..agreement import SEED, Case, assert_same, draw_case, gradients, plain_step
from .ranks import run_ranks

CASES = 24


def drawn(seed: int) -> Case:
    return draw_case(random.Random(seed).choice)


def check(folder: str) -> None:
    """One rank: its half of the pairs of each case, gradients and losses added up; rank 0 holds them to the plain."""
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank(), world_size=2)
    gathered = gather(torch.tensor([rank()]), dist.group.WORLD)
    assert type(gathered) is Tensor and gathered.tolist() == [0, 1], "whole when it is there, not in a thread's hands"
    for seed in range(CASES):
        model, batch = drawn(seed).made()
        half = len(batch) // 2
        mine = batch.micro(rank() * half, (rank() + 1) * half, model.row_multiple)
        model.set_contrast_group(dist.group.WORLD)
        counts = model.counts(mine)
        dist.all_reduce(counts)
        losses = model(mine, SEED, counts)
        got = gradients(model, losses.total)
        for value in (*losses.report.values(), *got.values()):
            dist.all_reduce(value)
        model.set_contrast_group(None)
        if rank() == 0:
            try:
                assert_same(losses.report, got, *plain_step(model, batch))
            except AssertionError as error:
                raise AssertionError(f"case {seed}, {drawn(seed)}: {error}") from error
    dist.barrier()
    if rank() == 0:
        Path(folder, "done").touch()


def rank() -> int:
    return int(os.environ["RANK"])


def test_any_step_of_two_ranks_agrees(tmp_path: Path) -> None:
    kinds = [drawn(seed).config for seed in range(CASES)]
    assert {config["mode"] for config in kinds} == {"replace", "drop"}
    assert sum(config["weights"][2] > 0 and config["weights"][3] > 0 for config in kinds) > 5, "ITC and ITM over ranks"
    run_ranks(2, check, str(tmp_path))
    assert (tmp_path / "done").exists()
