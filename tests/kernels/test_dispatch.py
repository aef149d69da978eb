"""Which backend a call takes, who may demand another, and what `explain` says of it."""

from __future__ import annotations

import pytest
import torch
from mvle_kernels import expand, explain, patchify, ragged_attention, set_backend, use_backend
from mvle_kernels.dispatch import OPS, Op

from .compare import layout, random


@pytest.fixture(autouse=True)
def no_demands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MVLE_BACKEND", raising=False)
    set_backend(None)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Op:
    """An op of three backends: one that takes positive numbers alone, one that takes any, one that only few want."""
    monkeypatch.setattr("mvle_kernels.dispatch.OPS", dict(OPS))
    op = Op("toy")
    op.register("picky", "the fastest", lambda x: None if x > 0 else f"needs a positive number, got {x}")(
        lambda x: "picky"
    )
    op.register("plain", "takes anything")(lambda x: "plain")
    op.register("spare", "last resort")(lambda x: "spare")
    return op


def test_the_first_backend_that_does_not_refuse_is_taken(toy: Op) -> None:
    assert toy(1) == "picky" and toy(-1) == "plain"


def test_the_reasons_name_the_chosen_backend_and_why_each_other_was_not(toy: Op) -> None:
    chosen, reasons = toy.judge(-1)
    assert chosen.name == "plain"
    assert reasons == [
        ("picky", "refused: needs a positive number, got -1"),
        ("plain", "chosen: takes anything"),
        ("spare", "not needed: plain comes first"),
    ]


def test_a_config_key_comes_before_the_environment_and_that_before_the_choice(
    toy: Op, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MVLE_BACKEND", "reference")
    q = layout([2])
    values = [random(2, 1, 4)] * 3
    call = (ragged_attention, *values, layout_plan(q))
    assert "reference chosen: MVLE_BACKEND demands it" in explain(*call)
    assert "dense refused: MVLE_BACKEND demands reference" in explain(*call)
    with use_backend("dense"):
        assert "dense chosen: kernels.backend demands it" in explain(*call)
    assert "reference chosen" in explain(*call)
    monkeypatch.setenv("MVLE_BACKEND", "spare")
    assert toy(1) == "spare"
    monkeypatch.delenv("MVLE_BACKEND")
    assert toy(1) == "picky"
    assert "dense chosen: equal lengths as one batch" in explain(*call)


def test_a_config_key_wins_for_the_ops_that_it_names_and_leaves_the_others_to_the_environment(
    toy: Op, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = (ragged_attention, *[random(2, 1, 4)] * 3, layout_plan(layout([2])))
    monkeypatch.setenv("MVLE_BACKEND", "toy=spare,ragged_attention=reference")
    with use_backend("ragged_attention=dense"):
        assert "dense chosen: kernels.backend demands it" in explain(*call)
        assert toy(1) == "spare" and "MVLE_BACKEND demands spare" in explain("toy")
    with use_backend("toy=plain"):
        assert "reference chosen: MVLE_BACKEND demands it" in explain(*call) and toy(1) == "plain"
    monkeypatch.setenv("MVLE_BACKEND", "reference|spare")
    with use_backend("plain"):  # of all ops that have it: attention does not
        assert toy(1) == "plain" and "reference chosen: MVLE_BACKEND demands it" in explain(*call)
    with use_backend("ragged_attention=dense"):
        assert toy(1) == "spare" and "dense chosen: kernels.backend demands it" in explain(*call)


def layout_plan(q: object) -> object:
    from mvle_kernels import attention_plan

    return attention_plan(q, q)


def test_a_demand_that_cannot_be_met_is_an_error(toy: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MVLE_BACKEND", "picky")
    with pytest.raises(ValueError, match="no backend of toy takes these arguments: picky: refused: needs a positive"):
        toy(-1)
    monkeypatch.setenv("MVLE_BACKEND", "imaginary")
    with pytest.raises(ValueError, match="MVLE_BACKEND must be auto or one of .*'picky'.*; got 'imaginary'"):
        toy(1)
    with pytest.raises(ValueError, match="MVLE_BACKEND must be auto or one of .*; got 'imaginary'"):
        patchify(torch.zeros(1, 4, 4, 3, dtype=torch.uint8), 4, (0, 0, 0), (1, 1, 1))
    with pytest.raises(ValueError, match=r"kernels.backend must be auto or one of .*'dense'.*; got 'cuda-9'"):
        set_backend("cuda-9")


def test_a_demand_of_all_reaches_those_that_have_the_backend_and_one_of_an_op_that_op_alone(toy: Op) -> None:
    q = layout([2])
    call = (ragged_attention, *[random(2, 1, 4)] * 3, layout_plan(q))
    with use_backend("spare"):
        assert toy(1) == "spare" and "dense chosen: equal lengths" in explain(*call)
    with use_backend("spare|plain"):
        assert toy(1) == "spare"
    with use_backend("picky|plain,ragged_attention=reference|dense"):
        assert toy(1) == "picky" and toy(-1) == "plain" and "reference chosen" in explain(*call)
        assert toy.judge(-1)[1][2] == ("spare", "refused: kernels.backend demands picky|plain")
    with pytest.raises(ValueError, match=r"names all ops twice in 'picky,plain'; write a\|b for either"):
        set_backend("picky,plain")
    with use_backend("toy=plain, ragged_attention=reference"):
        assert toy(1) == "plain" and "reference chosen: kernels.backend demands it" in explain(*call)
        assert "kernels.backend demands" not in explain("patchify")
    with pytest.raises(ValueError, match=r"kernels.backend demands a backend of op 'attention'; the ops are \['add_n"):
        set_backend("attention=dense")
    with pytest.raises(ValueError, match=r"must be auto or one of \['picky', 'plain', 'spare'\] for toy, .* got"):
        set_backend("toy=dense")


def test_a_backend_that_waits_for_a_demand_is_not_taken_of_itself(toy: Op) -> None:
    toy.register("shy", "comes if called", unasked=lambda x: "waits to be called")(lambda x: "shy")
    toy.backends.insert(0, toy.backends.pop())
    assert toy(1) == "picky" and toy.judge(1)[1][0] == ("shy", "not asked: waits to be called")
    with use_backend("shy"):
        assert toy(1) == "shy"


def test_auto_and_none_lift_a_demand(toy: Op) -> None:
    for lifted in ("auto", None):
        set_backend("plain")
        assert toy(1) == "plain"
        set_backend(lifted)
        assert toy(1) == "picky"


def test_a_demand_of_a_with_block_ends_with_it_even_after_an_error(toy: Op) -> None:
    set_backend("plain")
    with pytest.raises(RuntimeError), use_backend("spare"):
        assert toy(1) == "spare"
        raise RuntimeError
    assert toy(1) == "plain"
    set_backend(None)


def test_every_op_has_both_plain_backends_behind_those_of_a_gpu() -> None:
    assert sorted(OPS) == [
        *("add_norm", "contrastive_loss", "embed_views", "expand", "feed_forward", "insert_mask_tokens"),
        *("masked_pixel_loss", "masked_token_loss", "patchify", "ragged_attention"),
    ]
    for op in OPS.values():
        assert [b.name for b in op.backends][-2:] == ["dense", "reference"]
        assert explain(op.name) == f"{op.name}: " + " > ".join(f"{b.name} ({b.why})" for b in op.backends)


def test_explain_without_an_op_has_a_line_for_each_and_refuses_unknown_ones() -> None:
    assert [line.split(":")[0] for line in explain().splitlines()] == sorted(OPS)
    with use_backend("reference"):
        assert all(line.endswith("kernels.backend demands reference") for line in explain().splitlines())
    with pytest.raises(ValueError, match="unknown op 'attention'"):
        explain("attention")


def test_a_demand_reaches_the_public_functions() -> None:
    rows = layout([2, 1]).with_rows(random(3, 2))
    seen = []
    original = OPS["expand"].backends[-1]
    assert original.name == "reference"
    spy = type(original)("reference", lambda *a: seen.append("called") or original.run(*a), original.refuse, "a spy")
    OPS["expand"].backends[-1] = spy
    try:
        with use_backend("reference"):
            expand(rows, torch.tensor([1]))
        expand(rows, torch.tensor([1]))
    finally:
        OPS["expand"].backends[-1] = original
    assert seen == ["called"]
