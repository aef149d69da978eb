"""The sharded model on real ranks computes what one unsharded process computes: one objective, whatever the ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mvle.engine.parallel import Parallel, ParallelConfig
from mvle.model.model import MaskVLM

from ..helpers import MASK, VOCABULARY, make_batch, make_config
from .ranks import run_ranks

RATIOS = (0.6, 0.7, 0.8, 1.0, 0.5, 0.6, 0.9, 0.6)


def one_step(result: str, mode: str, group: int, break_contrast: bool = False) -> None:
    """Forward and backward of one global batch of 8 pairs; rank 0 writes losses and whole gradients."""
    with Parallel.start(ParallelConfig(), "cpu") as parallel:
        with torch.device("meta"):
            model = MaskVLM(make_config(mode, group=group, kind="l1+mse"), VOCABULARY, MASK)
        model.double()
        parallel.shard(model)
        model.to_empty(device="cpu")
        model.init_weights(0)
        if parallel.ranks > 1 and not break_contrast:
            model.set_contrast_group(dist.group.WORLD)
        each = 8 // parallel.ranks
        batch = make_batch(ratios=RATIOS).micro(parallel.rank * each, (parallel.rank + 1) * each, 16)
        counts = parallel.all_reduce_sum(model.counts(batch))

        losses = model(batch, 3, counts)
        (losses.total * parallel.ranks).backward()

        report = {name: parallel.all_reduce_sum(value.double()) for name, value in losses.report.items()}
        gradients = {}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                whole = parameter.grad.full_tensor() if parallel.sharded else parameter.grad
                gradients[name] = whole.clone()
        if parallel.is_main:
            torch.save({"report": report, "gradients": gradients}, result)


def both(tmp_path: Path, mode: str, **wrong: bool) -> tuple[dict[str, dict[str, torch.Tensor]], ...]:
    """The step on one rank, and on two."""
    one_step(str(tmp_path / "one.pt"), mode, 4)
    run_ranks(2, one_step, str(tmp_path / "two.pt"), mode, 4, *wrong.values())
    return tuple(torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))


def largest_difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """Of any parameter's gradient, as a share of max(its norm, 1e-4 of the whole gradient's norm)."""
    assert one.keys() == two.keys()
    whole = torch.stack([g.norm() for g in one.values()]).norm()
    return max(float((two[n] - g).norm() / torch.maximum(g.norm(), 1e-4 * whole)) for n, g in one.items())


@pytest.mark.parametrize("mode", ["replace", "drop"])
def test_two_sharded_ranks_have_the_losses_and_gradients_of_one_process(tmp_path: Path, mode: str) -> None:
    one, two = both(tmp_path, mode)

    for name, value in one["report"].items():
        assert float(two["report"][name]) == pytest.approx(float(value), rel=1e-9), name
    assert largest_difference(one["gradients"], two["gradients"]) < 1e-9


def test_contrast_within_a_rank_alone_would_be_another_objective(tmp_path: Path) -> None:
    one, two = both(tmp_path, "replace", break_contrast=True)

    assert largest_difference(one["gradients"], two["gradients"]) > 1e-3
