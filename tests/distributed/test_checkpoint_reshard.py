"""A checkpoint of any number of ranks loads on any other, whether it was written in the background or not."""

from __future__ import annotations

from pathlib import Path

import torch

from mvle.engine.checkpoint import CheckpointConfig, Checkpointer
from mvle.engine.ema import Ema
from mvle.engine.optim import OptimConfig, build_optimizer, clip_and_step
from mvle.engine.parallel import Parallel, ParallelConfig

from .ranks import run_ranks
from .toy import Toy, pairs_of


def train(folder: str, first: int, last: int, result: str) -> None:
    """Steps first .. last - 1 on this many ranks: resumes from `folder`, saves there, writes whole weights and EMA."""
    with Parallel.start(ParallelConfig(), "cpu") as parallel:
        model = parallel.shard(Toy(seed=first))  # other weights in each process generation: loading must replace them
        optimizer = build_optimizer(model, OptimConfig(lr=1e-2))
        ema = Ema(model, 0.5)
        checkpoints = Checkpointer(folder, CheckpointConfig(asynchronous=parallel.ranks > 1), parallel)
        if (path := checkpoints.latest()) is not None:
            assert checkpoints.load(path, model, optimizer, ema)["step"] == first
        for step in range(first, last):
            mine = pairs_of(step).chunk(parallel.ranks)[parallel.rank]
            (model(mine) * parallel.ranks / 8).backward()
            _, skipped = clip_and_step(optimizer, 1.0)
            optimizer.zero_grad(set_to_none=True)
            ema.update(step, skipped)
        checkpoints.save(last, model, optimizer, {"pairs": last * 8}, ema)
        tensors = {**dict(model.named_parameters()), **{f"ema.{n}": tensor for n, tensor in ema.tensors().items()}}
        whole = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in tensors.items()}
        if parallel.is_main:
            torch.save({name: tensor.detach() for name, tensor in whole.items()}, result)
        checkpoints.wait()


def weights_after(folder: Path, plan: list[tuple[int, int, int]]) -> dict[str, torch.Tensor]:
    """Weights and EMA after (ranks, first step, last step) parts, each going on from the checkpoint of the last."""
    result = folder / "weights.pt"
    for ranks, first, last in plan:
        if ranks == 1:
            train(str(folder / "checkpoints"), first, last, str(result))
        else:
            run_ranks(ranks, train, str(folder / "checkpoints"), first, last, str(result))
    return torch.load(result, weights_only=True)


def test_two_ranks_continue_one_and_one_continues_two(tmp_path: Path) -> None:
    alone = weights_after(tmp_path / "alone", [(1, 0, 6)])

    mixed = weights_after(tmp_path / "mixed", [(1, 0, 2), (2, 2, 4), (1, 4, 6)])

    for name, weight in alone.items():
        torch.testing.assert_close(mixed[name], weight, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
