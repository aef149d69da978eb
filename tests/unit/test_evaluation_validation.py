"""Validation while training: which figures, over which pairs, and that they are the training losses."""

from __future__ import annotations

import math

import pytest
import torch

from mvle.evaluation.ranks import Alone, turns
from mvle.evaluation.split import SplitError
from mvle.evaluation.validation import Validation

from .small_run import small_parts, write_shard

ALWAYS = {
    "val_loss",
    "val_mim",
    "val_mlm",
    "val_mlm_accuracy",
    "val_itc",
    "val_itc_accuracy",
    "val_itm",
    "val_itm_accuracy",
}


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return write_shard(tmp_path_factory.mktemp("set") / "pairs.tar")


def test_every_trained_loss_and_both_ways_of_retrieval_are_reported(shard):
    config, shards, tokenizer, model = small_parts(shard)
    out = Validation(config, shards, tokenizer).run(model, "cpu")
    recall = {"val_r1_image_to_text", "val_r1_text_to_image"}
    assert set(out) == ALWAYS | recall | {"val_mim_true", "val_mim_wrong"}
    assert all(math.isfinite(value) for value in out.values())
    assert out["val_mlm"] == pytest.approx(math.log(tokenizer.vocabulary), abs=0.3), "an untrained model guesses"


def test_a_loss_of_weight_zero_is_not_reported(shard):
    objectives = {"itc": {"weight": 0}, "itm": {"weight": 0}, "mim": {"weight": 0}}
    config, shards, tokenizer, model = small_parts(shard, objectives=objectives)
    assert set(Validation(config, shards, tokenizer).run(model, "cpu")) == {"val_loss", "val_mlm", "val_mlm_accuracy"}


def test_losses_are_means_over_all_pairs_of_the_split(shard):
    config, shards, tokenizer, model = small_parts(shard, batch={"total": 4})
    validation = Validation(config, shards, tokenizer)
    assert validation.forward_pairs == 4
    out = validation.losses(model, "cpu", Alone())
    sums, counts = torch.zeros(4), torch.zeros(4)
    with torch.no_grad():
        for start in (0, 4, 8):
            batch = validation.split.batch(range(start, start + 4))
            own = model.counts(batch).float()
            report = model(batch, config.evaluation.seed, own).report
            sums += torch.stack([report[n] for n in ("mim", "mlm", "itc", "itm")]) * own
            counts += own
    assert out["val_loss"] == pytest.approx(float((sums / counts).sum()), rel=1e-5), "all weights are 1 here"
    for name, value in zip(("mim", "mlm", "itc", "itm"), (sums / counts).tolist(), strict=True):
        assert out[f"val_{name}"] == pytest.approx(value, rel=1e-5)


def test_it_gives_the_same_figures_twice_and_leaves_no_gradient(shard):
    config, shards, tokenizer, model = small_parts(shard)
    validation = Validation(config, shards, tokenizer)
    assert validation.run(model, "cpu") == validation.run(model, "cpu")
    assert all(p.grad is None for p in model.parameters())


def test_too_few_pairs_for_a_group_are_refused_naming_the_keys(shard):
    sections = {"batch": {"total": 16}, "objectives": {"itm": {"group": 16}}}
    config, shards, tokenizer, _ = small_parts(shard, **sections)
    with pytest.raises(SplitError, match=r"data.val must have at least objectives.itm.group \(16\).*got 12"):
        Validation(config, shards, tokenizer)


@pytest.mark.parametrize("chunks", [1, 2, 4, 7])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_chunk_counts_on_one_rank_and_all_ranks_take_as_many_turns(chunks, count):
    shares = [list(turns(range(chunks), Place(rank, count))) for rank in range(count)]
    counted = [chunk for share in shares for chunk, mine in share if mine]
    assert sorted(counted) == list(range(chunks))
    assert {len(share) for share in shares} == {math.ceil(chunks / count)}


class Place(Alone):
    """One of several ranks, which says nothing to the others."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
