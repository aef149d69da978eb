"""The model held against the plain graph in float64, and steps to hold it at: drawn at random, every option of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.plain import Negatives, plain_losses
from mvle.data.batch import Batch
from mvle.model.model import MaskVLM
from mvle.model.queries import View
from mvle.model.step import Step
from mvle.objectives.itm import draw_negatives

from .helpers import NAMES, make_batch, make_config, make_model

CONTEXTS = ("clean", "masked", "none")
MODES = (("replace", "cross"), ("drop", "cross"), ("drop", "decoder"))
SEED = 3


def negatives_of(model: MaskVLM, batch: Batch) -> Negatives:
    """The hard negatives that the model draws for this batch."""
    clean = frozenset({View.IMAGE_CLEAN, View.TEXT_CLEAN})
    step = Step(batch, SEED, model.row_multiple, model.choose(batch, SEED, clean))
    with torch.no_grad():
        model.encode(step, clean)
    image, text, valid = draw_negatives(step, model.config.objectives.itm.group)
    return image.index, text.index, valid


def gradients(model: MaskVLM, total: Tensor) -> dict[str, Tensor]:
    """Every parameter's gradient of `total`, zero where there is none."""
    model.zero_grad(set_to_none=True)
    total.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def plain_step(
    model: MaskVLM, batch: Batch, negatives: Negatives | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(losses, gradients) of the plain graph. Negatives are given, as drawn from the model's own embeddings: the two
    graphs agree to the last bits only, and a draw must not hang on those."""
    kinds = model.config.objectives
    if kinds.itm.weight and negatives is None:
        negatives = negatives_of(model, batch)
    losses = plain_losses(model, batch, SEED, negatives)
    return losses, gradients(model, sum(getattr(kinds, name).weight * loss for name, loss in losses.items()))


def assert_same(
    report: dict[str, Tensor], got: dict[str, Tensor], plain: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    """Losses to 1e-10 of their value; each gradient to 1e-9 of max(its norm, 1e-4 of the whole gradient's norm)."""
    assert {n for n in NAMES if n in report} == set(plain)
    for name, loss in plain.items():
        assert report[name].dtype == torch.float64
        assert abs(report[name] - loss) <= 1e-10 * abs(loss), f"{name}: {report[name]} is not {loss}"
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    assert whole > 0
    for name, gradient in expected.items():
        bound = 1e-9 * max(gradient.norm(), 1e-4 * whole)
        error = (got[name] - gradient).norm()
        assert error <= bound, f"gradient of {name} differs by {error:.2e}, allowed {bound:.2e}"


def assert_agrees(model: MaskVLM, batch: Batch, negatives: Negatives | None = None) -> None:
    """One forward of the whole batch has the losses and gradients of the plain graph."""
    plain, expected = plain_step(model, batch, negatives)
    losses = model(batch, SEED, model.counts(batch))
    assert_same(losses.report, gradients(model, losses.total), plain, expected)


@dataclass(frozen=True)
class Case:
    """A step: arguments of `make_config` and `make_batch`."""

    config: dict[str, Any]
    batch: dict[str, Any]

    def made(self) -> tuple[MaskVLM, Batch]:
        """The model and the batch."""
        return make_model(make_config(**self.config)), make_batch(**self.batch)


def draw_case(one_of: Callable[[Sequence[Any]], Any]) -> Case:
    """A step whose every choice is made by `one_of`, which takes one of the options."""
    group = one_of([2, 3, 4])
    pairs = group * 2 * one_of([1, 2])  # whole groups on each of two ranks
    lengths = [one_of([2, 3, 4, 5, 7, 11, 16]) for _ in range(pairs)]
    if one_of([False, False, True]):
        lengths = [one_of([2, 5, 16])] * pairs
    lengths[0] = max(lengths[0], 3)  # some word is masked: with MLM alone there would be no gradient else
    mode, insert = one_of(MODES)
    weights = [one_of([0, 1, 0.5, 3]) for _ in NAMES]
    if not any(weights):
        weights[one_of([0, 1, 2, 3])] = 1
    alike = [(one_of(range(pairs)), one_of(range(pairs))) for _ in range(one_of([0, 1, 3]))]
    equal_images = [(a, b) for a, b in alike if a < b]
    equal_texts = [(a, b) for a, b in alike[::-1] if a < b and lengths[a] == lengths[b]]
    ratio = one_of([0.6, 1.0, None])
    return Case(
        {
            "mode": mode,
            "insert": insert,
            "weights": weights,
            "group": group,
            "cross_depth": one_of([1, 2, 3]),
            "decoder_depth": one_of([1, 2, 3]),
            "cell": one_of([16, 32]),
            "row_multiple": one_of([1, 8, 16, 64]),
            "kind": one_of(["l1", "mse", "l1+mse"]),
            "per_patch": one_of([False, True]),
            "text_ratio": one_of([0.1, 0.3, 1.0]),
            "clean_keep": one_of([1.0, 1.0, 0.5, 0.1]) if any(weights[1:]) else 1.0,
            "context": one_of(["clean", *CONTEXTS]),
        },
        {
            "lengths": lengths,
            "ratios": [one_of([0.05, 0.3, 0.6, 0.9, 1.0]) if ratio is None else ratio for _ in range(pairs)],
            "equal_images": equal_images,
            "equal_texts": equal_texts,
            "row_multiple": one_of([1, 16]),
            "seed": one_of(range(100)),
            "side": one_of([64, 64, 64, 32]),
        },
    )
