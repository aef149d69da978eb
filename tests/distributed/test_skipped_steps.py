"""What one rank alone has seen (a bad pair, a value that is not finite, counts) is known to all, over sharded ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mvle.config import Config
from mvle.engine.metrics import Metrics, read_rows
from mvle.engine.optim import OptimConfig, build_optimizer, clip_and_step
from mvle.engine.parallel import Parallel, ParallelConfig
from mvle.engine.profiling import Profiler
from mvle.engine.run import RunFolder
from mvle.engine.skips import NotFiniteError, SkipLog
from mvle.engine.trackers import TrackerError, open_trackers

from .ranks import run_ranks
from .toy import Toy, pairs_of


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def step_with_one_bad_shard(parallel: Parallel) -> Tensor:
    """One value of rank 1's shard of one gradient is NaN: nothing of any rank changes. Returns `skipped`."""
    model = parallel.shard(Toy())
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2))

    def backward(step: int) -> None:
        optimizer.zero_grad()
        model(pairs_of(step).chunk(parallel.ranks)[parallel.rank]).backward()

    backward(0)
    clip_and_step(optimizer, 1e-3)
    backward(1)
    if parallel.rank == 1:
        local(model.embed.weight.grad)[0, 0] = math.nan
    held = [p.detach() for p in model.parameters()] + [p.grad for p in model.parameters() if p.grad is not None]
    held += [value for state in optimizer.state.values() for value in state.values()]
    before = [local(tensor).clone() for tensor in held]

    _, skipped = clip_and_step(optimizer, 1e-3)

    after = [local(tensor) for tensor in held]
    assert skipped.item() == 1
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(after, before, strict=True))
    assert sum(not tensor.isfinite().all() for tensor in after) == parallel.rank  # NaN has not spread
    return skipped


def ranks_with_a_bad_pair(path: str) -> None:
    with Parallel.start(ParallelConfig(), "cpu") as parallel:
        skipped = step_with_one_bad_shard(parallel)
        folder = RunFolder(path)
        config = Config.from_dict({"run": {"folder": path}, "metrics": {"every": 3, "profile": [1, 2]}})
        keys = [f"pair{4 * parallel.rank + i}" for i in range(4)]
        bad_on_rank_1 = torch.tensor([False, parallel.rank == 1, False, False])
        with (
            Metrics(folder.metrics, config.metrics, parallel, steps=9, pairs=8) as metrics,
            Profiler(config.metrics.profile, folder.profile, parallel, metrics) as profiler,
        ):
            log = SkipLog(metrics, parallel, limit=2)
            for step, (flag, broken) in enumerate(
                [(0, bad_on_rank_1), (1, bad_on_rank_1), (0, None), (1, torch.zeros(4, dtype=torch.bool))], 1
            ):
                with profiler.step(step):
                    losses = {"loss": torch.tensor(0.25 + parallel.rank)}
                metrics.update(
                    step,
                    losses,
                    {},
                    skipped=skipped * flag,
                    wait=0.0,
                    lr=1.0,
                    replaced=parallel.rank,
                    truncated=2,
                )
                log.note(step, skipped * flag, keys, broken, losses)
            log.note(5, skipped, keys, bad_on_rank_1, losses)
            log.note(6, skipped, keys, None, losses)
            # the second in a row is looked at two steps later, and stops all ranks at once with one story
            with pytest.raises(NotFiniteError) as error:
                log.note(7, skipped, keys, None, losses)
        Path(f"{path}/said_{parallel.rank}").write_text(str(error.value))

        # a tracker that rank 0 cannot open stops the others too
        folder.tensorboard.write_text("a file is in the way")
        with pytest.raises(OSError if parallel.is_main else TrackerError, match="tensorboard"):
            wanted = Config.from_dict({"run": {"folder": path}, "metrics": {"tensorboard": True}})
            open_trackers(wanted, folder, parallel, 0)


def test_what_one_rank_has_seen_is_known_to_all(tmp_path: Path, capfd) -> None:
    pytest.importorskip("tensorboard")

    run_ranks(2, ranks_with_a_bad_pair, str(tmp_path))

    keys = [f"pair{i}" for i in range(8)]  # in the order of their positions
    losses = {"loss": 1.5}
    assert read_rows(tmp_path / "metrics.jsonl", "skipped") == [
        {"step": 2, "kind": "skipped", "keys": ["pair5"], "blamed": True, "losses": losses},
        {"step": 4, "kind": "skipped", "keys": keys, "blamed": False, "losses": losses},
        {"step": 5, "kind": "skipped", "keys": ["pair5"], "blamed": True, "losses": losses},
    ]
    (row,) = read_rows(tmp_path / "metrics.jsonl", "train")
    assert (row["skipped"], row["replaced"], row["truncated"], row["loss"]) == (1, 3, 12, 1.5)
    first, second = ((tmp_path / f"said_{rank}").read_text() for rank in (0, 1))
    assert first == second and "step 4" in first and "step 5 was not finite; to blame: pair5" in first
    assert capfd.readouterr().out.count("SKIPPED step 2 was not finite; to blame: pair5") == 1
    assert [path.name for path in sorted((tmp_path / "profile").iterdir())] == ["operators.txt", "trace_rank0.json.gz"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["step"] == 3
