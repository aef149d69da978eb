"""Ranks: sharded equals alone, ranks agree, and what cannot be is refused before anybody waits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mvle.engine.checkpoint import CheckpointConfig, Checkpointer, CheckpointError
from mvle.engine.metrics import Metrics, MetricsConfig, read_rows
from mvle.engine.optim import OptimConfig, build_optimizer, clip_and_step
from mvle.engine.parallel import CUDA_ENVIRONMENT, MARGIN, Parallel, ParallelConfig, mesh_shape, prepare_cuda

from .ranks import run_ranks
from .toy import Toy, pairs_of


def steps(result: str, replicate: int, micro: int) -> None:
    """Five steps, the third not finite, in micro-batches; rank 0 writes whole weights and what it saw."""
    with Parallel.start(ParallelConfig(replicate=replicate, first_timeout=90, timeout=7), "cpu") as parallel:
        assert patience(parallel) == ([] if parallel.ranks == 1 else [90 * 60 + MARGIN])
        model = parallel.shard(Toy())
        optimizer = build_optimizer(model, OptimConfig(lr=1e-2, encoder_lr=5e-3))
        norms, skips = [], []
        for step in range(5):
            mine = pairs_of(step).chunk(parallel.ranks)[parallel.rank]
            if step == 2 and parallel.rank == 0:
                mine = mine * float("nan")  # on one rank alone: all must skip
            parts = mine.split(micro)
            for k, part in enumerate(parts):
                with parallel.accumulating(model, last=k == len(parts) - 1):
                    (model(part) * parallel.ranks / 8).backward()
            norm, skipped = clip_and_step(optimizer, 1.0)
            optimizer.zero_grad(set_to_none=True)
            norms.append(norm.item())
            skips.append(skipped.item())
            with torch.no_grad():
                model.encode_images(mine)  # an entry beside forward
            parallel.reshard(model)
            parallel.shorten_timeouts()
        assert patience(parallel) == ([] if parallel.ranks == 1 else [7 * 60 + MARGIN])
        whole = {n: (p.full_tensor() if parallel.sharded else p).detach() for n, p in model.named_parameters()}
        if parallel.is_main:
            torch.save({"weights": whole, "norms": torch.tensor(norms), "skips": torch.tensor(skips)}, result)


def patience(parallel: Parallel) -> list[float]:
    """How many seconds the groups of ranks wait: one number, if all wait alike."""
    if parallel.mesh is None:
        return []
    groups = [torch.distributed.group.WORLD, parallel.cpu_group, *parallel.mesh.get_all_groups()]
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    return sorted({backend.options._timeout.total_seconds() for backend in backends})


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict:
    result = tmp_path_factory.mktemp("alone") / "result.pt"
    steps(str(result), replicate=1, micro=8)
    return torch.load(result, weights_only=True)


@pytest.mark.parametrize(
    ("ranks", "replicate", "micro"),
    [(2, 1, 4), (2, 1, 2), (4, 2, 2)],  # sharded; with accumulation; two copies of two shards
)
def test_ranks_train_as_one(tmp_path: Path, alone: dict, ranks: int, replicate: int, micro: int) -> None:
    run_ranks(ranks, steps, str(tmp_path / "result.pt"), replicate, micro)

    shared = torch.load(tmp_path / "result.pt", weights_only=True)
    assert shared["skips"].tolist() == alone["skips"].tolist() == [0, 0, 1, 0, 0]
    torch.testing.assert_close(shared["norms"], alone["norms"], rtol=1e-5, atol=0, equal_nan=True)
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(shared["weights"][name], weight, rtol=1e-5, atol=1e-6)


def words(folder: str) -> None:
    with Parallel.start(ParallelConfig(), "cpu") as parallel:
        assert parallel.vote(parallel.rank == 1)
        assert not parallel.vote(False)
        assert parallel.agree(10 * parallel.rank) == 10
        total = parallel.all_reduce_sum(torch.tensor([1.0, parallel.rank]))
        assert total.tolist() == [2.0, 1.0]
        assert parallel.sum_on_cpu(torch.tensor([1.0, parallel.rank])).tolist() == [2.0, 1.0]

        # losses are added over ranks, what all have alike is not
        with Metrics(f"{folder}/metrics.jsonl", MetricsConfig(every=2), parallel, steps=2, pairs=8) as metrics:
            for step in (1, 2):
                sums = {"loss": torch.tensor(0.25 + parallel.rank)}
                state = {"grad_norm": torch.tensor(3.0)}
                metrics.update(step, sums, state, skipped=torch.tensor(0.0), wait=0.0, lr=0.1)

        # a rank that cannot write stops all of them, and what was there stays
        model = parallel.shard(Toy())
        optimizer = build_optimizer(model, OptimConfig())
        checkpoints = Checkpointer(f"{folder}/checkpoints", CheckpointConfig(), parallel)
        good = checkpoints.save(1, model, optimizer)
        write = checkpoints._write

        def broken(path: Path, tensors: dict) -> None:
            write(path, tensors)
            if parallel.rank == 1:
                raise OSError(28, os.strerror(28))

        checkpoints._write = broken  # type: ignore[method-assign]
        with pytest.raises(CheckpointError, match="step 2 was not written"):
            checkpoints.save(2, model, optimizer)
        assert checkpoints.latest() == good


def test_ranks_agree_and_fail_together(tmp_path: Path) -> None:
    run_ranks(2, words, str(tmp_path))

    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["loss"], row["grad_norm"]) for row in rows] == [(1.5, 3.0)]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000001"]


def meet_over(port: int) -> None:
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with Parallel.start(ParallelConfig(), "cpu") as parallel:
        assert parallel.agree(parallel.rank) == 1


def test_ranks_that_start_again_do_not_find_those_of_before_in_the_store_that_torchrun_keeps() -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _ in range(2):
        run_ranks(2, meet_over, store.port)


def test_cuda_gets_the_settings_of_a_cluster_where_the_user_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for names in CUDA_ENVIRONMENT:
        for name in names:
            monkeypatch.setenv(name, "")  # put back afterwards
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "mine")

    prepare_cuda()

    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert os.environ["PYTORCH_ALLOC_CONF"] == "mine" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    prepare_cuda()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


def test_one_cpu_rank_needs_no_process_group() -> None:
    with Parallel.start(ParallelConfig(), "cpu") as parallel:
        model = Toy()

        assert parallel.shard(model) is model
        assert not parallel.sharded and not torch.distributed.is_initialized()
        assert not hasattr(model, "reshard")
        assert parallel.is_main and parallel.vote(True) and not parallel.vote(False)


@pytest.mark.parametrize(
    ("config", "ranks", "shape"),
    [
        (ParallelConfig(), 1, (1, 1)),
        (ParallelConfig(), 8, (1, 8)),
        (ParallelConfig(replicate=2), 8, (2, 4)),
        (ParallelConfig(replicate=2, shard=4), 8, (2, 4)),
    ],
)
def test_the_mesh_is_replicate_by_shard(config: ParallelConfig, ranks: int, shape: tuple[int, int]) -> None:
    assert mesh_shape(config, ranks) == shape


@pytest.mark.parametrize(
    ("config", "ranks", "message"),
    [
        (ParallelConfig(replicate=3), 8, r"parallel.replicate must divide the number of ranks \(8\); got 3"),
        (ParallelConfig(shard=2), 8, r"must be the number of ranks \(8\); got 1 x 2. Set parallel.replicate=4 or "),
        (ParallelConfig(replicate=2, shard=3), 8, r"got 2 x 3. Set parallel.shard=4, which is what null means"),
        (ParallelConfig(replicate=2), 1, "Without torchrun there is one rank"),
    ],
)
def test_a_mesh_that_does_not_fit_the_ranks_is_refused(config: ParallelConfig, ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mesh_shape(config, ranks)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_asked_for_by_name() -> None:
    with pytest.raises(ValueError, match="run.device=cuda needs a GPU for each rank"):
        Parallel.start(ParallelConfig(), "cuda")
