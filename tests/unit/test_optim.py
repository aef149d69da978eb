"""The optimizer: its groups, and the step that clips and skips."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from mvle.engine.optim import OptimConfig, build_optimizer, clip_and_step, total_norm

from ..distributed.toy import Toy, pairs_of


def backward(model: nn.Module, step: int, scale: float = 1.0) -> None:
    (model(pairs_of(step)) * scale).backward()


def test_groups_split_encoder_from_other_and_decayed_from_not() -> None:
    model = Toy()

    optimizer = build_optimizer(model, OptimConfig(lr=3e-4, encoder_lr=1e-5, weight_decay=0.05))

    groups = {g["name"]: g for g in optimizer.param_groups}
    assert {n: (g["peak"], g["weight_decay"]) for n, g in groups.items()} == {
        "encoder decayed": (1e-5, 0.05),
        "encoder not decayed": (1e-5, 0.0),
        "other decayed": (3e-4, 0.05),
        "other not decayed": (3e-4, 0.0),
    }
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))
    assert all(p.ndim >= 2 for p in groups["encoder decayed"]["params"])


def test_encoders_share_the_rate_of_the_rest_unless_they_have_their_own() -> None:
    optimizer = build_optimizer(Toy(), OptimConfig(lr=1e-3))

    assert {g["peak"] for g in optimizer.param_groups} == {1e-3}


def test_frozen_parameters_are_left_out() -> None:
    model = Toy()
    model.embed.requires_grad_(False)

    optimizer = build_optimizer(model, OptimConfig())

    chosen = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert chosen == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("scale", [1.0, 1e-6])  # far above the limit; far below it
def test_a_clipped_step_equals_torchs_own(scale: float) -> None:
    model = Toy()
    plain = copy.deepcopy(model)
    config = OptimConfig(lr=1e-2)
    optimizer = build_optimizer(model, config)
    expected = torch.optim.AdamW(
        [{k: v for k, v in g.items() if k != "params"} | {"params": p} for g, p in _twins(model, plain, optimizer)],
        betas=config.betas,
        eps=config.eps,
        foreach=False,
    )

    for step in range(3):
        backward(model, step, scale)
        backward(plain, step, scale)
        norm, skipped = clip_and_step(optimizer, 1.0)
        plain_norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        expected.step()
        optimizer.zero_grad()
        expected.zero_grad()
        assert skipped.item() == 0
        torch.testing.assert_close(norm, plain_norm)

    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)


def _twins(model: nn.Module, plain: nn.Module, optimizer: torch.optim.Optimizer):
    twin = {id(p): q for p, q in zip(model.parameters(), plain.parameters(), strict=True)}
    for group in optimizer.param_groups:
        kept = {k: group[k] for k in ("lr", "weight_decay")}
        yield kept, [twin[id(p)] for p in group["params"]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad: float) -> None:
    model = Toy()
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2))
    backward(model, 0)
    clip_and_step(optimizer, 1.0)
    optimizer.zero_grad()
    weights = [p.detach().clone() for p in model.parameters()]
    state = copy.deepcopy(list(optimizer.state.values()))

    backward(model, 1)
    model.embed.weight.grad[0, 0] = bad  # one value of one gradient
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    norm, skipped = clip_and_step(optimizer, 1.0)

    assert skipped.item() == 1 and not norm.isfinite()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    for now, before in zip(optimizer.state.values(), state, strict=True):
        assert all(torch.equal(now[k], before[k]) for k in before)
    # the decision comes before clipping, which would have made NaN of all of them
    now = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(now, gradients, strict=True))
    assert sum(not g.isfinite().all() for g in now) == 1


def test_the_step_after_a_skipped_one_is_as_if_it_had_not_been() -> None:
    results = []
    for steps in ([0, None, 1], [0, 1]):
        model = Toy()
        optimizer = build_optimizer(model, OptimConfig(lr=1e-2))
        for step in steps:
            backward(model, step or 0, math.nan if step is None else 1.0)
            clip_and_step(optimizer, 1.0)
            optimizer.zero_grad()
        results.append([p.detach() for p in model.parameters()])

    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_parameter_without_gradient_is_left_alone() -> None:
    model = Toy()
    before = model.unused.weight.detach().clone()
    optimizer = build_optimizer(model, OptimConfig(lr=1.0, weight_decay=0.5))

    backward(model, 0)
    clip_and_step(optimizer, 1.0)

    assert torch.equal(model.unused.weight, before)


def test_the_norm_is_that_of_all_gradients_together() -> None:
    model = Toy()
    optimizer = build_optimizer(model, OptimConfig())
    backward(model, 0)

    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()

    torch.testing.assert_close(total_norm(optimizer), expected)
