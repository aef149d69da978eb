"""The formula for useful operations, against torch's own counter over ops that are plain products."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from mvle_kernels import use_backend
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers.plain import Plain, plain_inputs
from mvle.config import Config, load_config
from mvle.data.batch import Batch
from mvle.engine.dry_run import made_up_batch
from mvle.model.flops import Flops, plain_flops, step_flops, total
from mvle.model.model import MaskVLM
from mvle.model.step import Step
from mvle.objectives import itm

from ..helpers import MASK, VOCABULARY, make_batch, make_config, make_model

LENGTHS = (3, 11, 6, 8, 4, 4, 16, 5)
RATIOS = (0.6, 0.7, 0.05, 1.0, 0.5, 0.6, 0.9, 1.0)
ALL = (1.0, 1.0, 1.0, 1.0)
CASES = [
    *(({"mode": mode, "insert": insert}, ALL) for mode, insert in (("replace", "cross"), ("drop", "cross"))),
    ({"mode": "drop", "insert": "decoder", "decoder_depth": 2}, ALL),
    ({"cross_depth": 1}, ALL),  # the first block is the last: what ITM shares stays whole
    ({"cross_depth": 3, "group": 2}, ALL),
    ({"mode": "drop"}, (1, 0, 0, 0)),
    ({"cross_depth": 1}, (0, 1, 0, 0)),  # no set repeats: one block that asks with the masked rows alone
    ({}, (0, 1, 0, 0)),
    ({}, (0, 0, 1, 0)),
    ({}, (0, 0, 0, 1)),  # only first rows are read, and negatives are drawn without similarities
    ({"cross_depth": 1}, (1, 0, 0, 1)),
    ({"clean_keep": 0.5}, ALL),
    ({"mode": "drop", "clean_keep": 0.3}, ALL),
    *(
        ({"context": c, "mode": mode}, w)
        for c in ("masked", "none")
        for mode, w in (("drop", ALL), ("replace", (1, 1, 0, 0)))
    ),
    ({"context": "masked"}, (1, 0, 0, 1)),
    ({"context": "masked", "mode": "drop"}, (0, 1, 0, 0)),
    ({"context": "none", "mode": "drop", "insert": "decoder", "cross_depth": 1}, (1, 0, 0, 1)),
]


@contextmanager
def host_knows_the_draw(drawn: list[int]) -> Iterator[None]:
    """The length of each caption drawn goes into `drawn` and into the layout, whose tail is padding otherwise."""

    def draw(step: Step, group: int) -> Any:
        image, text, valid = itm_draw(step, group)
        lengths = tuple(step.batch.text.lengths[i] for i in text.index.tolist())  # type: ignore[index]
        drawn[:] = lengths
        return image, replace(text, lengths=lengths), valid

    itm_draw = itm.draw_negatives
    with mock.patch.object(itm, "draw_negatives", draw):
        yield


def counted_step(model: MaskVLM, batch: Batch) -> tuple[Flops, list[int]]:
    """torch's count of a forward and backward over the reference ops, and the lengths that were drawn."""
    drawn: list[int] = []
    with use_backend("reference"), host_knows_the_draw(drawn):
        with FlopCounterMode(display=False) as forward:
            loss = model(batch, 0, model.counts(batch)).total
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return Flops(forward.get_total_flops(), backward.get_total_flops()), drawn


def products(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Attention by two plain products: torch's counter knows no formula for its own on a CPU."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    return scores.softmax(-1) @ v


def counted_plain(model: MaskVLM, batch: Batch, length: int | None) -> Flops:
    """torch's count of the plain graph."""
    inputs = plain_inputs(model, batch, 0, length)
    weights = {o.name: o.weight for o in model.objectives}
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", products):
        with FlopCounterMode(display=False) as forward:
            loss = sum(weights[name] * loss for name, loss in Plain(model).losses(inputs).items())
        with FlopCounterMode(display=False) as backward:
            loss.backward()  # type: ignore[union-attr]
    return Flops(forward.get_total_flops(), backward.get_total_flops())


def small_step(options: dict[str, Any], weights: Any, lengths: tuple[int, ...] = LENGTHS) -> tuple[MaskVLM, Batch]:
    config = make_config(weights=weights, row_multiple=1, **options)
    return make_model(config, dtype=torch.float32), make_batch(lengths, ratios=RATIOS, row_multiple=1)


def vit_s() -> tuple[MaskVLM, Batch]:
    """ViT-S/16 blocks at 112 px, four pairs, 4,000 words."""
    sizes = "{width: 384, heads: 6, image: {size: 112, depth: 2}, text: {depth: 2}, cross_depth: 2, decoder_depth: 1}"
    overrides = [f"model={sizes}", "masking.cell=16", "objectives.itm.group=4", "batch.total=4", "data.slots=4"]
    config = load_config(None, [*overrides, "kernels.row_multiple=1"])
    model = MaskVLM(config, 4000, MASK)
    model.init_weights(0)
    return model, made_up_batch(config, 4000, 4, seed=1)


@pytest.mark.parametrize(("options", "weights"), CASES)
def test_the_formula_is_what_torch_counts_in_the_step(options: dict[str, Any], weights: Any) -> None:
    model, batch = small_step(options, weights)

    counted, drawn = counted_step(model, batch)
    parts = step_flops(model.config, VOCABULARY, LENGTHS, RATIOS, drawn=drawn or None)

    assert total(parts) == counted, parts


@pytest.mark.parametrize("mode", ["replace", "drop"])
def test_it_knows_shortened_clean_views_and_smaller_images(mode: str) -> None:
    config = make_config(mode, row_multiple=1, clean_keep=0.5)
    model, batch = make_model(config, dtype=torch.float32), make_batch(LENGTHS, ratios=RATIOS, row_multiple=1, side=32)

    counted, drawn = counted_step(model, batch)
    expected = total(step_flops(config, VOCABULARY, LENGTHS, RATIOS, drawn=drawn, side=32))

    assert 0 <= counted.total - expected.total < 0.001 * counted.total  # the resampling of positions is not counted


def test_it_is_at_the_size_of_vit_s_too() -> None:
    model, batch = vit_s()
    assert batch.text.lengths is not None

    counted, drawn = counted_step(model, batch)
    parts = step_flops(model.config, 4000, batch.text.lengths, batch.image_ratio, drawn=drawn)

    assert total(parts) == counted, parts


def test_without_the_draw_it_is_right_within_one_percent() -> None:
    lengths = (9, 14, 11, 8, 12, 13, 16, 10)
    model, batch = small_step({}, ALL, lengths)

    counted, _ = counted_step(model, batch)
    expected = total(step_flops(model.config, VOCABULARY, lengths, RATIOS))

    assert abs(expected.total - counted.total) <= 0.01 * counted.total


@pytest.mark.parametrize(("options", "weights", "length"), [(*case, 16) for case in CASES] + [({}, ALL, None)])
def test_the_plain_formula_is_what_torch_counts_in_the_plain_graph(
    options: dict[str, Any], weights: Any, length: int | None
) -> None:
    lengths = (3, 11, 6, 8, 4, 4, 12, 5)
    model, batch = small_step(options, weights, lengths)

    parts = plain_flops(model.config, VOCABULARY, lengths, RATIOS, length)

    assert total(parts) == counted_plain(model, batch, length), parts


def shares_of_plain(name: str, *overrides: str, of: str = "replace") -> float:
    """Useful operations over those of the plain graph in mode `of`: 14 real tokens, padded to 32."""
    config: Config = load_config(name, overrides)
    plain = load_config(name, [f"masking.mode={of}"])
    lengths, ratios = [14] * 64, [0.6] * 64
    return (
        total(step_flops(config, 50265, lengths, ratios)).total
        / total(plain_flops(plain, 50265, lengths, ratios, 32)).total
    )


def test_the_step_needs_the_promised_share_of_the_plain_graphs_operations() -> None:
    drop = "masking.mode=drop"

    assert shares_of_plain("base") <= 0.79
    assert shares_of_plain("base", drop, of="drop") <= 0.75
    assert shares_of_plain("base", drop) <= 0.64
    assert shares_of_plain("base", drop, "masking.insert=decoder") <= 0.60
    assert shares_of_plain("large") <= 0.84
    assert shares_of_plain("large", drop) <= 0.65


def test_ranks_add_similarities_and_nothing_else() -> None:
    config = make_config()
    alone = step_flops(config, VOCABULARY, LENGTHS, RATIOS)
    among = step_flops(config, VOCABULARY, LENGTHS, RATIOS, contrast_pairs=4 * len(LENGTHS))

    assert among.pop("contrast").total == 4 * alone.pop("contrast").total
    assert among == alone
