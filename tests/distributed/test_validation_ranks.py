"""Validation shared among ranks: the figures and embeddings of one process, and no rank does all the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mvle.engine.parallel import Parallel, ParallelConfig
from mvle.evaluation.retrieval import embed
from mvle.evaluation.validation import Validation

from ..unit.small_run import small_parts, write_shard
from .ranks import run_ranks

# 5 whole forwards of 12 pairs and some pairs over, 2 chunks of images, 1 of first captions: none goes round on 3 ranks
IMAGES, FORWARD, RANKS = 70, 12, 3


def validate(folder: str) -> None:
    """On each rank: what it found, and how many forwards of pairs and of images it made."""
    config, shards, tokenizer, model = small_parts(Path(folder) / "pairs.tar", batch={"total": FORWARD})
    model.double()  # in float32 the last bits may change a draw of negatives, or who comes first
    validation = Validation(config, shards, tokenizer)
    with Parallel.start(ParallelConfig(), "cpu") as ranks:
        ranks.shard(model)
        calls = {"forward": 0, "images": 0}
        model.register_forward_hook(lambda *_: count(calls, "forward"))
        model.image_encoder.register_forward_hook(lambda *_: count(calls, "images"))
        figures = validation.run(model, "cpu", ranks)
        with torch.no_grad():
            found = embed(model, validation.split, "cpu", "all", keep_rows=False, ranks=ranks)
        outcome = {"figures": figures, "image_z": found.image_z, "text_z": found.text_z, "calls": calls}
        torch.save(outcome, f"{folder}/{ranks.rank}-of-{ranks.ranks}.pt")


def count(calls: dict[str, int], name: str) -> None:
    calls[name] += 1


def read(folder: Path, ranks: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}-of-{ranks}.pt", weights_only=True) for rank in range(ranks)]


def test_three_ranks_share_the_forwards_and_each_has_the_figures_of_one(tmp_path: Path) -> None:
    write_shard(tmp_path / "pairs.tar", images=IMAGES, extras=False)
    validate(str(tmp_path))
    run_ranks(RANKS, validate, str(tmp_path))
    [alone], shared = read(tmp_path, 1), read(tmp_path, RANKS)
    for one in shared:
        assert one["figures"] == pytest.approx(alone["figures"], rel=1e-9)
        assert one["figures"] == shared[0]["figures"], "to the bit among ranks"
        for name in ("image_z", "text_z"):
            torch.testing.assert_close(one[name], alone[name], rtol=1e-6, atol=1e-7)
            assert torch.equal(one[name], shared[0][name])
    assert alone["calls"]["forward"] == 5
    assert [one["calls"]["forward"] for one in shared] == [2, 2, 2], "as many on a rank without a chunk left"
    assert all(one["calls"] == shared[0]["calls"] for one in shared)
    assert shared[0]["calls"]["images"] <= alone["calls"]["images"] // 2
