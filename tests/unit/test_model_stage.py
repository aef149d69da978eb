"""A stage answers every query set as if it were the only one, whatever else shares the call."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from mvle_kernels import Packed

from mvle.model.queries import Draw, QuerySet, View
from mvle.model.step import Step

from ..helpers import make_batch, make_config, make_model

LENGTHS = (3, 7, 5, 4)
OTHERS = Draw(torch.tensor([1, 0, 3, 3], dtype=torch.int32), 4)


def positions(*lists: list[int]) -> Packed:
    layout = Packed.layout_of([len(p) for p in lists], 8)
    rows = torch.tensor([n for p in lists for n in p], dtype=torch.int32)
    return layout.with_rows(torch.cat([rows, rows.new_zeros(layout.total - len(rows))]))


def questions() -> list[QuerySet]:
    """Sets of one stage that differ in source, context, reads and repetition. The one whose lengths only the device
    knows comes last, as `plan_stage` asks."""
    masked, clean = View.TEXT_MASKED, View.TEXT_CLEAN
    read = positions([1], [1, 3, 5], [], [2])
    return [
        QuerySet("whole", "text_cross", clean, View.IMAGE_CLEAN),
        QuerySet("words", "text_cross", masked, View.IMAGE_CLEAN, read=read),
        QuerySet("other context", "text_cross", masked, View.IMAGE_MASKED, read=read),
        QuerySet("global", "text_cross", clean, View.IMAGE_MASKED, read="global"),
        QuerySet(
            "other image",
            "text_cross",
            clean,
            View.IMAGE_CLEAN,
            expand=(None, None),
            kv_index=(OTHERS, None),
            read="global",
        ),
        QuerySet(
            "other text",
            "text_cross",
            clean,
            View.IMAGE_MASKED,
            expand=(None, OTHERS),
            kv_index=(OTHERS, None),
            read="global",
        ),
    ]


@pytest.mark.parametrize("mode", ["replace", "drop"])
@pytest.mark.parametrize("cross_depth", [1, 2, 3])
@torch.no_grad()
def test_sets_asked_together_get_the_rows_of_sets_asked_alone(cross_depth: int, mode: str) -> None:
    model, batch = make_model(make_config(mode, cross_depth=cross_depth)), make_batch(LENGTHS)
    views = frozenset(View)
    step = Step(batch, 0, 16, model.choose(batch, 0, views))
    model.encode(step, views)
    alone = {s.name: model.ask(step, [s])[s.name] for s in questions()}
    for size in (2, 3, 6):
        for sets in combinations(questions(), size):
            together = model.ask(step, sets)
            assert set(together) == {s.name for s in sets}
            for name, rows in together.items():
                assert rows.lengths == alone[name].lengths
                assert torch.allclose(rows.rows, alone[name].rows, rtol=1e-10, atol=1e-12), (name, sets)


@torch.no_grad()
def test_reads_are_rows_of_the_whole_answer() -> None:
    model, batch = make_model(make_config()), make_batch(LENGTHS)
    views = frozenset(View)
    step = Step(batch, 0, 16, model.choose(batch, 0, views))
    model.encode(step, views)
    source, context = View.TEXT_CLEAN, View.IMAGE_CLEAN
    lists = ([2, 0], [], [4], [1, 2, 3])
    whole = model.ask(step, [QuerySet("all", "text_cross", source, context)])["all"].unpack()
    some = model.ask(step, [QuerySet("some", "text_cross", source, context, read=positions(*lists))])["some"]
    first = model.ask(step, [QuerySet("first", "text_cross", source, context, read="global")])["first"]
    for rows, part, wanted, one in zip(whole, some.unpack(), lists, first.unpack(), strict=True):
        assert torch.allclose(part, rows[wanted], rtol=1e-10, atol=1e-12)
        assert torch.allclose(one, rows[:1], rtol=1e-10, atol=1e-12)
    assert some.total == 8 and not some.rows[6:].any()


@torch.no_grad()
def test_repeated_sequences_read_the_contexts_that_kv_index_names() -> None:
    model, batch = make_model(make_config()), make_batch(LENGTHS)
    step = Step(batch, 0, 16, model.choose(batch, 0, frozenset()))
    model.encode(step, frozenset({View.TEXT_CLEAN, View.IMAGE_CLEAN}))
    source, context = View.TEXT_CLEAN, View.IMAGE_CLEAN
    rows = model.ask(
        step,
        [QuerySet("q", "text_cross", source, context, expand=(None, OTHERS), kv_index=(OTHERS, None), read="global")],
    )["q"].rows
    texts, images = step.views[source].unpack(), step.views[context].unpack()
    other = OTHERS.index.tolist()
    asked = [(t, i) for t, i in enumerate(other)] + [(t, i) for i, t in enumerate(other)]
    for row, (t, i) in zip(rows, asked, strict=True):
        alone = Step(batch, 0, 1, step.choices)
        alone.views = {source: Packed.of([texts[t]]), context: Packed.of([images[i]])}
        expected = model.ask(alone, [QuerySet("one", "text_cross", source, context, read="global")])["one"].rows[0]
        assert torch.allclose(row, expected, rtol=1e-10, atol=1e-12)


def test_a_set_that_cannot_be_answered_is_refused() -> None:
    source, context = View.TEXT_CLEAN, View.IMAGE_CLEAN
    with pytest.raises(ValueError, match="same number of parts; got 2 and 1"):
        QuerySet("uneven", "text_cross", source, context, expand=(None, OTHERS))
    with pytest.raises(ValueError, match="cannot repeat its sequences"):
        QuerySet(
            "both", "text_cross", source, context, expand=(None, None), kv_index=(None, None), read=positions([0], [0])
        )
    model, batch = make_model(make_config()), make_batch(LENGTHS)
    step = Step(batch, 0, 16, model.choose(batch, 0, frozenset()))
    model.encode(step, frozenset({source, context}))
    with pytest.raises(ValueError, match="set late reads all rows of sequences whose lengths only the device knows"):
        model.ask(step, [QuerySet("late", "text_cross", source, context, expand=(OTHERS,))])
