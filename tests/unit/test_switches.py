"""Each saving of the step switched off: more work, and the same mathematics to the last bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.counts import count
from benchmarks.switches import SWITCHES, Switch
from mvle.data.batch import Batch
from mvle.model.model import MaskVLM

from ..helpers import MASK, VOCABULARY, make_batch, make_config, make_model

# these do the same arithmetic in more calls
SAME_ARITHMETIC = ("both views in one call", "all questions in one call", "keys and values in one product")
switches = pytest.mark.parametrize("switch", SWITCHES.values(), ids=lambda s: s.name)


def off(switch: Switch, model: MaskVLM) -> MaskVLM:
    """The model without the saving, with the weights of the other."""
    other = switch.model(model.config, VOCABULARY, MASK).to(torch.float64)
    other.load_state_dict(model.state_dict())
    return other


def step(model: MaskVLM, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    losses = model(batch, 3, model.counts(batch))
    losses.total.backward()
    return losses.report, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize(("mode", "insert"), [("replace", "cross"), ("drop", "cross"), ("drop", "decoder")])
@switches
def test_a_step_without_the_saving_is_the_same_step(switch: Switch, mode: str, insert: str) -> None:
    model = make_model(make_config(mode, insert, (1, 0.7, 1.3, 2), cross_depth=3, decoder_depth=2))
    batch = make_batch(ratios=[0.6, 0.7, 0.05, 1.0, 0.5, 0.6, 0.9, 1.0])
    expected, gradients = step(model, batch)
    report, got = step(off(switch, model), batch)

    assert report.keys() == expected.keys()
    assert all(abs(report[name] - value) <= 1e-10 * abs(value) for name, value in expected.items())
    whole = torch.stack([g.norm() for g in gradients.values()]).norm()
    for name, gradient in gradients.items():
        assert (got[name] - gradient).norm() <= 1e-9 * max(gradient.norm(), 1e-4 * whole), name


@pytest.mark.parametrize("mode", ["replace", "drop"])
@switches
def test_a_step_without_the_saving_does_more(switch: Switch, mode: str) -> None:
    model, batch = make_model(make_config(mode, cross_depth=3, decoder_depth=2)), make_batch()
    products, launches = [], []
    for one in (model, off(switch, model)):
        counted = count(lambda one=one: step(one, batch))
        products.append(counted.flops)
        launches.append(counted.launches)

    if switch.name in SAME_ARITHMETIC:
        assert products[1] >= products[0] and launches[1] > launches[0]
    else:
        assert products[1] > products[0]
