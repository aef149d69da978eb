"""One question: what does each feature of the engine add to a training step, and to the loop around a save?

    pytest benchmarks/test_engine.py --benchmark-only

Shape: tiny at 32 pairs, on one process; captions as long as those of shapes. Every row is the whole optimizer step
(counts, forward, backward, clipping, AdamW). Read each row against the first of its group in one run, not the times.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mvle.config import Config, check_ranks, load_config
from mvle.engine.build import Built, build
from mvle.engine.checkpoint import Checkpointer
from mvle.engine.parallel import Parallel
from mvle.engine.train_step import TrainStep

from .shapes import MASK, SHAPES, SHAPES_BPE


class ContrastWithinMicro(TrainStep):
    """What accumulation was before: each micro-batch is contrasted with itself alone. Another objective."""

    def contrast(self, batch: Any, pieces: Any) -> list[None]:
        return [None] * len(pieces)


def made(*overrides: str) -> tuple[Config, Built]:
    config = load_config("tiny", ["run.device=cpu", "objectives.itm.group=8", *overrides])
    with Parallel.start(config.parallel, "cpu") as parallel:
        return config, build(config, parallel, SHAPES_BPE, MASK)


def step_of(kind: type[TrainStep], *overrides: str) -> Any:
    config, built = made(*overrides)
    parallel = Parallel(0, 1, torch.device("cpu"))
    step = kind(config, parallel, check_ranks(config, 1), built)
    batch = SHAPES["tiny"].batch()
    return lambda: step(0, batch)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("optim.ema=0.999",),
        ("metrics.gradient_norms=1",),
        ("parallel.activation_checkpointing=selective",),
        ("parallel.activation_checkpointing=full",),
    ],
    ids=lambda o: o[0] if o else "everything off",
)
@pytest.mark.benchmark(group="features, tiny, 32 pairs", min_rounds=15, warmup=True, warmup_iterations=2)
def test_feature(benchmark: Any, overrides: tuple[str, ...]) -> None:
    benchmark(step_of(TrainStep, *overrides))


@pytest.mark.parametrize(
    ("kind", "micro"),
    [(TrainStep, 32), (ContrastWithinMicro, 8), (TrainStep, 8)],
    ids=["one forward", "4 micro-batches, contrast within each", "4 micro-batches, one contrast"],
)
@pytest.mark.benchmark(group="accumulation, tiny, 32 pairs", min_rounds=15, warmup=True, warmup_iterations=2)
def test_accumulation(benchmark: Any, kind: type[TrainStep], micro: int) -> None:
    benchmark(step_of(kind, f"batch.micro={micro}"))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["whole save", "until an asynchronous save lets go"])
@pytest.mark.benchmark(group="save, tiny")
def test_save(benchmark: Any, tmp_path: Path, asynchronous: bool) -> None:
    config, built = made(f"checkpoint.asynchronous={asynchronous}".lower())
    TrainStep(config, Parallel(0, 1, torch.device("cpu")), check_ranks(config, 1), built)(0, SHAPES["tiny"].batch())
    with Parallel.start(config.parallel, "cpu") as parallel:
        checkpoints = Checkpointer(tmp_path, config.checkpoint, parallel)
        at = iter(range(1, 1000))
        benchmark.pedantic(
            lambda: checkpoints.save(next(at), built.model, built.optimizer), setup=checkpoints.wait, rounds=12
        )
        checkpoints.wait()
