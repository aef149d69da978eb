"""Which tensors a checkpoint holds: the EMA beside the weights, and what is said where they do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mvle.engine.checkpoint import load_checkpoint
from mvle.engine.checkpoint_tensors import architecture_differences, has_ema
from mvle.engine.errors import CheckpointError

from ..distributed.toy import Toy
from .checkpoint_run import Run, same


def test_a_resumed_run_has_its_ema_again_bit_for_bit(tmp_path: Path) -> None:
    path = Run(tmp_path, ema=True).train(3).save()

    resumed = Run(tmp_path, seed=9, ema=True).resume().train(3)

    assert has_ema(path) and same(resumed, Run(tmp_path / "other", ema=True).train(6))


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (False, True, r"has no EMA of the weights, and the run keeps one \(optim.ema\)"),
        (True, False, r"has an EMA of the weights, and the run keeps none \(optim.ema\)"),
    ],
)
def test_a_run_with_an_ema_does_not_go_on_from_one_without_nor_the_other_way(
    tmp_path: Path, before: bool, now: bool, message: str
) -> None:
    Run(tmp_path, ema=before).train(1).save()

    with pytest.raises(CheckpointError, match=message):
        Run(tmp_path, ema=now).resume()


def test_a_model_is_filled_with_the_weights_or_with_their_ema(tmp_path: Path) -> None:
    run = Run(tmp_path, ema=True)
    run.model.scale.fill_(7.0)  # a buffer has no average
    path = run.train(3).save()
    model, average = Toy(seed=9), Toy(seed=9)

    load_checkpoint(path, model)
    load_checkpoint(path, average, weights="ema")

    for name, parameter in run.model.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
        assert torch.equal(average.get_parameter(name), run.ema.tensors()[name]), name
    assert not torch.equal(model.embed.weight, average.embed.weight)
    assert model.scale.tolist() == average.scale.tolist() == [7.0, 7.0]


def test_parameters_that_are_not_trained_are_as_they_are_in_the_ema_too(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.model.unused.requires_grad_(False)
    run.ema = type(Run(tmp_path / "other", ema=True).ema)(run.model, 0.5)
    path = run.train(1).save()
    average = Toy(seed=9)

    load_checkpoint(path, average, weights="ema")

    assert "unused.weight" not in run.ema.tensors() and torch.equal(average.unused.weight, run.model.unused.weight)


def test_an_ema_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = Run(tmp_path).train(1).save()

    with pytest.raises(CheckpointError, match="has no EMA of the weights: the run was trained with optim.ema=null"):
        load_checkpoint(path, Toy(), weights="ema")
    with pytest.raises(ValueError, match="weights must be model or ema; got 'best'"):
        load_checkpoint(path, Toy(), weights="best")


def test_what_differs_in_the_architecture_is_said_by_block_and_shape(tmp_path: Path) -> None:
    path = Run(tmp_path, ema=True).train(1).save()
    assert architecture_differences(path, Toy()) == []

    model = Toy()
    model.blocks.append(nn.Sequential(nn.LayerNorm(7), nn.Linear(7, 7)))
    model.embed = nn.Linear(5, 8)
    del model.unused

    assert architecture_differences(path, model) == [
        "only the checkpoint has unused.weight",
        "only the checkpoint has unused.bias",
        "the checkpoint lacks blocks.2.* (4 tensors)",
        "embed.weight is (7, 5) in the checkpoint and (8, 5) in the model",
        "embed.bias is (7,) in the checkpoint and (8,) in the model",
    ]


def test_many_differences_are_cut_short(tmp_path: Path) -> None:
    path = Run(tmp_path).save()
    model = Toy()
    for i in range(9):
        model.register_buffer(f"more_{i}", torch.zeros(1))

    found = architecture_differences(path, model)

    assert len(found) == 7 and found[-1] == "... and 3 more such lines"
