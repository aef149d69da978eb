"""Recomputation inside the hooks of a sharded model. (Compiled pieces there take a minute to compile: by hand.)"""

from __future__ import annotations

import torch
from torch import Tensor

from mvle.engine.blocks import prepare_blocks
from mvle.engine.parallel import Parallel, ParallelConfig
from mvle.model.model import MaskVLM

from ..helpers import MASK, VOCABULARY, make_batch, make_config
from .ranks import run_ranks


def gradients(parallel: Parallel, keep: str) -> dict[str, Tensor]:
    """Of two micro-batches of this rank's pairs, whole."""
    with torch.device("meta"):
        model = MaskVLM(make_config(), VOCABULARY, MASK)
    prepare_blocks(model, keep, compiled=False)
    parallel.shard(model)
    model.to_empty(device="cpu")
    model.init_weights(0)
    for part in range(2):
        batch = make_batch(seed=2 * parallel.rank + part)
        with parallel.accumulating(model, last=part == 1):
            model(batch, 0, model.counts(batch)).total.backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}


def compare() -> None:
    with Parallel.start(ParallelConfig(), "cpu") as parallel:
        plain = gradients(parallel, "none")
        for keep in ("selective", "full"):
            again = gradients(parallel, keep)
            assert again.keys() == plain.keys()
            assert all(torch.equal(again[name], gradient) for name, gradient in plain.items()), keep


def test_sharded_blocks_have_the_same_gradients_whatever_they_keep() -> None:
    run_ranks(2, compare)
