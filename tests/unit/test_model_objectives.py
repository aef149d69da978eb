"""What a step computes: each module once, nothing that nobody asked for, and the same whatever shares its batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from mvle_kernels import mask_of
from torch import Tensor

from mvle.model.model import MaskVLM
from mvle.model.queries import View

from ..helpers import MASK, NAMES, VOCABULARY, make_batch, make_config, make_model, reordered

STAGES = ("image_cross", "text_cross", "decoder")
EVERYTHING = frozenset(View)


def calls(model: MaskVLM) -> Counter[str]:
    """How often one training step enters each module."""
    seen: Counter[str] = Counter()
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: seen.update([name]))
        for name, module in model.named_modules()
        if name
    ]
    batch = make_batch()
    model.zero_grad(set_to_none=True)
    model(batch, 0, model.counts(batch)).total.backward()
    for hook in hooks:
        hook.remove()
    return seen


def weights_of(*wanted: str) -> list[float]:
    return [float(name in wanted) for name in NAMES]


CROSSES = (".cross.", ".context.", ".norm2.")  # what cross-attention learns, in a cross stage


@pytest.mark.parametrize("mode", ["replace", "drop"])
def test_without_a_context_and_without_matching_cross_attention_gets_no_gradient(mode: str) -> None:
    weights = (1, 1, 1, 0)
    for context, learns in (("none", False), ("masked", True), ("clean", True)):
        model = make_model(make_config(mode, weights=weights, context=context))
        calls(model)
        own = {n: p for n, p in model.named_parameters() if n.startswith(STAGES) and any(c in n for c in CROSSES)}
        assert len(own) == 3 * 2 + 5 * 6, "keys and values of 3 stages; norm, query and projection of 5 blocks"
        assert {p.grad is not None for p in own.values()} == {learns}, (context, sorted(own))
        others = {n: p for n, p in model.named_parameters() if n.startswith(STAGES) and n not in own}
        assert all(p.grad is not None for p in others.values())


def test_matching_reads_the_whole_of_both_sides_whatever_masked_modelling_reads() -> None:
    batch = make_batch()
    reports = []
    for context in ("clean", "masked", "none"):
        model = make_model(make_config(context=context))
        reports.append(model(batch, 0, model.counts(batch)).report)
    for name in ("itc", "itm"):
        assert torch.allclose(reports[0][name], reports[1][name]) and torch.allclose(reports[0][name], reports[2][name])
    for name in ("mim", "mlm"):
        assert len({round(float(report[name]), 9) for report in reports}) == 3


@pytest.mark.parametrize(
    ("wanted", "asked"),
    [
        (("mim",), {"image_cross", "decoder"}),
        (("mlm",), {"text_cross"}),
        (("itc",), set()),
        (("itm",), {"image_cross", "text_cross"}),
        (("mlm", "itc", "itm"), {"image_cross", "text_cross"}),
        (("mim", "itc"), {"image_cross", "decoder"}),
        (NAMES, set(STAGES)),
    ],
)
def test_a_loss_of_weight_zero_asks_no_stage_and_trains_nothing(wanted: tuple[str, ...], asked: set[str]) -> None:
    model = make_model(make_config("drop", weights=weights_of(*wanted)))
    seen = calls(model)
    assert {stage for stage in STAGES if seen[stage]} == asked
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    for stage in STAGES:
        own = {name for name, _ in model.named_parameters() if name.startswith(f"{stage}.")}
        assert own <= with_gradient if stage in asked else not own & with_gradient
    heads = {"heads.pixels.weight": "mim", "heads.tokens.weight": "mlm", "heads.match.weight": "itm"}
    for head, loss in heads.items():
        assert (head in with_gradient) == (loss in wanted)
    assert ("heads.temperature.log_value" in with_gradient) == ("itc" in wanted)
    assert ("insert_token" in with_gradient) == ("mim" in wanted)


def test_a_step_of_all_losses_enters_every_module_exactly_once() -> None:
    seen = calls(make_model(make_config("drop", decoder_depth=2)))
    entered = {name: n for name, n in seen.items() if name.startswith(("image_", "text_", "decoder"))}
    assert set(entered.values()) == {1}
    assert {"image_encoder", "text_encoder", *STAGES} <= set(entered)


def test_the_report_names_the_trained_losses_alone_and_the_total_weighs_them() -> None:
    batch = make_batch()
    model = make_model(make_config(weights=(0.5, 2, 0, 3)))
    losses = model(batch, 0, model.counts(batch))
    assert set(losses.report) == {"mim", "mlm", "itm", "loss", "mlm_correct", "itm_correct"}
    r = losses.report
    assert torch.equal(r["loss"], losses.total)
    assert torch.allclose(losses.total, 0.5 * r["mim"] + 2 * r["mlm"] + 3 * r["itm"], rtol=1e-12)
    assert all(0 <= r[name] <= 1 and not r[name].requires_grad for name in ("mlm_correct", "itm_correct"))
    assert model.counts(batch)[NAMES.index("itc")] == 0


def test_counts_come_from_lengths_ratios_and_ids_alone() -> None:
    lengths, ratios = (3, 11, 2, 8), (0.6, 0.01, 1.0, 0.5)
    batch = make_batch(lengths, ratios=ratios)
    counts = make_model(make_config(group=2)).counts(batch).tolist()
    assert counts == [(10 + 1 + 16 + 8) * 768, 1 + 3 + 0 + 2, 8, 4 + 2 * 2]


def gradients(model: MaskVLM) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["replace", "drop"])
def test_micro_batches_add_up_to_the_whole_batch(mode: str) -> None:
    model, batch = make_model(make_config(mode, weights=(1, 1, 0, 1))), make_batch(ratios=[0.6, 1, 0.2, 0.6] * 2)
    counts = model.counts(batch)
    whole = model(batch, 3, counts)
    whole.total.backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    parts = [batch.micro(start, start + 4, 8) for start in (0, 4)]
    assert torch.equal(sum(model.counts(p) for p in parts), counts)
    report: Counter[str] = Counter()
    for part in parts:
        losses = model(part, 3, counts)
        losses.total.backward()
        report.update(losses.report)
    for name, value in whole.report.items():
        assert torch.allclose(report[name], value, rtol=1e-12)
    for name, gradient in gradients(model).items():
        assert (gradient - expected[name]).norm() <= 1e-10 * max(expected[name].norm(), 1e-3)


@pytest.mark.parametrize("row_multiple", [1, 64])
def test_masks_are_the_same_for_any_batch_that_a_pair_is_in(row_multiple: int) -> None:
    batch = make_batch(ratios=(0.6, 0.7, 0.05, 1.0, 0.5, 0.6, 0.9, 1.0))
    whole = make_model(make_config()).choose(batch, 5, EVERYTHING)
    order = [6, 1, 4]
    some = make_model(make_config(row_multiple=row_multiple)).choose(reordered(batch, order), 5, EVERYTHING)
    assert torch.equal(mask_of(some.masked, 16), mask_of(whole.masked, 16)[order])
    for k, i in enumerate(order):
        assert torch.equal(some.tokens.unpack()[k], whole.tokens.unpack()[i])
        assert torch.equal(some.read.unpack()[k], whole.read.unpack()[i])
    other = make_model(make_config()).choose(batch, 6, EVERYTHING)
    assert not torch.equal(other.masked.rows, whole.masked.rows)


def test_given_masks_take_the_place_of_drawn_ones() -> None:
    model, batch = make_model(make_config(weights=(1, 1, 0, 0))), make_batch()
    drawn = model.choose(batch, 5, EVERYTHING)
    flags = torch.zeros(batch.text.total, dtype=torch.bool)
    flags[drawn.positions.rows.long()[: sum(drawn.positions.lengths)]] = True
    given = replace(batch, masks={"image": mask_of(drawn.masked, 16), "text": flags})
    again = model.choose(given, 99, EVERYTHING)
    for name in ("keep", "masked", "positions", "read"):
        ours, theirs = getattr(again, name), getattr(drawn, name)
        assert all(map(torch.equal, ours.unpack(), theirs.unpack())), name
    real = sum(drawn.positions.lengths)
    assert torch.equal(again.targets[:real], drawn.targets[:real]) and (again.targets[real:] == -1).all()
    assert torch.equal(again.tokens.rows == MASK, flags)
    assert torch.equal(model.counts(given), model.counts(batch))
    one, two = (model(b, 5, model.counts(b)).report["mim"] for b in (given, batch))
    assert torch.allclose(one, two, rtol=1e-12)


def test_captions_without_a_word_to_mask_are_left_out_and_stay_finite() -> None:
    for lengths in ((2, 9, 2, 5), (2, 2, 2, 2)):
        model, batch = make_model(make_config()), make_batch(lengths)
        losses = model(batch, 0, model.counts(batch))
        losses.total.backward()
        assert all(bool(v.isfinite()) for v in losses.report.values())
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
        if max(lengths) == 2:
            assert losses.report["mlm"] == 0


def test_masked_pixels_and_words_do_not_reach_the_model() -> None:
    """What is to be predicted must not be seen: other pixels under the mask leave each prediction as it was."""
    model, batch = make_model(make_config(weights=(1, 0, 0, 0))), make_batch(ratios=[0.6] * 8)
    masked = mask_of(model.choose(batch, 0, EVERYTHING).masked, 16)
    covered = masked.view(8, 4, 4).repeat_interleave(16, 1).repeat_interleave(16, 2)
    other = torch.where(covered[..., None], 255 - batch.images, batch.images)
    for mode, insert in (("replace", "cross"), ("drop", "cross"), ("drop", "decoder")):
        model = make_model(make_config(mode, insert))
        first, second = (model.reconstruct(images, masked, batch.text) for images in (batch.images, other))
        assert torch.equal(first[masked], second[masked])
    assert VOCABULARY > MASK
