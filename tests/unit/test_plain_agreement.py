"""The model against the plain graph in float64: the same losses and the same gradient of every parameter.

Sharing, packing and pruning may change nothing. The negatives are given, as drawn from the model's own embeddings: the
two graphs agree to the last bits only, and a draw must not hang on those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from mvle_kernels import AttentionPlan, Packed, expand, use_backend
from torch import Tensor

from benchmarks.peers.plain import plain_losses
from mvle.model import image_encoder, layers, stage
from mvle.model import model as model_file
from mvle.model.queries import Draw
from mvle.model.step import Step
from mvle.objectives import itm, mim, mlm

from ..agreement import MODES, SEED, assert_agrees, draw_case, negatives_of
from ..helpers import NAMES, make_batch, make_config, make_model

RATIOS = (0.6, 0.7, 0.05, 1.0, 0.5, 0.6, 0.9, 1.0)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_step_agrees(data: st.DataObject) -> None:
    case = draw_case(lambda options: data.draw(st.sampled_from(options)))
    note(str(case))
    assert_agrees(*case.made())


@pytest.mark.parametrize(("cross_depth", "decoder_depth"), [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize(("mode", "insert"), MODES)
def test_all_losses_agree_in_every_mask_mode_and_depth(
    mode: str, insert: str, cross_depth: int, decoder_depth: int
) -> None:
    config = make_config(mode, insert, (1, 0.7, 1.3, 2), cross_depth=cross_depth, decoder_depth=decoder_depth)
    assert_agrees(make_model(config), make_batch(ratios=RATIOS))


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (1, 1, 0, 0), (1, 0, 0, 1), (0, 1, 1, 0)])
@pytest.mark.parametrize(("mode", "insert"), MODES)
@pytest.mark.parametrize("context", ["masked", "none"])
def test_all_losses_agree_in_every_context(context: str, mode: str, insert: str, weights: tuple[int, ...]) -> None:
    config = make_config(mode, insert, weights, context=context, cross_depth=3)
    assert_agrees(make_model(config), make_batch(ratios=RATIOS))


@pytest.mark.parametrize("wanted", [*combinations(NAMES, 1), *combinations(NAMES, 2), *combinations(NAMES, 3)])
def test_any_subset_of_losses_agrees(wanted: tuple[str, ...]) -> None:
    mode, insert = MODES[len("".join(wanted)) % 3]
    config = make_config(mode, insert, [float(name in wanted) for name in NAMES], decoder_depth=2)
    assert_agrees(make_model(config), make_batch(ratios=RATIOS))


@pytest.mark.parametrize("row_multiple", [1, 8, 64])
def test_rounding_of_packed_buffers_changes_nothing(row_multiple: int) -> None:
    config = make_config("drop", "cross", row_multiple=row_multiple)
    assert_agrees(make_model(config), make_batch(row_multiple=row_multiple))


@pytest.mark.parametrize("lengths", [(3,) * 8, (16,) * 8, (3, 3, 3, 3, 3, 3, 3, 16), (7, 7, 7, 7, 9, 9, 9, 9)])
def test_captions_of_every_length_agree(lengths: tuple[int, ...]) -> None:
    assert_agrees(make_model(make_config()), make_batch(lengths))


@pytest.mark.parametrize("group", [2, 4, 8])
def test_groups_of_negatives_agree_even_where_a_pair_has_no_candidate(group: int) -> None:
    model = make_model(make_config(group=group))
    batch = make_batch(equal_images=((0, 1), (2, 5)), equal_texts=((4, 6),))
    _, _, valid = negatives_of(model, batch)
    assert bool(valid.all()) == (group > 2)
    assert_agrees(model, batch)


@pytest.mark.parametrize("kind", ["l1", "mse", "l1+mse"])
@pytest.mark.parametrize("per_patch", [False, True])
def test_every_pixel_loss_agrees(kind: str, per_patch: bool) -> None:
    assert_agrees(make_model(make_config(weights=(1, 0, 0, 0), kind=kind, per_patch=per_patch)), make_batch())


def test_large_cells_and_wholly_masked_images_agree() -> None:
    for mode, insert in MODES:
        config = make_config(mode, insert, (1, 1, 0, 0), cell=32)
        assert_agrees(make_model(config), make_batch(ratios=[1.0] * 8))


def test_the_reference_backend_agrees_too() -> None:
    with use_backend("reference"):
        assert_agrees(make_model(make_config("drop", "decoder")), make_batch((3, 9, 5, 4), ratios=(0.6, 1, 0.6, 0.2)))


def test_the_plain_graph_draws_the_same_negatives_by_itself() -> None:
    model, batch = make_model(make_config()), make_batch()
    given = plain_losses(model, batch, SEED, negatives_of(model, batch))
    drawn = plain_losses(model, batch, SEED)
    assert torch.equal(given["itm"], drawn["itm"])


# ---- the comparison notices what it should -------------------------------------------------------------------------


def shift_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = stage.attention_plan

    def broken(q: Packed, k: Packed, kv_index: Tensor | None = None) -> AttentionPlan:
        return plan(q, k, None if kv_index is None else kv_index.roll(1))

    monkeypatch.setattr(stage, "attention_plan", broken)


def shift_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = mlm.mlm_sets

    def broken(step: Step, context: Any) -> Any:
        step.choices.read.rows[0] -= 1
        return sets(step, context)

    monkeypatch.setattr(mlm, "mlm_sets", broken)


def shift_predicted_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = mim.masked_pixel_loss
    monkeypatch.setattr(mim, "masked_pixel_loss", lambda p, i, rows, *rest: loss(p, i, rows.roll(1), *rest))


def swap_negative_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = itm.draw_negatives

    def broken(step: Step, group: int) -> Any:
        image, text, valid = draw(step, group)
        return image, Draw(text.index.roll(1), group), valid

    monkeypatch.setattr(itm, "draw_negatives", broken)


def forget_inserted_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    insert = model_file.insert_mask_tokens
    monkeypatch.setattr(model_file, "insert_mask_tokens", lambda r, m, token, p: insert(r, m, token, p.roll(1, 0)))


def forget_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    embed = image_encoder.embed_views

    def broken(x: Tensor, positions: Tensor, *rest: Any) -> Packed:
        return embed(x, positions, *rest[:4], ["clean" for _ in rest[4]], *rest[5:])

    monkeypatch.setattr(image_encoder, "embed_views", broken)


def swap_views(monkeypatch: pytest.MonkeyPatch) -> None:
    split = model_file.split_sequences
    monkeypatch.setattr(model_file, "split_sequences", lambda packed, parts: split(packed, parts)[::-1])


def swap_blocks_of_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    split = layers.ContextProjection.split
    monkeypatch.setattr(layers.ContextProjection, "split", lambda self, kv: split(self, kv)[::-1])


def repeat_other_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(rows: Packed, index: Tensor, layout: Packed) -> Packed:
        found = expand(rows, index, layout)
        return found.with_rows(found.rows.roll(1, 0))

    monkeypatch.setattr(stage, "expand", broken)


def absorb_other_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    absorb = layers.SelfAttention.absorb
    monkeypatch.setattr(layers.SelfAttention, "absorb", lambda self, q: absorb(self, q.roll(1, 0)))


def give_values_to_other_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    values = layers.SelfAttention.values
    monkeypatch.setattr(layers.SelfAttention, "values", lambda self, read: values(self, read.roll(1, 0)))


def shift_rows_of_single_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = stage._asked_at_the_end

    def broken(*arguments: Any) -> Any:
        others, single = plan(*arguments)
        return others, single and replace(single, first=single.first - 1, stop=single.stop - 1)

    monkeypatch.setattr(stage, "_asked_at_the_end", broken)


@pytest.mark.parametrize(
    ("breakage", "mode"),
    [
        (swap_views, "replace"),
        (swap_blocks_of_a_context, "replace"),
        (repeat_other_sequences, "replace"),
        (absorb_other_queries, "replace"),
        (give_values_to_other_heads, "replace"),
        (shift_rows_of_single_sequences, "drop"),
        (shift_contexts, "replace"),
        (shift_reads, "replace"),
        (shift_predicted_patches, "replace"),
        (swap_negative_captions, "replace"),
        (forget_inserted_positions, "drop"),
        (forget_masks, "replace"),
    ],
)
def test_a_broken_index_breaks_the_agreement(
    breakage: Callable[[pytest.MonkeyPatch], None], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = make_model(make_config(mode)), make_batch()
    negatives = negatives_of(model, batch)
    assert_agrees(model, batch, negatives)
    breakage(monkeypatch)
    with pytest.raises(AssertionError, match="is not|differs"):
        assert_agrees(model, batch, negatives)
