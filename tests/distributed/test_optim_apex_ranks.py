"""AdamW by apex's kernel over shards: this rank's parts go to the kernel, and a checkpoint fits both backends."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mvle.engine.checkpoint import CheckpointConfig, Checkpointer
from mvle.engine.ema import Ema
from mvle.engine.optim import OptimConfig, build_optimizer, clip_and_step
from mvle.engine.optim_apex import local
from mvle.engine.parallel import Parallel, ParallelConfig

from ..apex_stand_in import by_apex
from .ranks import run_ranks
from .toy import Toy, pairs_of

CONFIG = OptimConfig(lr=1e-2, weight_decay=0.1)


def train(folder: str, backend: str, first: int, last: int, result: str) -> None:
    """Steps first .. last - 1, of which step 3 is not finite on the last rank alone; goes on from `folder` and saves
    there. Writes whole weights, averages and state."""
    with Parallel.start(ParallelConfig(), "cpu") as parallel:
        model = parallel.shard(Toy(seed=first))
        optimizer = (by_apex if backend == "apex" else build_optimizer)(model, CONFIG)
        ema = Ema(model, 0.5)
        checkpoints = Checkpointer(folder, CheckpointConfig(), parallel)
        if (path := checkpoints.latest()) is not None:
            checkpoints.load(path, model, optimizer, ema)
        for step in range(first, last):
            (model(pairs_of(step).chunk(parallel.ranks)[parallel.rank]) * parallel.ranks / 8).backward()
            if step == 3 and parallel.rank == parallel.ranks - 1:
                local(model.embed.weight.grad)[0, 0] = math.nan
            held = [local(t).clone() for t in whole_state(model, optimizer).values()]
            _, skipped = clip_and_step(optimizer, 0.1)
            assert skipped.item() == (step == 3)
            now = [local(t) for t in whole_state(model, optimizer).values()]
            assert step != 3 or all(torch.equal(a, b) for a, b in zip(now, held, strict=True))
            optimizer.zero_grad(set_to_none=True)
            ema.update(step, skipped)
        checkpoints.save(last, model, optimizer, {"pairs": last * 8}, ema)
        tensors = whole_state(model, optimizer) | {f"ema.{name}": t for name, t in ema.tensors().items()}
        if parallel.sharded:
            assert all(isinstance(t, DTensor) for name, t in tensors.items() if not name.endswith(".step"))
            empty = [name for name, t in tensors.items() if not local(t).numel()]
            assert bool(empty) == (parallel.rank == 1)  # the temperature is one number
        whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
        if parallel.is_main:
            torch.save({name: tensor.detach() for name, tensor in whole.items()}, result)
        checkpoints.wait()


def whole_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, and each one's state in the optimizer."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    state = {
        f"{name}.{key}": tensor
        for name, p in model.named_parameters()
        for key, tensor in optimizer.state.get(p, {}).items()
    }
    return weights | state


def result_of(folder: Path, parts: list[tuple[int, str, int, int]]) -> dict[str, Tensor]:
    """What (ranks, backend, first step, last step) parts leave, each going on from the one before."""
    result = folder / "result.pt"
    for ranks, *part in parts:
        if ranks == 1:
            train(str(folder / "checkpoints"), *part, str(result))
        else:
            run_ranks(ranks, train, str(folder / "checkpoints"), *part, str(result))
    return torch.load(result, weights_only=True)


def test_shards_are_stepped_as_the_whole_and_go_on_under_the_other_backend(tmp_path: Path) -> None:
    alone = result_of(tmp_path / "alone", [(1, "torch", 0, 7)])

    mixed = result_of(tmp_path / "mixed", [(2, "apex", 0, 4), (1, "torch", 4, 5), (2, "apex", 5, 7)])

    assert {float(t) for name, t in alone.items() if name.endswith(".step")} == {6.0}
    for name, tensor in alone.items():
        torch.testing.assert_close(mixed[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
