"""ragged_attention: dense equals reference, in the cases that break attention kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from mvle_kernels import Packed, attention_plan, ragged_attention, use_backend
from torch import Tensor

from .compare import BACKENDS, assert_backends_agree, forget_lengths, layout, random, results

H, E = 2, 4


def attention(q_layout: Packed, k_layout: Packed, kv_index: Tensor | None = None, planned: bool = True) -> object:
    plan = attention_plan(q_layout, k_layout, kv_index) if planned else None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        offsets = q_layout.offsets, k_layout.offsets
        return ragged_attention(q, k, v, *offsets, q_layout.max_length, k_layout.max_length, kv_index, plan=plan)

    return run


def inputs(q_layout: Packed, k_layout: Packed) -> list[Tensor]:
    return [random(n, H, E, seed=i) for i, n in enumerate((q_layout.total, k_layout.total, k_layout.total))]


CASES = {
    "equal lengths": ([5] * 6, [3] * 6, None),
    "one sequence": ([4], [7], None),
    "ragged": ([3, 1, 4, 1, 5], [2, 6, 5, 3, 5], None),
    "ragged queries, equal contexts": ([3, 1, 4, 1, 5], [4] * 5, None),
    "runs of equal lengths among ragged ones": ([9] * 6 + [2, 5, 3] + [4] * 5, [4] * 6 + [1, 0, 3] + [6] * 5, None),
    "equal queries with empty contexts": ([4] * 4, [2, 0, 3, 0], None),
    "all contexts empty": ([4, 2], [0, 0], None),
    "empty queries": ([0, 3, 0, 2, 0], [2, 1, 4, 0, 3], None),
    "all queries empty": ([0, 0], [3, 1], None),
    "hubs": ([3, 1, 4, 2, 2, 6], [2, 5, 3], [1, 1, 1, 0, 1, 1]),
    "hubs over equal contexts": ([3] * 7, [4] * 3, [2, 2, 0, 2, 2, 2, 0]),
    "hubs and an empty context": ([3, 2, 4, 1], [0, 5], [0, 1, 0, 1]),
    "contexts that nobody reads": ([2, 3], [4, 1, 5, 2], [2, 0]),
    "cut queries over shared contexts": ([7] * 8 + [1, 2, 3, 4] + [5] * 8, [3, 0, 6], [0, 1, 2, 2] * 5),
}


@pytest.mark.parametrize("tail", [0, 5])
@pytest.mark.parametrize("known", ["lengths known", "lengths unknown", "no plan"])
@pytest.mark.parametrize("case", CASES)
def test_dense_equals_reference(case: str, known: str, tail: int) -> None:
    q_lengths, k_lengths, index = CASES[case]
    q, k = layout(q_lengths, tail=tail), layout(k_lengths, tail=tail)
    if known == "lengths unknown":
        q, k = forget_lengths(q, q.max_length + 2), forget_lengths(k, k.max_length + 1)
    kv_index = None if index is None else torch.tensor(index, dtype=torch.int32)
    assert_backends_agree(attention(q, k, kv_index, known != "no plan"), inputs(q, k))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_gets_the_formula_of_the_docstring(backend: str) -> None:
    q, k = layout([3, 2]), layout([4, 5])
    values = inputs(q, k)
    with use_backend(backend):
        out = attention(q, k, torch.tensor([1, 1]))(*values)
    for h in range(H):
        scores = values[0][3:5, h] @ values[1][4:9, h].T / math.sqrt(E)
        expected = scores.exp() / scores.exp().sum(1, keepdim=True) @ values[2][4:9, h]
        assert torch.allclose(out[3:5, h], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("known", [True, False])
def test_tails_and_empty_contexts_are_zero_forward_and_backward(backend: str, known: bool) -> None:
    q, k = layout([3, 2, 4], tail=4), layout([2, 0, 3], tail=6)
    if not known:
        q, k = forget_lengths(q), forget_lengths(k)
    values = inputs(q, k)
    for value, rows in zip(values, (9, 5, 5), strict=True):
        value[rows:] = float("nan")  # what lies in a tail must not matter either
    out, grads = results(attention(q, k), values, backend)
    assert not out[9:].any() and not out[3:5].any()
    assert out[:3].all() and out[5:9].all()
    assert all(not g[n:].any() for g, n in zip(grads, (9, 5, 5), strict=True))
    assert not grads[0][3:5].any()


@pytest.mark.parametrize("known", [True, False])
def test_strided_inputs_cut_from_one_product_are_taken_as_they_are(known: bool) -> None:
    rows = layout([5, 3, 3, 1], 8)
    rows = rows if known else forget_lengths(rows)
    run = attention(rows, rows)

    def fused(qkv: Tensor) -> Tensor:
        q, k, v = (x.unflatten(1, (H, E)) for x in qkv.split(H * E, 1))
        assert not q.is_contiguous()
        return run(q, k, v)

    assert_backends_agree(fused, [random(rows.total, 3 * H * E)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("q_lengths", "k_lengths"),
    [
        ([3, 3, 3, 3], [2, 2, 2, 2]),
        ([3, 1, 4, 2], [2, 5, 3, 4]),
        ([3, 1, 4, 2], [2, 0, 3, 4]),
        ([3, 0, 4, 2], [2, 3, 3, 4]),
        ([0, 0, 4, 2], [2, 0, 3, 0]),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_a_sequence_that_is_not_finite_reaches_no_other(
    q_lengths: Sequence[int], k_lengths: Sequence[int], backend: str, known: bool
) -> None:
    q, k = layout(q_lengths), layout(k_lengths)
    q_ends, k_ends = q.offsets.tolist(), k.offsets.tolist()
    if not known:
        q, k = forget_lengths(q), forget_lengths(k)
    values = inputs(q, k)
    clean, clean_grads = results(attention(q, k), values, backend)
    values[0][q_ends[2]] = float("nan")
    values[1][k_ends[2]] = float("inf")
    values[2][k_ends[2]] = float("nan")
    out, grads = results(attention(q, k), values, backend)
    assert out[q_ends[2] : q_ends[3]].isnan().any()
    for got, expected, ends in ((out, clean, q_ends), *zip(grads, clean_grads, (q_ends, k_ends, k_ends), strict=True)):
        others = torch.tensor([not ends[2] <= row < ends[3] for row in range(len(got))])
        assert torch.equal(got[others], expected[others])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_context_gives_zeros_whatever_the_query(backend: str) -> None:
    q, k = layout([2, 3]), layout([0, 2])
    values = inputs(q, k)
    values[0][:2] = float("nan")
    out, grads = results(attention(q, k), values, backend)
    assert not out[:2].any() and out[2:].all()
    assert all(bool(g.isfinite().all()) for g in (out, grads[1], grads[2]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", [None, [1, 1, 0]])
def test_gradients_match_finite_differences(backend: str, index: list[int] | None) -> None:
    q, k = layout([2, 1, 3], 4), layout([2, 0, 1] if index is None else [1, 3], 4)
    kv_index = None if index is None else torch.tensor(index)
    leaves = [x.requires_grad_() for x in inputs(q, k)]
    with use_backend(backend):
        assert torch.autograd.gradcheck(attention(q, k, kv_index), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_keep_their_dtype_and_stay_near(dtype: torch.dtype) -> None:
    q, k = layout([3, 1, 4]), layout([2, 6, 0])
    exact = attention(q, k)(*inputs(q, k))
    for backend in BACKENDS:
        with use_backend(backend):
            out = attention(q, k)(*[x.to(dtype) for x in inputs(q, k)])
        assert out.dtype == dtype
        assert (out - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()


def test_repeated_calls_are_bitwise_equal() -> None:
    q, k = layout([3, 1, 4, 2, 2, 6]), layout([2, 5, 3])
    run = attention(q, k, torch.tensor([1, 1, 1, 0, 1, 1]))
    first, again = results(run, inputs(q, k), "dense"), results(run, inputs(q, k), "dense")
    assert torch.equal(first[0], again[0]) and all(map(torch.equal, first[1], again[1]))


def test_what_does_not_fit_is_refused_with_the_shapes() -> None:
    q, k = layout([2, 1]), layout([2])
    values = [random(3, H, E), random(2, H, E), random(2, H, E)]
    with pytest.raises(ValueError, match="2 query and 1 key sequences"):
        attention(q, k)(*values)
    with pytest.raises(ValueError, match="same H and E"):
        ragged_attention(values[0], random(2, H, E + 1), random(2, H, E + 1), q.offsets, k.offsets, 2, 2)
    with pytest.raises(ValueError, match="share a dtype"):
        ragged_attention(values[0], values[1].float(), values[2], q.offsets, k.offsets, 2, 2)
    plan = attention_plan(q, q)
    with pytest.raises(ValueError, match="plan was made for 3 query and 3 key rows; got 3 and 2"):
        ragged_attention(*values, q.offsets, k.offsets, 2, 2, plan=plan)


@pytest.mark.parametrize("case", CASES)
def test_a_plan_that_was_evaluated_with_first_is_trained_with_later(case: str) -> None:
    q_lengths, k_lengths, index = CASES[case]
    q, k = layout(q_lengths, tail=2), layout(k_lengths, tail=2)
    run = attention(q, k, None if index is None else torch.tensor(index))
    values = [x.float() for x in inputs(q, k)]  # in float64 SDPA keeps a copy of what the plan keeps
    with torch.inference_mode(), use_backend("dense"):
        run(*values)
    assert_backends_agree(run, values, 1e-5)
